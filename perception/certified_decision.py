"""The certified radius of a moderation decision: `DecisionPolicy`'s rules as conditions on where an image may move.

Owns which conditions keep a verdict's label, from finitely many neighbours, what is known of all others, and what
decides who takes part. The geometry is that of `perception.certificates`; knows no images, encoders or indexes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from perception.certificates import FeatureBound, Geometry
from perception.verdict import DecisionPolicy, Neighbor, PoolLabel, Verdict, VerdictLabel

LONGEST = 1 + 1e-3
"""Norm of any stored embedding, at most; galleries and indexes refuse others."""

Rows = NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Gates:
    """What decides which exemplars take part, by the image itself: on which sides of thresholds its cosines are.

    As long as all of them stay on their sides, the same exemplars take part.

    Attributes:
        directions: (m, d) of unit norm.
        thresholds: (m,) cosines.
    """

    directions: NDArray[np.float64]
    thresholds: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Surroundings:
    """What lies around an image in the pools.

    Attributes:
        neighbors: at least `DecisionPolicy.neighbors_needed` of each pool, all of a smaller one; the nearest of those
            that take part, in any order. More make a certificate larger.
        embeddings: (n, d), theirs, as they are searched.
        unseen: by pool, a similarity that none of its other exemplars exceeds; a pool without any is left out.
        gates: None where all exemplars take part whatever the image is.
    """

    neighbors: tuple[Neighbor, ...]
    embeddings: NDArray[np.float32]
    unseen: Mapping[str, float] = field(default_factory=dict)
    gates: Gates | None = None

    def __post_init__(self) -> None:
        if len(self.neighbors) != len(self.embeddings):
            raise ValueError(f"{len(self.neighbors)} neighbours and {len(self.embeddings)} embeddings do not fit")

    @classmethod
    def of(
        cls, neighbors: Sequence[Neighbor], embeddings: NDArray[np.float32], asked: int, gates: Gates | None = None
    ) -> "Surroundings":
        """From the nearest `asked` of each pool: one that has fewer has no others."""
        by_pool: dict[str, list[float]] = {}
        for neighbor in neighbors:
            by_pool.setdefault(str(neighbor.pool), []).append(neighbor.similarity)
        unseen = {pool: min(found) for pool, found in by_pool.items() if len(found) >= asked}
        return cls(tuple(neighbors), embeddings, unseen, gates)


def decision_radius(
    features: NDArray[np.floating], around: Surroundings, policy: DecisionPolicy, bound: FeatureBound
) -> float | None:
    """Radius within which the label of an image's verdict cannot change, as long as pools and policy stay as they are.

    With f the features, w the winning pool and e similarities, the label stays as long as all of these hold; each is a
    condition of the kind (1) of `perception.certificates`, and the radius is the smallest:

    - Rule 'nearest': each exemplar b of another pool has an a of w that is nearer, by the margin that the policy asks
      for: `min over b of max over a`, see `nearest_radius`. A margin of m is a condition with g = m.
    - Rule 'vote': each of the k nearest stays nearer than each exemplar that is not among them, of another pool. Then
      every pool keeps its number of votes: if one pool had one more among the new k nearest, some exemplar b of it
      would have come in, and some a of another pool, which has one less, have gone out, though a is nearer than b.
      (Within a pool they may change places.) Besides, the margin that the policy asks for, as above; of a safe image
      it must not be negative, even if the policy asks for none.
    - `min_similarity`: one exemplar at least, whichever, stays as similar as that: `max over a`, g = min_similarity.
    - Exemplars of a pool that are not among the neighbours have the pool's `unseen` similarity at most, from which
      `Geometry.ahead_of_unseen` follows.
    - Every gate stays on its side, so that suppress items go on to take the same exemplars away.
    - Similarities are clipped at -1, which could hide a margin: the nearest of w stays above -1 by it.

    Args:
        features: (d,), not normalised.
        around: what lies around their direction.
        policy: that decides.
        bound: of the features.

    Returns:
        In pixel L2 units at the encoder's input, at least 0. None where there is nothing to certify: `review` because
        there was nothing to compare with, or because a threshold of the policy was not met.
    """
    verdict = policy.decide(around.neighbors)
    if _by_threshold(verdict, policy) or verdict.pool is None:
        return None
    pools = np.array([str(PoolLabel(neighbor.pool)) for neighbor in around.neighbors])
    geometry = Geometry(features, around.embeddings, bound)
    distances: list[float] = []
    gap = _gap(verdict, policy)
    if gap is not None:
        distances.append(_leads(geometry, pools, verdict.pool, around.unseen, gap))
    if policy.rule == "vote":
        distances.append(_keeps_votes(geometry, pools, _voters(around, verdict, policy), around.unseen))
    if verdict.label is not VerdictLabel.REVIEW and policy.min_similarity > -1.0:
        distances.append(float(geometry.above(np.arange(len(geometry)), policy.min_similarity).max()))
    if around.gates is not None:
        distances.append(_least(geometry.on_their_sides(around.gates.directions, around.gates.thresholds)))
    return float(bound.pixels(_least(np.array(distances))))


def label_radius(labels: Sequence[VerdictLabel], radii: Sequence[float | None]) -> float | None:
    """Radius for the most cautious verdict over several views of one image, from those of the views' own verdicts.

    Every view may move by as much, each in its own way. `unsafe` stays as long as one view stays unsafe, so that the
    largest radius of those counts. Else every view has to keep its label: the smallest one counts.

    Args:
        labels: of at least one view.
        radii: of the same views; None where nothing is certified of one.

    Returns:
        None where nothing is certified of the label.

    Raises:
        ValueError: no views, or not one radius for each.
    """
    if not labels:
        raise ValueError("no views")
    views = list(zip(labels, radii, strict=True))
    unsafe = [radius for label, radius in views if label is VerdictLabel.UNSAFE]
    if unsafe:
        return max((radius for radius in unsafe if radius is not None), default=None)
    known = [radius for _, radius in views if radius is not None]
    return min(known) if len(known) == len(views) else None


def _by_threshold(verdict: Verdict, policy: DecisionPolicy) -> bool:
    """Whether the policy's thresholds made it `review`; of the buffer pool all that could be said is that, too."""
    if verdict.label is not VerdictLabel.REVIEW:
        return False
    return verdict.pool is not PoolLabel.BUFFER or verdict.neighbors[0].similarity < policy.min_similarity


