"""Threat models: closed forms of projections, starts and directions, and membership as a property."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from offline.errors import PlanError
from offline.threat import Norm, ThreatModel, parse_eps, scaled_l2_eps

NORMS: tuple[Norm, ...] = ("linf", "l2")


def images(seed: int, count: int = 3, side: int = 5) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("norm", "eps"), [("linf", -0.1), ("l2", math.inf), ("l2", math.nan)])
def test_an_impossible_radius_is_refused(norm: Norm, eps: float) -> None:
    with pytest.raises(PlanError, match=f"eps must be finite and not negative, got {eps}"):
        ThreatModel(norm, eps)


def test_an_unknown_norm_is_refused() -> None:
    with pytest.raises(PlanError, match="norm must be one of linf, l2, got 'l1'"):
        ThreatModel("l1", 0.1)  # type: ignore[arg-type]


def test_radii_are_numbers_or_fractions() -> None:
    assert parse_eps("4/255") == 4 / 255
    assert parse_eps("0.5") == parse_eps(0.5) == 0.5
    assert parse_eps(0) == 0.0


@pytest.mark.parametrize("value", ["four", "4/0", "1/2/3", "", "-1", "nan", "1e999", math.inf, True])
def test_a_radius_that_cannot_be_read_is_named(value: Any) -> None:
    with pytest.raises(PlanError, match="eps must be") as caught:
        parse_eps(value)
    assert repr(value) in str(caught.value)


def test_projections_of_points_that_were_worked_out_by_hand() -> None:
    pixels = torch.tensor([0.5, 0.95, 0.0]).view(1, 3, 1, 1)
    outside = pixels + torch.tensor([0.3, 0.4, 0.0]).view(1, 3, 1, 1)
    linf = ThreatModel("linf", 0.1).project(outside, pixels)
    torch.testing.assert_close(linf.flatten(), torch.tensor([0.6, 1.0, 0.0]))
    # (.3, .4) has norm .5: scaled to .1 it is (.06, .08), and .95 + .08 is clamped to 1.
    l2 = ThreatModel("l2", 0.1).project(outside, pixels)
    torch.testing.assert_close(l2.flatten(), torch.tensor([0.56, 1.0, 0.0]))


@pytest.mark.parametrize("norm", NORMS)
def test_inside_points_stay(norm: Norm) -> None:
    pixels = 0.4 + 0.2 * images(0)
    inside = pixels + 0.01 * images(1)
    torch.testing.assert_close(ThreatModel(norm, 0.5).project(inside, pixels), inside, atol=1e-7, rtol=0)


@given(
    norm=st.sampled_from(NORMS),
    eps=st.floats(0, 4),
    spread=st.floats(0, 10),
    seed=st.integers(0, 2**32),
    side=st.integers(1, 9),
)
def test_projections_and_starts_are_inside(norm: Norm, eps: float, spread: float, seed: int, side: int) -> None:
    threat, pixels, generator = ThreatModel(norm, eps), images(seed, side=side), torch.Generator().manual_seed(seed)
    noise = torch.randn(pixels.shape, generator=generator)
    for inside in (
        threat.project(pixels + spread * noise, pixels),
        threat.random_start(pixels, generator),
        threat.boundary_start(pixels, generator),
    ):
        assert bool(threat.contains(inside, pixels).all())


@pytest.mark.parametrize("norm", NORMS)
def test_containment_is_judged_image_by_image(norm: Norm) -> None:
    pixels = torch.full((5, 3, 2, 2), 0.95)
    perturbed = pixels.clone()
    perturbed[1, 0, 0, 0] -= 0.0999
    perturbed[2, 0, 0, 0] -= 0.1001
    perturbed[3, 0, 0, 0] = 1.0001  # in the ball, out of the box
    perturbed[4, 0, 0, 0] = math.nan
    assert ThreatModel(norm, 0.1).contains(perturbed, pixels).tolist() == [True, True, False, False, False]


def test_distances_are_the_norms() -> None:
    pixels = torch.zeros(1, 3, 1, 1)
    perturbed = torch.tensor([0.3, 0.0, 0.4]).view(1, 3, 1, 1)
    assert ThreatModel("linf", 1).distance(perturbed, pixels).item() == pytest.approx(0.4)
    assert ThreatModel("l2", 1).distance(perturbed, pixels).item() == pytest.approx(0.5)


def test_random_linf_perturbations_fill_the_box_uniformly() -> None:
    pixels = torch.zeros(4, 3, 100, 100)
    drawn = ThreatModel("linf", 0.2).random_perturbation(pixels, torch.Generator().manual_seed(0))
    assert drawn.abs().max() <= 0.2
    assert drawn.mean().item() == pytest.approx(0, abs=3 * 0.2 / math.sqrt(3 * drawn.numel()))
    assert drawn.square().mean().item() == pytest.approx(0.2**2 / 3, rel=0.01)


def test_starts_on_the_boundary_have_norm_eps_exactly() -> None:
    pixels, generator = torch.full((4, 3, 6, 6), 0.5), torch.Generator().manual_seed(0)
    for norm in NORMS:
        threat = ThreatModel(norm, 0.3)
        distances = threat.distance(threat.boundary_start(pixels, generator), pixels)
        torch.testing.assert_close(distances, torch.full_like(distances, 0.3), atol=1e-6, rtol=0)
    l2 = ThreatModel("l2", 0.3).random_perturbation(pixels, generator)
    torch.testing.assert_close(l2.flatten(1).norm(dim=1), torch.full((4,), 0.3))


def test_steepest_is_the_sign_or_the_unit_vector_and_takes_zero() -> None:
    gradient = torch.tensor([[3.0, 0.0, -4.0], [0.0, 0.0, 0.0]]).view(2, 3, 1, 1)
    assert ThreatModel("linf", 1).steepest(gradient).flatten(1).tolist() == [[1, 0, -1], [0, 0, 0]]
    torch.testing.assert_close(
        ThreatModel("l2", 1).steepest(gradient).flatten(1), torch.tensor([[0.6, 0.0, -0.8], [0.0, 0.0, 0.0]])
    )


def test_a_scaled_l2_radius_allows_the_same_change_to_each_pixel() -> None:
    def strength(size_px: int) -> float:
        """Root mean square over all values of a perturbation as long as the radius."""
        return scaled_l2_eps(3.0, size_px) / math.sqrt(3 * size_px**2)

    assert scaled_l2_eps(3.0, 224) == 3.0
    assert strength(128) == pytest.approx(strength(224))


@pytest.mark.parametrize("eps", [0.5, 3 * 128 / 224, 3.0])
def test_l2_projection_stays_in_the_ball_at_the_size_of_real_images(eps: float) -> None:
    """Summed in float32, norms of 49,152 values are off by more than a millionth."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(16, 3, 128, 128, generator=generator).contiguous(memory_format=torch.channels_last)
    threat = ThreatModel("l2", eps)
    perturbed = 0.4 + 0.2 * pixels
    for _ in range(20):
        step = torch.randn(pixels.shape, generator=generator)
        perturbed = threat.project(perturbed + 0.02 * step, 0.4 + 0.2 * pixels)
        assert bool(threat.contains(perturbed, 0.4 + 0.2 * pixels).all())
        distance = threat.distance(perturbed, 0.4 + 0.2 * pixels)
        assert distance.max() <= eps * (1 + 3e-7)
    assert distance.min() > eps * (1 - 1e-4)
