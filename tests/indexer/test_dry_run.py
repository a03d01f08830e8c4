"""A dry run counts and lists what two sides answer differently."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer.catalog.traffic import Seen
from indexer.contents import POOL_LABELS, Exemplar
from indexer.dry_run import DryRun, Side, dry_run
from indexer.live.view import View
from perception.intervals import wilson_interval
from perception.verdict import DecisionPolicy, VerdictLabel
from tests.indexer.live_states import NOW, Embedding, make_base, unit, view_of

SAFE, REVIEW, UNSAFE = VerdictLabel.SAFE, VerdictLabel.REVIEW, VerdictLabel.UNSAFE


def pools(seed: int, n: int = 12, dim: int = 5) -> View:
    exemplars = [Exemplar(f"b{i}", POOL_LABELS[i % 3]) for i in range(n)]
    return view_of(make_base(exemplars, unit(seed, n, dim)), {}, dim=dim)


def traffic(n: int) -> list[Seen]:
    return [Seen(f"r{i}", f"{i:064x}", NOW, REVIEW, None, None, "", "v") for i in range(n)]


def one_by_one(side: Side) -> list[VerdictLabel]:
    k = side.policy.neighbors_needed
    return [side.policy.decide(side.view.evidence(row[np.newaxis], k)[0].neighbors).label for row in side.embeddings]


@settings(max_examples=40)
@given(
    n=st.integers(0, 40),
    seeds=st.tuples(st.integers(0, 100), st.integers(0, 100)),
    limit=st.integers(0, 50),
    batch=st.integers(1, 50),
    other_encoder=st.booleans(),
)
def test_as_counted_one_by_one(n: int, seeds: tuple[int, int], limit: int, batch: int, other_encoder: bool) -> None:
    """The candidate has a policy of its own, and where it is of another encoder, embeddings of another length."""
    dim = 7 if other_encoder else 5
    present = Side(pools(seeds[0]), DecisionPolicy(min_margin=0.05), unit(1, n))
    embeddings = unit(2, n, dim) if other_encoder else present.embeddings
    candidate = Side(pools(seeds[1], dim=dim), DecisionPolicy("vote", 3), embeddings)
    seen = traffic(n)
    found = dry_run(seen, present, candidate, limit=limit, batch=batch)
    pairs = list(zip(one_by_one(present), one_by_one(candidate), strict=True))
    counts = Counter(pairs)
    assert {(a, b): found.confusion[a][b] for a in VerdictLabel for b in VerdictLabel} == {
        (a, b): counts[a, b] for a in VerdictLabel for b in VerdictLabel
    }
    differing = {s.request_id: pair for s, pair in zip(seen, pairs, strict=True) if pair[0] is not pair[1]}
    assert (found.n, found.flips_total) == (n, len(differing))
    assert len(found.flips) == min(limit, len(differing))
    for flip in found.flips:
        assert differing[flip.seen.request_id] == (flip.present, flip.candidate)
    order = [(UNSAFE, SAFE), (SAFE, UNSAFE), (UNSAFE, REVIEW), (REVIEW, SAFE), (SAFE, REVIEW), (REVIEW, UNSAFE)]
    rank = {pair: (0, 1, 2, 2, 3, 3)[at] for at, pair in enumerate(order)}
    places = [(rank[f.present, f.candidate], int(f.seen.request_id[1:])) for f in found.flips]
    assert all(a < b for a, b in pairwise(places))
    everything = sorted(rank[pair] for pair in differing.values())
    assert [place for place, _ in places] == everything[: len(places)]
    if n:
        assert found.disagreement == len(differing) / n
        assert found.interval95 == wilson_interval(len(differing), n)
    else:
        assert (found.disagreement, found.interval95) == (None, None)


def same(n: int, batch: int, calls: list[int]) -> DryRun:
    side = Side(pools(3), DecisionPolicy(), unit(1, n))
    return dry_run(traffic(n), side, side, limit=10, batch=batch, between=lambda: calls.append(0))


def test_a_candidate_like_the_present_one_flips_nothing() -> None:
    calls: list[int] = []
    found = same(50, 20, calls)
    assert (found.flips, found.flips_total) == ((), 0)
    assert sum(found.confusion[label][label] for label in VerdictLabel) == 50
    assert found.interval95 is not None
    assert found.interval95[0] == 0.0
    assert len(calls) == 3


def test_the_caller_may_end_it_between_batches() -> None:
    side = Side(pools(3), DecisionPolicy(), unit(1, 10))

    def end() -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        dry_run(traffic(10), side, side, limit=10, batch=5, between=end)


@pytest.mark.parametrize("embeddings", [unit(1, 9), unit(1, 10, 6)])
def test_embeddings_that_do_not_fit_are_refused(embeddings: Embedding) -> None:
    side = Side(pools(3), DecisionPolicy(), unit(1, 10))
    with pytest.raises(ValueError, match=r".+"):
        dry_run(traffic(10), side, Side(side.view, side.policy, embeddings), limit=10)


def test_pools_without_anything_to_compare_with_answer_review() -> None:
    side = Side(pools(3), DecisionPolicy(), unit(1, 10))
    empty = Side(view_of(None, {}), DecisionPolicy(), side.embeddings)
    found = dry_run(traffic(10), side, empty, limit=10)
    assert sum(found.confusion[label][REVIEW] for label in VerdictLabel) == 10
