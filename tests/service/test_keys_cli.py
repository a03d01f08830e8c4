"""hardlook-serve keys: a key is shown once, hashes never, errors are one line and exit code 2."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cyclopts import CycloptsError

from service.errors import Unauthenticated
from service.key_file import create_key, read_key_file
from service.keys import KeyRing
from service.keys_cli import keys_app

Run = Callable[..., tuple[str, str]]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("HARDLOOK_KEYS_FILE", raising=False)
    return tmp_path / "keys.json"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*tokens: str) -> tuple[str, str]:
        keys_app()(tokens, exit_on_error=False, print_error=False, result_action="return_value")
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


def refusal(capsys: pytest.CaptureFixture[str], run: Run, *tokens: str) -> str:
    with pytest.raises(SystemExit) as caught:
        run(*tokens)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert line.startswith("hardlook-serve: ")
    return line


def test_a_created_key_is_shown_once_and_works(path: Path, run: Run) -> None:
    out, err = run("create", "--file", str(path), "--name", "web", "--scope", "classify", "similar")
    [key] = out.splitlines()
    assert key[17:] not in err
    assert key[4:16] in err
    caller = KeyRing.load(path).authenticate(key)
    assert (caller.name, sorted(caller.scopes), caller.rate_limit) == ("web", ["classify", "similar"], None)
    listed = "".join(run("list", "--file", str(path)))
    assert key[17:] not in listed


def test_limits_and_expiry(path: Path, run: Run) -> None:
    scopes = ("--scope", "admin", "--scope", "review")
    run("create", "--file", str(path), "--name", "b", *scopes, "--rate-limit", "5/second", "--expires-days", "2")
    [record] = read_key_file(path)[0].keys
    assert (record.scopes, record.rate_limit) == (("admin", "review"), "5/second")
    assert record.expires_at is not None
    assert abs(record.expires_at - datetime.now(UTC) - timedelta(days=2)) < timedelta(minutes=1)


def test_the_list_has_all_but_hashes(path: Path, run: Run) -> None:
    create_key(path, "old", ("classify",), "5/second", datetime(2020, 1, 1, tzinfo=UTC))
    _, gone = create_key(path, "gone", ("review", "metrics"), None, None)
    run("revoke", gone.id, "--file", str(path))
    out, err = run("list", "--file", str(path))
    first, second = (line.split("\t") for line in out.splitlines())
    assert err == ""
    assert first[1:5] == ["expired", "old", "classify", "5/second"]
    assert second[:5] == [gone.id, "revoked", "gone", "review,metrics", "default rate limit"]
    assert not any(record.sha256[:8] in out for record in read_key_file(path)[0].keys)


def test_a_revoked_key_is_refused(path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run("create", "--file", str(path), "--name", "web", "--scope", "classify")
    key = out.strip()
    out, err = run("revoke", key[4:16], "--file", str(path))
    assert out == ""
    assert err.startswith(f"revoked {key[4:16]}\trevoked")
    with pytest.raises(Unauthenticated):
        KeyRing.load(path).authenticate(key)
    assert "has no key 'abc'" in refusal(capsys, run, "revoke", "abc", "--file", str(path))


def test_the_file_is_that_of_the_service(path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARDLOOK_KEYS_FILE", str(path))
    run("create", "--name", "web", "--scope", "metrics")
    assert "metrics" in run("list")[0]


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        (("--name", "web", "--scope", "classify", "--rate-limit", "many"), "rate_limit: 'many' is no rate limit"),
        (("--name", "web", "--scope", "classify", "--expires-days", "0"), "--expires-days must be above 0"),
        (("--name", "web", "--scope", "classify", "--expires-days", "nan"), "--expires-days must be above 0"),
        (("--name", "web", "--scope", "classify", "--expires-days", "1e9"), "--expires-days must be above 0"),
        (("--name", "", "--scope", "classify"), "name: "),
        (("--name", "a\nb", "--scope", "classify"), "name has printable characters only"),
    ],
)
def test_bad_values(
    path: Path, run: Run, capsys: pytest.CaptureFixture[str], tokens: tuple[str, ...], reason: str
) -> None:
    assert reason in refusal(capsys, run, "create", "--file", str(path), *tokens)
    assert not path.exists()


@pytest.mark.parametrize(
    "tokens",
    [("create", "--name", "web", "--scope", "everything"), ("create", "--name", "web"), ("list",), ("revoke",)],
)
def test_bad_arguments_are_left_to_the_command_line(run: Run, path: Path, tokens: tuple[str, ...]) -> None:
    """`hardlook-serve` turns these into one line; none may end in another way or do anything."""
    with pytest.raises(CycloptsError):
        run(*tokens, *(() if tokens == ("list",) else ("--file", str(path))))
    assert not path.exists()


def test_a_damaged_file_is_left_alone(path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text('{"format": "something else"}')
    path.chmod(0o600)
    before = path.read_bytes()
    for tokens in (("list",), ("create", "--name", "web", "--scope", "classify"), ("revoke", "0" * 12)):
        assert "is damaged" in refusal(capsys, run, *tokens, "--file", str(path))
    assert path.read_bytes() == before


def test_changes_at_once_are_all_kept(path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda i: create_key(path, str(i), ("classify",), None, None)[0], range(40)))
    ring = KeyRing.load(path)
    assert [ring.authenticate(key).name for key in made] == [str(i) for i in range(40)]
    assert len(json.loads(path.read_text())["keys"]) == 40
