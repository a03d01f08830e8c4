"""Labelled images for training, whatever they are stored in: the door of the modules beside it.

Owns the kinds of storage by name, and how several sets become one.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from offline.data.classes import Naming, join_classes
from offline.data.examples import UNLABELLED, ClassNames, LabelledImages, TrainingExample
from offline.data.folder import FolderImages
from offline.data.shards import TarImages
from offline.data.zips import MosaicImages, ZipImages
from offline.errors import DataError, PlanError

__all__ = ["KINDS", "ClassNames", "ConcatenatedImages", "LabelledImages", "TrainingExample", "joined", "open_images"]

KINDS = ("folder", "labelled-zip", "mosaic", "tar")


def open_images(
    kind: str,
    path: Path | Sequence[Path],
    *,
    where: Mapping[str, str] | None = None,
    class_names: Naming = None,
    name: str | None = None,
) -> LabelledImages:
    """Open a set of labelled images.

    Args:
        kind: 'folder' (class = first sub-folder), 'tar' (webdataset's layout, uncompressed), 'labelled-zip' (a zip with
            `labels.csv`) or 'mosaic' (a zip of mosaics with `classes.json`).
        path: one folder, or one or several archives; for 'tar' also folders, globs and `shard-{000..146}.tar`.
        where: of a labelled zip, keeps the rows whose columns have these values.
        class_names: 'imagenet' for OpenAI's names of ImageNet-1k, by class number or rank of the WordNet id; a JSON
            file of {label: [names]}; None for the labels themselves with '_' and '-' as spaces. A mosaic has names.
        name: for logs; default from the path.

    Raises:
        DataMissing: a path is not there.
        DataError: the data has another layout, or nothing in it can be read.
        PlanError: an argument does not fit the kind or the data.
    """
    paths = (path,) if isinstance(path, Path) else tuple(path)
    if not paths:
        raise PlanError(f"a source of kind {kind!r} needs a path")
    if where and kind != "labelled-zip":
        raise PlanError(f"where selects rows of a 'labelled-zip', not of kind {kind!r}")
    if name is None:
        rows = ",".join(f"{column}={value}" for column, value in (where or {}).items())
        name = "+".join(p.stem for p in paths) + (f"[{rows}]" if rows else "")
    if kind == "folder":
        if len(paths) > 1:
            raise PlanError(f"a source of kind 'folder' takes one path, got {len(paths)}; several are several sources")
        return FolderImages(paths[0], class_names, name)
    if kind == "tar":
        return TarImages(paths, class_names, name)
    if kind == "labelled-zip":
        return ZipImages(paths, where or {}, class_names, name)
    if kind == "mosaic":
        if class_names is not None:
            raise PlanError("a source of kind 'mosaic' brings its class names; leave class_names out")
        return MosaicImages(paths, name)
    raise PlanError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")


class ConcatenatedImages:
    """Several sets, one after the other, with one list of classes; see `LabelledImages` and `join_classes`.

    Attributes:
        parts: the sets.
        starts: of each set, the index of its first image.
    """

    def __init__(self, parts: Sequence[LabelledImages]) -> None:
        if not parts:
            raise DataError("no set of images", "there is nothing to join")
        self.parts = tuple(parts)
        *starts, self._length = accumulate((len(part) for part in parts), initial=0)
        self.starts = tuple(starts)
        self.name = "+".join(part.name for part in parts)
        self.problems = tuple(f"{part.name}: {problem}" for part in parts for problem in part.problems)
        self.class_names, self._maps = join_classes(part.class_names for part in parts)

    def __len__(self) -> int:
        return self._length

    def id_of(self, index: int) -> str:
        """The set's name, and the id within the set."""
        number = self._part(index)
        part = self.parts[number]
        return f"{part.name}/{part.id_of(index - self.starts[number])}"

    def read(self, index: int) -> TrainingExample:
        """See `LabelledImages.read`; the label is an index into the joint classes."""
        number = self._part(index)
        part = self.parts[number]
        example = part.read(index - self.starts[number])
        label = UNLABELLED if example.label == UNLABELLED else int(self._maps[number][example.label])
        return TrainingExample(f"{part.name}/{example.id}", example.image, label)

    def _part(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has images 0 to {len(self) - 1}, not {index}")
        return bisect_right(self.starts, index) - 1


def joined(parts: Sequence[LabelledImages]) -> ConcatenatedImages:
    """Several sets as one, with one list of classes."""
    return ConcatenatedImages(parts)
