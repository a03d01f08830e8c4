"""Why a verdict came out as it did: the arithmetic of the decision, from the answer of /classify alone.

Says in numbers what `perception.verdict.DecisionPolicy` has done; it decides nothing. What an answer does not show,
such as the neighbours of a coarse one, is not made up: the parts that need it are empty.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from perception.verdict import PoolLabel
from service.wire import SHOWN_NEIGHBORS, ClassifyItem, NeighborItem, Policy

_RULES = {
    "nearest": "The pool of the most similar exemplar wins.",
    "vote": "The pool with most of the {k} most similar exemplars wins; of pools with as many, the more cautious.",
}


@dataclass(frozen=True)
class Threshold:
    """What the policy asks for, and what it got.

    Attributes:
        what: it asks of, in words.
        asked: the least that will do.
        found: what there was; None where it does not apply.
    """

    what: str
    asked: float
    found: float | None

    @property
    def distance(self) -> float | None:
        """How far above what is asked for, negative below; None where it does not apply."""
        return None if self.found is None else self.found - self.asked

    @property
    def met(self) -> bool | None:
        """Whether it was; None where it does not apply."""
        return None if self.found is None else self.found >= self.asked


@dataclass(frozen=True)
class Why:
    """The arithmetic of one verdict.

    Attributes:
        rule: of the policy, in words.
        best: the nearest exemplar of each pool that has one, most similar first.
        winner: the nearest of the pool that won; None where nothing won, or the answer does not say.
        runner_up: the nearest of all other pools; None where they have none.
        votes: pools and how many of the nearest exemplars lie in them, most first; empty for the rule 'nearest'.
        thresholds: all of the policy, in the order in which they are looked at.
    """

    rule: str
    best: tuple[NeighborItem, ...]
    winner: NeighborItem | None
    runner_up: NeighborItem | None
    votes: tuple[tuple[str, int], ...]
    thresholds: tuple[Threshold, ...]

    @property
    def lead(self) -> float | None:
        """By how much the winner is nearer than the runner-up, negative where a vote went against the nearest."""
        if self.winner is None or self.runner_up is None:
            return None
        return self.winner.similarity - self.runner_up.similarity


def neighbors_to_show(policy: Policy, most: int) -> int:
    """Neighbours of each pool to ask for, so that all that decided is among them.

    Args:
        policy: in force.
        most: that may be asked for.
    """
    needed = policy.k if policy.rule == "vote" else 1
    return min(most, max(SHOWN_NEIGHBORS, needed))


def why(item: ClassifyItem, policy: Policy) -> Why:
    """Explain one verdict.

    Args:
        item: of an answer that shows at least `neighbors_to_show` neighbours of each pool.
        policy: that decided.
    """
    best = _best(item.neighbors)
    winner = next((near for near in best if near.pool == item.pool), None)
    runner_up = next((near for near in best if near.pool != item.pool), None) if winner else None
    voters = item.neighbors[: policy.k] if policy.rule == "vote" else []
    return Why(
        _RULES[policy.rule].format(k=policy.k),
        best,
        winner,
        runner_up,
        tuple(Counter(near.pool for near in voters).most_common()),
        _thresholds(item, policy, best),
    )


def frame_to_add(item: ClassifyItem) -> int:
    """Position among the examined frames of the one that decided, as far as the answer tells; else 0.

    An opaque frame is examined once, a transparent one on white and then on black.
    """
    index, views, frames = item.frame.index, item.frame.frames_examined, item.image.frames_in_file
    if item.frame.background is None:
        return index if views == frames else 0
    return 2 * index + (item.frame.background == "black") if views == 2 * frames else 0


def _best(neighbors: Sequence[NeighborItem]) -> tuple[NeighborItem, ...]:
    first: dict[str, NeighborItem] = {}
    for near in neighbors:  # most similar first
        first.setdefault(near.pool, near)
    return tuple(first.values())


def _thresholds(item: ClassifyItem, policy: Policy, best: Sequence[NeighborItem]) -> tuple[Threshold, ...]:
    nearest = best[0].similarity if best else None
    safe, unsafe = item.pool is PoolLabel.SAFE, item.pool is PoolLabel.UNSAFE
    asked_of_unsafe = unsafe and policy.min_margin_unsafe > 0  # 0 asks for nothing, not even of a negative margin
    return (
        Threshold("similarity of the nearest exemplar", policy.min_similarity, nearest),
        Threshold("margin of a safe winner", policy.min_margin, item.margin if safe else None),
        Threshold("margin of an unsafe winner", policy.min_margin_unsafe, item.margin if asked_of_unsafe else None),
    )
