"""Folders and tar shards as sets of labelled images by random access."""

import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offline.data.examples import LIMITS
from offline.data.labelled import open_images
from offline.errors import DataError, DataMissing, PlanError
from perception.errors import CorruptImage, ImageTooLarge, UnsupportedFormat
from tests.offline.data_layouts import folder, png, samples, shard, shows, table_of

# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_comes_in_name_order_with_its_sub_folders_as_classes(tmp_path: Path) -> None:
    root = folder(
        tmp_path, ["polar_bear/2.png", "polar_bear/1.JPEG", "jack-o-lantern/deep/er/3.png", "top.webp", "a/x.txt"]
    )
    images = open_images("folder", root)
    assert table_of(images) == [
        ("jack-o-lantern/deep/er/3.png", 0), ("polar_bear/1.JPEG", 1), ("polar_bear/2.png", 1), ("top.webp", -1),
    ]  # fmt: skip
    assert images.class_names == (("jack o lantern",), ("polar bear",))
    assert [shows(images, i, seed) for i, seed in enumerate((2, 1, 0, 3))] == [True] * 4
    assert images.problems == ()


def test_a_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    images = open_images("folder", folder(tmp_path, ["b.png", "a.png"]))
    assert table_of(images) == [("a.png", -1), ("b.png", -1)]
    assert images.class_names == ()


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    outside, root = folder(tmp_path / "out", ["x/secret.png"]), folder(tmp_path / "in", ["a/1.png"])
    (root / "a" / "out.png").symlink_to(outside / "x/secret.png")
    (root / "b").symlink_to(outside / "x")
    (root / "a" / "same.png").symlink_to(root / "a/1.png")
    (root / "a" / "gone.png").symlink_to(root / "a/none.png")
    os.mkfifo(root / "a" / "pipe.png")  # would block whoever opens it
    images = open_images("folder", root)
    assert [images.id_of(i) for i in range(len(images))] == ["a/1.png", "a/same.png"]
    assert sorted(problem.partition(":")[0] for problem in images.problems) == [
        "a/gone.png",
        "a/out.png",
        "a/pipe.png",
        "b",
    ]


def test_unreadable_files_are_typed_errors_one_at_a_time(tmp_path: Path) -> None:
    root = folder(tmp_path, ["a/0.png", "a/1.png", "a/2.png", "a/3.png", "a/4.png"])
    images = open_images("folder", root)
    (root / "a/0.png").write_bytes(b"no image")
    (root / "a/1.png").write_bytes(png(1)[:60])
    (root / "a/2.png").unlink()
    os.truncate(root / "a/3.png", LIMITS.max_bytes + 1)
    for index, error in enumerate((UnsupportedFormat, CorruptImage, FileNotFoundError, ImageTooLarge)):
        with pytest.raises(error):
            images.read(index)
        assert images.id_of(index) == f"a/{index}.png"
    assert shows(images, 4, 4)
    for index in (-1, 5):
        with pytest.raises(IndexError, match="images 0 to 4"):
            images.read(index)


# --- tar shards ------------------------------------------------------------------------------------------------------


def test_samples_of_a_shard_carry_class_numbers_or_words(tmp_path: Path) -> None:
    files = [
        ("./a/1.cls", b" 10\n"), ("./a/1.jpg", png(0)), ("./a/1.txt", b"a caption"),
        ("2.jpg", png(1)), ("2.seg.png", b"a mask"), ("2.json", b'{"label": 9, "n": 1}'),
        ("3.JPG", png(2)), ("3.cls", b"010"), ("3.json", b"not looked at"),
        ("4.png", png(3)),
    ]  # fmt: skip
    images = open_images("tar", shard(tmp_path / "s.tar", files))
    assert table_of(images) == [("s.tar/./a/1.jpg", 1), ("s.tar/2.jpg", 0), ("s.tar/3.JPG", 1), ("s.tar/4.png", -1)]
    assert images.class_names == (("9",), ("10",))
    assert all(shows(images, n, n) for n in range(4))
    words = open_images("tar", shard(tmp_path / "w.tar", samples(["sea_lion", "cat", "sea_lion"])))
    assert [label for _, label in table_of(words)] == [1, 0, 1]
    assert words.class_names == (("cat",), ("sea lion",))


def test_long_names_of_every_tar_dialect(tmp_path: Path) -> None:
    name = "ü" * 60 + "/" + "x" * 180 + ".jpg"
    for dialect in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "long.tar", "w", format=dialect) as archive:
            info = tarfile.TarInfo(name)
            info.size = len(png(5))
            archive.addfile(info, io.BytesIO(png(5)))
        images = open_images("tar", tmp_path / "long.tar")
        assert images.id_of(0) == f"long.tar/{name}"
        assert shows(images, 0, 5)


