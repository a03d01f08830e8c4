"""The file of API keys: what is in it, who may write it, its damage, and how a running service follows it."""

import json
import logging
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from service.errors import SettingsError, Unauthenticated
from service.key_file import create_key, revoke_key
from service.keys import KeyRing
from tests.service.key_files import make


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_the_file_is_private_and_has_hashes_only(path: Path) -> None:
    key = make(path)
    assert path.stat().st_mode & 0o777 == 0o600
    text = path.read_text()
    assert key[17:] not in text
    assert json.loads(text)["format"] == "hardlook-keys/1"


def test_the_mode_and_links_stay(path: Path, tmp_path: Path) -> None:
    make(path)
    path.chmod(0o640)
    link = tmp_path / "link.json"
    link.symlink_to(path)
    key = make(link, "b")
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert KeyRing.load(path).authenticate(key).name == "b"


def test_whoever_may_write_makes_keys_and_whoever_may_read_learns_nothing(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(path)
    for mode in (0o620, 0o602, 0o666):
        path.chmod(mode)
        with pytest.raises(SettingsError, match=rf"mode 0{mode:o}.*chmod go-w"):
            KeyRing.load(path)
    path.chmod(0o640)
    assert len(KeyRing.load(path)) == 1
    assert not caplog.records
    path.chmod(0o644)
    assert len(KeyRing.load(path)) == 1
    assert "everybody may read it" in caplog.text


def refuses(ring: KeyRing, key: str) -> None:
    with pytest.raises(Unauthenticated):
        ring.authenticate(key)


def damaged(text: str) -> dict[str, str]:
    content = json.loads(text)
    [entry] = content["keys"]

    def with_key(**changes: Any) -> str:
        return json.dumps({**content, "keys": [{**entry, **changes}]})

    return {
        "empty": "",
        "not JSON": text[:-5],
        "not an object": "[]",
        "nothing in it": "{}",
        "no keys": json.dumps({"format": content["format"]}),
        "another format": json.dumps({**content, "format": "hardlook-keys/2"}),
        "an unknown member": json.dumps({**content, "more": 1}),
        "an unknown member of a key": with_key(scope="admin"),
        "an id twice": json.dumps({**content, "keys": [entry, entry]}),
        "an unknown scope": with_key(scopes=["everything"]),
        "no scope": with_key(scopes=[]),
        "a bad id": with_key(id="a/b"),
        "a short hash": with_key(sha256="ab"),
        "a bad limit": with_key(rate_limit="many"),
        "a time without a zone": with_key(expires_at="2030-01-01T00:00:00"),
        "a name with a newline": with_key(name="a\nb"),
    }


DAMAGES = tuple(
    damaged('{"format": "", "keys": [{}]}')  # their names only
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_at_the_start_and_ignored_later(
    path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    key = make(path)
    ring = KeyRing.load(path)
    good = path.read_text()
    path.write_text(damaged(good)[damage])
    with pytest.raises(SettingsError, match=r"key file .*keys\.json: is damaged"):
        KeyRing.load(path)
    assert not ring.reload_if_changed()
    assert not ring.reload_if_changed()
    assert ring.authenticate(key).name == "a"
    assert [r.levelname for r in caplog.records] == ["ERROR"]
    path.write_text(good)
    assert ring.reload_if_changed()


def test_an_absent_or_unreadable_file_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read: No such file"):
        KeyRing.load(path)
    with pytest.raises(SettingsError, match="cannot be read: Is a directory"):
        KeyRing.load(tmp_path)
    path.write_bytes(b" " * (16 * 1024 * 1024 + 1))
    with pytest.raises(SettingsError, match="more than 16777216 bytes"):
        KeyRing.load(path)


def test_new_and_revoked_keys_hold_without_a_restart(path: Path) -> None:
    first = make(path)
    ring = KeyRing.load(path)
    assert not ring.reload_if_changed()
    second = make(path, "b")
    refuses(ring, second)
    assert ring.reload_if_changed()
    assert not ring.reload_if_changed()
    assert ring.authenticate(second).name == "b"
    revoke_key(path, first[4:16])
    assert ring.reload_if_changed()
    refuses(ring, first)
    assert ring.authenticate(second).name == "b"


def test_each_failure_to_reload_is_logged_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    key = make(path)
    ring = KeyRing.load(path)
    good = path.read_text()
    path.unlink()
    for _ in range(3):
        assert not ring.reload_if_changed()
    path.write_text("{")
    path.chmod(0o600)
    for _ in range(3):
        assert not ring.reload_if_changed()
    assert [r.levelname for r in caplog.records] == ["ERROR"] * 2
    assert ring.authenticate(key).name == "a"
    path.write_text(good)
    assert ring.reload_if_changed()
    path.unlink()
    assert not ring.reload_if_changed()
    assert [r.levelname for r in caplog.records if r.levelno >= logging.ERROR] == ["ERROR"] * 3


def test_a_change_of_the_same_length_and_time_is_seen(path: Path) -> None:
    key = make(path)
    ring = KeyRing.load(path)
    status = path.stat()
    path.write_text(path.read_text().replace('"a"', '"b"'))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert ring.reload_if_changed()
    assert ring.authenticate(key).name == "b"


def test_a_failed_change_leaves_the_file(path: Path) -> None:
    make(path)
    before = path.read_bytes()
    with pytest.raises(SettingsError, match="rate_limit"):
        create_key(path, "a", ("classify",), "many", None)
    with pytest.raises(SettingsError, match="name"):
        create_key(path, "", ("classify",), None, None)
    with pytest.raises(SettingsError, match="has no key '0'"):
        revoke_key(path, "0")
    assert path.read_bytes() == before


def test_revoking_twice_keeps_the_first_time(path: Path) -> None:
    key = make(path, revoked_at="2020-01-01T00:00:00Z")
    before = path.read_bytes()
    assert revoke_key(path, key[4:16]).revoked_at == datetime(2020, 1, 1, tzinfo=UTC)
    assert path.read_bytes() == before


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be written: No such file"):
        create_key(tmp_path / "absent" / "keys.json", "a", ("classify",), None, None)