def _gap(verdict: Verdict, policy: DecisionPolicy) -> float | None:
    """The margin that the winning pool must keep for the label to stay; None where none is needed."""
    by_vote = policy.rule == "vote"
    if verdict.pool is PoolLabel.SAFE:
        return policy.min_margin
    if verdict.pool is PoolLabel.UNSAFE and (policy.min_margin_unsafe > 0 or not by_vote):
        return policy.min_margin_unsafe
    return None if by_vote else 0.0


def _leads(geometry: Geometry, pools: NDArray[np.str_], winner: str, unseen: Mapping[str, float], gap: float) -> float:
    """Distance within which the nearest exemplar of a pool stays ahead of those of all others."""
    own, others = _rows(pools == winner), _rows(pools != winner)
    distances = [_least(geometry.ahead(own, others, gap).max(axis=0))]
    nearest = own[[int(geometry.similarities[own].argmax())]]
    distances += [
        _least(geometry.ahead_of_unseen(nearest, ceiling, LONGEST, gap))
        for pool, ceiling in unseen.items()
        if pool != winner
    ]
    return _not_clipped(geometry, nearest, gap, min(distances))


def _keeps_votes(geometry: Geometry, pools: NDArray[np.str_], voters: Rows, unseen: Mapping[str, float]) -> float:
    """Distance within which each voter stays ahead of all exemplars of other pools that do not vote."""
    rest = np.setdiff1d(np.arange(len(geometry)), voters)
    distances = np.where(pools[voters][:, None] == pools[rest], np.inf, geometry.ahead(voters, rest, 0.0))
    found = [_least(distances)]
    for pool, ceiling in unseen.items():
        rivals = voters[pools[voters] != pool]
        found.append(_least(geometry.ahead_of_unseen(rivals, ceiling, LONGEST, 0.0)))
    return _not_clipped(geometry, voters, 0.0, min(found))


def _not_clipped(geometry: Geometry, rows: Rows, gap: float, distance: float) -> float:
    """The part of a distance within which clipping similarities at -1 takes nothing off a margin, if there is one."""
    return distance if np.isinf(distance) else min(distance, _least(geometry.above(rows, gap - 1.0)))


def _voters(around: Surroundings, verdict: Verdict, policy: DecisionPolicy) -> Rows:
    """Rows of the k nearest, in the order in which the policy has put them."""
    row_of = {(str(n.pool), n.id): row for row, n in enumerate(around.neighbors)}
    return np.array([row_of[str(n.pool), n.id] for n in verdict.neighbors[: policy.k]], np.intp)


def _rows(mask: NDArray[np.bool_]) -> Rows:
    return np.flatnonzero(mask)


def _least(distances: NDArray[np.float64]) -> float:
    """The smallest, infinite where there are none."""
    return float(distances.min(initial=np.inf))
