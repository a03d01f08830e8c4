"""ZipImages and MosaicImages: the research archives (see `offline.data.archives`) by random access.

No zip is kept open: the places of the members are read once, and each image's bytes are read from there.
"""

import struct
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from offline.data.archives import Mosaic, open_archive, read_mosaics, read_rows
from offline.data.classes import Naming, index_classes, name_classes
from offline.data.examples import LIMITS, IndexedImages, first_view, read_range
from offline.errors import DataError, PlanError
from perception.errors import CorruptImage, ImageTooLarge

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature; lengths of the name and the extra field, which the data follows


@dataclass(frozen=True, slots=True)
class _Member:
    """One file of a zip, stored or deflated."""

    archive: str
    header_offset: int
    stored_bytes: int
    size_bytes: int
    deflated: bool
    crc32: int

    def read(self) -> bytes:
        """Read and check the content.

        Raises:
            ImageTooLarge, CorruptImage, OSError: as its reason says.
        """
        if self.size_bytes > LIMITS.max_bytes:
            raise ImageTooLarge("bytes", LIMITS.max_bytes, self.size_bytes)
        signature, *lengths = _LOCAL_HEADER.unpack(read_range(self.archive, self.header_offset, _LOCAL_HEADER.size))
        if signature != b"PK\3\4":
            raise CorruptImage("the archive has no file where its table says")
        data = read_range(self.archive, self.header_offset + _LOCAL_HEADER.size + sum(lengths), self.stored_bytes)
        if self.deflated:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, self.size_bytes + 1)
            except zlib.error as error:
                raise CorruptImage(f"the archive's data is damaged: {error}") from error
        if len(data) != self.size_bytes or zlib.crc32(data) != self.crc32:
            raise CorruptImage("the archive's data is damaged: it has another length or checksum than its table says")
        return data


def _find(archive: zipfile.ZipFile, name: str, problems: list[str]) -> _Member | None:
    """A member's place; None, with a problem noted, where it cannot be read."""
    path = Path(str(archive.filename))
    try:
        info = archive.getinfo(name)
    except KeyError:
        problems.append(f"{path.name}/{name}: the table names it, the archive lacks it")
        return None
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        problems.append(f"{path.name}/{name}: encrypted, or neither stored nor deflated")
        return None
    deflated = info.compress_type == zipfile.ZIP_DEFLATED
    return _Member(str(path), info.header_offset, info.compress_size, info.file_size, deflated, info.CRC)


def _check_names(paths: Sequence[Path], name: str) -> None:
    if len({path.name for path in paths}) < len(paths):
        raise DataError(name, "two archives have the same file name, so that ids would collide")


class ZipImages(IndexedImages):
    """Images of zips with a `labels.csv`; the id is `<archive>/<file>`, the label the column `class`, where it is."""

    def __init__(self, paths: Sequence[Path], where: Mapping[str, str], naming: Naming, name: str) -> None:
        """Read the tables.

        Args:
            where: keeps the rows whose columns have these values.

        Raises:
            DataMissing: an archive is not there.
            DataError: a table cannot be read, or names nothing that is there.
            PlanError: `where` names no column or no row, or the naming does not fit the classes.
        """
        _check_names(paths, name)
        problems: list[str] = []
        ids: list[str] = []
        labels: list[str | None] = []
        members: list[_Member] = []
        for path in paths:
            with open_archive(path) as archive:
                for row in _matching(read_rows(archive), where, path):
                    if member := _find(archive, row["file"], problems):
                        ids.append(f"{path.name}/{row['file']}")
                        labels.append(row.get("class") or None)
                        members.append(member)
        indices, found = index_classes(labels)
        super().__init__(name, ids, indices, name_classes(found, naming), problems)
        self._members = tuple(members)

    def _image(self, index: int) -> Image.Image:
        return first_view(self._members[index].read())


def _matching(rows: list[dict[str, str]], where: Mapping[str, str], path: Path) -> list[dict[str, str]]:
    columns = list(rows[0]) if rows else []
    for column in where:
        if column not in columns:
            raise PlanError(f"where: {path.name} has no column {column!r}, only {', '.join(columns)}")
    matching = [row for row in rows if all(row[column] == value for column, value in where.items())]
    if where and not matching:
        raise PlanError(f"where: no row of {path.name} has {dict(where)}")
    return matching


class MosaicImages(IndexedImages):
    """Tiles of zips of mosaics; the id is `<archive>/<wnid>/<tile>`, the names are all lemmas of the class.

    Each process decodes a mosaic when its first tile is read, and keeps the pixels (3 MB each in Tiny-ImageNet's):
    decoding it anew for every tile would cost a hundred times more.
    """

    def __init__(self, paths: Sequence[Path], name: str) -> None:
        """Read the tables.

        Raises:
            DataMissing: an archive is not there.
            DataError: a table cannot be read, or names nothing that is there.
        """
        _check_names(paths, name)
        problems: list[str] = []
        ids: list[str] = []
        labels: list[str | None] = []
        mosaics: list[tuple[Mosaic, _Member]] = []
        starts: list[int] = []
        for path in paths:
            with open_archive(path) as archive:
                for mosaic in read_mosaics(archive):
                    if member := _find(archive, mosaic.file, problems):
                        mosaics.append((mosaic, member))
                        starts.append(len(ids))
                        ids += [f"{path.name}/{mosaic.wnid}/{tile:03d}" for tile in range(mosaic.tiles)]
                        labels += [mosaic.wnid] * mosaic.tiles
        indices, found = index_classes(labels)
        lemmas = {mosaic.wnid: mosaic.lemmas for mosaic, _ in reversed(mosaics)}
        names = tuple(tuple(lemma.strip() for lemma in lemmas[wnid].split(",")) for wnid in found)
        super().__init__(name, ids, indices, names, problems)
        self._mosaics, self._starts = tuple(mosaics), tuple(starts)
        self._decoded: dict[int, NDArray[np.uint8]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without the pixels: who receives the set decodes what it needs."""
        return self.__dict__ | {"_decoded": {}}

    def _image(self, index: int) -> Image.Image:
        number = bisect_right(self._starts, index) - 1
        mosaic, member = self._mosaics[number]
        pixels = self._decoded.get(number)
        if pixels is None:
            # Two threads may both decode it: wasteful once, and without a lock there is none to inherit in a fork.
            pixels = self._decoded[number] = np.asarray(first_view(member.read()))
        left, top, right, bottom = mosaic.box(index - self._starts[number])
        if bottom > pixels.shape[0] or right > pixels.shape[1]:
            raise CorruptImage(f"tile at ({left}, {top}) px lies outside of its mosaic")
        return Image.fromarray(pixels[top:bottom, left:right])
