"""Labelled zips and mosaics by random access."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from offline.data.archives import read_labelled_zip, read_mosaic_zip
from offline.data.examples import first_view
from offline.data.labelled import open_images
from offline.errors import DataError, PlanError
from perception.errors import CorruptImage, ImageTooLarge
from tests.offline.data_layouts import labelled_zip, mosaic_zip, png, shows, table_of

ROWS = [
    {"file": f"{name}/{n}.webp", "class": name, "split": split}
    for n, (name, split) in enumerate([("sea_lion", "val"), ("cat", "train"), ("cat", "val"), ("sea_lion", "train")])
]


def test_labelled_zips_agree_with_the_sequential_reader(tmp_path: Path) -> None:
    path = labelled_zip(tmp_path / "a.zip", ROWS)
    images, expected = open_images("labelled-zip", path), list(read_labelled_zip(path))
    assert [images.id_of(i) for i in range(len(images))] == [f"a.zip/{e.id}" for e in expected]
    for i in (3, 0, 2, 1):
        example = images.read(i)
        assert np.array_equal(np.asarray(example.image), np.asarray(expected[i].image))
        assert images.class_names[example.label] == (expected[i].label.replace("_", " "),)


def test_rows_are_chosen_by_their_columns(tmp_path: Path) -> None:
    path = labelled_zip(tmp_path / "a.zip", ROWS)
    images = open_images("labelled-zip", path, where={"split": "train"})
    assert [id for id, _ in table_of(images)] == ["a.zip/cat/1.webp", "a.zip/sea_lion/3.webp"]
    assert images.name == "a[split=train]"
    with pytest.raises(PlanError, match="no column 'part', only file, class, split"):
        open_images("labelled-zip", path, where={"part": "train"})
    with pytest.raises(PlanError, match="no row"):
        open_images("labelled-zip", path, where={"split": "Train"})


def test_zips_without_a_class_are_unlabelled_and_several_are_one(tmp_path: Path) -> None:
    rows = [{"file": row["file"]} for row in ROWS]
    a, b = labelled_zip(tmp_path / "a.zip", rows), labelled_zip(tmp_path / "b.zip", ROWS[:1])
    assert {label for _, label in table_of(open_images("labelled-zip", a))} == {-1}
    both = open_images("labelled-zip", [a, b])
    assert [label for _, label in table_of(both)] == [-1, -1, -1, -1, 0]
    with pytest.raises(DataError, match="same file name"):
        open_images("labelled-zip", [a, a])


def test_damage_of_a_zip_is_a_typed_error_of_one_image(tmp_path: Path) -> None:
    rows = [*ROWS, {"file": "none.png", "class": "cat", "split": "val"}]
    files = {row["file"]: png(n) for n, row in enumerate(ROWS)}
    path = labelled_zip(tmp_path / "a.zip", rows, files)
    images = open_images("labelled-zip", path)
    assert images.problems == ("a.zip/none.png: the table names it, the archive lacks it",)
    pristine = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        starts = [archive.getinfo(row["file"]).header_offset for row in ROWS]
    for index, start in enumerate(starts):
        data = bytearray(pristine)
        data[start + 200] ^= 0xFF  # within the file's data
        path.write_bytes(data)
        with pytest.raises(CorruptImage):
            images.read(index)
        data[start : start + 4] = b"none"
        path.write_bytes(data)
        with pytest.raises(CorruptImage, match="where its table says"):
            images.read(index)
        assert shows(images, (index + 1) % 4, (index + 1) % 4)
    path.write_bytes(pristine[: starts[2]])
    with pytest.raises(OSError, match="file ends at byte"):
        images.read(2)
    with pytest.raises(DataError, match="is not a readable zip"):
        open_images("labelled-zip", path)


def test_a_deflated_bomb_is_refused_by_its_size(tmp_path: Path) -> None:
    path = labelled_zip(tmp_path / "a.zip", ROWS[:2], {ROWS[0]["file"]: png(0), ROWS[1]["file"]: bytes(30_000_000)})
    with pytest.raises(ImageTooLarge):
        open_images("labelled-zip", path).read(1)


@pytest.mark.parametrize(
    ("table", "text"),
    [("labels.csv", "name\na.png\n"), ("labels.csv", "file,class\na.png\n"), ("other.csv", ""), ("labels.csv", "\xff")],
)
def test_zips_of_another_layout_are_refused(tmp_path: Path, table: str, text: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(table, text.encode("latin1"))
    with pytest.raises(DataError, match=r"labels\.csv|holds no image"):
        open_images("labelled-zip", tmp_path / "a.zip")
    with pytest.raises(DataError, match=r"classes\.json"):
        open_images("mosaic", tmp_path / "a.zip")


# --- mosaics ---------------------------------------------------------------------------------------------------------

CLASSES = {"n02": ("tench, Tinca tinca", 5), "n01": ("koala", 3)}


def test_mosaics_agree_with_the_sequential_reader(tmp_path: Path) -> None:
    path = mosaic_zip(tmp_path / "m.zip", CLASSES)
    images, expected = open_images("mosaic", path), list(read_mosaic_zip(path))
    assert [images.id_of(i) for i in range(len(images))] == [f"m.zip/{e.id}" for e in expected]
    assert images.class_names == (("koala",), ("tench", "Tinca tinca"))
    for i in (7, 0, 4, 1, 6, 2, 3, 5):
        example = images.read(i)
        assert np.array_equal(np.asarray(example.image), np.asarray(expected[i].image))
        assert images.class_names[example.label][0] == expected[i].label


def test_a_mosaic_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []

    def counted(data: bytes) -> Image.Image:
        decoded.append(data)
        return first_view(data)

    monkeypatch.setattr("offline.data.zips.first_view", counted)
    images = open_images("mosaic", mosaic_zip(tmp_path / "m.zip", CLASSES))
    assert decoded == []
    for _ in range(2):
        table_of(images)
    assert len(decoded) == len(CLASSES)


def test_classes_of_several_mosaic_archives_are_one(tmp_path: Path) -> None:
    a = mosaic_zip(tmp_path / "a.zip", CLASSES)
    b = mosaic_zip(tmp_path / "b.zip", {"n01": ("koala", 2), "n00": ("goldfish", 1)})
    images = open_images("mosaic", [a, b])
    assert [label for _, label in table_of(images)] == [1] * 3 + [2] * 5 + [0] + [1] * 2
    assert images.class_names == (("goldfish",), ("koala",), ("tench", "Tinca tinca"))


def test_a_tile_outside_of_its_mosaic_is_an_error_not_black(tmp_path: Path) -> None:
    path = mosaic_zip(tmp_path / "m.zip", CLASSES)
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    contents["classes.json"] = contents["classes.json"].replace(b'"n": 5', b'"n": 7')
    del contents["n01.jpg"]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    images = open_images("mosaic", path)
    assert (len(images), len(images.problems)) == (7, 1)
    assert images.read(5).id == "m.zip/n02/005"  # black, but within
    with pytest.raises(CorruptImage, match="outside"):
        images.read(6)
