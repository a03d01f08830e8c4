"""Small data sets in each layout that training reads, and how to look at them."""

import csv
import io
import json
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from offline.data.labelled import LabelledImages
from perception.testing import encoded, synthetic_image

Files = list[tuple[str, bytes]]


def png(seed: int) -> bytes:
    return encoded(synthetic_image(seed))


def folder(root: Path, files: Iterable[str]) -> Path:
    """Files in a folder; the n-th holds picture n."""
    for number, name in enumerate(files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(number))
    return root


def shard(path: Path, files: Files) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def samples(labels: Iterable[Any]) -> Files:
    """webdataset's usual sample: `<key>.cls` and `<key>.jpg`, here a PNG by any name; the n-th is picture n."""
    return [
        (f"{n:04d}.{extension}", data)
        for n, label in enumerate(labels)
        for extension, data in (("cls", str(label).encode()), ("jpg", png(n)))
    ]


def labelled_zip(path: Path, rows: list[dict[str, str]], files: dict[str, bytes] | None = None) -> Path:
    """A zip with a table; the n-th row's file holds picture n, stored and deflated in turn."""
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("labels.csv", table.getvalue())
        contents = {row["file"]: png(n) for n, row in enumerate(rows)} if files is None else files
        for number, (name, data) in enumerate(contents.items()):
            archive.writestr(name, data, zipfile.ZIP_DEFLATED if number % 2 else zipfile.ZIP_STORED)
    return path


def mosaic_zip(path: Path, classes: dict[str, tuple[str, int]], columns: int = 3, tile: int = 8) -> Path:
    """Mosaics by WordNet id: lemmas and number of tiles, each tile of one grey."""
    with zipfile.ZipFile(path, "w") as archive:
        table = {w: {"name": name, "n": n, "cols": columns, "tile": tile} for w, (name, n) in classes.items()}
        archive.writestr("classes.json", json.dumps(table))
        for wnid, (_, n) in classes.items():
            mosaic = Image.new("RGB", (columns * tile, -(-n // columns) * tile))
            for i in range(n):
                left, top = i % columns * tile, i // columns * tile
                mosaic.paste((40 * i, 40 * i, 40 * i), (left, top, left + tile, top + tile))
            archive.writestr(f"{wnid}.jpg", encoded(mosaic, "PNG"))
    return path


def table_of(images: LabelledImages) -> list[tuple[str, int]]:
    return [(e.id, e.label) for e in (images.read(i) for i in range(len(images)))]


def shows(images: LabelledImages, index: int, seed: int) -> bool:
    return np.array_equal(np.asarray(images.read(index).image), np.asarray(synthetic_image(seed)))
