"""Readers of the research archives under `HARDLOOK_DATA`: labelled zips and mosaics of tiles.

Owns the archive layouts. Knows nothing of models.
"""

import csv
import io
import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image

from offline.errors import DATA_VARIABLE, DataMissing
from perception.image import decode

DEFAULT_DATA = Path("../shared/data")


@dataclass(frozen=True)
class Example:
    """One image of an archive.

    Attributes:
        id: archive-relative name, unique within the archive.
        image: RGB.
        label: class name, or the empty string.
        fields: the other columns of the archive's table.
    """

    id: str
    image: Image
    label: str
    fields: dict[str, str]


def data_root(root: Path | None = None) -> Path:
    """The data folder: the argument, else the variable HARDLOOK_DATA, else `../shared/data`."""
    return root if root is not None else Path(os.environ.get(DATA_VARIABLE, DEFAULT_DATA))


def open_archive(path: Path) -> zipfile.ZipFile:
    """Open a zip, or raise DataMissing with the path that was tried."""
    if not path.is_file():
        raise DataMissing(path)
    return zipfile.ZipFile(path)


def read_labelled_zip(path: Path) -> Iterator[Example]:
    """Yield the images of a zip with a `labels.csv` (columns `file`, optional `class`), in table order."""
    with open_archive(path) as archive:
        with archive.open("labels.csv") as table:
            rows = list(csv.DictReader(io.TextIOWrapper(table, "utf8")))
        for row in rows:
            image = decode(archive.read(row["file"])).frames[0].image
            yield Example(row["file"], image, row.get("class", ""), row)


def first_lemma(name: str) -> str:
    """The first of a WordNet synset's comma-separated lemmas: 'tench, Tinca tinca' -> 'tench'."""
    return name.split(",")[0].strip()


def read_mosaic_zip(path: Path) -> Iterator[Example]:
    """Yield the tiles of a zip of mosaics, one mosaic a class (`classes.json`: name, n, cols, tile in px)."""
    with open_archive(path) as archive:
        classes = json.loads(archive.read("classes.json"))
        for wnid in sorted(classes):
            entry = classes[wnid]
            mosaic = decode(archive.read(f"{wnid}.jpg")).frames[0].image
            tile = entry["tile"]
            for i in range(entry["n"]):
                left, top = i % entry["cols"] * tile, i // entry["cols"] * tile
                image = mosaic.crop((left, top, left + tile, top + tile))
                yield Example(
                    f"{wnid}/{i:03d}", image, first_lemma(entry["name"]), {"wnid": wnid, "lemmas": entry["name"]}
                )
