"""API keys: who gets in, who does not, and that nobody learns why."""

import base64
import hmac
import logging
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from service.errors import Forbidden, SettingsError, Unauthenticated
from service.key_file import create_key, read_key_file
from service.keys import (
    MAX_PRESENTED_CHARS,
    Caller,
    KeyRing,
    anonymous,
    anonymous_scopes,
    exposed_without_keys,
    identify,
    presented_key,
)
from service.settings import Scope, Settings
from tests.service.key_files import make

SCOPES: tuple[Scope, ...] = ("classify", "similar", "pools:write", "review", "metrics", "admin")
SOON = datetime.now(UTC) + timedelta(days=1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> KeyRing:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    for name in "abc":
        make(path, name, SCOPES)
    return KeyRing.load(path)


def refusal(ring: KeyRing, presented: str | None) -> str:
    with pytest.raises(Unauthenticated) as caught:
        ring.authenticate(presented)
    return str(caught.value)


# --- authentication --------------------------------------------------------------------------------------------------


def test_a_key_is_who_it_says(path: Path) -> None:
    key, record = create_key(path, "the uploader", ("classify", "similar", "classify"), "5/second", SOON)
    make(path, "another")
    ring = KeyRing.load(path)
    assert ring.authenticate(key) == Caller(record.id, "the uploader", frozenset({"classify", "similar"}), "5/second")
    assert key.startswith(f"hlk_{record.id}_")
    assert len(key) <= MAX_PRESENTED_CHARS
    assert len(ring) == 2


def test_every_refusal_has_the_same_words(path: Path) -> None:
    known, other = make(path), make(path, "b")
    texts = (
        "",
        "hlk_000000000000_" + "A" * 43,
        known[:-1],
        known[:17] + other[17:],
        "x" * 10_000,
        make(path, "late", expires_at="2020-01-01T00:00:00Z"),
        make(path, "gone", revoked_at="2020-01-01T00:00:00Z"),
    )
    ring = KeyRing.load(path)
    assert len({refusal(ring, text) for text in texts}) == 1


def test_no_key_is_told_how_to_send_one(path: Path) -> None:
    make(path)
    assert "X-API-Key" in refusal(KeyRing.load(path), None)


def test_without_a_file_every_key_is_refused(path: Path) -> None:
    key = make(path)
    assert "unknown" in refusal(KeyRing(None), key)
    assert not KeyRing(None).reload_if_changed()


def test_a_key_expires_at_its_time(path: Path) -> None:
    now = [SOON - timedelta(seconds=1)]
    key, _ = create_key(path, "a", ("classify",), None, SOON)
    ring = KeyRing(path, clock=lambda: now[0])
    assert ring.authenticate(key).name == "a"
    now[0] = SOON
    refusal(ring, key)


@given(st.one_of(st.text(), st.text("hlk_0123456789abcdef", max_size=80), st.from_regex(r"hlk_[0-9a-f]{12}_[\w-]{43}")))
def test_no_other_text_is_a_key(ring: KeyRing, text: str) -> None:
    refusal(ring, text)


def test_no_key_with_one_character_changed_is_a_key(path: Path) -> None:
    key = make(path)
    ring = KeyRing.load(path)
    for at, char in enumerate(key):
        for other in "Aa0-_ \0é\ud800":
            if other != char:
                refusal(ring, key[:at] + other + key[at + 1 :])
        refusal(ring, key[:at] + key[at + 1 :])
        refusal(ring, key[:at] + char + key[at:])
    assert ring.authenticate(key)


def test_digests_are_compared_in_constant_time_whatever_is_presented(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {
        "right": make(path),
        "expired": make(path, expires_at="2020-01-01T00:00:00Z"),
        "revoked": make(path, revoked_at="2020-01-01T00:00:00Z"),
    }
    keys |= {
        "wrong secret": keys["right"][:-1] + ("A" if keys["right"][-1] != "A" else "B"),
        "unknown": "hlk_000000000000_" + "A" * 43,
        "no key": "Basic",
        "too long": "x" * (MAX_PRESENTED_CHARS + 1),
        "empty": "",
    }
    ring = KeyRing.load(path)
    compared: list[tuple[str, str]] = []

    def counted(a: str, b: str) -> bool:
        compared.append((a, b))
        return real(a, b)

    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", counted)
    for name, text in keys.items():
        compared.clear()
        try:
            ring.authenticate(text)
        except Unauthenticated:
            assert name != "right"
        assert [tuple(map(len, pair)) for pair in compared] == [(64, 64)], name


def test_nothing_of_a_secret_is_logged_or_shown(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    key = make(path)
    secret = key[17:]
    seen = [repr(KeyRing.load(path).authenticate(key)), repr(read_key_file(path)), repr(KeyRing.load(path))]
    revoked = make(path, "b", revoked_at="2020-01-01T00:00:00Z")
    ring = KeyRing.load(path)
    attempts = (key[:-1] + "!", revoked, f"hlk_{secret}", secret, f"hlk_000000000000_{secret}", key + key)
    seen += [refusal(ring, text) for text in attempts]
    path.write_text(path.read_text().replace(read_key_file(path)[0].keys[0].sha256, key))
    assert not ring.reload_if_changed()
    with pytest.raises(SettingsError) as caught:
        KeyRing.load(path)
    assert "keys.0.sha256" in str(caught.value)
    seen += [str(caught.value), repr(caught.value.__cause__)]
    seen += [f"{record.getMessage()} {vars(record)}" for record in caplog.records]
    assert len(caplog.records) >= len(attempts)
    text = "\n".join(seen)
    pieces = {part[at : at + 8] for part in (secret, revoked[17:]) for at in range(len(part) - 7)}
    assert [piece for piece in pieces if piece in text] == []


def test_the_log_says_why(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    key = make(path)
    revoked = make(path, "b", revoked_at="2020-01-01T00:00:00Z")
    ring = KeyRing.load(path)
    for text in (key[:-1] + ("A" if key[-1] != "A" else "B"), revoked, "hlk_000000000000_" + "A" * 43):
        refusal(ring, text)
    messages = [(r.getMessage().split(": ")[1], vars(r)["fields"]["key"]) for r in caplog.records]
    assert messages == [("wrong secret", key[4:16]), ("revoked", revoked[4:16]), ("unknown", None)]


# --- scopes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", SCOPES)
@pytest.mark.parametrize("asked", SCOPES)
def test_the_whole_table_of_scopes(path: Path, held: Scope, asked: Scope) -> None:
    key = make(path, scopes=(held,))
    caller = KeyRing.load(path).authenticate(key)
    caller.require_any()
    if asked == held or held == "admin":
        caller.require(asked)
    else:
        with pytest.raises(Forbidden) as caught:
            caller.require(asked)
        assert caught.value.scope == asked


def test_who_has_no_key_is_asked_for_one_instead() -> None:
    caller = anonymous("192.0.2.1", frozenset({"classify"}))
    caller.require("classify")
    caller.require_any()
    with pytest.raises(Unauthenticated, match="X-API-Key"):
        caller.require("similar")
    with pytest.raises(Unauthenticated):
        anonymous("192.0.2.1", frozenset()).require_any()


@pytest.mark.parametrize(
    ("changes", "scopes"),
    [
        ({}, {"classify", "similar", "metrics"}),
        ({"keys_file": "keys.json"}, set()),
        ({"keys_file": "keys.json", "anonymous_scopes": "classify"}, {"classify"}),
        ({"anonymous_scopes": ""}, set()),
        ({"anonymous_scopes": "metrics, review"}, {"metrics", "review"}),
    ],
)
def test_what_callers_without_a_key_may_do(changes: dict[str, Any], scopes: set[str]) -> None:
    assert anonymous_scopes(Settings(**changes)) == scopes


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("192.0.2.1", "anonymous:192.0.2.1"),
        ("::ffff:192.0.2.1", "anonymous:192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "anonymous:2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "anonymous:2001:db8:1:2::/64"),
        ("fe80::1%eth0", "anonymous:fe80::/64"),
        ("::1", "anonymous:::/64"),
        (None, "anonymous:unknown"),
        ("testclient", "anonymous:unknown"),
    ],
)
def test_callers_without_a_key_are_known_by_address(host: str | None, name: str) -> None:
    caller = anonymous(host, frozenset())
    assert caller.id == name
    assert caller.anonymous


# --- requests --------------------------------------------------------------------------------------------------------


def basic(user: str, password: str | None = None) -> str:
    """The header that a URL with a user's name and a password makes."""
    text = user if password is None else f"{user}:{password}"
    return f"Basic {base64.b64encode(text.encode()).decode()}"


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ([], None),
        ([("authorization", "Bearer k")], "k"),
        ([("Authorization", "bearer  k ")], "k"),
        ([("x-api-key", "k")], "k"),
        ([("x-api-key", "k"), ("authorization", "Bearer k")], "k"),
        ([("x-api-key", "k"), ("authorization", "Basic dTpw")], "k"),
        ([("x-api-key", "")], ""),
        ([("authorization", "Bearer")], ""),
        ([("authorization", basic("pict-rs", "k"))], "k"),
        ([("authorization", basic("k", ""))], "k"),
        ([("authorization", basic("k"))], "k"),
        ([("authorization", basic("", "k"))], "k"),
        ([("authorization", basic("u", "k:x"))], "k:x"),
        ([("authorization", basic("u", "k").replace("Basic", "basic "))], "k"),
        ([("authorization", basic("", ""))], ""),
        ([("authorization", "Basic")], ""),
        ([("authorization", basic("u", "k")), ("authorization", "Bearer k")], "k"),
        ([("x-api-key", "k"), ("authorization", "Basic !")], "k"),
    ],
)
def test_where_a_key_is_read_from(headers: list[tuple[str, str]], key: str | None) -> None:
    assert presented_key(Headers(raw=[(n.lower().encode(), v.encode()) for n, v in headers])) == key


