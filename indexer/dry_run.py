"""Dry run: what a candidate version, or a candidate encoder with its pools, would have answered to recent traffic.

Owns the comparison of two sets of pools on the same images. Knows no database and no HTTP.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from indexer.catalog.traffic import Seen
from indexer.live.view import View
from perception.intervals import wilson_interval
from perception.verdict import DecisionPolicy, VerdictLabel

BATCH = 32  # queries searched at a time
_CAUTION = {VerdictLabel.SAFE: 0, VerdictLabel.REVIEW: 1, VerdictLabel.UNSAFE: 2}
Confusion = Mapping[VerdictLabel, Mapping[VerdictLabel, int]]


@dataclass(frozen=True, eq=False)
class Side:
    """One way of answering.

    Attributes:
        view: the pools.
        policy: the rule.
        embeddings: (n, d) float32 of unit L2 norm, of the images, by the encoder of the view.
    """

    view: View
    policy: DecisionPolicy
    embeddings: NDArray[np.float32]


@dataclass(frozen=True)
class Flip:
    """An image that the two sides answer differently.

    Attributes:
        seen: as it was answered at the time.
        present, candidate: what the two sides answer.
    """

    seen: Seen
    present: VerdictLabel
    candidate: VerdictLabel


@dataclass(frozen=True)
class DryRun:
    """How two sides differ on n images.

    Attributes:
        n: images.
        confusion: counts by the present verdict, then by that of the candidate; all nine are there.
        flips: images that are answered differently, the worst first.
        flips_total: how many there are, listed or not.
        interval95: Wilson's interval of the share `flips_total / n`; None without images.
    """

    n: int
    confusion: Confusion
    flips: tuple[Flip, ...]
    flips_total: int
    interval95: tuple[float, float] | None

    @property
    def disagreement(self) -> float | None:
        """Share of the images that are answered differently; None without images."""
        return self.flips_total / self.n if self.n else None


def dry_run(
    seen: Sequence[Seen],
    present: Side,
    candidate: Side,
    *,
    limit: int,
    batch: int = BATCH,
    between: Callable[[], None] = lambda: None,
) -> DryRun:
    """Compare two sides on recent traffic.

    Both answer anew: what was answered at the time may be of other pools than the present ones. Of an animation the
    frame that decided stands for the image.

    Args:
        seen: n decisions, the newest first.
        present: what is served.
        candidate: what might be.
        limit: flips that are listed. First those between safe and unsafe, then those from or to review; of either first
            those that the candidate is less cautious about; then the newest.
        batch: images searched at a time on each side, so that other searches get their turn.
        between: called after each batch; what it raises ends the work.

    Raises:
        ValueError: there are not n embeddings, or they are of another length than those of the view.
    """
    counts = {before: dict.fromkeys(VerdictLabel, 0) for before in VerdictLabel}
    flips: list[Flip] = []
    for start in range(0, len(seen), batch):
        part = seen[start : start + batch]
        verdicts = [_verdicts(side, start, len(part)) for side in (present, candidate)]
        for each, before, after in zip(part, *verdicts, strict=True):
            counts[before][after] += 1
            if before is not after:
                flips.append(Flip(each, before, after))
        between()
    interval = wilson_interval(len(flips), len(seen)) if seen else None
    return DryRun(len(seen), counts, tuple(sorted(flips, key=_badness)[:limit]), len(flips), interval)


def _verdicts(side: Side, start: int, n: int) -> list[VerdictLabel]:
    queries = side.embeddings[start : start + n]
    found = side.view.evidence(queries, side.policy.neighbors_needed)
    return [side.policy.decide(evidence.neighbors).label for evidence in found]


def _badness(flip: Flip) -> tuple[int, bool]:
    """Sorts the worst first."""
    difference = _CAUTION[flip.candidate] - _CAUTION[flip.present]
    return -abs(difference), difference > 0
