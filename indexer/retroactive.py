"""Retroactive matching: which recent requests a change of the pools would have decided otherwise.

Owns the question which of ten thousand recent decisions are worth searching again. Knows no database and no HTTP.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from indexer.catalog.traffic import Recent, Seen
from indexer.errors import UnknownExemplar
from indexer.live.view import View
from perception.verdict import DecisionPolicy, PoolLabel, VerdictLabel

EXAMINED = 512
_BATCH = 32  # queries searched at a time
# Similarities of one pair differ by less between two ways of computing them in float32.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Caught:
    """A recent decision that would be another one now.

    Attributes:
        seen: as it was answered.
        similarity: cosine of its image to the exemplar, in [-1, 1].
        before: what the pools would have answered without the change.
        after: what they answer with it; neither `before` nor what was answered.
    """

    seen: Seen
    similarity: float
    before: VerdictLabel
    after: VerdictLabel


@dataclass(frozen=True)
class RetroactiveMatches:
    """What a change would have caught.

    Attributes:
        caught: the most similar first.
        recent: decisions that were looked at.
        candidates: those among them that the change can have an effect on.
        complete: whether all candidates were searched, so that `caught` is all there is.
    """

    caught: tuple[Caught, ...]
    recent: int
    candidates: int
    complete: bool


def catch(
    recent: Recent,
    embedding: NDArray[np.float32],
    policy: DecisionPolicy,
    before: View,
    after: View,
    *,
    limit: int,
    examined: int = EXAMINED,
    enough: Callable[[], bool] = lambda: False,
) -> RetroactiveMatches:
    """Find the recent decisions that one exemplar changes: that was added, moved, or takes part again.

    Of an animation the ring has the frame that decided. That it would now be `unsafe` holds for the whole image; that
    it would be less, only as far as that frame is concerned.

    Args:
        recent: decisions, with embeddings of the encoder of the views.
        embedding: (d,) float32 of unit L2 norm, of the exemplar.
        policy: in force.
        before, after: the pools without the change and with it.
        limit: how many to return at most.
        examined: how many candidates to search at most.
        enough: asked after each batch of searches; where it says so, the work ends with what was found by then.

    Raises:
        ValueError: the embeddings are of another length than those of the views.
    """
    if not len(recent):
        return RetroactiveMatches((), 0, 0, complete=True)
    similarities = recent.embeddings @ embedding
    candidates = np.flatnonzero(similarities >= _needed(recent, policy, before, after))
    candidates = candidates[np.argsort(-similarities[candidates], kind="stable")]
    found: list[Caught] = []
    searched = 0
    while searched < min(len(candidates), examined) and len(found) < limit:
        rows = candidates[searched : min(searched + _BATCH, examined)]
        for row, old, new in _changed(recent, rows, policy, before, after):
            found.append(Caught(recent.seen[row], float(similarities[row]), old, new))
        searched += len(rows)
        if enough():
            break
    complete = searched == len(candidates) and len(found) <= limit
    return RetroactiveMatches(tuple(found[:limit]), len(recent), len(candidates), complete)


def _needed(recent: Recent, policy: DecisionPolicy, before: View, after: View) -> NDArray[np.float32]:
    """(n,) how similar an exemplar must be at least to have an effect on each decision; -inf where any may.

    By the rule 'nearest' an exemplar less similar than the best one by more than the margins that the policy asks for
    changes neither the winner nor whether its margin suffices. The exemplar that decided is one that is at most as
    similar as the best one now, unless it does not take part any more.
    """
    unknown = np.full(len(recent), -np.inf, np.float32)
    pools = (PoolLabel.SAFE, PoolLabel.UNSAFE)
    if policy.rule != "nearest" or not all(view.counts[pool] for view in (before, after) for pool in pools):
        return unknown
    suppressed = {id for record in before.state.records.values() if record for id in record.suppresses}
    rows_of: dict[str, list[int]] = {}
    for row, seen in enumerate(recent.seen):
        rows_of.setdefault(seen.nearest, []).append(row)
    known = [id for id in rows_of if id and id not in suppressed and _takes_part(before, id)]
    if not known:
        return unknown
    rows = np.array([row for id in known for row in rows_of[id]])
    places = np.repeat(np.arange(len(known)), [len(rows_of[id]) for id in known])
    deciding = np.stack([before.embedding(id) for id in known])[places]
    best = np.einsum("nd,nd->n", recent.embeddings[rows], deciding)
    unknown[rows] = best - max(policy.min_margin, policy.min_margin_unsafe) - _ROUNDING
    return unknown


def _takes_part(view: View, id: str) -> bool:
    try:
        return view.is_active(id)
    except UnknownExemplar:
        return False


def _changed(
    recent: Recent, rows: NDArray[np.intp], policy: DecisionPolicy, before: View, after: View
) -> list[tuple[int, VerdictLabel, VerdictLabel]]:
    """Of some rows those that change: the row, the verdict before, the verdict after."""
    new = [policy.decide(e.neighbors).label for e in after.evidence(recent.embeddings[rows], policy.neighbors_needed)]
    differ = [at for at, row in enumerate(rows) if new[at] is not recent.seen[row].verdict]
    if not differ:
        return []
    evidence = before.evidence(recent.embeddings[rows[differ]], policy.neighbors_needed)
    old = [policy.decide(e.neighbors).label for e in evidence]
    return [(int(rows[at]), was, new[at]) for at, was in zip(differ, old, strict=True) if was is not new[at]]