def test_a_key_in_a_url_is_a_key_like_others(path: Path) -> None:
    key = make(path)
    ring = KeyRing.load(path)
    for header in (basic(key), basic(key, ""), basic("pict-rs", key)):
        assert identify(ring, Headers({"authorization": header}), "192.0.2.1", frozenset()).scopes == {"classify"}
    for header in (basic("pict-rs", key[:-1] + "!"), basic(key, "x"), basic("", ""), basic(key * 3)):
        with pytest.raises(Unauthenticated):
            identify(ring, Headers({"authorization": header}), "192.0.2.1", frozenset({"classify"}))


def test_nothing_of_malformed_credentials_is_shown(path: Path) -> None:
    key = make(path)
    with pytest.raises(Unauthenticated) as caught:
        presented_key(Headers({"authorization": f"Basic {key}"}))
    shown = f"{caught.value!r} {caught.value} {caught.value.__cause__!r} {vars(caught.value)}"
    assert key[17:25] not in shown
    assert caught.value.__suppress_context__


@given(st.text(), st.text())
def test_any_basic_credentials_are_read_or_refused(user: str, password: str) -> None:
    try:
        header = basic(user, password)
    except UnicodeEncodeError:
        return  # a lone surrogate, which nobody can send
    found = presented_key(Headers({"authorization": header}))
    text = f"{user}:{password}".encode().decode("latin-1")
    first, _, rest = text.partition(":")
    assert found == (rest or first)


