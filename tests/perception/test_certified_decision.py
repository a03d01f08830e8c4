"""Certified radii of verdicts: the policy itself is asked all over the ball, with exemplars that were not looked at."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from perception.certificates import FORWARD_ERROR, FeatureBound, nearest_radius
from perception.certified_decision import Gates, Surroundings, decision_radius, label_radius
from perception.verdict import DecisionPolicy, Neighbor, PoolLabel, Verdict, VerdictLabel

Array = NDArray[np.float64]
POOLS = [str(pool) for pool in PoolLabel]
SAFE, REVIEW, UNSAFE = VerdictLabel.SAFE, VerdictLabel.REVIEW, VerdictLabel.UNSAFE
PLAIN = FeatureBound(1.0, 400)


def unit(vectors: Array) -> NDArray[np.float32]:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), np.float32)


def neighbors_of(features: Array, pools: list[str], exemplars: NDArray[np.float32]) -> list[Neighbor]:
    """All exemplars, with similarities as an index computes them."""
    similarities = np.clip(exemplars.astype(float) @ unit(features).astype(float), -1, 1)
    return [Neighbor(f"x{i}", pool, float(s)) for i, (pool, s) in enumerate(zip(pools, similarities, strict=True))]


def surroundings(features: Array, pools: list[str], exemplars: NDArray[np.float32], asked: int) -> Surroundings:
    """The nearest `asked` of each pool."""
    everyone = neighbors_of(features, pools, exemplars)
    kept = [
        neighbor
        for pool in POOLS
        for neighbor in sorted((n for n in everyone if n.pool == pool), key=lambda n: -n.similarity)[:asked]
    ]
    rows = [int(neighbor.id[1:]) for neighbor in kept]
    return Surroundings.of(kept, exemplars[rows], asked)


@st.composite
def situations(draw: st.DrawFn) -> tuple[int, Array, list[str], NDArray[np.float32], DecisionPolicy, int, int]:
    """(seed, features, pools, exemplars, policy, neighbours asked of each pool, fixed coordinates)."""
    seed, fixed = draw(st.integers(0, 100_000)), draw(st.integers(0, 1))
    rng = np.random.default_rng(seed)
    dim = draw(st.integers(2, 4)) + fixed
    features = rng.normal(size=dim) * draw(st.sampled_from([0.3, 1.0, 3.0]))
    if fixed:
        features[-1] = 1.0
    spread = draw(st.sampled_from([0.1, 0.5, 2.0]))
    pools = POOLS + draw(st.lists(st.sampled_from(POOLS), max_size=9))
    own = draw(st.sampled_from([*POOLS, None]))  # whose exemplars are nearer than the others, so that votes are clear
    reach = np.array([spread * (0.3 if pool == own else 1.0) for pool in pools])[:, None]
    exemplars = unit(features / np.linalg.norm(features) + reach * rng.normal(size=(len(pools), dim)))
    exemplars *= draw(st.sampled_from([1.0, 1.0, 0.9995, 1.0005]))  # norms as galleries may have them
    policy = DecisionPolicy(
        rule=draw(st.sampled_from(["nearest", "vote"])),
        k=draw(st.integers(1, 5)),
        min_similarity=draw(st.sampled_from([-1.0, -1.0, 0.3, 0.9])),
        min_margin=draw(st.sampled_from([0.0, 0.0, 0.02])),
        min_margin_unsafe=draw(st.sampled_from([0.0, 0.0, 0.01])),
    )
    asked = draw(st.sampled_from([0, 1, 20])) + policy.neighbors_needed
    return seed, features, pools, exemplars, policy, asked, fixed


def ways(seed: int, features: Array, exemplars: NDArray[np.float32], fixed: int) -> Array:
    """Unit directions in which features can move: at random, towards exemplars, and straight over all borders."""
    rng = np.random.default_rng(seed)
    e = exemplars.astype(float)
    pairs = [a - b for a, b in itertools.permutations(e, 2)]
    tilted = [c - m * features / np.linalg.norm(features) for c in [*pairs, *-e] for m in (0.02, 0.3, 0.9)]
    found = np.stack([*rng.normal(size=(150, len(features))), *pairs, *e, *-e, *tilted])
    found[:, len(features) - fixed :] = 0
    lengths = np.linalg.norm(found, axis=1)
    return np.asarray(found[lengths > 0] / lengths[lengths > 0, None])


@given(situations())
@settings(max_examples=120)
def test_no_features_within_the_radius_have_another_label(
    situation: tuple[int, Array, list[str], NDArray[np.float32], DecisionPolicy, int, int],
) -> None:
    seed, features, pools, exemplars, policy, asked, fixed = situation

    def verdict(at: Array) -> Verdict:
        return policy.decide(neighbors_of(at, pools, exemplars))

    before = verdict(features)
    radius = decision_radius(
        features, surroundings(features, pools, exemplars, asked), policy, replace(PLAIN, fixed=fixed)
    )
    if radius is None:
        assert before.label is REVIEW
        return
    assert 0 <= radius <= 20
    if radius > 0:
        for way in ways(seed, features, exemplars, fixed):
            assert verdict(features + radius * way).label is before.label


@given(situations())
@settings(max_examples=40)
def test_more_neighbors_never_certify_less(
    situation: tuple[int, Array, list[str], NDArray[np.float32], DecisionPolicy, int, int],
) -> None:
    _, features, pools, exemplars, policy, asked, fixed = situation
    radii = [
        decision_radius(features, surroundings(features, pools, exemplars, k), policy, replace(PLAIN, fixed=fixed))
        for k in (asked, asked + 2, len(pools))
    ]
    assert [radius is None for radius in radii] in ([True] * 3, [False] * 3)
    known = [radius for radius in radii if radius is not None]
    assert all(more >= less - 1e-9 for less, more in itertools.pairwise(known))


def circle(degrees: float, norm: float = 1.0) -> Array:
    return norm * np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))])


def on_circle(
    policy: DecisionPolicy, exemplars: list[tuple[str, float]], norm: float = 2.0, gates: Gates | None = None
) -> float | None:
    """The certificate of features at 0 degrees among exemplars (pool, degrees)."""
    around = surroundings(
        circle(0, norm), [pool for pool, _ in exemplars], unit(np.stack([circle(at) for _, at in exemplars])), 20
    )
    return decision_radius(circle(0, norm), replace(around, gates=gates), policy, PLAIN)


def test_closed_forms_on_a_circle() -> None:
    """The border of two exemplars halves their angle; that of a threshold is at its own angle; |f| = 2."""
    two = [("safe", 10.0), ("unsafe", -50.0)]
    border = 2 * np.sin(np.radians(20))
    assert on_circle(DecisionPolicy(), two) == pytest.approx(border, rel=1e-3)
    assert on_circle(DecisionPolicy(), [(pool, at * -1) for pool, at in two]) == pytest.approx(border, rel=1e-3)
    # min_similarity: 25 degrees from an exemplar at 10.
    policy = DecisionPolicy(min_similarity=float(np.cos(np.radians(25))))
    assert on_circle(policy, two) == pytest.approx(2 * np.sin(np.radians(15)), rel=1e-3)
    # A second exemplar nearer to where the features would go takes over.
    assert on_circle(policy, [*two, ("safe", -6.0)]) == pytest.approx(2 * np.sin(np.radians(19)), rel=1e-3)
    # A margin: cos(x + 10) - cos(50 - x) = 0.2 degrees on the way to the unsafe one.
    angles = np.linspace(0, np.pi / 4, 200_001)
    lead = np.cos(angles + np.radians(10)) - np.cos(np.radians(50) - angles)
    crossing = angles[np.flatnonzero(lead <= 0.2)[0]]
    assert on_circle(DecisionPolicy(min_margin=0.2), two) == pytest.approx(2 * np.sin(crossing), rel=1e-3)
    assert on_circle(DecisionPolicy(min_margin_unsafe=0.2), two) == pytest.approx(border, rel=1e-3)


def test_votes_may_change_places_within_a_pool() -> None:
    """Three unsafe ones, of which two vote: that the third may come in for the second certifies no less."""
    exemplars = [("unsafe", 1.0), ("unsafe", 2.0), ("unsafe", 2.5), ("safe", -30.0)]
    policy = DecisionPolicy(rule="vote", k=2)
    # The second voter, at 2 degrees, and the safe one at -30 are as near at -14.
    assert on_circle(policy, exemplars) == pytest.approx(2 * np.sin(np.radians(14)), rel=1e-3)
    assert on_circle(replace(policy, k=4), exemplars) == pytest.approx(20)  # all vote: nothing can change
    # A margin that unsafe must keep is lost before: cos(1 + x) - cos(30 - x) = 0.1.
    angles = np.radians(np.linspace(0, 15, 100_001))
    crossing = angles[np.flatnonzero(np.cos(np.radians(1) + angles) - np.cos(np.radians(30) - angles) <= 0.1)[0]]
    strict = replace(policy, min_margin_unsafe=0.1)
    assert on_circle(strict, exemplars) == pytest.approx(2 * np.sin(crossing), rel=1e-3)


def test_exemplars_that_nobody_has_looked_at_may_be_anywhere() -> None:
    """Safe ones at 30 and 31 degrees: a third one may be at -31, as near to the voter at 2 as -14.5 is."""
    pools, at = ["unsafe", "unsafe", "safe", "safe"], [1.0, 2.0, 30.0, 31.0]
    exemplars = unit(np.stack([circle(degrees) for degrees in at]))
    for policy, all_seen, border in (
        (DecisionPolicy(rule="vote", k=2), 15.5, 14.5),  # voter 1 or 2, and what is at 30
        (DecisionPolicy(), 16.0, 15.0),  # what is at 30 has one at 2 before it; for the rest the nearest counts, at 1
    ):
        for asked, degrees in ((3, all_seen), (2, border)):
            around = surroundings(circle(0, 2.0), pools, exemplars, asked)
            found = decision_radius(circle(0, 2.0), around, policy, PLAIN)
            assert found == pytest.approx(2 * np.sin(np.radians(degrees)), rel=5e-3)  # norms may be up to 1.001


def test_a_vote_for_safe_against_the_nearest_asks_for_review() -> None:
    exemplars = [("unsafe", 1.0), ("safe", 5.0), ("safe", 6.0), ("safe", 80.0), ("unsafe", 90.0)]
    policy = DecisionPolicy(rule="vote", k=3)
    assert on_circle(policy, exemplars) is None  # its margin is negative
    turned = [({"safe": "unsafe", "unsafe": "safe"}[pool], at) for pool, at in exemplars]
    # A vote for unsafe counts whatever its margin; the safe voter at 1 and the unsafe one at 80 are as near at 40.5.
    assert on_circle(policy, turned) == pytest.approx(2 * np.sin(np.radians(40.5)), rel=1e-3)


@pytest.mark.parametrize(
    ("policy", "exemplars"),
    [
        (DecisionPolicy(), []),
        (DecisionPolicy(), [("safe", 3.0)]),
        (DecisionPolicy(), [("buffer", 3.0), ("unsafe", 9.0)]),
        (DecisionPolicy(min_similarity=0.99), [("safe", 10.0), ("unsafe", 50.0)]),
        (DecisionPolicy(min_similarity=0.99), [("buffer", 10.0), ("unsafe", 50.0), ("safe", 60.0)]),
        (DecisionPolicy(min_margin=0.5), [("safe", 10.0), ("unsafe", 50.0)]),
        (DecisionPolicy(min_margin_unsafe=0.5), [("unsafe", 10.0), ("safe", 50.0)]),
    ],
)
def test_review_by_a_threshold_has_no_radius(policy: DecisionPolicy, exemplars: list[tuple[str, float]]) -> None:
    if exemplars:
        assert on_circle(policy, exemplars) is None
    else:
        empty = Surroundings((), np.zeros((0, 2), np.float32))
        assert decision_radius(circle(0), empty, policy, PLAIN) is None


def test_review_since_the_buffer_pool_is_nearest_has_one() -> None:
    three = [("buffer", 10.0), ("unsafe", -50.0), ("safe", 80.0)]
    assert on_circle(DecisionPolicy(min_similarity=0.5), three) == pytest.approx(2 * np.sin(np.radians(20)), rel=1e-3)


@pytest.mark.parametrize("at", [30.0, -30.0, 120.0])
@pytest.mark.parametrize("wide", [25.0, 35.0])
def test_gates_must_stay_as_they_are(at: float, wide: float) -> None:
    """Features within `wide` degrees of `at` meet the gate: 5 degrees to go from 0, in or out; 85 to 95 from 120."""
    gates = Gates(circle(at)[None], np.array([np.cos(np.radians(wide))]))
    two = [("safe", 10.0), ("unsafe", -50.0)]
    found = on_circle(DecisionPolicy(), two, gates=gates)
    assert found == pytest.approx(2 * np.sin(np.radians(min(20, abs(abs(at) - wide)))), rel=1e-3)


def test_the_retrieval_form_is_the_plain_rule() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        features, exemplars = rng.normal(size=5) * 2, unit(rng.normal(size=(12, 5)))
        pools = ["safe"] * 6 + ["unsafe"] * 6
        around = surroundings(features, pools, exemplars, 20)
        found = decision_radius(features, around, DecisionPolicy(), PLAIN)
        won = np.array(pools) == around.neighbors[int(np.argmax([n.similarity for n in around.neighbors]))].pool
        assert found == pytest.approx(nearest_radius(features, exemplars[won], exemplars[~won], PLAIN), abs=1e-9)


def test_a_duplicate_in_two_pools_certifies_nothing() -> None:
    assert on_circle(DecisionPolicy(), [("safe", 10.0), ("unsafe", 10.0)]) == 0


def test_labels_over_several_views() -> None:
    assert label_radius([SAFE], [0.5]) == 0.5
    assert label_radius([SAFE, SAFE], [0.5, 0.25]) == 0.25
    assert label_radius([SAFE, REVIEW], [0.5, 0.75]) == 0.5  # the safe view must not become unsafe
    assert label_radius([SAFE, REVIEW], [0.5, None]) is None
    assert label_radius([UNSAFE, REVIEW, SAFE], [0.5, None, 0.25]) == 0.5  # one unsafe view is enough
    assert label_radius([UNSAFE, UNSAFE], [0.5, 0.25]) == 0.5
    with pytest.raises(ValueError, match="no views"):
        label_radius([], [])
    with pytest.raises(ValueError, match="shorter"):
        label_radius([SAFE, SAFE], [0.5])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="1 neighbours and 0 embeddings"):
        Surroundings((Neighbor("a", "safe", 0.5),), np.zeros((0, 2), np.float32))


def test_the_slack_of_rounding_is_small() -> None:
    """At the published size: a thousandth of an image's norm per million, 0.0008 in pixel units."""
    assert 2 * FORWARD_ERROR * np.sqrt(3 * 224 * 224) == pytest.approx(0.00078, abs=1e-5)
