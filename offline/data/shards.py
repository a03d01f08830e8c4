"""TarImages: images in uncompressed tar shards, in the layout of webdataset.

Members that share a key (the name up to the first dot of its last part) stand next to each other and are one sample:
`<key>.jpg`, and beside it `<key>.cls` (the label, a number or a word) or `<key>.json` (an object whose `label` counts
where there is no `.cls`). Other members are not looked at. Everything is read as bytes and text: webdataset's own
decoders are not used, because they unpickle what they find.
"""

import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL.Image import Image

from offline.data.classes import Naming, index_classes, is_integer, name_classes
from offline.data.examples import IndexedImages, first_view, read_exactly, read_range
from offline.errors import DataError, DataMissing, PlanError
from perception.image import IMAGE_EXTENSIONS
from perception.tar import StrictTarInfo

_MAX_ANNOTATION_BYTES = 64 * 1024
_MAX_RANGE = 100_000  # shards of one brace range
_RANGE = re.compile(r"\{([0-9]+)\.\.([0-9]+)\}")
# What Python's tar module raises on damaged archives.
_DAMAGE = (tarfile.TarError, OSError, EOFError, ValueError, RecursionError)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class TarImages(IndexedImages):
    """Random access by the offsets in the tar headers, which are read once; the id is `<shard>/<member>`.

    Of a damaged shard, the samples before the damage are used, without the one that it cuts; `problems` names the rest.
    """

    def __init__(self, paths: Sequence[Path], naming: Naming, name: str) -> None:
        """Read the headers and labels of all shards.

        Args:
            paths: each a shard, a folder of `*.tar`, a glob, or a range like `shard-{000..146}.tar`.

        Raises:
            DataMissing: a shard is not there.
            DataError: a shard is compressed, two have the same name, or nothing in them can be read.
            PlanError: the naming does not fit the labels, or a range is too long.
        """
        shards = [shard for path in paths for shard in expand_shards(path)]
        repeated = {a.name for a, b in itertools.pairwise(sorted(shards, key=attrgetter("name"))) if a.name == b.name}
        if repeated:
            raise DataError(name, f"two shards are called {min(repeated)}, so that ids would collide")
        problems: list[str] = []
        found = [(number, entry) for number, shard in enumerate(shards) for entry in _scan(shard, problems)]
        labels, classes = index_classes([entry.label for _, entry in found])
        ids = [f"{shards[number].name}/{entry.name}" for number, entry in found]
        super().__init__(name, ids, labels, name_classes(classes, naming), problems)
        self._shards = tuple(os.path.realpath(shard) for shard in shards)
        # (n, 3): shard, offset and size. Arrays, since ImageNet's 1.28 million would be slow to send as objects.
        self._spans = np.array([(number, entry.offset, entry.size) for number, entry in found], dtype=np.int64)

    def _image(self, index: int) -> Image:
        shard, offset, size = self._spans[index].tolist()
        return first_view(read_range(self._shards[shard], offset, size))


def expand_shards(path: Path) -> list[Path]:
    """The shards that a path means: itself, the `*.tar` of a folder, or those of a glob or a brace range.

    Raises:
        DataMissing: there is none, or one of a range is absent.
        PlanError: a range runs backwards or is too long.
    """
    if path.is_dir():
        shards = sorted(path.glob("*.tar"))
        if not shards:
            raise DataError(str(path), "holds no *.tar")
        return shards
    if path.is_file():
        return [path]
    if match := _RANGE.search(str(path)):
        first, last = int(match[1]), int(match[2])
        if not first <= last < first + _MAX_RANGE:
            raise PlanError(f"{match[0]} must run forwards over at most {_MAX_RANGE} shards")
        before, after = str(path)[: match.start()], str(path)[match.end() :]
        numbers = (f"{number:0{len(match[1])}}" for number in range(first, last + 1))
        return [shard for number in numbers for shard in expand_shards(Path(before + number + after))]
    anchor = Path(path.anchor)
    shards = sorted(anchor.glob(str(path.relative_to(anchor)))) if re.search(r"[*?[]", str(path)) else []
    if not shards:
        raise DataMissing(path)
    return shards


@dataclass(frozen=True, slots=True)
class _Member:
    """One file of a shard: offset and size in bytes, of its content."""

    name: str
    key: str
    extension: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """One image of a shard."""

    name: str
    label: str | None
    offset: int
    size: int


def _scan(shard: Path, problems: list[str]) -> Iterator[_Entry]:
    try:
        with shard.open("rb") as file:
            _refuse_compressed(shard, file)
            # The damage surfaces while the sample before it is gathered, which is thus left out: it may lack its label.
            for _, sample in itertools.groupby(_members(file, shard, problems), attrgetter("key")):
                yield from _images(list(sample), shard, file.fileno(), problems)
    except _DAMAGE as error:
        problems.append(f"{shard.name}: the rest of the shard cannot be read: {error}")


def _refuse_compressed(shard: Path, file: BinaryIO) -> None:
    head = file.read(8)
    file.seek(0)
    for magic, method in _COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(str(shard), f"is compressed ({method}): decompress it, images are read at random places")


def _members(file: BinaryIO, shard: Path, problems: list[str]) -> Iterator[_Member]:
    """The regular files of an archive; raises one of _DAMAGE where it ends too early."""
    with tarfile.open(fileobj=file, mode="r:", tarinfo=StrictTarInfo) as archive:
        while (info := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # else all headers stay in memory
            if info.size < 0:  # would lead tarfile back, and round in a circle
                raise tarfile.ReadError(f"{info.name} has a size of {info.size} bytes")
            folder, slash, last = info.name.rpartition("/")
            stem, _, extension = last.partition(".")
            member = _Member(info.name, folder + slash + stem, extension.lower(), info.offset_data, info.size)
            if info.isreg() and not info.issparse():
                yield member
            elif member.extension in IMAGE_EXTENSIONS and not info.isdir():
                problems.append(f"{shard.name}/{info.name}: not a regular file")


def _images(sample: list[_Member], shard: Path, descriptor: int, problems: list[str]) -> Iterator[_Entry]:
    """The images of one sample with its label; none where the label cannot be read."""
    images = [member for member in sample if member.extension in IMAGE_EXTENSIONS]
    if not images:
        return
    try:
        label = _label({member.extension: member for member in sample}, descriptor)
    except (ValueError, RecursionError) as error:
        problems.append(f"{shard.name}/{images[0].name}: its label cannot be read: {error}")
        return
    for image in images:
        yield _Entry(image.name, label, image.offset, image.size)


def _label(members: dict[str, _Member], descriptor: int) -> str | None:
    """What `.cls` says, else the `label` of `.json`, else None."""
    member = members.get("cls") or members.get("json")
    if member is None:
        return None
    if member.size > _MAX_ANNOTATION_BYTES:
        raise ValueError(f"{member.name} has {member.size} bytes, the limit is {_MAX_ANNOTATION_BYTES}")
    text = read_exactly(descriptor, member.offset, member.size).decode().strip()
    if member.extension == "json":
        found = json.loads(text)
        value = found.get("label") if isinstance(found, dict) else None
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError(f"label must be a number or a word, got {value!r}")
        text = str(value).strip()
    if not text or re.fullmatch("-[0-9]+", text):
        raise ValueError(f"label must be a class name or a class number from 0, got {text!r}")
    return str(int(text)) if is_integer(text) else text
