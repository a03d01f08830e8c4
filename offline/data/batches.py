"""Which images make up the global batch of a step, and reading a process's share of them.

Everything random is a function of (seed, step, slot), so a resumed run sees what the killed one would have seen, and
the ranks of a distributed run together see what one process sees alone. Knows of models their PreprocessSpec alone.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from offline.data.labelled import ConcatenatedImages, TrainingExample
from offline.errors import PlanError, RunError
from perception.errors import ImageError

T = TypeVar("T")

MAX_ATTEMPTS = 100
PREFETCHED = 2  # batches that wait, in each worker
# Streams of random numbers beside the sources' orders, which are numbered from 0.
_MIRRORED, _REPLACEMENT = 2**31, 2**31 + 1


class EpochOrder:
    """The order in which a source of n images is walked: a fresh permutation each epoch.

    Holds the epoch it was last asked for: sorting 1.28 million indices at every step would cost more than reading.
    """

    def __init__(self, n: int, seed: int, stream: int) -> None:
        self.n, self.seed, self.stream = n, seed, stream
        self._current: tuple[int, NDArray[np.int64]] | None = None

    def indices(self, batch: int, step: int) -> NDArray[np.int64]:
        """The `batch` indices of a step."""
        position, end = step * batch, (step + 1) * batch
        parts = []
        while position < end:
            epoch, offset = divmod(position, self.n)
            parts.append(self._permutation(epoch)[offset : offset + end - position])
            position += len(parts[-1])
        return np.concatenate(parts)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        current = self._current  # read once: another thread may replace it
        if current is None or current[0] != epoch:
            current = epoch, np.random.default_rng([self.seed, self.stream, epoch]).permutation(self.n)
            self._current = current
        return current[1]

    def __getstate__(self) -> dict[str, Any]:
        """Without the permutation: it is drawn anew sooner than sent."""
        return self.__dict__ | {"_current": None}


@dataclass(frozen=True)
class BatchPlan:
    """Composition of the global batches.

    Attributes:
        sizes: images of each source.
        per_batch: slots of a batch that each source fills. The sources take turns, in proportion, so that every
            process's share has some of each.
        seed: of orders, flips and replacements.
    """

    sizes: Sequence[int]
    per_batch: Sequence[int]
    seed: int
    _orders: tuple[EpochOrder, ...] = field(init=False, repr=False, compare=False)
    _layout: tuple[tuple[int, int], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Lay out the slots.

        Raises:
            PlanError: no source, a source without images or slots, or a negative seed.
        """
        if not self.sizes or len(self.sizes) != len(self.per_batch):
            raise PlanError(f"{len(self.sizes)} sources need as many per_batch numbers, got {len(self.per_batch)}")
        if min(self.sizes) < 1 or min(self.per_batch) < 1:
            raise PlanError(f"sizes and per_batch must be at least 1, got {self.sizes} and {self.per_batch}")
        if self.seed < 0:
            raise PlanError(f"seed must be at least 0, got {self.seed}")
        turns = [((2 * i + 1) / n, s, i) for s, n in enumerate(self.per_batch) for i in range(n)]
        orders = (EpochOrder(size, self.seed, stream) for stream, size in enumerate(self.sizes))
        object.__setattr__(self, "sizes", tuple(self.sizes))
        object.__setattr__(self, "per_batch", tuple(self.per_batch))
        object.__setattr__(self, "_orders", tuple(orders))
        object.__setattr__(self, "_layout", tuple((source, i) for _, source, i in sorted(turns)))

    @property
    def batch_size(self) -> int:
        """Slots of the global batch."""
        return len(self._layout)

    def slots(self, step: int) -> list[tuple[int, int]]:
        """(source, index within it) for each slot of a step's batch."""
        rows = [order.indices(n, step).tolist() for order, n in zip(self._orders, self.per_batch, strict=True)]
        return [(source, rows[source][i]) for source, i in self._layout]

    def replacement(self, step: int, slot: int, attempt: int) -> tuple[int, int]:
        """A substitute from the same source, as (source, index), for an image that cannot be read.

        Args:
            attempt: 1 for the first substitute.
        """
        source = self._layout[slot][0]
        rng = np.random.default_rng([self.seed, _REPLACEMENT, step, slot, attempt])
        return source, int(rng.integers(self.sizes[source]))

    def mirrored(self, step: int) -> NDArray[np.bool_]:
        """For each slot of a step's batch, whether a random flip mirrors it."""
        return np.random.default_rng([self.seed, _MIRRORED, step]).random(self.batch_size) < 0.5


class Unreadable(NamedTuple):
    """An image that was replaced."""

    source: str
    id: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """A process's share of a global batch.

    Attributes:
        pixels: (b, 3, size_px, size_px) uint8 RGB.
        labels: (b,) int64 index into the joint class names, -1 where unlabelled.
        unreadable: what was replaced.
    """

    pixels: Tensor
    labels: Tensor
    unreadable: tuple[Unreadable, ...]


