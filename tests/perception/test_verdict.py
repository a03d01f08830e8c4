"""Decision rules: the paper's 1-NN, the vote, and failing closed."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perception.verdict import DecisionPolicy, Neighbor, PoolLabel, Verdict, VerdictLabel, most_cautious

CAUTION = {VerdictLabel.SAFE: 0, VerdictLabel.REVIEW: 1, VerdictLabel.UNSAFE: 2}


def near(**similarities: float | list[float]) -> list[Neighbor]:
    """Neighbours by pool: near(safe=0.9, unsafe=[0.5, 0.4])."""
    rows = {p: v if isinstance(v, list) else [v] for p, v in similarities.items()}
    return [Neighbor(f"{p}{i}", p, s) for p, values in rows.items() for i, s in enumerate(values)]


@pytest.mark.parametrize(
    ("neighbors", "label", "margin"),
    [
        (near(safe=0.9, buffer=0.5, unsafe=0.4), VerdictLabel.SAFE, 0.4),
        (near(safe=0.2, buffer=0.5, unsafe=0.75), VerdictLabel.UNSAFE, 0.25),
        (near(safe=0.2, buffer=0.5, unsafe=0.25), VerdictLabel.REVIEW, 0.25),
        (near(safe=0.5, unsafe=0.25), VerdictLabel.SAFE, 0.25),
    ],
)
def test_nearest_takes_the_pool_of_the_most_similar_exemplar(
    neighbors: list[Neighbor], label: VerdictLabel, margin: float
) -> None:
    verdict = DecisionPolicy().decide(neighbors)
    assert verdict.label is label
    assert verdict.margin == pytest.approx(margin)
    assert verdict.neighbors[0].similarity == max(n.similarity for n in neighbors)


def test_a_tie_goes_to_the_more_cautious_pool() -> None:
    assert DecisionPolicy().decide(near(safe=0.5, buffer=0.5, unsafe=0.5)).label is VerdictLabel.UNSAFE
    assert DecisionPolicy().decide(near(safe=0.5, buffer=0.5, unsafe=0.1)).label is VerdictLabel.REVIEW
    assert DecisionPolicy(rule="vote", k=2).decide(near(safe=0.6, unsafe=0.5)).label is VerdictLabel.UNSAFE


def test_the_vote_can_overrule_the_nearest() -> None:
    neighbors = near(safe=[0.9, 0.2, 0.1], unsafe=[0.8, 0.7, 0.1])
    verdict = DecisionPolicy(rule="vote", k=3).decide(neighbors)
    assert verdict.label is VerdictLabel.UNSAFE
    assert verdict.margin == pytest.approx(-0.1)
    assert DecisionPolicy().decide(neighbors).label is VerdictLabel.SAFE


@pytest.mark.parametrize(
    "neighbors", [[], near(safe=0.9), near(unsafe=0.9), near(safe=0.9, buffer=0.1), near(buffer=1.0)]
)
def test_nothing_to_compare_with_is_review(neighbors: list[Neighbor]) -> None:
    verdict = DecisionPolicy().decide(neighbors)
    assert verdict.label is VerdictLabel.REVIEW
    assert "nothing to compare with" in verdict.reason


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("pool", list(PoolLabel))
def test_a_similarity_that_is_no_number_is_review(bad: float, pool: PoolLabel) -> None:
    neighbors = [*near(safe=0.9, buffer=0.2, unsafe=0.1), Neighbor("x", pool, bad)]
    assert DecisionPolicy().decide(neighbors).label is VerdictLabel.REVIEW


def test_far_from_everything_or_barely_safe_is_review() -> None:
    far, close = near(safe=0.3, unsafe=0.1), near(safe=0.9, unsafe=0.88)
    assert DecisionPolicy(min_similarity=0.4).decide(far).label is VerdictLabel.REVIEW
    assert DecisionPolicy(min_margin=0.05).decide(close).label is VerdictLabel.REVIEW
    assert DecisionPolicy(min_margin=0.05).decide(near(unsafe=0.9, safe=0.88)).label is VerdictLabel.UNSAFE


def test_barely_unsafe_is_review_where_the_policy_asks_for_more() -> None:
    policy = DecisionPolicy(min_margin_unsafe=0.05)
    barely = policy.decide(near(unsafe=0.9, safe=0.88))
    assert (barely.label, barely.pool) == (VerdictLabel.REVIEW, PoolLabel.UNSAFE)
    assert "unsafe by a margin of 0.0200, the policy asks for 0.05" in barely.reason
    assert policy.decide(near(unsafe=0.9, safe=0.5)).label is VerdictLabel.UNSAFE
    assert policy.decide(near(unsafe=0.75, safe=0.5)).label is VerdictLabel.UNSAFE
    assert DecisionPolicy(min_margin_unsafe=0.25).decide(near(unsafe=0.75, safe=0.5)).label is VerdictLabel.UNSAFE
    assert policy.decide(near(unsafe=0.88, safe=0.9)).label is VerdictLabel.SAFE


def test_a_vote_against_the_nearest_is_unsafe_unless_a_margin_is_asked_for() -> None:
    neighbors = near(safe=[0.9, 0.2, 0.1], unsafe=[0.8, 0.7, 0.1])
    assert DecisionPolicy("vote", 3).decide(neighbors).label is VerdictLabel.UNSAFE
    assert DecisionPolicy("vote", 3, min_margin_unsafe=1e-6).decide(neighbors).label is VerdictLabel.REVIEW


@given(
    st.lists(st.tuples(st.sampled_from(list(PoolLabel)), st.floats(-1, 1)), max_size=12),
    st.sampled_from(["nearest", "vote"]),
    st.integers(1, 5),
    st.floats(0, 2),
    st.floats(0, 2),
)
def test_margins_turn_verdicts_into_review_and_into_nothing_else(
    pairs: list[tuple[PoolLabel, float]], rule: Any, k: int, min_margin: float, min_margin_unsafe: float
) -> None:
    neighbors = [Neighbor(f"n{i}", pool, similarity) for i, (pool, similarity) in enumerate(pairs)]
    before = DecisionPolicy(rule, k).decide(neighbors)
    after = DecisionPolicy(rule, k, -1.0, min_margin, min_margin_unsafe).decide(neighbors)
    asked = {VerdictLabel.SAFE: min_margin, VerdictLabel.UNSAFE: min_margin_unsafe}.get(before.label, 0.0)
    too_small = before.margin is not None and asked > 0 and before.margin < asked
    assert after.label is (VerdictLabel.REVIEW if too_small else before.label)
    assert (after.pool, after.margin) == (before.pool, before.margin)


@given(
    st.lists(st.tuples(st.sampled_from(list(PoolLabel)), st.floats(-1, 1)), min_size=1, max_size=12),
    st.floats(-1, 1),
    st.sampled_from(
        [
            DecisionPolicy(),
            DecisionPolicy(min_margin=0.1),
            DecisionPolicy(rule="vote", k=3),
            DecisionPolicy(min_margin_unsafe=0.1),
            DecisionPolicy("vote", 3, -1.0, 0.1, 0.2),
        ]
    ),
)
def test_one_more_unsafe_neighbour_never_makes_it_safer(
    pairs: list[tuple[PoolLabel, float]], extra: float, policy: DecisionPolicy
) -> None:
    neighbors = [Neighbor(f"n{i}", pool, similarity) for i, (pool, similarity) in enumerate(pairs)]
    before = policy.decide(neighbors)
    after = policy.decide([*neighbors, Neighbor("extra", PoolLabel.UNSAFE, extra)])
    if "nothing to compare with" in before.reason:
        return
    assert CAUTION[after.label] >= CAUTION[before.label]


@given(st.permutations(near(safe=[0.5, 0.4], buffer=[0.5], unsafe=[0.2, 0.1])))
def test_order_does_not_matter(neighbors: list[Neighbor]) -> None:
    assert DecisionPolicy().decide(neighbors) == DecisionPolicy().decide(sorted(neighbors, key=lambda n: n.id))


def test_version_changes_with_every_parameter() -> None:
    policies = [
        DecisionPolicy(),
        DecisionPolicy(k=3),
        DecisionPolicy(rule="vote"),
        DecisionPolicy(min_margin=0.1),
        DecisionPolicy(min_similarity=0),
        DecisionPolicy(min_margin_unsafe=0.1),
    ]
    assert len({p.version for p in policies}) == len(policies)
    assert DecisionPolicy().version == DecisionPolicy().version


@pytest.mark.parametrize(
    "wrong",
    [
        {"rule": "best"},
        {"k": 0},
        {"min_similarity": 1.5},
        {"min_margin": -0.1},
        {"min_margin": math.nan},
        {"min_margin_unsafe": 2.1},
        {"min_margin_unsafe": math.nan},
    ],
)
def test_wrong_parameters_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DecisionPolicy(**wrong)


def test_most_cautious_frame_decides() -> None:
    def verdict(label: VerdictLabel) -> Verdict:
        return Verdict(label, None, None, (), "", "")

    safe, review, unsafe = (verdict(label) for label in (VerdictLabel.SAFE, VerdictLabel.REVIEW, VerdictLabel.UNSAFE))
    assert most_cautious([safe, review, unsafe, unsafe]) == 2
    assert most_cautious([safe, safe]) == 0
    with pytest.raises(ValueError, match="no verdicts"):
        most_cautious([])
