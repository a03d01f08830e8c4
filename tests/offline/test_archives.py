"""Readers of the research archives, on small ones of the same layout."""

import csv
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from offline.data.archives import data_root, read_labelled_zip, read_mosaic_zip
from offline.errors import DATA_VARIABLE, DataMissing
from perception.errors import CorruptImage
from perception.testing import encoded, synthetic_image


def labelled_zip(path: Path, files: dict[str, bytes]) -> Path:
    table = io.StringIO()
    writer = csv.DictWriter(table, ["file", "class", "split"])
    writer.writeheader()
    writer.writerows({"file": name, "class": f"c{i}", "split": "val"} for i, name in enumerate(files))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("labels.csv", table.getvalue())
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def test_labelled_zips_come_in_table_order(tmp_path: Path) -> None:
    images = {f"{i}.png": synthetic_image(i) for i in (3, 1, 2)}
    path = labelled_zip(tmp_path / "a.zip", {name: encoded(image) for name, image in images.items()})
    examples = list(read_labelled_zip(path))
    assert [(e.id, e.label, e.fields["split"]) for e in examples] == [
        ("3.png", "c0", "val"), ("1.png", "c1", "val"), ("2.png", "c2", "val"),
    ]  # fmt: skip
    assert all(np.array_equal(np.asarray(e.image), np.asarray(images[e.id])) for e in examples)


def test_mosaics_are_cut_row_by_row(tmp_path: Path) -> None:
    mosaic = Image.new("RGB", (3 * 8, 2 * 8))
    for i in range(5):
        mosaic.paste((40 * i + 20, 0, 0), (i % 3 * 8, i // 3 * 8, i % 3 * 8 + 8, i // 3 * 8 + 8))
    classes = {"n01": {"name": "tench, Tinca tinca", "n": 5, "cols": 3, "tile": 8}}
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.writestr("classes.json", json.dumps(classes))
        archive.writestr("n01.jpg", encoded(mosaic, "JPEG", quality=100, subsampling=0))
    examples = list(read_mosaic_zip(tmp_path / "m.zip"))
    assert [e.id for e in examples] == [f"n01/00{i}" for i in range(5)]
    assert {e.label for e in examples} == {"tench"}
    assert [round(float(np.asarray(e.image)[..., 0].mean()), -1) for e in examples] == [20, 60, 100, 140, 180]


def test_a_damaged_image_ends_a_measurement_loudly(tmp_path: Path) -> None:
    path = labelled_zip(tmp_path / "a.zip", {"a.png": encoded(synthetic_image(1))[:60]})
    with pytest.raises(CorruptImage):
        list(read_labelled_zip(path))


def test_absent_archives_name_the_path_and_the_variable(tmp_path: Path) -> None:
    with pytest.raises(DataMissing, match=rf"absent\.zip.*{DATA_VARIABLE}"):
        list(read_labelled_zip(tmp_path / "absent.zip"))


def test_the_data_folder_is_argument_then_variable_then_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_VARIABLE, "from/variable")
    assert data_root(Path("given")) == Path("given")
    assert data_root() == Path("from/variable")
    monkeypatch.delenv(DATA_VARIABLE)
    assert data_root() == Path("../shared/data")
