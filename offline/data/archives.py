"""Readers of the research archives under `HARDLOOK_DATA`: labelled zips and mosaics of tiles.

Owns the archive layouts. Knows nothing of models.
"""

import csv
import io
import json
import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image

from offline.errors import DATA_VARIABLE, DataError, DataMissing
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
    """Open a zip.

    Raises:
        DataMissing: it is not there.
        DataError: it is no zip.
    """
    if not path.is_file():
        raise DataMissing(path)
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise DataError(str(path), f"is not a readable zip: {error}") from error


def read_rows(archive: zipfile.ZipFile, table: str = "labels.csv") -> list[dict[str, str]]:
    """The rows of an archive's table (columns `file`, optional `class`, any others).

    Raises:
        DataError: there is no such table, or it is damaged.
    """
    try:
        text = archive.read(table).decode("utf8")
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except (KeyError, OSError, ValueError, zipfile.BadZipFile, zlib.error, csv.Error) as error:
        raise DataError(str(archive.filename), f"has no readable {table}: {error}") from error
    for number, row in enumerate(rows, 2):
        if "file" not in row or None in row or None in row.values():
            raise DataError(str(archive.filename), f"{table}, row {number}: needs a column 'file' and no gaps")
    return rows


def read_labelled_zip(path: Path) -> Iterator[Example]:
    """Yield the images of a zip with a `labels.csv`, in table order."""
    with open_archive(path) as archive:
        for row in read_rows(archive):
            image = decode(archive.read(row["file"])).frames[0].image
            yield Example(row["file"], image, row.get("class", ""), row)


def first_lemma(name: str) -> str:
    """The first of a WordNet synset's comma-separated lemmas: 'tench, Tinca tinca' -> 'tench'."""
    return name.split(",")[0].strip()


@dataclass(frozen=True)
class Mosaic:
    """One class of a mosaic archive: tiles in rows, in one image.

    Attributes:
        wnid: WordNet id of the class; the image's file name without `.jpg`.
        lemmas: the class's names, separated by commas.
        tiles, columns: how many, in all and in a full row.
        tile_px: width and height of a tile.
    """

    wnid: str
    lemmas: str
    tiles: int
    columns: int
    tile_px: int

    @property
    def file(self) -> str:
        """The image's member of the archive."""
        return f"{self.wnid}.jpg"

    def box(self, tile: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of a tile, in px."""
        left, top = tile % self.columns * self.tile_px, tile // self.columns * self.tile_px
        return left, top, left + self.tile_px, top + self.tile_px


def read_mosaics(archive: zipfile.ZipFile) -> list[Mosaic]:
    """The classes of an archive's `classes.json` (by WordNet id: name, n, cols, tile), in the order of their ids.

    Raises:
        DataError: there is no such table, or it is damaged.
    """
    try:
        classes = json.loads(archive.read("classes.json"))
        mosaics = [
            Mosaic(wnid, str(entry["name"]), int(entry["n"]), int(entry["cols"]), int(entry["tile"]))
            for wnid, entry in sorted(classes.items())
        ]
    except (KeyError, OSError, ValueError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(str(archive.filename), f"has no readable classes.json: {error!r}") from error
    for mosaic in mosaics:
        if mosaic.tiles < 0 or mosaic.columns < 1 or mosaic.tile_px < 1:
            raise DataError(str(archive.filename), f"classes.json: sizes of {mosaic.wnid} must be positive")
    return mosaics


def read_mosaic_zip(path: Path) -> Iterator[Example]:
    """Yield the tiles of a zip of mosaics, one mosaic a class."""
    with open_archive(path) as archive:
        for mosaic in read_mosaics(archive):
            whole = decode(archive.read(mosaic.file)).frames[0].image
            fields = {"wnid": mosaic.wnid, "lemmas": mosaic.lemmas}
            for i in range(mosaic.tiles):
                image = whole.crop(mosaic.box(i))
                yield Example(f"{mosaic.wnid}/{i:03d}", image, first_lemma(mosaic.lemmas), fields)
