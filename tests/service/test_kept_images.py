"""The folder of pictures: names, modes, what is whole or not there, and what goes when."""

import errno
import hashlib
import multiprocessing
import os
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from service import kept_images
from service.kept_images import KeptImages

DAY_S = 86_400.0
JPEG = b"\xff\xd8 a picture \xff\xd9"
WRONG_NAMES = [
    "", "a", "A" * 64, "g" * 64, "a" * 63, "a" * 65, "a" * 64 + "\n", "../" + "a" * 61, "a" * 60 + "/../", "\0" * 64,
    "../../../../etc/passwd", "." * 64, "\uff41" * 64, "\u0663" * 64,
]  # fmt: skip


class Clock:
    """A time that the test sets."""

    def __init__(self) -> None:
        self.now_s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


def name(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def images(tmp_path: Path, clock: Clock) -> KeptImages:
    return KeptImages(tmp_path / "images", kept_s=30 * DAY_S, max_bytes=1000, clock=clock)


def test_a_picture_is_kept_under_the_hash_of_its_file(images: KeptImages) -> None:
    sha256 = name(1)
    assert images.read(sha256) is None
    assert images.keep(sha256, JPEG, exemplar=False)
    assert images.read(sha256) == JPEG
    assert files(images.folder) == [images.folder / "recent" / sha256[:2] / f"{sha256}.jpg"]
    assert images.keep(name(2), JPEG, exemplar=True)
    assert (images.folder / "exemplars" / name(2)[:2] / f"{name(2)}.jpg").read_bytes() == JPEG
    assert images.kept([sha256, name(2), name(3), "", "../x"]) == {sha256, name(2)}


def test_nobody_else_may_look(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        images = KeptImages(tmp_path / "images", kept_s=1, max_bytes=1000)
        (tmp_path / "images" / "recent").mkdir(parents=True, mode=0o777)
        images.prepare()
        images.keep(name(1), JPEG, exemplar=False)
        images.keep(name(2), JPEG, exemplar=True)
    finally:
        os.umask(before)
    for kind in kept_images.KINDS:
        folder = tmp_path / "images" / kind
        for path in (folder, *folder.rglob("*")):
            assert stat.S_IMODE(path.stat().st_mode) == (0o600 if path.is_file() else 0o700), path


@pytest.mark.parametrize("wrong", WRONG_NAMES)
def test_no_other_name_gets_near_the_disk(images: KeptImages, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    def touched(*_: Any, **__: Any) -> None:
        raise AssertionError("the disk was touched")

    for call in ("open", "stat", "unlink", "mkdir", "rename", "scandir", "utime"):
        monkeypatch.setattr(os, call, touched)
    refused: list[Callable[[], object]] = [
        lambda: images.read(wrong),
        lambda: images.keep(wrong, JPEG, exemplar=False),
        lambda: images.keep(wrong, JPEG, exemplar=True),
        lambda: images.promote(wrong),
        lambda: images.forget(wrong),
        lambda: images.touch(wrong),
        lambda: images.take_back(wrong),
    ]
    for ask in refused:
        with pytest.raises(ValueError, match="64 lower-case hex digits"):
            ask()
    assert images.kept([wrong]) == frozenset()


def test_what_is_no_plain_file_is_not_read(images: KeptImages, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    for number in range(3):
        images.keep(name(number), JPEG, exemplar=False)
        (images.folder / "recent" / name(number)[:2] / f"{name(number)}.jpg").unlink()
    path = {number: images.folder / "recent" / name(number)[:2] / f"{name(number)}.jpg" for number in range(3)}
    path[0].symlink_to(secret)
    os.mkfifo(path[1])
    path[2].mkdir()
    assert images.read(name(0)) is None
    assert images.read(name(1)) is None


def test_age_is_counted_from_when_it_was_kept_or_seen_last(images: KeptImages, clock: Clock) -> None:
    images.keep(name(1), JPEG, exemplar=False)
    images.keep(name(2), JPEG, exemplar=False)
    images.keep(name(3), JPEG, exemplar=True)
    clock.now_s += 29 * DAY_S
    assert images.touch(name(2))
    assert images.touch(name(3))
    assert not images.touch(name(4))
    assert images.prune(clock.now_s) == 0
    clock.now_s += DAY_S
    # Its time is over, although nobody has removed it yet.
    assert images.read(name(1)) is None
    assert images.kept([name(1), name(2), name(3)]) == {name(2), name(3)}
    assert not images.touch(name(1))
    assert not images.promote(name(1))
    assert images.prune(clock.now_s) == 0  # asking for it to stay has removed it already
    clock.now_s += 28.9 * DAY_S
    assert images.prune(clock.now_s) == 0
    clock.now_s += 0.2 * DAY_S
    assert images.prune(clock.now_s) == 1
    assert [path.stem for path in files(images.folder)] == [name(3)]
    clock.now_s += 10_000 * DAY_S
    assert images.prune(clock.now_s) == 0
    assert images.read(name(3)) == JPEG


def test_the_oldest_go_where_there_are_too_many_bytes(images: KeptImages, clock: Clock) -> None:
    images.keep(name(100), bytes(5000), exemplar=True)  # those of exemplars do not count
    for number in range(10):
        clock.now_s += 1
        assert images.keep(name(number), bytes(100), exemplar=False)
    assert len(images.kept(map(name, range(10)))) == 10  # exactly what there may be
    clock.now_s += 1
    assert images.keep(name(10), bytes(100), exemplar=False)
    left = images.kept(map(name, range(11)))
    assert sum(len(images.read(each) or b"") for each in left) <= 1000
    assert left == {name(number) for number in range(2, 11)}  # a tenth is made free at a time
    assert images.read(name(100)) == bytes(5000)


def test_what_is_larger_than_all_there_may_be_is_not_kept(images: KeptImages) -> None:
    images.keep(name(1), JPEG, exemplar=False)
    assert not images.keep(name(2), bytes(1001), exemplar=False)
    assert images.kept([name(1), name(2)]) == {name(1)}
    assert images.keep(name(3), bytes(1000), exemplar=False)


def test_another_process_may_have_filled_the_folder(images: KeptImages, clock: Clock) -> None:
    other = KeptImages(images.folder, kept_s=30 * DAY_S, max_bytes=10**9, clock=clock)
    images.keep(name(0), bytes(100), exemplar=False)
    for number in range(1, 30):
        clock.now_s += 1
        other.keep(name(number), bytes(100), exemplar=False)
    assert images.prune(clock.now_s) == 20
    assert images.kept(map(name, range(30))) == {name(number) for number in range(20, 30)}


@hypothesis_settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 400), st.booleans()), max_size=40))
def test_recent_pictures_never_take_more_than_they_may(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int, bool]]
) -> None:
    clock = Clock()
    images = KeptImages(tmp_path_factory.mktemp("images"), kept_s=DAY_S, max_bytes=1000, clock=clock)
    exemplars: set[str] = set()
    for number, size_bytes, exemplar in steps:
        clock.now_s += 1
        images.keep(name(number), bytes(size_bytes), exemplar=exemplar)
        exemplars |= {name(number)} if exemplar else set()
        assert sum(path.stat().st_size for path in files(images.folder / "recent")) <= 1000
        assert {path.stem for path in files(images.folder / "exemplars")} == exemplars
        assert not exemplars & {path.stem for path in files(images.folder / "recent")}
        assert images.read(name(number)) == bytes(size_bytes)


