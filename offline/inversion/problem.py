"""What an inversion is asked: embeddings that pictures are sought for, and the noisy grey that every search starts at.

Eq. 9 and 10 minimise `|phi(z) - t|^2` over the pictures z, t being the unit embedding of an image or of a text. For
unit embeddings that is `2 - 2 <phi(z), t>`, so that `offline.objectives.TargetSet` with one target an image is the same
objective: it has the same best picture, and a gradient of the same direction.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor

from offline.errors import PlanError
from offline.objectives import TargetSet
from offline.seeds import mixed_seed

GREY = 0.5
NOISE = 8 / 255
_TOLERANCE = 1e-3  # of a unit embedding's norm; bf16 encoders normalise in fp32
_STARTS, _SEARCHES = 0, 1  # what a (target, seed) pair draws random numbers for


@dataclass(frozen=True, eq=False)
class Target:
    """One embedding that a picture is sought for, under one encoder.

    Attributes:
        id: unique within a run, the same under all its encoders; names files and decides random numbers.
        embedding: (d,) of unit norm.
        picture: RGB, what the embedding is of, for grids; None for a text.
        label: how it is called in a grid, such as a file name or the text.
    """

    id: str
    embedding: Tensor
    picture: Image | None
    label: str

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            PlanError: no id, or an embedding that is no finite vector of unit norm.
        """
        if not self.id:
            raise PlanError("a target needs an id")
        if self.embedding.ndim != 1 or not abs(float(self.embedding.norm()) - 1) <= _TOLERANCE:
            raise PlanError(f"the embedding of {self.id!r} is not a finite vector of unit norm")


def towards(targets: Sequence[Target], device: torch.device | str) -> TargetSet:
    """The objective of a batch, to be maximised: (b, d) unit embeddings -> (b,) cosines with each one's own target."""
    return TargetSet(torch.stack([target.embedding for target in targets]).detach().to(device))


def start_pixels(count: int, size_px: int, seed: int, ids: Sequence[str]) -> Tensor:
    """Noisy grey, `.5 + U(-8/255, 8/255)` each value.

    Each (target, seed) pair draws from a generator of its own, on the CPU, so that what a target starts at does not
    depend on the others of its batch.

    Args:
        count: how many starts, one for each of `ids`.
        size_px: height and width.
        seed: the same for all.
        ids: of the targets.

    Returns:
        (count, 3, size_px, size_px) in [0, 1].

    Raises:
        PlanError: not one id a start, no start, a size below 1 or a negative seed.
    """
    if count != len(ids):
        raise PlanError(f"{count} starts need as many ids, got {len(ids)}")
    if count < 1 or size_px < 1:
        raise PlanError(f"starts need at least 1 target and 1 px, got {count} and {size_px}")
    drawn = [torch.rand(3, size_px, size_px, generator=_generator(id, seed, _STARTS)) for id in ids]
    return GREY + NOISE * (2 * torch.stack(drawn) - 1)


def search_generator(id: str, seed: int) -> torch.Generator:
    """The random numbers of one (target, seed) pair's search, on the CPU; others than its start was drawn from.

    Raises:
        PlanError: a negative seed.
    """
    return _generator(id, seed, _SEARCHES)


def require_unique(ids: Iterable[str]) -> None:
    """Check the ids of a run's targets.

    Raises:
        PlanError: there is none, or two are the same.
    """
    seen: set[str] = set()
    for id in ids:
        if id in seen:
            raise PlanError(f"two targets have the id {id!r}")
        seen.add(id)
    if not seen:
        raise PlanError("an inversion needs at least one target")


def _generator(id: str, seed: int, purpose: int) -> torch.Generator:
    if seed < 0:
        raise PlanError(f"a seed must not be negative, got {seed}")
    of_id = int.from_bytes(hashlib.sha256(id.encode("utf8", "surrogatepass")).digest()[:8], "big")
    return torch.Generator().manual_seed(mixed_seed(seed, of_id, purpose))
