"""Accuracy and its interval."""

from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offline.benchmarks import robustness_records
from offline.benchmarks.intervals import Accuracy
from offline.errors import DataError


@st.composite
def accuracies(draw: st.DrawFn) -> Accuracy:
    total = draw(st.integers(1, 10_000))
    return Accuracy(draw(st.integers(0, total)), total)


@given(accuracies())
def test_the_ends_are_where_the_score_test_turns(accuracy: Accuracy) -> None:
    """Shares p0 that lie as many of their own standard errors from p as 2.5 % of a normal are above."""
    z, p = NormalDist().inv_cdf(0.975), accuracy.value
    low, high = accuracy.interval
    assert 0 <= low <= p <= high <= 1
    assert high > low
    for p0 in (low, high):
        assert abs(p - p0) == pytest.approx(z * (p0 * (1 - p0) / accuracy.total) ** 0.5, rel=1e-6, abs=1e-7)


@given(accuracies())
def test_wrong_answers_have_the_mirrored_interval(accuracy: Accuracy) -> None:
    low, high = Accuracy(accuracy.total - accuracy.right, accuracy.total).interval
    assert (1 - high, 1 - low) == pytest.approx(accuracy.interval, abs=1e-12)


@pytest.mark.parametrize("total", [1, 10, 1000])
def test_no_and_all_right_have_the_closed_form(total: int) -> None:
    z2 = NormalDist().inv_cdf(0.975) ** 2
    assert Accuracy(0, total).interval == pytest.approx((0, z2 / (total + z2)))
    assert Accuracy(total, total).interval == pytest.approx((total / (total + z2), 1))


@pytest.mark.parametrize(("right", "total"), [(0, 0), (1, 0), (-1, 5), (6, 5), (0, -1)])
def test_what_is_no_share_is_refused(right: int, total: int) -> None:
    with pytest.raises(DataError, match=f"{right} right of {total}"):
        Accuracy(right, total)


def test_plain_values_and_the_other_door() -> None:
    assert Accuracy(3, 4).as_dict() == {"right": 3, "total": 4, "value": 0.75, "interval95": [0.3006, 0.9544]}
    assert robustness_records.Accuracy is Accuracy