@pytest.mark.parametrize(
    "headers",
    [
        [("x-api-key", "k"), ("authorization", "Bearer other")],
        [("x-api-key", "k"), ("x-api-key", "other")],
        [("authorization", "Bearer k"), ("authorization", "Bearer other")],
        [("x-api-key", "k"), ("authorization", "Bearer")],
        [("authorization", "Digest k")],
        [("authorization", "Basic !")],
        [("authorization", "Basic aGxrX\xe9")],
        [("authorization", basic("u", "k")), ("authorization", "Bearer other")],
        [("authorization", basic("u", "k")), ("authorization", basic("u", "other"))],
        [("authorization", "")],
    ],
)
def test_contradictions_are_refused(headers: list[tuple[str, str]]) -> None:
    with pytest.raises(Unauthenticated):
        presented_key(Headers(raw=[(n.encode(), v.encode()) for n, v in headers]))


def test_a_bad_key_is_refused_even_where_none_is_needed(path: Path) -> None:
    key = make(path)
    ring = KeyRing.load(path)
    scopes: frozenset[Scope] = frozenset({"similar"})
    assert identify(ring, Headers({}), "192.0.2.1", scopes) == anonymous("192.0.2.1", scopes)
    assert identify(ring, Headers({"x-api-key": key}), "192.0.2.1", scopes).scopes == {"classify"}
    for bad in ("", key[:-1], "k"):
        with pytest.raises(Unauthenticated):
            identify(ring, Headers({"x-api-key": bad}), "192.0.2.1", scopes)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert exposed_without_keys(Settings(host=host)) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1", "example.org"])
def test_other_addresses_need_keys_or_a_word(host: str) -> None:
    reason = exposed_without_keys(Settings(host=host))
    assert reason is not None
    assert "HARDLOOK_KEYS_FILE" in reason
    assert "HARDLOOK_ANONYMOUS_SCOPES" in reason
    assert exposed_without_keys(Settings(host=host, keys_file=Path("k"))) is None
    assert exposed_without_keys(Settings(host=host, anonymous_scopes=())) is None


def test_who_has_shown_a_key_before_is_found_by_its_id(path: Path) -> None:
    key = make(path, "a", ("classify",))
    expired = make(path, "b", ("classify",), expires_at="2020-01-01T00:00:00Z")
    ring = KeyRing.load(path)
    assert ring.caller_of(key.split("_")[1]) == ring.authenticate(key)
    assert ring.caller_of(expired.split("_")[1]) is None
    assert ring.caller_of("0" * 12) is None


def test_a_slow_look_does_not_bring_old_keys_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(path, "a")
    ring = KeyRing.load(path)
    make(path, "b")
    has_read, may_go_on = threading.Event(), threading.Event()

    def slowly(file: Path) -> Any:
        found = read_key_file(file)
        if not has_read.is_set():  # the first look
            has_read.set()
            may_go_on.wait(10)
        return found

    monkeypatch.setattr("service.keys.read_key_file", slowly)
    looks = [threading.Thread(target=ring.reload_if_changed) for _ in range(2)]
    looks[0].start()
    assert has_read.wait(10)
    newest = make(path, "c")
    looks[1].start()
    looks[1].join(0.2)  # without the lock it is through by now
    may_go_on.set()
    for look in looks:
        look.join()
    assert ring.authenticate(newest).name == "c"
