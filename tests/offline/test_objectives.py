"""Objectives and the criteria that go with them: published vectors, closed forms and naive twins."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from offline.criteria import (
    ArgmaxWrong,
    Criterion,
    HeadDecides,
    NearestNeighborIs,
    NearestNeighborWrong,
    TwoAfcWrong,
)
from offline.errors import PlanError
from offline.objectives import (
    CrossEntropy,
    Dlr,
    EmbeddingShift,
    HeadLogit,
    Margin,
    Objective,
    PoolMargin,
    TargetedDlr,
    TargetSet,
    TwoAfcCrossEntropy,
)

PUBLISHED = torch.tensor([[2.0, 1.0, 0.5, -1.0]])


def label(*values: int) -> Tensor:
    return torch.tensor(values)


def units(seed: int, count: int = 5, dim: int = 4) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(count, dim, generator=made, dtype=torch.float64), dim=1)


def head(embeddings: Tensor) -> Tensor:
    return 3 * embeddings[:, 0] - 1


# --- published vectors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "expected"), [(0, -2 / 3), (1, 2 / 3)])
def test_dlr_of_the_published_logits(right: int, expected: float) -> None:
    assert Dlr(None, label(right))(PUBLISHED).item() == pytest.approx(expected)


def test_targeted_dlr_of_the_published_logits() -> None:
    assert TargetedDlr(None, label(0), label(2))(PUBLISHED).item() == pytest.approx(-2 / 3)
    assert Dlr(None, label(0)).toward(label(2))(PUBLISHED).item() == pytest.approx(-2 / 3)


def test_margin_of_the_published_logits() -> None:
    assert [Margin(None, label(y))(PUBLISHED).item() for y in range(4)] == [-1, 1, 1.5, 3]


def test_two_detectors_under_their_own_attacks() -> None:
    """Over two unsafe images the one says (yes, no) and the other (no, no): half of them are detected by either."""
    first, second = torch.tensor([[0.9, 0.0], [0.1, 0.0]]), torch.tensor([[0.2, 0.0], [0.1, 0.0]])
    evades = HeadDecides(head, torch.tensor([-1.0, -1.0]))
    detected = ~evades(first) | ~evades(second)
    assert detected.double().mean() == 0.5


# --- over logits -----------------------------------------------------------------------------------------------------


@given(
    logits=st.lists(st.floats(-50, 50), min_size=4, max_size=9),
    scale=st.floats(0.5, 20),
    shift=st.floats(-9, 9),
    data=st.data(),
)
def test_dlr_knows_neither_scale_nor_offset(
    logits: list[float], scale: float, shift: float, data: st.DataObject
) -> None:
    z = torch.tensor([logits], dtype=torch.float64)
    if max(logits) - sorted(logits)[-3] < 1e-3:
        return  # so close that the 1e-12 in the denominator and rounding matter
    y, t = (label(data.draw(st.integers(0, len(logits) - 1))) for _ in range(2))
    for objective in (Dlr(None, y), TargetedDlr(None, y, t)):
        torch.testing.assert_close(objective(scale * z + shift), objective(z), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [Margin, Dlr])
def test_the_sign_says_whether_the_classifier_errs(kind: type[Margin] | type[Dlr]) -> None:
    z = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    y = torch.arange(200) % 5
    assert torch.equal(kind(None, y)(z) > 0, ArgmaxWrong(None, y)(z))


def test_zero_shot_logits_are_a_hundred_times_the_cosines() -> None:
    embeddings, classes, y = units(0), units(1, 6), torch.arange(5)
    logits = 100 * embeddings @ classes.T
    for kind in (CrossEntropy, Margin, Dlr):
        torch.testing.assert_close(kind(classes, y)(embeddings), kind(None, y)(logits))
    targets = (y + 2) % 6
    torch.testing.assert_close(TargetedDlr(classes, y, targets)(embeddings), TargetedDlr(None, y, targets)(logits))
    assert torch.equal(ArgmaxWrong(classes, y)(embeddings), ArgmaxWrong(None, y)(logits))


def test_runners_up_are_the_other_classes_in_falling_order() -> None:
    z = torch.tensor([[5.0, 1, 4, 2, 3], [5.0, 1, 4, 2, 3]])
    objective = Dlr(None, label(0, 4))
    assert objective.runners_up(z, 3).tolist() == [[2, 4, 3], [0, 2, 3]]
    assert objective.runners_up(z, 9).tolist() == [[2, 4, 3, 1], [0, 2, 3, 1]]


def test_too_few_classes_are_refused() -> None:
    with pytest.raises(PlanError, match="DLR needs at least 3 classes, got 2"):
        Dlr(None, label(0))(torch.ones(1, 2))
    with pytest.raises(PlanError, match="targeted DLR needs at least 4 classes, got 3"):
        TargetedDlr(None, label(0), label(1))(torch.ones(1, 3))


# --- over embeddings -------------------------------------------------------------------------------------------------


def test_objectives_and_criteria_in_closed_form() -> None:
    directions = torch.eye(3)
    embeddings = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.6, 0.8]])
    shift = EmbeddingShift(torch.tensor([[1.0, 0, 0], [1.0, 0, 0]]))
    torch.testing.assert_close(shift(embeddings), torch.tensor([0.0, 2.0]))
    torch.testing.assert_close(shift.rows(torch.tensor([1]))(embeddings[1:]), torch.tensor([2.0]))
    entropy = CrossEntropy(directions, torch.tensor([0, 1]))
    # Logits (0, 60, 80): the loss of class 1 is log(1 + e^-60 + e^20) = 20 but for rounding.
    torch.testing.assert_close(entropy(embeddings), torch.tensor([0.0, 20.0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy.rows(torch.tensor([1]))(embeddings[1:]), torch.tensor([20.0]), atol=1e-5, rtol=0)
    assert ArgmaxWrong(directions, torch.tensor([0, 1]))(embeddings).tolist() == [False, True]
    assert ArgmaxWrong(directions, torch.tensor([0, 2])).rows(torch.tensor([1]))(embeddings[1:]).tolist() == [False]
    neighbours = NearestNeighborWrong(directions, torch.tensor([7, 8, 9]), torch.tensor([7, 8]))
    assert neighbours(embeddings).tolist() == [False, True]
    assert neighbours.rows(torch.tensor([1]))(embeddings[1:]).tolist() == [True]


def test_two_afc_in_closed_form() -> None:
    reference, left, right = torch.tensor([[1.0, 0]]), torch.tensor([[0.6, 0.8]]), torch.tensor([[0.8, 0.6]])
    for y, expected in ((0, math.log1p(math.exp(0.2))), (1, math.log1p(math.exp(-0.2)))):
        assert TwoAfcCrossEntropy(left, right, label(y))(reference).item() == pytest.approx(expected)
        assert TwoAfcWrong(left, right, label(y))(reference).tolist() == [y == 0]


def test_a_two_afc_tie_goes_to_the_left() -> None:
    same = torch.tensor([[0.6, 0.8]])
    assert TwoAfcWrong(same, same, label(0))(torch.tensor([[1.0, 0]])).tolist() == [False]
    assert TwoAfcWrong(same, same, label(1))(torch.tensor([[1.0, 0]])).tolist() == [True]


def test_two_afc_entropy_rises_with_the_margin() -> None:
    reference, left, right = units(0, 50), units(1, 50), units(2, 50)
    objective = TwoAfcCrossEntropy(left, right, torch.zeros(50, dtype=torch.int64))(reference)
    margin = (reference * (right - left)).sum(dim=1)
    assert torch.equal(objective.argsort(), margin.argsort())


def test_a_target_set_is_the_sum_over_its_targets() -> None:
    """Eq. 5 as it is written, up to a positive factor and an offset."""
    targets, embeddings = 3 * units(1, 16), units(0)
    objective = TargetSet.of(targets, images=5)
    mean = normalize(targets, dim=1).mean(dim=0)
    written = -(embeddings[:, None] - normalize(targets, dim=1)).square().sum(dim=(1, 2))
    torch.testing.assert_close(2 * 16 * (mean.norm() * objective(embeddings) - 1), written)
    assert objective(embeddings).abs().max() <= 1
    assert objective(objective.means).tolist() == pytest.approx([1.0] * 5)


def test_targets_without_a_direction_are_refused() -> None:
    opposite = torch.tensor([[1.0, 0], [-1.0, 0]])
    with pytest.raises(PlanError, match="the 2 targets cancel out"):
        TargetSet.of(opposite, images=1)
    for targets in (torch.zeros(0, 2), torch.zeros(1, 2), torch.full((1, 2), torch.nan)):
        with pytest.raises(PlanError, match="finite and not zero"):
            TargetSet.of(targets, images=1)


def test_a_head_is_pushed_to_either_side() -> None:
    embeddings, signs = torch.tensor([[0.5, 0.0], [0.2, 0.0], [1 / 3, 0.0]]), torch.tensor([-1.0, 1.0, 1.0])
    torch.testing.assert_close(HeadLogit(head, signs)(embeddings), torch.tensor([-0.5, -0.4, 0.0]))
    assert HeadDecides(head, signs)(embeddings).tolist() == [False, False, True]
    assert HeadDecides(head, -signs)(embeddings).tolist() == [True, True, False]
    assert HeadDecides(head, signs, threshold=0.6)(embeddings).tolist() == [True, False, False]


def test_heads_may_return_columns_but_not_more() -> None:
    signs = torch.ones(2)
    assert HeadLogit(lambda e: head(e)[:, None], signs)(torch.zeros(2, 3)).shape == (2,)
    with pytest.raises(PlanError, match=r"one logit for each of 2 images, got \(2, 3\)"):
        HeadLogit(lambda e: e, signs)(torch.zeros(2, 3))


def test_pool_margin_is_the_difference_of_two_maxima() -> None:
    embeddings, gallery = units(0), units(1, 20)
    pools = torch.arange(20) % 3
    wanted, true = label(0, 1, 2, 0, 1), label(2, 2, 1, 1, 0)
    expected = []
    for embedding, want, have in zip(embeddings, wanted, true, strict=True):
        similarities = [float(embedding @ exemplar) for exemplar in gallery]
        best = [max(s for s, p in zip(similarities, pools.tolist(), strict=True) if p == q) for q in range(3)]
        expected.append(best[int(want)] - best[int(have)])
    assert PoolMargin(gallery, pools, wanted, true)(embeddings).tolist() == pytest.approx(expected)


def test_pool_margin_says_whom_one_nn_believes() -> None:
    embeddings, gallery = units(0, 100), units(1, 20)
    pools, wanted, true = torch.arange(20) % 2, torch.ones(100, dtype=torch.int64), torch.zeros(100, dtype=torch.int64)
    won = PoolMargin(gallery, pools, wanted, true)(embeddings) > 0
    assert torch.equal(won, NearestNeighborIs(gallery, pools, wanted)(embeddings))
    assert torch.equal(won, NearestNeighborWrong(gallery, pools, true)(embeddings))


@pytest.mark.parametrize(("wanted", "true", "name"), [(7, 0, "wanted pool 7"), (0, 8, "true pool 8")])
def test_an_empty_pool_is_refused(wanted: int, true: int, name: str) -> None:
    with pytest.raises(PlanError, match=f"the {name} has no exemplar"):
        PoolMargin(units(0), torch.zeros(5, dtype=torch.int64), label(wanted), label(true))


# --- what all share --------------------------------------------------------------------------------------------------

Y, OTHER = label(0, 1, 2, 3, 0), label(1, 0, 3, 2, 2)
SIGNS = torch.tensor([1.0, -1, 1, -1, 1], dtype=torch.float64)
GALLERY, POOLS = units(9, 20), torch.arange(20) % 4
OBJECTIVES: dict[str, Objective] = {
    "shift": EmbeddingShift(units(2)),
    "targets": TargetSet(units(3)),
    "2afc": TwoAfcCrossEntropy(units(4), units(5), Y % 2),
    "head": HeadLogit(head, SIGNS),
    "pools": PoolMargin(GALLERY, POOLS, Y, OTHER),
    "cross-entropy": CrossEntropy(units(6, 6), Y),
    "margin": Margin(None, Y),
    "dlr": Dlr(units(6, 6), Y),
    "targeted dlr": TargetedDlr(None, Y, OTHER),
}
CRITERIA: dict[str, Criterion] = {
    "neighbour wrong": NearestNeighborWrong(GALLERY, POOLS, Y),
    "neighbour is": NearestNeighborIs(GALLERY, POOLS, Y),
    "argmax": ArgmaxWrong(None, Y),
    "2afc": TwoAfcWrong(units(4), units(5), Y % 2),
    "head": HeadDecides(head, SIGNS, 0.1),
}


@pytest.mark.parametrize("figure", [*OBJECTIVES.values(), *CRITERIA.values()], ids=[*OBJECTIVES, *CRITERIA])
@pytest.mark.parametrize("index", [[0, 1, 2, 3, 4], [3, 0], [4], []])
def test_rows_are_the_rows(figure: Objective | Criterion, index: list[int]) -> None:
    rows = torch.tensor(index, dtype=torch.int64)
    narrowed: Callable[[Tensor], Tensor] = figure.rows(rows)
    torch.testing.assert_close(narrowed(units(0)[rows]), figure(units(0))[rows])
    assert len(narrowed(units(0)[rows])) == len(index)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_gradients_are_right_and_stay_with_their_image(objective: Objective) -> None:
    at = units(0).requires_grad_(True)
    assert torch.autograd.gradcheck(objective, (at,))
    (gradient,) = torch.autograd.grad(objective(at)[1], at)
    assert bool(gradient[1].any())
    assert not gradient[[0, 2, 3, 4]].any()


def test_only_the_distance_from_itself_needs_a_random_start() -> None:
    assert [name for name, objective in OBJECTIVES.items() if objective.needs_random_start] == ["shift"]
    at = units(2).requires_grad_(True)
    (gradient,) = torch.autograd.grad(OBJECTIVES["shift"](at).sum(), at)
    assert not gradient.any()
