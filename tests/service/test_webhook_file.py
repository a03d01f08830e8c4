"""The file of webhooks: what it may say, who may read it, and that no message repeats a secret."""

from pathlib import Path

import pytest

from service.errors import SettingsError
from service.webhook_file import read_webhooks
from tests.service.webhook_receivers import SECRET

GOOD = f"""
[[webhooks]]
name = "moderators"
url = "https://hooks.example.org:8443/a?token=t0k3n"
secret = "{SECRET}"
events = ["verdict.unsafe", "job.done"]

[[webhooks]]
name = "here"
url = "http://localhost:9000"
secret = "{SECRET}"
previous_secret = "whsec_{"AAAA" * 10}"
events = ["review.opened"]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "webhooks.toml", GOOD)


def write(path: Path, text: str) -> Path:
    path.touch(0o600)
    path.write_text(text)
    return path


def test_what_a_file_says(path: Path) -> None:
    moderators, here = read_webhooks(path)
    assert (moderators.scheme, moderators.host, moderators.port) == ("https", "hooks.example.org", 8443)
    assert (moderators.authority, moderators.target) == ("hooks.example.org:8443", "/a?token=t0k3n")
    assert moderators.events == ["verdict.unsafe", "job.done"]
    assert not moderators.private
    assert len(moderators.keys) == 1
    assert (here.authority, here.target, here.private, len(here.keys)) == ("localhost:9000", "/", True, 2)


def test_a_file_may_be_empty(tmp_path: Path) -> None:
    assert read_webhooks(write(tmp_path / "none.toml", "")) == ()


def test_secrets_and_urls_are_in_no_repr(path: Path) -> None:
    for hook in read_webhooks(path):
        assert SECRET[6:] not in repr(hook)
        assert "AAAA" not in repr(hook)
        assert "t0k3n" not in repr(hook)
        assert hook.name in repr(hook)


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o620, 0o666, 0o644])
def test_others_may_not_read_or_change_it(path: Path, mode: int) -> None:
    path.chmod(mode)
    with pytest.raises(SettingsError, match=rf"mode 0{mode:o}.*chmod"):
        read_webhooks(path)


def test_its_group_may_read_it(path: Path) -> None:
    path.chmod(0o640)
    assert len(read_webhooks(path)) == 2


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("https://hooks", "http://hooks", "not https"),
        ("https://hooks", "ftp://hooks", "https://host/path"),
        ("https://hooks", "https://ann:pass@hooks", "password"),
        ("hooks.example.org:8443", "hooks.example.org:84430", "not a URL"),
        ("hooks.example.org:8443", "10.0.0.7", "private"),
        ("hooks.example.org:8443", "[fe80::1]", "link-local"),
        ("hooks.example.org:8443", "169.254.169.254", "metadata"),
        ("/a?token", "/a b?token", "spaces"),
        ("/a?token", "/ä?token", "ASCII"),
        ("/a?token=t0k3n", "/a#b", "fragment"),
        (f'"{SECRET}"\nevents = ["verdict', f'"{SECRET[6:]}"\nevents = ["verdict', "begins with whsec_"),
        (f'"{SECRET}"\nevents = ["verdict', '"whsec_c2hvcnQ="\nevents = ["verdict', "24 to 64 bytes"),
        (f'"{SECRET}"\nevents = ["verdict', '"whsec_c2hvcnQ*"\nevents = ["verdict', "base64"),
        ('["review.opened"]', "[]", "at least 1"),
        ('["review.opened"]', '["review.lost"]', "review.opened"),
        ('"here"', '"moderators"', "occur twice: moderators"),
        ('"here"', '"h ere"', "name"),
        ('name = "here"', 'name = "here"\nnick = "x"', "nick"),
        ("[[webhooks]]", "[[webhook]]", "webhook"),
        ('name = "here"', "name = here", "is not TOML"),
    ],
)
def test_what_does_not_fit_is_said_without_secrets(path: Path, old: str, new: str, reason: str) -> None:
    assert old in GOOD
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(SettingsError) as caught:
        read_webhooks(path)
    assert reason in str(caught.value)
    for secret in (SECRET[6:], "c2hvcnQ", "t0k3n", "pass@"):
        assert secret not in str(caught.value)


def test_private_addresses_are_allowed_where_the_operator_says_so(path: Path) -> None:
    url = "http://10.0.0.7:8080/"
    path.write_text(
        GOOD.replace("https://hooks.example.org:8443/a?token=t0k3n", f'{url}"\nallow_private = true\n#"', 1)
    )
    assert read_webhooks(path)[0].private


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        read_webhooks(tmp_path / "none.toml")
    large = write(tmp_path / "large.toml", "#" * (1024 * 1024 + 1))
    with pytest.raises(SettingsError, match="more than 1048576 bytes"):
        read_webhooks(large)
    binary = write(tmp_path / "binary.toml", "")
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="UTF-8"):
        read_webhooks(binary)