def test_promoted_pictures_stay(images: KeptImages, clock: Clock) -> None:
    images.keep(name(1), JPEG, exemplar=False)
    assert images.promote(name(1))
    assert images.promote(name(1))
    assert not images.promote(name(2))
    clock.now_s += 100 * DAY_S
    images.prune(clock.now_s)
    assert images.read(name(1)) == JPEG
    images.keep(name(1), b"another", exemplar=False)  # it is still that of an exemplar
    assert [path.parent.parent.name for path in files(images.folder)] == ["exemplars"]
    assert images.read(name(1)) == b"another"
    assert images.exemplars(clock.now_s) == []
    assert images.exemplars(clock.now_s + 1) == [name(1)]
    images.take_back(name(1))
    images.take_back(name(2))
    assert [path.parent.parent.name for path in files(images.folder)] == ["recent"]
    assert images.read(name(1)) == b"another"
    clock.now_s += 31 * DAY_S
    assert images.prune(clock.now_s) == 1


def test_forgetting(images: KeptImages) -> None:
    images.keep(name(1), JPEG, exemplar=False)
    images.keep(name(2), JPEG, exemplar=True)
    assert not images.forget(name(2), exemplar=False)
    assert images.forget(name(1), exemplar=False)
    assert images.forget(name(2))
    assert not images.forget(name(2))
    assert files(images.folder) == []


@pytest.mark.parametrize("failing", ["open", "write", "rename"])
def test_a_full_disk_leaves_what_was_there_and_nothing_half(
    images: KeptImages, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    images.keep(name(1), JPEG, exemplar=False)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        where, call = {"open": (os, "open"), "write": (os, "utime"), "rename": (Path, "rename")}[failing]
        patch.setattr(where, call, full)
        for sha256, exemplar in ((name(1), False), (name(2), False), (name(3), True)):
            with pytest.raises(OSError, match="No space"):
                images.keep(sha256, b"other", exemplar=exemplar)
    assert [path.stem for path in files(images.folder)] == [name(1)]
    assert images.read(name(1)) == JPEG
    assert images.keep(name(2), JPEG, exemplar=False)


def test_a_folder_that_vanishes_is_made_again(images: KeptImages) -> None:
    images.prepare()
    for kind in kept_images.KINDS:
        (images.folder / kind).rmdir()
    images.folder.rmdir()
    assert images.prune(0) == 0
    assert images.read(name(1)) is None
    assert images.keep(name(1), JPEG, exemplar=False)


def test_an_unreadable_picture_is_an_error_and_not_an_absent_one(
    images: KeptImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> int:
        raise PermissionError(errno.EACCES, "no")

    images.keep(name(1), JPEG, exemplar=False)
    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(PermissionError):
        images.read(name(1))


def _write_for_ever(folder: Path) -> None:
    images = KeptImages(folder, kept_s=DAY_S, max_bytes=10**9)
    data = JPEG + bytes(300_000) + JPEG
    while True:
        for number in range(20):
            images.keep(name(number), data, exemplar=bool(number % 2))


def test_a_kill_leaves_whole_pictures_and_what_is_swept_up(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    context = multiprocessing.get_context("spawn")
    for _ in range(3):
        process = context.Process(target=_write_for_ever, args=(folder,))
        process.start()
        until_s = time.monotonic() + 30
        while len(files(folder)) < 10 and time.monotonic() < until_s:
            time.sleep(0.01)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    images = KeptImages(folder, kept_s=DAY_S, max_bytes=10**9)
    part = folder / "recent" / "ab" / f".{'ab' * 32}.0011.tmp"
    part.parent.mkdir(exist_ok=True)
    part.write_bytes(b"half")
    whole = [images.read(name(number)) for number in range(20)]
    assert {len(data) for data in whole if data is not None} == {300_000 + 2 * len(JPEG)}
    images.prune(time.time())
    assert part.exists()  # it may be in work
    images.prune(time.time() + 3700)
    assert all(path.suffix == ".jpg" for path in files(folder))
