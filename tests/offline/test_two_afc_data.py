"""Readers of NIGHTS and BAPPS: which triplets count, and what a wrong layout is called."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from offline.benchmarks.two_afc import BAPPS_SPLITS
from offline.data.files import inside, read_image_file
from offline.data.two_afc import read_bapps, read_nights, read_triplets
from offline.errors import DataError, DataMissing, PlanError
from tests.offline.two_afc_layouts import Row, bapps, nights


def test_nights_keeps_the_test_split_where_six_raters_agree(tmp_path: Path) -> None:
    rows = [
        Row(1, right=1),
        Row(2, right=0, imagenet=False, votes=6),
        Row(3, right=1, votes=5),
        Row(4, right=1, split="train"),
        Row(5, right=0, split="val", imagenet=False),
    ]
    folder = nights(tmp_path / "nights", rows)
    first, second = read_nights(folder)
    assert (first.id, first.set, first.prefers_right) == ("1", "test_imagenet", True)
    assert (second.id, second.set, second.prefers_right) == ("2", "test_no_imagenet", False)
    assert first.reference == folder / "ref/000/001.png"
    assert (first.left, first.right) == (folder / "distort/000/001_0.png", folder / "distort/000/001_1.png")
    assert [t.set for t in read_nights(folder, "val")] == ["val_no_imagenet"]
    with pytest.raises(DataError, match="no triplet of the split 'other'"):
        read_nights(folder, "other")


def test_a_limit_of_nights_is_of_a_seeded_shuffle(tmp_path: Path) -> None:
    nights(tmp_path, [Row(n, right=n % 2, imagenet=n < 10) for n in range(30)])
    everything = read_triplets("nights", tmp_path, 0, 0)
    assert [t.id for t in everything] == [str(n) for n in range(30)]
    some = read_triplets("nights", tmp_path, 12, 0)
    assert len(some) == 12
    assert set(some) < set(everything)
    assert some != everything[:12]
    assert read_triplets("nights", tmp_path, 12, 0) == some != read_triplets("nights", tmp_path, 12, 1)


def test_bapps_takes_the_majority_of_the_first_of_each_split(tmp_path: Path) -> None:
    bapps(tmp_path, [0.0, 0.8, 0.4, 0.6])
    triplets = read_triplets("bapps", tmp_path, 3, 0)
    assert Counter(t.set for t in triplets) == dict.fromkeys(BAPPS_SPLITS, 3)
    assert [(t.id, t.prefers_right) for t in triplets if t.set == "cnn"] == [
        ("000000", False),
        ("000001", True),
        ("000002", False),
    ]
    assert triplets[0].left == tmp_path / "2afc/val/cnn/p0/000000.png"
    assert triplets[0].right == tmp_path / "2afc/val/cnn/p1/000000.png"
    assert len(read_bapps(tmp_path)) == 24


def _replace(old: str, new: str) -> Callable[[Path], object]:
    def change(folder: Path) -> object:
        table = folder / "data.csv"
        content = table.read_text()
        assert old in content
        return table.write_text(content.replace(old, new, 1))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "data.csv").unlink(), r"data\.csv is not there; expected .*NIGHTS \(DreamSim\)"),
        (lambda folder: (folder / "data.csv").write_bytes(b"\xff\xfe"), "cannot be read as a table"),
        (lambda folder: (folder / "data.csv").write_text(""), r"votes, split and is_imagenet, got \[\]"),
        (_replace("is_imagenet", "imagenet"), "votes, split and is_imagenet"),
        (_replace(",0,1,10,", ",0,2,10,"), r"row 1: .* is no triplet: KeyError\(2\.0\)"),
        (_replace(",0,1,10,", ",0,1,many,"), "row 1: .*many"),
        (_replace("True", "perhaps"), "row 1: .*perhaps"),
        (_replace(",test", ""), "row 1: .* is no triplet"),
        (_replace("ref/000/001.png", "../secret.png"), r"'\.\./secret\.png', which is not below"),
        (_replace("ref/000/001.png", "/etc/hosts"), "'/etc/hosts', which is not below"),
        (lambda folder: shutil.rmtree(folder / "distort"), r"2 of 3 files are missing, e\.g\. .*_0\.png, .*_1\.png;"),
    ],
)
def test_what_is_no_nights_is_named(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    folder = nights(tmp_path / "nights", [Row(1, right=1)])
    damage(folder)
    with pytest.raises(DataError, match=message):
        read_triplets("nights", folder, 0, 0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda val: shutil.rmtree(val / "superres"), r"superres/ref holds no \*\.png; expected .*BAPPS"),
        (lambda val: shutil.rmtree(val / "cnn/judge"), "2 of 2 files are missing"),
        (lambda val: (val / "cnn/p1/000001.png").unlink(), r"1 of 36 files are missing, e\.g\. .*p1/000001\.png"),
        (lambda val: (val / "cnn/judge/000001.npy").write_bytes(b"no array"), r"000001\.npy holds no judgement"),
        (lambda val: (val / "cnn/judge/000001.npy").write_bytes(b""), r"000001\.npy holds no judgement"),
        (lambda val: np.save(val / "cnn/judge/000001.npy", np.array([1.5])), r"one share of raters in \[0, 1\]"),
        (lambda val: np.save(val / "cnn/judge/000001.npy", np.array([np.nan])), r"one share of raters in \[0, 1\]"),
        (lambda val: np.save(val / "cnn/judge/000001.npy", np.ones(2)), r"one share of raters in \[0, 1\]"),
        (
            lambda val: np.save(val / "cnn/judge/000001.npy", np.array([{}]), allow_pickle=True),
            r"000001\.npy holds no judgement",
        ),
        (lambda val: np.save(val / "cnn/judge/000001.npy", np.array(["x"])), r"000001\.npy holds no judgement"),
    ],
)
def test_what_is_no_bapps_is_named(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(bapps(tmp_path, [0.2, 0.8]) / "2afc/val")
    with pytest.raises(DataError, match=message):
        read_triplets("bapps", tmp_path, 0, 0)


def test_there_are_two_kinds(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="nights, bapps, got 'folder'"):
        read_triplets("folder", tmp_path, 0, 0)


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataMissing, match=r"x\.png"):
        read_image_file(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"x\.png: cannot be read as an image"):
        read_image_file(tmp_path / "x.png")
    assert inside(tmp_path, "a/..b.png", "table") == tmp_path / "a/..b.png"
