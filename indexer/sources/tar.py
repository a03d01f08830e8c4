"""TarSource: images in tar shards, in the layout of webdataset.

Members that share a key (the name up to the first dot of its last part) stand next to each other and are one sample:
`<key>.jpg`, and beside it `<key>.cls` (the label), `<key>.txt` (a caption) and `<key>.json` (an object; its `label`
counts where there is no `.cls`). Members are read as bytes and text. webdataset's own decoders are not used, because
they unpickle what they find.
"""

import json
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from indexer.contents import POOL_LABELS, Kind
from indexer.errors import InvalidLabel, SourceError
from indexer.sources.item import Skipped, SourceItem, as_text, stamp_of
from perception.errors import ImageTooLarge
from perception.image import IMAGE_EXTENSIONS, ImageLimits
from perception.tar import StrictTarInfo

_ANNOTATIONS = frozenset({"cls", "txt", "json"})
_MAX_ANNOTATION_BYTES = 64 * 1024  # of labels, captions and metadata: they are held in memory and served
# What Python's tar and decompression modules raise on damaged archives.
_DAMAGE = (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)


class TarSource:
    """Streams shards one after the other; nothing is extracted to disk.

    The id is `<shard>/<member>`. Without a label of its own, a sample is labelled by the folder in its key, as in
    `FolderSource`. A damaged shard yields what comes before the damage, and one skipped entry for the rest.
    """

    def __init__(self, paths: Sequence[Path], kind: Kind, max_bytes: int = ImageLimits.max_bytes) -> None:
        """Name the shards; compressed ones (gz, bz2, xz) too.

        Args:
            paths: in the order to read.
            kind: of the collection that is built.
            max_bytes: larger images are skipped unread.

        Raises:
            SourceError: a shard is not a file, or two have the same name.
        """
        self._paths, self._kind, self._max_bytes = tuple(paths), kind, max_bytes
        names = set()
        for path in self._paths:
            if not path.is_file():
                raise SourceError(path, "is not a file")
            if path.name in names:
                raise SourceError(path, "another shard has the same name, so that ids would collide")
            names.add(path.name)

    @property
    def identity(self) -> str:
        """See `Source.identity`."""
        return "tar " + " ".join(as_text(os.path.realpath(path)) for path in self._paths)

    def count(self) -> int | None:
        """See `Source.count`: a tar has no table of contents."""
        return None

    def __iter__(self) -> Iterator[SourceItem | Skipped]:
        """See `Source.__iter__`."""
        for path in self._paths:
            yield from self._read_shard(path)

    def _read_shard(self, path: Path) -> Iterator[SourceItem | Skipped]:
        shard = as_text(path.name)
        stamp = stamp_of(path)
        sample = _Sample("", shard, stamp)
        try:
            with tarfile.open(path, "r|*", tarinfo=StrictTarInfo) as archive:
                for member in archive:
                    archive.members.clear()  # type: ignore[attr-defined]  # else all headers stay in memory
                    if member.isdir():
                        continue
                    key, extension = _split(as_text(member.name))
                    if key != sample.key:
                        yield from sample.entries(self._kind)
                        sample = _Sample(key, shard, stamp)
                    self._add(sample, archive, member, extension)
        except _DAMAGE as error:
            yield from sample.entries(self._kind)
            reason = f"the rest of the shard cannot be read: {error}"
            yield Skipped(f"{shard}/", shard, type(error).__name__, reason)
            return
        yield from sample.entries(self._kind)

    def _add(self, sample: "_Sample", archive: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> None:
        """Read one member into its sample, or note why not."""
        name = as_text(member.name)
        limit_bytes = self._max_bytes if extension in IMAGE_EXTENSIONS else _MAX_ANNOTATION_BYTES
        file = archive.extractfile(member) if member.isreg() else None
        if file is None:
            sample.skip(name, OSError("not a regular file"))
        elif extension not in IMAGE_EXTENSIONS | _ANNOTATIONS:
            sample.skip(name, ValueError(f"extension {extension!r} is neither an image's nor a label's"))
        elif member.size > limit_bytes:
            sample.skip(name, ImageTooLarge("bytes", limit_bytes, member.size))
        elif extension in IMAGE_EXTENSIONS:
            sample.images.append((name, file.read()))
        else:
            sample.annotations[extension] = file.read()


@dataclass
class _Sample:
    """The members of one key, while they are read."""

    key: str
    shard: str
    stamp: str
    images: list[tuple[str, bytes]] = field(default_factory=list)
    annotations: dict[str, bytes] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)

    def skip(self, name: str, error: Exception) -> None:
        self.skipped.append(Skipped.because(f"{self.shard}/{name}", f"{self.shard}/{name}", error))

    def entries(self, kind: Kind) -> Iterator[SourceItem | Skipped]:
        """The images with their label and metadata; all skipped where these cannot be read."""
        try:
            label, metadata = self._describe(kind)
        except (ValueError, InvalidLabel, RecursionError) as error:
            for name, _ in self.images:
                self.skip(name, error)
        else:
            for name, data in self.images:
                id = f"{self.shard}/{name}"
                yield SourceItem(id, label, id, metadata, self.stamp, partial(bytes, data))
        yield from self.skipped

    def _describe(self, kind: Kind) -> tuple[str, dict[str, str]]:
        metadata: dict[str, str] = {}
        if "json" in self.annotations:
            found = json.loads(self.annotations["json"])
            if not isinstance(found, dict):
                raise ValueError(f"{self.key}.json holds no object")
            metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in found.items()}
        if "txt" in self.annotations:
            metadata["text"] = self.annotations["txt"].decode()
        folder, _, _ = self.key.rpartition("/")
        label = metadata.pop("label", folder.partition("/")[0] if kind == "pools" else folder)
        if "cls" in self.annotations:
            label = self.annotations["cls"].decode().strip()
        if kind == "pools" and label not in POOL_LABELS:
            raise InvalidLabel(label, POOL_LABELS, f"sample {self.key!r}")
        return label, metadata


def _split(name: str) -> tuple[str, str]:
    """Key and extension of a member: 'a.b/0001.seg.png' -> ('a.b/0001', 'seg.png')."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension.lower()
