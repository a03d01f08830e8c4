"""Triplets of NIGHTS for training: which rows make up a step, and reading their images.

Everything random is a function of (seed, epoch), so a resumed run sees what the killed one would have seen. Knows of
models their PreprocessSpec alone.
"""

import hashlib
import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from offline.data.batches import EpochOrder, stream_steps
from offline.data.files import read_image_file, require_files
from offline.data.two_afc import NIGHTS_LAYOUT, Triplet, read_nights
from offline.errors import DataError, DataMissing, RunError
from perception.preprocess import PreprocessSpec

_LIMIT_STREAM, _ORDER_STREAM = 2**31, 0


def open_nights(folder: Path, split: str, limit: int, seed: int) -> list[Triplet]:
    """The triplets of a split, whose image files are all there.

    Args:
        split: 'train' or 'val'.
        limit: the first so many of a seeded shuffle; 0 for all, in the table's order.

    Raises:
        DataError: the folder has another layout, the split is empty, or files are missing.
    """
    triplets = read_nights(folder, split)
    if limit:
        order = np.random.default_rng([seed, _LIMIT_STREAM]).permutation(len(triplets))
        triplets = [triplets[i] for i in order[:limit].tolist()]
    require_files([path for t in triplets for path in (t.reference, t.left, t.right)], "NIGHTS", NIGHTS_LAYOUT)
    return triplets


def triplets_sha256(triplets: Sequence[Triplet]) -> str:
    """Hash of which triplets these are and what people said of them, in order; of paths their last three parts."""
    rows = [
        (t.id, t.set, t.prefers_right, *("/".join(p.parts[-3:]) for p in (t.reference, t.left, t.right)))
        for t in triplets
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


@dataclass(frozen=True)
class TripletOrder:
    """Which of n triplets make up each step: a fresh permutation each epoch, whose last batch may be shorter."""

    n: int
    batch_size: int
    seed: int
    _order: EpochOrder = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_order", EpochOrder(self.n, self.seed, _ORDER_STREAM))

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return -(-self.n // self.batch_size)

    def rows(self, step: int) -> list[int]:
        """The triplets of a step, 0-based and counted over all epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self.batch_size
        rows: list[int] = self._order.indices(self.n, epoch)[start : start + self.batch_size].tolist()
        return rows


class TripletBatch(NamedTuple):
    """Some triplets.

    Attributes:
        images: (b, 3, ...) of reference, left and right: (3, s, s) uint8 pixels, or (d,) features.
        prefers_right: (b,) bool.
    """

    images: Tensor
    prefers_right: Tensor


class TripletImages:
    """Reads the images of triplets as an encoder takes them."""

    def __init__(self, triplets: Sequence[Triplet], preprocess: PreprocessSpec) -> None:
        self.triplets, self.preprocess = tuple(triplets), preprocess

    def __len__(self) -> int:
        return len(self.triplets)

    def read(self, rows: Sequence[int]) -> TripletBatch:
        """Read some triplets: (b, 3, 3, s, s) uint8.

        Raises:
            RunError: an image cannot be read; without it there is no triplet.
        """
        chosen = [self.triplets[row] for row in rows]
        try:
            pixels = [
                np.stack([self.preprocess.apply(read_image_file(path)) for path in (t.reference, t.left, t.right)])
                for t in chosen
            ]
        except (DataError, DataMissing) as error:
            raise RunError(f"a triplet of NIGHTS cannot be read: {error}") from error
        return TripletBatch(torch.from_numpy(np.stack(pixels)), torch.tensor([t.prefers_right for t in chosen]))


class Part(NamedTuple):
    """Reads the triplets of a step; a value, so that worker processes can have it.

    Attributes:
        images: where they are.
        order: which they are; None for all in their order, `size` at a time.
        size: triplets of a step without an order.
    """

    images: TripletImages
    order: TripletOrder | None
    size: int = 0

    def read(self, step: int) -> TripletBatch:
        """The triplets of a step; see `TripletImages.read`."""
        start = step * self.size
        rows = self.order.rows(step) if self.order else range(start, min(start + self.size, len(self.images)))
        return self.images.read(rows)

    def stream(self, steps: range, workers: int = 0) -> Generator[TripletBatch, None, None]:
        """The triplets of several steps, read ahead; see `stream_steps`."""
        return stream_steps(self.read, steps, workers)
