"""What all sets of labelled images have in common: their protocol, their index, and bytes that are read by position.

A set is opened once, which finds every image without reading any, and is immutable from then on. It keeps no open file
and no lock, so that any thread may read it, and any process that it is forked or sent to.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, overload

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from offline.errors import DataError
from perception.errors import ImageTooLarge
from perception.image import ImageLimits, decode

# Training looks at the first frame alone.
LIMITS = ImageLimits(max_frames=1)
UNLABELLED = -1

# By class index, the names that each class goes by; the first is the word for prompts.
ClassNames = tuple[tuple[str, ...], ...]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class TrainingExample:
    """One image of a set.

    Attributes:
        id: unique within the set.
        image: RGB.
        label: index into the set's class names, or -1 for an unlabelled image.
    """

    id: str
    image: Image
    label: int


class LabelledImages(Protocol):
    """An immutable set of images that are read by index, in any order, by any thread or process.

    Attributes:
        name: for logs.
        class_names: by class index the names that the class goes by, the one for prompts first; () where nothing is
            labelled.
        problems: what was left out when the set was opened, and why.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def class_names(self) -> ClassNames: ...  # noqa: D102

    @property
    def problems(self) -> tuple[str, ...]: ...  # noqa: D102

    def __len__(self) -> int: ...

    def id_of(self, index: int) -> str:
        """The id of an image, without reading it."""

    def read(self, index: int) -> TrainingExample:
        """Decode one image.

        Raises:
            ImageError: it is not an image that can be decoded.
            OSError: its bytes cannot be read.
            IndexError: there is no such index.
        """


class PackedNames(Sequence[str]):
    """Many strings in two blocks of memory: quick to send to a worker, and a fork shares them for good."""

    def __init__(self, names: Iterable[str]) -> None:
        # surrogatepass: file names need not be text.
        encoded = [name.encode("utf8", "surrogatepass") for name in names]
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self._text = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = self._ends[index - 1] if index else 0
        return self._text[start : self._ends[index]].decode("utf8", "surrogatepass")


class IndexedImages(ABC):
    """A set of images whose ids and labels are known before any image is read; see `LabelledImages`."""

    def __init__(
        self, name: str, ids: Sequence[str], labels: Labels, class_names: ClassNames, problems: Sequence[str]
    ) -> None:
        """Hold the index.

        Args:
            ids, labels: of every image.

        Raises:
            DataError: there is no image.
        """
        if not ids:
            found = f"; {len(problems)} left out, the first: {problems[0]}" if problems else ""
            raise DataError(name, f"holds no image{found}")
        self.name, self.class_names, self.problems = name, class_names, tuple(problems)
        self._ids, self._labels = PackedNames(ids), labels

    def __len__(self) -> int:
        return len(self._labels)

    def id_of(self, index: int) -> str:
        """See `LabelledImages.id_of`."""
        self._check(index)
        return self._ids[index]

    def read(self, index: int) -> TrainingExample:
        """See `LabelledImages.read`."""
        self._check(index)
        return TrainingExample(self._ids[index], self._image(index), int(self._labels[index]))

    @abstractmethod
    def _image(self, index: int) -> Image:
        """Decode the image of a valid index."""

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has images 0 to {len(self) - 1}, not {index}")


def first_view(data: bytes) -> Image:
    """Decode a file's first frame, transparency laid on white.

    Raises:
        ImageError: see `perception.image.decode`.
    """
    return decode(data, LIMITS).frames[0].image


def read_range(path: str | Path, offset: int = 0, size: int | None = None) -> bytes:
    """Read part of a file, or all of it; opens and closes it, so that nothing is shared between callers.

    Raises:
        ImageTooLarge: more bytes than an image may have.
        OSError: the file cannot be read, or ends too early.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size if size is None else size
        if size > LIMITS.max_bytes:
            raise ImageTooLarge("bytes", LIMITS.max_bytes, size)
        return read_exactly(descriptor, offset, size)
    finally:
        os.close(descriptor)


def read_exactly(descriptor: int, offset: int, size: int) -> bytes:
    """Read `size` bytes at an offset, or raise OSError."""
    data = b""
    while len(data) < size:
        part = os.pread(descriptor, size - len(data), offset + len(data))
        if not part:
            raise OSError(f"file ends at byte {offset + len(data)}, expected {size} bytes from byte {offset}")
        data += part
    return data
