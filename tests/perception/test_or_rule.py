"""The OR of two detectors, clean and under attack."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from perception.heads import or_correct, or_rule

T, F = True, False
pairs = st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=8)


def test_either_detector_is_enough() -> None:
    assert or_rule([F, F, T, T], [F, T, F, T]).tolist() == [F, T, T, T]
    assert or_rule(torch.tensor([T]), [F]).tolist() == [T]
    assert or_rule([], []).shape == (0,)


def test_robust_values_of_two_detectors_combine_image_by_image() -> None:
    unsafe = or_correct([T, T], [T, F], [F, F])
    assert unsafe.float().mean() == 0.5
    safe = or_correct([F, F, F], [T, F, F], [F, T, F])
    assert safe.tolist() == [F, F, T]


@given(pairs)
def test_a_second_detector_helps_unsafe_images_and_costs_safe_ones(rows: list[tuple[bool, bool, bool]]) -> None:
    unsafe, first, second = (list(column) for column in zip(*rows, strict=True))
    together = or_correct(unsafe, first, second).tolist()
    alone = or_correct(unsafe, first, first).tolist()
    assert or_correct(unsafe, second, first).tolist() == together
    assert alone == [a == u for a, u in zip(first, unsafe, strict=True)]
    for u, both, one in zip(unsafe, together, alone, strict=True):
        assert both >= one if u else both <= one


@pytest.mark.parametrize("bad", [[1, 0], [0.2, 0.7], torch.tensor([0.2, 0.7]), torch.ones(2, 1).bool(), [T], [T] * 3])
def test_what_are_no_flags_of_the_same_images_is_refused(bad: list[bool] | Tensor) -> None:
    for arguments in ((bad, [T, F]), ([T, F], bad)):
        with pytest.raises(ValueError, match="flags"):
            or_rule(*arguments)
    with pytest.raises(ValueError, match="flags"):
        or_correct(bad, [T, F], [T, F])