@pytest.mark.parametrize("pattern", ["shard-{000..002}.tar", "shard-*.tar", "."])
def test_shards_by_range_glob_and_folder(tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    for number in range(3):
        shard(tmp_path / "data" / f"shard-{number:03d}.tar", samples([number, 0]))
    images = open_images("tar", tmp_path / "data" / pattern)
    assert [label for _, label in table_of(images)] == [0, 0, 1, 0, 2, 0]
    assert [images.id_of(i)[:13] for i in (0, 2, 4)] == ["shard-000.tar", "shard-001.tar", "shard-002.tar"]
    monkeypatch.chdir(tmp_path / "data")
    relative = open_images("tar", Path("../data") / pattern)
    monkeypatch.chdir(tmp_path)
    assert table_of(relative) == table_of(images)


def test_absent_shards_are_named(tmp_path: Path) -> None:
    shard(tmp_path / "a-0.tar", samples([0]))
    with pytest.raises(DataMissing, match=r"a-1\.tar"):
        open_images("tar", tmp_path / "a-{0..1}.tar")
    with pytest.raises(DataMissing, match=r"b-\*\.tar"):
        open_images("tar", tmp_path / "b-*.tar")
    for wrong in ("a-{1..0}.tar", "a-{0..999999999999}.tar"):
        with pytest.raises(PlanError, match="forwards"):
            open_images("tar", tmp_path / wrong)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \*\.tar"):
        open_images("tar", tmp_path / "empty")
    shard(tmp_path / "empty" / "a-0.tar", samples([0]))
    with pytest.raises(DataError, match=r"two shards are called a-0\.tar"):
        open_images("tar", [tmp_path / "empty", tmp_path / "a-0.tar"])


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_shards_are_refused_with_the_way_out(tmp_path: Path, mode: str) -> None:
    with tarfile.open(tmp_path / "s.tar", mode):  # type: ignore[call-overload]
        pass
    with pytest.raises(DataError, match="decompress it"):
        open_images("tar", tmp_path / "s.tar")


def test_what_precedes_the_damage_of_a_shard_is_used(tmp_path: Path) -> None:
    """Cut a shard at every block: only whole samples come out, and the loss is reported."""
    whole = shard(tmp_path / "whole.tar", samples("abcd")).read_bytes()
    sample = whole.index(b"0001.cls")
    good = shard(tmp_path / "good.tar", samples("z"))
    for length in range(100, 4 * sample + 512, 512):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        images = open_images("tar", [tmp_path / "cut.tar", good])
        # A sample is known to be whole when the next one begins: a header, and the one byte of its label.
        assert len(images) - 1 == sum((k + 1) * sample + 513 <= length for k in range(3))
        assert all(shows(images, n, n) for n in range(len(images) - 1))
        assert -1 not in [label for _, label in table_of(images)]
        assert [problem.partition(":")[0] for problem in images.problems] == ["cut.tar"]


def test_damage_in_the_middle_does_not_pass_for_the_end(tmp_path: Path) -> None:
    data = bytearray(shard(tmp_path / "s.tar", samples("abcd")).read_bytes())
    header = data.index(b"0002.cls")
    data[header : header + 400] = os.urandom(400)
    (tmp_path / "s.tar").write_bytes(data)
    images = open_images("tar", tmp_path / "s.tar")
    assert [images.id_of(i) for i in range(len(images))] == ["s.tar/0000.jpg"]
    assert "rest of the shard" in images.problems[0]
    (tmp_path / "none.tar").write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(DataError, match=r"holds no image; 1 left out, the first: none\.tar"):
        open_images("tar", tmp_path / "none.tar")


def test_a_negative_size_does_not_lead_round_in_a_circle(tmp_path: Path) -> None:
    data = bytearray(shard(tmp_path / "s.tar", samples("abc")).read_bytes())
    header = data.index(b"0002.cls")
    data[header + 124 : header + 136] = (2**96 - 512).to_bytes(12, "big")  # -512, in the base-256 notation of GNU
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
    (tmp_path / "s.tar").write_bytes(data)
    images = open_images("tar", tmp_path / "s.tar")
    assert len(images) == 1  # the one before the damage may lack its label, too
    assert len(images.problems) == 1
    assert images.problems[0].startswith("s.tar: the rest of the shard cannot be read")


@pytest.mark.parametrize(
    ("name", "annotation"),
    [("1.cls", b"\xff\xfe"), ("1.cls", b" "), ("1.cls", b"-1"), ("1.cls", b"x" * 70_000), ("1.json", b"{"),
     ("1.json", b'{"label": [1]}'), ("1.json", b'{"label": true}'), ("1.json", b"[" * 50_000)],
)  # fmt: skip
def test_an_image_whose_label_cannot_be_read_is_left_out(tmp_path: Path, name: str, annotation: bytes) -> None:
    files = [("1.jpg", png(1)), (name, annotation), *samples("ab")]
    images = open_images("tar", shard(tmp_path / "s.tar", files))
    assert [images.id_of(i) for i in range(len(images))] == ["s.tar/0000.jpg", "s.tar/0001.jpg"]
    assert len(images.problems) == 1
    assert images.problems[0].startswith("s.tar/1.jpg: its label cannot be read")


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_a_pickle_in_a_shard_is_never_executed(tmp_path: Path) -> None:
    payload = pickle.dumps(Trap(tmp_path / "sprung"))
    names = ("pyd", "pickle", "pkl", "pth", "cls", "json", "jpg")
    files = [(f"{sample}.{name}", payload) for sample in ("0", "1") for name in names[: 4 if sample == "0" else None]]
    files += [("1b.jpg", payload), ("1b.pyd", payload), *samples("a")]
    images = open_images("tar", shard(tmp_path / "s.tar", files))
    with pytest.raises(UnsupportedFormat):
        images.read(0)
    assert shows(images, 1, 0)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(payload)  # noqa: S301
    assert (tmp_path / "sprung").exists()  # the trap works


def test_links_in_a_shard_are_not_followed(tmp_path: Path) -> None:
    with tarfile.open(shard(tmp_path / "s.tar", samples("a")), "a") as archive:
        link = tarfile.TarInfo("1.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, str(folder(tmp_path, ["x.png"]) / "x.png")
        archive.addfile(link)
    images = open_images("tar", tmp_path / "s.tar")
    assert (len(images), images.problems) == (1, ("s.tar/1.jpg: not a regular file",))
