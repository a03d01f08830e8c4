"""DiffAugment: closed forms, a naive twin in numpy, the range of the draws, and gradients by finite differences."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from offline.errors import PlanError
from offline.inversion.augment import (
    PAPERS_POLICY,
    POLICIES,
    DiffAugment,
    Draws,
    brighten,
    contrast,
    cut_out,
    resize,
    saturate,
    translate,
)
from tests.offline.attack_toys import generator

MANY = 4000
Array = NDArray[np.float64]


def images(seed: int, count: int = 5, size: tuple[int, int] = (16, 24)) -> Tensor:
    return torch.rand(count, 3, *size, generator=generator(seed), dtype=torch.float64)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def integers(*values: int) -> Tensor:
    return torch.tensor(values)


# --- closed forms ----------------------------------------------------------------------------------------------------


def test_identity_draws_leave_the_image() -> None:
    pixels, zeros, ones = images(0), torch.zeros(5), torch.ones(5)
    nowhere = torch.zeros(5, dtype=torch.int64)
    for same in (
        brighten(pixels, zeros),
        saturate(pixels, ones),
        contrast(pixels, ones),
        translate(pixels, nowhere, nowhere),
        resize(pixels, ones),
    ):
        torch.testing.assert_close(same, pixels, rtol=0, atol=1e-12)


def test_colours_of_a_hand_made_image() -> None:
    pixels = doubles(0.2, 0.4, 0.9).view(1, 3, 1, 1).expand(1, 3, 2, 2)  # its mean, of channels and of all, is 0.5
    assert brighten(pixels, doubles(0.25))[0, :, 0, 0].tolist() == pytest.approx([0.45, 0.65, 1.15])
    assert saturate(pixels, doubles(2.0))[0, :, 1, 1].tolist() == pytest.approx([-0.1, 0.3, 1.3])
    assert saturate(pixels, doubles(0.0))[0, :, 1, 0].tolist() == pytest.approx([0.5, 0.5, 0.5])
    assert contrast(pixels, doubles(0.5))[0, :, 0, 1].tolist() == pytest.approx([0.35, 0.45, 0.7])


def test_saturation_keeps_each_pixels_mean_and_contrast_the_images() -> None:
    pixels, factors = images(1), doubles(0.0, 0.3, 1.0, 1.7, 1.99)
    torch.testing.assert_close(saturate(pixels, factors).mean(1), pixels.mean(1))
    torch.testing.assert_close(contrast(pixels, factors).mean((1, 2, 3)), pixels.mean((1, 2, 3)))


@pytest.mark.parametrize(("down", "right"), [(0, 3), (2, 0), (-2, 1), (1, -3), (-2, -3), (2, 3)])
def test_translation_moves_whole_pixels_and_pads_with_zeros(down: int, right: int) -> None:
    pixels = images(2, 1) + 1  # no zeros of its own
    moved = translate(pixels, integers(down), integers(right))[0]
    for row in range(16):
        for column in range(24):
            inside = 0 <= row - down < 16 and 0 <= column - right < 24
            expected = pixels[0, :, row - down, column - right] if inside else torch.zeros(3)
            assert moved[:, row, column].tolist() == expected.tolist()
    assert int((moved == 0).sum()) == 3 * (16 * 24 - (16 - abs(down)) * (24 - abs(right)))


def square_hidden(size: tuple[int, int], row: int, column: int) -> NDArray[np.bool_]:
    """A naive twin: every pixel of the square is looked at, and those outside are passed over."""
    hidden = np.zeros(size, dtype=bool)
    sides = [int(side / 2 + 0.5) for side in size]
    for i in range(sides[0]):
        for j in range(sides[1]):
            y, x = row - sides[0] // 2 + i, column - sides[1] // 2 + j
            if 0 <= y < size[0] and 0 <= x < size[1]:
                hidden[y, x] = True
    return hidden


@pytest.mark.parametrize("size", [(16, 16), (16, 24), (14, 14), (7, 9)])
def test_the_cut_out_square_is_where_and_as_large_as_it_should_be(size: tuple[int, int]) -> None:
    pixels = images(3, 1, size) + 1
    for row in range(size[0] + 1):
        for column in (0, 1, size[1] // 2, size[1] - 1):
            shown = cut_out(pixels, integers(row), integers(column))[0]
            hidden = square_hidden(size, row, column)
            assert np.array_equal((shown == 0).all(0).numpy(), hidden)
            assert torch.equal(shown[:, torch.from_numpy(~hidden)], pixels[0][:, torch.from_numpy(~hidden)])


def test_the_area_that_is_cut_out_is_a_quarter_inside_and_a_sixteenth_in_a_corner() -> None:
    pixels = torch.ones(4, 3, 32, 32)
    kept = cut_out(pixels, integers(16, 8, 0, 32), integers(16, 24, 0, 32)).mean((1, 2, 3))
    assert (1 - kept).tolist() == [1 / 4, 1 / 4, 1 / 16, 1 / 16]


def test_a_smaller_view_has_a_frame_and_a_larger_one_loses_its_rim() -> None:
    pixels = torch.ones(3, 3, 20, 20)
    small, same, large = resize(pixels, doubles(0.8, 1.0, 1.2))
    frame = torch.zeros(20, 20)
    frame[2:18, 2:18] = 1
    assert torch.equal(small, frame.expand(3, 20, 20))
    assert torch.equal(same, pixels[0])
    torch.testing.assert_close(large, pixels[0])
    odd = resize(torch.ones(1, 3, 21, 21), doubles(0.8))[0, 0]  # 16 of 21: two before, three behind
    assert (odd.sum(0) > 0).nonzero().flatten().tolist() == list(range(2, 18))


def test_what_is_larger_shows_the_middle() -> None:
    ramp = torch.arange(20.0).expand(1, 3, 20, 20)
    large = resize(ramp, doubles(1.2))[0, 0, 10]
    assert float(large.mean()) == pytest.approx(9.5, abs=1e-5)
    assert float(large[1:].diff().mean()) == pytest.approx(1 / 1.2, abs=1e-2)


# --- a naive twin ----------------------------------------------------------------------------------------------------


def twin(view: Array, draws: Draws, i: int) -> Array:
    """'color,translation,cutout' of one (3, h, w) view with loops and no torch."""
    out = view + float(draws.brightness[i])
    for y in range(view.shape[1]):
        for x in range(view.shape[2]):
            mean = (out[0, y, x] + out[1, y, x] + out[2, y, x]) / 3
            out[:, y, x] = (out[:, y, x] - mean) * float(draws.saturation[i]) + mean
    mean = sum(out.flatten()) / out.size
    out = (out - mean) * float(draws.contrast[i]) + mean
    moved = np.zeros_like(out)
    down, right = int(draws.down[i]), int(draws.right[i])
    for y in range(view.shape[1]):
        for x in range(view.shape[2]):
            if 0 <= y + down < view.shape[1] and 0 <= x + right < view.shape[2]:
                moved[:, y + down, x + right] = out[:, y, x]
    moved[:, square_hidden((view.shape[1], view.shape[2]), int(draws.row[i]), int(draws.column[i]))] = 0
    return moved


@pytest.mark.parametrize("seed", range(3))
def test_the_policy_of_the_paper_agrees_with_a_naive_twin(seed: int) -> None:
    pixels = images(seed)
    draws = Draws.of(5, (16, 24), generator(seed))
    found = DiffAugment().apply(pixels, draws).numpy()
    for i in range(5):
        np.testing.assert_allclose(found[i], twin(pixels[i].numpy().copy(), draws, i), atol=1e-6)


def test_a_policy_is_applied_in_its_order() -> None:
    pixels, draws = images(4), Draws.of(5, (16, 24), generator(4))
    forth = DiffAugment.parse("color,translation").apply(pixels, draws)
    back = DiffAugment.parse("translation, color").apply(pixels, draws)
    one = translate(pixels, draws.down, draws.right)
    torch.testing.assert_close(back, DiffAugment.parse("color").apply(one, draws))
    assert not torch.allclose(forth, back)  # brightness is added to the zeros that came in


# --- draws -----------------------------------------------------------------------------------------------------------


def test_draws_cover_their_ranges_and_no_more() -> None:
    draws = Draws.of(MANY, (128, 64), generator(5))
    for values, low, high in (
        (draws.brightness, -0.5, 0.5),
        (draws.saturation, 0.0, 2.0),
        (draws.contrast, 0.5, 1.5),
        (draws.scale, 0.8, 1.2),
    ):
        assert low <= float(values.min()) < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < float(values.max()) <= high
        assert float(values.mean()) == pytest.approx((low + high) / 2, abs=0.03 * (high - low))
    assert set(draws.down.tolist()) == set(range(-16, 17))
    assert set(draws.right.tolist()) == set(range(-8, 9))
    assert set(draws.row.tolist()) == set(range(129))
    assert set(draws.column.tolist()) == set(range(65))


def test_an_odd_square_is_centred_on_a_pixel() -> None:
    assert set(Draws.of(MANY, (6, 14), generator(6)).row.tolist()) == set(range(6))  # squares of 3 and of 7
    assert set(Draws.of(MANY, (6, 14), generator(6)).column.tolist()) == set(range(14))


def test_views_draw_for_themselves_and_as_the_generator_says() -> None:
    one = images(7, 1).expand(8, -1, -1, -1)
    views = DiffAugment()(one, generator(7))
    assert len({tuple(view.flatten().tolist()) for view in views}) == 8
    assert torch.equal(views, DiffAugment()(one, generator(7)))
    assert not torch.equal(views, DiffAugment()(one, generator(8)))
    state = generator(9)
    assert not torch.equal(DiffAugment()(one, state), DiffAugment()(one, state))


def test_a_draw_does_not_depend_on_the_rest_of_the_policy() -> None:
    pixels = images(8)
    draws = Draws.of(5, (16, 24), generator(8))
    assert torch.equal(
        DiffAugment.parse("color")(pixels, generator(8)), DiffAugment.parse("color").apply(pixels, draws)
    )
    cut = DiffAugment.parse("cutout")(pixels, generator(8))
    assert torch.equal(cut, cut_out(pixels, draws.row, draws.column))


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [*POLICIES, "color,translation,resize,cutout"])
def test_gradients_are_those_of_finite_differences(policy: str) -> None:
    pixels = images(9, 2, (6, 8))
    draws = Draws.of(2, (6, 8), generator(9))
    augment = DiffAugment.parse(policy)

    def views(at: Tensor) -> Tensor:
        return augment.apply(at, draws)

    assert torch.autograd.gradcheck(views, (pixels.requires_grad_(True),), atol=1e-5)


def test_no_gradient_flows_through_what_is_cut_out_or_moved_out() -> None:
    at = images(10, 1).requires_grad_(True)
    maps: list[Callable[[], Tensor]] = [
        lambda: cut_out(at, integers(8), integers(12)),
        lambda: translate(at, integers(2), integers(-3)),
    ]
    for apply in maps:
        (gradient,) = torch.autograd.grad(apply().sum(), at)
        assert set(gradient.flatten().tolist()) == {0.0, 1.0}
    assert int((gradient == 0).sum()) == 3 * (16 * 24 - 14 * 21)
    assert torch.equal(gradient[0, :, :14, 3:], torch.ones(3, 14, 21, dtype=torch.float64))


# --- bad input -------------------------------------------------------------------------------------------------------


def test_the_default_is_the_papers_policy() -> None:
    assert DiffAugment() == DiffAugment.parse("color,translation,cutout") == DiffAugment(PAPERS_POLICY)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("", "at least one of color, translation, resize, cutout"),
        ("  ", "at least one"),
        ("color,flip", "'flip'"),
        ("color,,cutout", "''"),
        ("Color", "'Color'"),
        ("color,cutout,color", "once"),
    ],
)
def test_policies_that_are_none_are_refused(policy: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        DiffAugment.parse(policy)
