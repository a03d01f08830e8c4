"""Sessions: which cookies are of one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.console.sessions import Session, Sessions

SECRET = bytes(range(32))
KEY_ID = "0123456789ab"


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize("key_id", [KEY_ID, None])
def test_a_cookie_is_read_as_its_session(key_id: str | None) -> None:
    sessions = Sessions(SECRET, 60)
    session = sessions.open(key_id)
    assert sessions.read(sessions.cookie(session)) == session
    assert session.key_id == key_id


def test_sessions_are_different() -> None:
    sessions = Sessions(SECRET, 60)
    assert len({sessions.open(KEY_ID).id for _ in range(100)}) == 100


def test_a_session_ends_by_its_age() -> None:
    clock = Clock()
    sessions = Sessions(SECRET, 60, clock)
    cookie = sessions.cookie(sessions.open(KEY_ID))
    clock.now_s += 59
    assert sessions.read(cookie) is not None
    clock.now_s += 1
    assert sessions.read(cookie) is None


def test_a_session_from_the_future_is_none() -> None:
    clock = Clock()
    sessions = Sessions(SECRET, 60, clock)
    cookie = sessions.cookie(Session("a" * 22, KEY_ID, int(clock.now_s) + 2))
    assert sessions.read(cookie) is None


def test_a_closed_session_is_none_and_others_stay() -> None:
    sessions = Sessions(SECRET, 60)
    closed, other = sessions.open(KEY_ID), sessions.open(KEY_ID)
    sessions.close(closed)
    assert sessions.read(sessions.cookie(closed)) is None
    assert sessions.read(sessions.cookie(other)) == other


def test_what_closed_is_forgotten_when_it_could_not_be_used_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.console.sessions._MOST_CLOSED", 3)
    clock = Clock()
    sessions = Sessions(SECRET, 60, clock)
    for _ in range(3):
        sessions.close(sessions.open(KEY_ID))
    clock.now_s += 61
    last = sessions.open(KEY_ID)
    sessions.close(last)
    assert list(sessions._closed) == [last.id]


def test_another_secret_another_key_or_another_time_is_no_session() -> None:
    sessions = Sessions(SECRET, 60)
    session = sessions.open(KEY_ID)
    cookie = sessions.cookie(session)
    assert Sessions(SECRET[::-1], 60).read(cookie) is None
    assert sessions.read(cookie.replace(KEY_ID, "ba9876543210")) is None
    assert sessions.read(cookie.replace(str(session.opened_s), str(session.opened_s + 1))) is None
    assert sessions.read(cookie.replace(KEY_ID, "-")) is None


@given(st.text(max_size=200))
def test_anything_else_is_no_session(text: str) -> None:
    assert Sessions(SECRET, 60).read(text) is None


@given(st.integers(min_value=0, max_value=120), st.integers(min_value=0, max_value=63))
def test_a_changed_character_is_no_session(position: int, replacement: int) -> None:
    sessions = Sessions(SECRET, 60)
    cookie = sessions.cookie(sessions.open(KEY_ID))
    position %= len(cookie)
    character = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"[replacement]
    changed = cookie[:position] + character + cookie[position + 1 :]
    # The last character of base64 carries two bits that say nothing; no other spelling of a signature is taken.
    assert changed == cookie or sessions.read(changed) is None


def test_the_token_of_forms_is_of_the_session_and_is_not_the_cookie() -> None:
    sessions = Sessions(SECRET, 60)
    one, other = sessions.open(KEY_ID), sessions.open(KEY_ID)
    assert sessions.form_token(one) == sessions.form_token(one) != sessions.form_token(other)
    assert sessions.form_token(one) not in sessions.cookie(one)


def test_no_cookie_is_no_session() -> None:
    assert Sessions(SECRET, 60).read(None) is None


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 32 bytes, got 31"):
        Sessions(SECRET[1:], 60)
