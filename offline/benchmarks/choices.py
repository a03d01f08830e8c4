"""Disjoint parts of sets of images, by a seed: what goes into the pools, what is asked, what the attacker knows.

Which image goes where is decided before any encoder is loaded. Images that cannot be decoded are passed over.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL.Image import Image

from offline.data.labelled import ConcatenatedImages, joined, open_images
from offline.errors import DataError
from offline.seeds import mixed_seed
from perception.errors import ImageError


@dataclass(frozen=True, eq=False)
class Choice:
    """Some images of a set, in a fixed order.

    Attributes:
        images: the whole set.
        indices: of the chosen ones.
    """

    images: ConcatenatedImages
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def ids(self) -> tuple[str, ...]:
        """`<folder>/<path within it>` of each."""
        return tuple(self.images.id_of(index) for index in self.indices)

    def read(self) -> Iterator[tuple[str, Image]]:
        """Id and image of each that can be decoded."""
        for index in self.indices:
            try:
                example = self.images.read(index)
            except (ImageError, OSError):
                continue
            yield example.id, example.image

    def part(self, start: int, stop: int) -> "Choice":
        """Those from `start` on, without `stop`."""
        return Choice(self.images, self.indices[start:stop])


def open_folders(folders: Sequence[Path]) -> ConcatenatedImages:
    """All images below some folders; an id starts with its folder's name.

    Raises:
        DataMissing, DataError: a folder is not there, or holds no image.
    """
    return joined([open_images("folder", folder, name=folder.name) for folder in folders])


def choose(images: ConcatenatedImages, counts: Sequence[int], seed: int, *, name: str) -> list[Choice]:
    """Disjoint parts of a seeded shuffle, one after the other, of images that can be decoded; and the rest.

    Args:
        counts: of the parts.
        name: for messages.

    Returns:
        One choice a count, then what is left, of which nothing has been decoded.

    Raises:
        DataError: there are fewer images.
    """
    order = np.random.default_rng(mixed_seed(seed)).permutation(len(images)).tolist()
    good: list[int] = []
    needed, tried = sum(counts), 0
    for index in order:
        if len(good) == needed:
            break
        tried += 1
        if _decodes(images, index):
            good.append(index)
    if len(good) < needed:
        raise DataError(name, f"needs {needed} images that can be decoded, found {len(good)} of {len(images)} files")
    parts, start = [], 0
    for count in counts:
        parts.append(Choice(images, tuple(good[start : start + count])))
        start += count
    return [*parts, Choice(images, tuple(order[tried:]))]


def _decodes(images: ConcatenatedImages, index: int) -> bool:
    try:
        images.read(index)
    except (ImageError, OSError):
        return False
    return True