class Transform(Protocol):
    """From an image to pixels, as `PreprocessSpec` has it."""

    def apply(self, image: Image) -> NDArray[np.uint8]:
        """One RGB image -> (3, size_px, size_px) uint8."""


class BatchReader:
    """Reads and preprocesses the slots that belong to one process."""

    def __init__(
        self,
        sources: ConcatenatedImages,
        plan: BatchPlan,
        preprocess: Transform,
        random_flip: bool = False,
        slots: tuple[int, int] | None = None,
    ) -> None:
        """Bind the plan to its sources.

        Args:
            preprocess: the encoder's evaluation transform, or another one.
            random_flip: mirror every second image at random.
            slots: first and behind the last slot of this process; default all.

        Raises:
            PlanError: the plan is for other sources, or the slots are not of its batch.
        """
        sizes = tuple(len(part) for part in sources.parts)
        if tuple(plan.sizes) != sizes:
            raise PlanError(f"the batches are planned for sources of {plan.sizes} images, these have {sizes}")
        self._first, self._stop = slots or (0, plan.batch_size)
        if not 0 <= self._first < self._stop <= plan.batch_size:
            raise PlanError(f"slots {slots} are not within a batch of {plan.batch_size}")
        self._sources, self._plan, self._preprocess, self._random_flip = sources, plan, preprocess, random_flip

    def read(self, step: int) -> Batch:
        """Read this process's share of a step's batch.

        Raises:
            RunError: MAX_ATTEMPTS images in a row could not be read.
        """
        slots, mirrored = self._plan.slots(step), self._plan.mirrored(step)
        pixels, labels = [], []
        unreadable: list[Unreadable] = []
        for slot in range(self._first, self._stop):
            example = self._read_slot(step, slot, slots[slot], unreadable)
            view = self._preprocess.apply(example.image)
            pixels.append(view[:, :, ::-1] if self._random_flip and mirrored[slot] else view)
            labels.append(example.label)
        return Batch(torch.from_numpy(np.stack(pixels)), torch.tensor(labels, dtype=torch.int64), tuple(unreadable))

    def _read_slot(self, step: int, slot: int, place: tuple[int, int], unreadable: list[Unreadable]) -> TrainingExample:
        """Read the slot's image or the first substitute that can be read."""
        for attempt in range(1, MAX_ATTEMPTS + 1):
            source, index = place
            try:
                return self._sources.read(self._sources.starts[source] + index)
            except (ImageError, OSError) as error:
                part = self._sources.parts[source]
                unreadable.append(Unreadable(part.name, part.id_of(index), str(error)))
            place = self._plan.replacement(step, slot, attempt)
        last = unreadable[-1]
        raise RunError(
            f"step {step}: {MAX_ATTEMPTS} images of {last.source} in a row cannot be read, "
            f"the last is {last.id}: {last.reason}"
        )

    def stream(self, start_step: int, stop_step: int, workers: int = 0) -> Generator[Batch, None, None]:
        """Yield the batches of the steps from `start_step` to before `stop_step`, in order, reading ahead.

        Closing the generator stops the readers.

        Args:
            workers: processes that read; 0 for one thread of this process.

        Raises:
            RunError: see `read`.
        """
        return stream_steps(self.read, range(start_step, stop_step), workers)


def stream_steps(read: Callable[[int], T], steps: range, workers: int = 0) -> Generator[T, None, None]:
    """Yield what `read` returns for each step, in order, reading ahead; closing the generator stops the readers.

    Args:
        workers: processes that read, which `read` is sent to; 0 for one thread of this process.

    Raises:
        RunError: as `read` does.
    """
    return _from_processes(read, steps, workers) if workers else _ahead(read, steps)


def _from_processes(read: Callable[[int], T], steps: range, workers: int) -> Generator[T, None, None]:
    loader: DataLoader[T | RunError] = DataLoader(
        _Steps(read), batch_size=None, sampler=steps, num_workers=workers, prefetch_factor=PREFETCHED
    )
    for batch in loader:
        if isinstance(batch, RunError):
            raise batch
        yield batch


class _Steps(Dataset[T | RunError], Generic[T]):
    """Steps as torch's DataLoader wants them; the error is a value, so that it arrives without a worker's traceback."""

    def __init__(self, read: Callable[[int], T]) -> None:
        self._read = read

    def __getitem__(self, step: int) -> T | RunError:
        try:
            return self._read(step)
        except RunError as error:
            return error


def _ahead(read: Callable[[int], T], steps: range) -> Generator[T, None, None]:
    """Read in one thread, at most PREFETCHED batches ahead of the consumer."""
    executor = ThreadPoolExecutor(1, thread_name_prefix="batches")
    pending: deque[Future[T]] = deque()
    try:
        for step in steps:
            pending.append(executor.submit(read, step))
            if len(pending) > PREFETCHED:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
