"""Certificates over live pools: edits, suppress items and indexes of 8-bit codes are what the answer is proven for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer.backends.flat import FlatIndex
from indexer.backends.scalar_quantized import ScalarQuantizedIndex
from indexer.catalog.records import Disabled
from indexer.contents import POOL_LABELS, Exemplar
from indexer.live.surroundings import surroundings
from indexer.live.view import View
from indexer.snapshot import MakeIndex, Snapshot
from perception.certificates import FeatureBound
from perception.certified_decision import decision_radius
from perception.verdict import DecisionPolicy, VerdictLabel
from tests.indexer.live_states import DIM, Changes, Embedding, make_base, merge, record, unit, view_of

BOUND = FeatureBound(1.0, 400)


@st.composite
def states(draw: st.DrawFn) -> tuple[int, View, Embedding, DecisionPolicy, int]:
    """(seed, an edited view, features (d,), policy, neighbours asked of each pool)."""
    seed = draw(st.integers(0, 10_000))
    rng = np.random.default_rng(seed)
    query = unit(seed, 1)[0]

    def near(n: int, spread: float) -> Embedding:
        return np.asarray([row / np.linalg.norm(row) for row in query + spread * rng.normal(size=(n, DIM))], np.float32)

    index: MakeIndex = ScalarQuantizedIndex if draw(st.booleans()) else FlatIndex
    base = make_base([Exemplar(f"x{i:02d}", POOL_LABELS[i % 3]) for i in range(18)], near(18, 0.5), index=index)
    changed: Changes = {f"x{i:02d}": None for i in draw(st.lists(st.integers(0, 17), max_size=4))}
    for i, embedding in enumerate(near(4, 0.4)):
        disabled = Disabled("operator") if i == 3 else None
        changed[f"n{i}"] = record(f"n{i}", draw(st.sampled_from(POOL_LABELS)), embedding, disabled)
    for i in range(draw(st.integers(0, 2))):
        # An item that matches just about where the query is, and takes all that is near away.
        [at] = near(1, 0.3)
        threshold = float(at @ query) + draw(st.sampled_from([-0.1, -0.01, 0.01, 0.1]))
        names = tuple(draw(st.lists(st.sampled_from([f"x{i:02d}" for i in range(18)]), min_size=4, unique=True)))
        changed[f"s{i}"] = record(f"s{i}", "suppress", at, None, names, min(max(threshold, 0.01), 1.0))
    policy = draw(st.sampled_from([DecisionPolicy(), DecisionPolicy("vote", 3), DecisionPolicy(min_margin=0.01)]))
    scale = draw(st.sampled_from([0.5, 2.0]))
    return (
        seed,
        view_of(base, changed),
        query * np.float32(scale),
        policy,
        policy.neighbors_needed + draw(st.sampled_from([0, 2, 30])),
    )


def label(view: View, features: Embedding, policy: DecisionPolicy) -> VerdictLabel:
    query = (features / np.linalg.norm(features)).astype(np.float32)
    [evidence] = view.evidence(query[np.newaxis], policy.neighbors_needed)
    return policy.decide(evidence.neighbors).label


@given(states())
@settings(max_examples=120)
def test_no_features_within_the_radius_have_another_verdict(
    state: tuple[int, View, Embedding, DecisionPolicy, int],
) -> None:
    seed, view, features, policy, k = state
    [around] = surroundings(view, (features / np.linalg.norm(features))[np.newaxis], k)
    radius = decision_radius(features, around, policy, BOUND)
    if radius is None:
        assert label(view, features, policy) is VerdictLabel.REVIEW
        return
    gates = np.zeros((0, DIM)) if around.gates is None else around.gates.directions
    rng = np.random.default_rng(seed)
    aims = [*around.embeddings, *-around.embeddings, *gates, *-gates, *rng.normal(size=(20, DIM))]
    aims += [b - a for a in around.embeddings[:6] for b in around.embeddings]
    # The shortest way towards a cosine's cone is across the features.
    f = features / np.linalg.norm(features)
    aims += [aim - (aim @ f) * f for aim in [*gates, *-gates]]
    before = label(view, features, policy)
    for aim in aims:
        length = np.linalg.norm(aim)
        if radius > 0 and length > 0:
            assert label(view, np.asarray(features + radius * aim / length, np.float32), policy) is before


@pytest.mark.parametrize("index", [FlatIndex, ScalarQuantizedIndex])
def test_what_is_around_is_what_a_naive_search_finds(index: MakeIndex) -> None:
    base = make_base([Exemplar(f"x{i}", POOL_LABELS[i % 3]) for i in range(40)], unit(1, 40), index=index)
    changed: Changes = {"x3": None, "n": record("n", "safe", unit(2, 1)[0])}
    view, [query] = view_of(base, changed), unit(3, 1)
    merged = merge(base, changed, view.now)
    for k in (1, 5, 100):
        [around] = surroundings(view, query[np.newaxis], k)
        for neighbor, embedding in zip(around.neighbors, around.embeddings, strict=True):
            assert np.array_equal(embedding, merged[neighbor.id][1])
        for pool in POOL_LABELS:
            found = sorted((float(e @ query) for x, e in merged.values() if x.label == pool), reverse=True)
            near = [n.similarity for n in around.neighbors if n.pool == pool]
            assert near == pytest.approx(found[:k], abs=1e-6)
            assert (pool in around.unseen) is (k < len(found))
            if pool in around.unseen:
                assert max(found[k:]) <= around.unseen[pool] + 1e-6
        assert around.gates is None


def test_only_active_suppress_items_are_gates() -> None:
    base = make_base([Exemplar("x", "safe")], unit(0, 1))
    [at, other] = unit(5, 2)
    view = view_of(base, {
        "s": record("s", "suppress", at, None, ("x",), 0.5),
        "off": record("off", "suppress", other, Disabled("operator"), ("x",), 0.9),
    })  # fmt: skip
    assert view.gates is not None
    assert view.gates.thresholds.tolist() == [0.5]
    assert view.gates.directions[0] == pytest.approx(at, abs=1e-6)
    assert isinstance(base, Snapshot)
    [around] = surroundings(base, at[np.newaxis], 3)  # nothing is suppressed in a snapshot
    assert around.gates is None
    assert [neighbor.id for neighbor in around.neighbors] == ["x"]
