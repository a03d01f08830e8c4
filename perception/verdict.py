"""From neighbours to a verdict: the decision that serves, and the one that audits re-check.

Owns the pool labels and the decision rules. Knows nothing of encoders, indexes or HTTP.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Literal


class PoolLabel(StrEnum):
    """The three retrieval pools of the paper: safe, buffer (uncertain), unsafe."""

    SAFE = "safe"
    BUFFER = "buffer"
    UNSAFE = "unsafe"


class VerdictLabel(StrEnum):
    """What is answered; `review` is every case in which `safe` and `unsafe` cannot be told."""

    SAFE = "safe"
    UNSAFE = "unsafe"
    REVIEW = "review"


# Ties go to the more cautious pool; verdicts over several frames to the more cautious verdict.
_POOL_CAUTION = {PoolLabel.SAFE: 0, PoolLabel.BUFFER: 1, PoolLabel.UNSAFE: 2}
_VERDICT_CAUTION = {VerdictLabel.SAFE: 0, VerdictLabel.REVIEW: 1, VerdictLabel.UNSAFE: 2}
_VERDICT_OF_POOL = {
    PoolLabel.SAFE: VerdictLabel.SAFE,
    PoolLabel.BUFFER: VerdictLabel.REVIEW,
    PoolLabel.UNSAFE: VerdictLabel.UNSAFE,
}


@dataclass(frozen=True)
class Neighbor:
    """One exemplar near a query.

    Attributes:
        id: identifier of the exemplar within its pool.
        pool: label of the pool (or name of the gallery) that it lies in.
        similarity: cosine in [-1, 1], higher = closer.
    """

    id: str
    pool: str
    similarity: float


@dataclass(frozen=True)
class Verdict:
    """A decision and all that explains it.

    Attributes:
        label: what is answered.
        pool: the pool that won, None where there was nothing to compare with.
        margin: best similarity of the winning pool minus the best of the others, in [-2, 2]; it is negative where a
            vote went against the nearest exemplar; None where no other pool had a neighbour.
        neighbors: the evidence, most similar first.
        reason: one sentence for a person.
        policy_version: identifies the rule and all of its parameters.
    """

    label: VerdictLabel
    pool: PoolLabel | None
    margin: float | None
    neighbors: tuple[Neighbor, ...]
    reason: str
    policy_version: str


@dataclass(frozen=True)
class DecisionPolicy:
    """Decides by nearest neighbours in the three pools.

    Attributes:
        rule: 'nearest' is the paper's 1-NN (the pool of the most similar exemplar); 'vote' is the majority among the
            `k` most similar exemplars of all pools together.
        k: voters; ignored by 'nearest'.
        min_similarity: where even the nearest exemplar is less similar than this, the verdict is `review`.
        min_margin: where the winning pool is `safe` by less than this, the verdict is `review`.
        min_margin_unsafe: where the winning pool is `unsafe` by less than this, the verdict is `review`, never `safe`;
            0 asks for nothing, so that a vote against the nearest exemplar, of which the margin is negative, counts.
    """

    rule: Literal["nearest", "vote"] = "nearest"
    k: int = 5
    min_similarity: float = -1.0
    min_margin: float = 0.0
    min_margin_unsafe: float = 0.0

    def __post_init__(self) -> None:
        if self.rule not in ("nearest", "vote"):
            raise ValueError(f"rule must be 'nearest' or 'vote', got {self.rule!r}")
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        if not -1.0 <= self.min_similarity <= 1.0:
            raise ValueError(f"min_similarity must be in [-1, 1], got {self.min_similarity}")
        for name in ("min_margin", "min_margin_unsafe"):
            if not 0.0 <= getattr(self, name) <= 2.0:
                raise ValueError(f"{name} must be in [0, 2], got {getattr(self, name)}")

    @property
    def version(self) -> str:
        """Rule name and a hash of all parameters: equal versions decide equally."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{self.rule}-{digest[:12]}"

    @property
    def neighbors_needed(self) -> int:
        """How many neighbours of each pool `decide` needs to see."""
        return self.k if self.rule == "vote" else 1

    def decide(self, neighbors: Iterable[Neighbor]) -> Verdict:
        """Decide from the nearest exemplars of every pool.

        Fails closed: with no neighbour at all, none in the safe or in the unsafe pool, or a similarity that is not a
        number, the verdict is `review`. Ties go to the more cautious pool.

        Args:
            neighbors: at least `neighbors_needed` of each pool (all of a smaller pool), in any order.
        """
        evidence = tuple(neighbors)
        if not all(math.isfinite(n.similarity) for n in evidence):
            return self._review(None, None, evidence, "a similarity is not a finite number")
        evidence = tuple(sorted(evidence, key=lambda n: (-n.similarity, -_POOL_CAUTION[PoolLabel(n.pool)], n.id)))
        best: dict[PoolLabel, float] = {}
        for neighbor in evidence:
            best.setdefault(PoolLabel(neighbor.pool), neighbor.similarity)
        for pool in (PoolLabel.SAFE, PoolLabel.UNSAFE):
            if pool not in best:
                return self._review(None, None, evidence, f"nothing to compare with: no exemplar in the {pool} pool")
        winner = self._winner(evidence)
        margin = best[winner] - max(similarity for pool, similarity in best.items() if pool != winner)
        nearest = evidence[0]
        if nearest.similarity < self.min_similarity:
            reason = (
                f"nearest exemplar has similarity {nearest.similarity:.4f}, the policy asks for {self.min_similarity}"
            )
            return self._review(winner, margin, evidence, reason)
        if winner is PoolLabel.SAFE and margin < self.min_margin:
            reason = f"safe by a margin of {margin:.4f}, the policy asks for {self.min_margin}"
            return self._review(winner, margin, evidence, reason)
        if winner is PoolLabel.UNSAFE and margin < self.min_margin_unsafe and self.min_margin_unsafe > 0:
            reason = f"unsafe by a margin of {margin:.4f}, the policy asks for {self.min_margin_unsafe}"
            return self._review(winner, margin, evidence, reason)
        reason = f"nearest exemplar is {nearest.id!r} in the {nearest.pool} pool (similarity {nearest.similarity:.4f})"
        if self.rule == "vote":
            votes = sum(PoolLabel(n.pool) is winner for n in evidence[: self.k])
            reason = f"{votes} of the {min(self.k, len(evidence))} nearest exemplars are in the {winner} pool; {reason}"
        return Verdict(_VERDICT_OF_POOL[winner], winner, margin, evidence, reason, self.version)

    def _winner(self, evidence: Sequence[Neighbor]) -> PoolLabel:
        """The pool that wins among the neighbours, which are sorted with the most similar first."""
        if self.rule == "nearest":
            return PoolLabel(evidence[0].pool)
        votes = dict.fromkeys(PoolLabel, 0)
        for neighbor in evidence[: self.k]:
            votes[PoolLabel(neighbor.pool)] += 1
        return max(PoolLabel, key=lambda pool: (votes[pool], _POOL_CAUTION[pool]))

    def _review(
        self, pool: PoolLabel | None, margin: float | None, evidence: tuple[Neighbor, ...], reason: str
    ) -> Verdict:
        return Verdict(VerdictLabel.REVIEW, pool, margin, evidence, reason, self.version)


def most_cautious(verdicts: Sequence[Verdict]) -> int:
    """Index of the verdict that decides over several frames of one image: unsafe before review before safe.

    Among equals the first. Raises ValueError for an empty sequence: no frame means no verdict, never `safe`.
    """
    if not verdicts:
        raise ValueError("no verdicts to choose from")
    return max(range(len(verdicts)), key=lambda i: (_VERDICT_CAUTION[verdicts[i].label], -i))
