"""Integrated gradients against closed forms, and what they must hold by their axioms."""

import io
from itertools import product

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from perception import load_encoder
from perception.encoder import Encoder, unit_embeddings
from perception.encoders.clip import ClipEncoder
from perception.preprocess import PreprocessSpec, to_pixels
from perception.testing import ToyEncoder, benign_hits, synthetic_image
from service.errors import AttributionFailed
from service.saliency import MAX_STEPS, TOLERANCE, Abandoned, attribute, pooled

BUNDLED = ("bundled/clean", "bundled/fare4", "bundled/tecoa4", "bundled/lipsim")


class Custom(ToyEncoder):
    """An encoder of 8 x 8 pixels whose embedding a test says."""

    def __init__(self) -> None:
        super().__init__(dim=2, size_px=8)
        self.preprocess = PreprocessSpec(size_px=8, resize_px=8)


class Line(Custom):
    """Embeds an image as the direction of (1, w . (x - 0.5)): linear in the pixels before it is normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(3)) / 8

    def features(self, pixels: Tensor) -> Tensor:
        return torch.stack([torch.ones(len(pixels)), ((pixels - 0.5) * self.w).sum(dim=(1, 2, 3))], dim=1)


class Broken(Custom):
    """An encoder with gradients or embeddings that are no finite numbers."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def features(self, pixels: Tensor) -> Tensor:
        mean = (pixels - 0.5).abs().sum(dim=(1, 2, 3))
        if self.how == "gradient":  # finite everywhere, with a derivative that is infinity times zero
            return torch.stack([torch.ones_like(mean), (mean * 0).sqrt() + mean], dim=1)
        if self.how == "zero":  # the baseline has no direction
            return torch.stack([mean, mean], dim=1)
        return torch.stack([torch.ones_like(mean), mean * float("nan")], dim=1)


def pixels_of(encoder: Encoder, seed: int = 1) -> NDArray[np.uint8]:
    return encoder.preprocess.apply(synthetic_image(seed, (64, 64)))


def exemplars_of(encoder: Encoder, *seeds: int) -> NDArray[np.float32]:
    with torch.no_grad():
        return encoder.encode(to_pixels([pixels_of(encoder, seed) for seed in seeds])).numpy()


def test_of_a_linear_encoder_the_attributions_are_known() -> None:
    """Along the path z(a) = (1, a s): the integral of the gradient is (cos(end) - cos(start)) / s times each share."""
    encoder, pixels = Line(), pixels_of(Line())
    targets = np.array([[0.6, 0.8], [-0.8, 0.6]], np.float32)
    shares = ((to_pixels([pixels])[0] - 0.5) * encoder.w).sum(dim=0).double().numpy()
    total = shares.sum()
    for found, (along, across) in zip(attribute(encoder, pixels, targets), targets, strict=True):
        end, start = (along + across * total) / np.hypot(1, total), along
        assert found.similarity == pytest.approx(end, abs=1e-6)
        assert found.baseline_similarity == pytest.approx(start, abs=1e-6)
        np.testing.assert_allclose(found.grid, shares * (end - start) / total, atol=1e-4)


def test_the_sign_says_what_supports() -> None:
    """What is brighter than grey where the weights are positive makes the image more similar to (0, 1)."""
    encoder, pixels = Line(), np.full((3, 8, 8), 128, np.uint8)
    encoder.w = torch.zeros(3, 8, 8)
    encoder.w[:, 1, 2], encoder.w[:, 5, 6] = 1.0, 1.0
    pixels[:, 1, 2], pixels[:, 5, 6] = 255, 60
    [found] = attribute(encoder, pixels, np.array([[0.0, 1.0]], np.float32))
    assert found.grid[1, 2] > 0.05
    assert found.grid[5, 6] < -0.05
    assert found.grid.argmax() == 1 * 8 + 2
    assert found.grid.argmin() == 5 * 8 + 6


@pytest.mark.parametrize("name", BUNDLED)
def test_the_bundled_encoders_are_complete(name: str) -> None:
    encoder = load_encoder(name)
    photo = np.ascontiguousarray(encoder.preprocess.apply(synthetic_image(5, (160, 120))))
    exemplars = exemplars_of(encoder, 7, 8)
    found = attribute(encoder, photo, exemplars)
    with torch.no_grad():
        ends = encoder.encode(torch.cat([to_pixels([photo]), torch.full_like(to_pixels([photo]), 0.5)])).numpy()
    for each, target in zip(found, exemplars, strict=True):
        assert each.similarity == pytest.approx(float(ends[0] @ target), abs=1e-5)
        assert each.baseline_similarity == pytest.approx(float(ends[1] @ target), abs=1e-5)
        assert each.grid.shape == (16, 16)
        assert each.completeness_error <= TOLERANCE or each.steps > MAX_STEPS - 8
        assert each.completeness_error <= 2 * TOLERANCE
        assert np.ptp(each.grid) > 0


def test_several_exemplars_are_what_each_is_alone() -> None:
    encoder = load_encoder("bundled/lipsim")
    exemplars, pixels = exemplars_of(encoder, 7, 8), pixels_of(encoder)
    together = attribute(encoder, pixels, exemplars)
    for row, found in enumerate(together):
        [alone] = attribute(encoder, pixels, exemplars[row : row + 1])
        np.testing.assert_allclose(found.grid, alone.grid, atol=TOLERANCE / 10)


def test_a_plain_sum_of_gradients_says_the_same() -> None:
    """A naive twin: Eq. 1 by the midpoint rule with many equal steps."""
    encoder, pixels = load_encoder("bundled/lipsim"), pixels_of(load_encoder("bundled/lipsim"))
    exemplars, steps = exemplars_of(encoder, 7), 200
    way = to_pixels([pixels]) - 0.5
    total = torch.zeros(64, 64, dtype=torch.float64)
    for step in range(steps):
        image = (0.5 + (step + 0.5) / steps * way).requires_grad_(True)
        (encoder.encode(image) @ torch.from_numpy(exemplars).T).sum().backward()
        assert image.grad is not None
        total += (image.grad * way / steps).double().sum(dim=(0, 1))
    [found] = attribute(encoder, pixels, exemplars)
    assert np.corrcoef(found.grid.ravel(), pooled(total.numpy()).ravel())[0, 1] > 0.99


@pytest.mark.parametrize("name", ["bundled/lipsim", "bundled/tecoa4"])
def test_reduced_precision_is_near(name: str) -> None:
    precise, coarse = load_encoder(name), load_encoder(name, precision="bf16")
    pixels, exemplars = pixels_of(precise), exemplars_of(precise, 7)
    [fine], [rough] = attribute(precise, pixels, exemplars), attribute(coarse, pixels, exemplars)
    assert rough.grid.dtype == np.float64
    assert rough.similarity == pytest.approx(fine.similarity, abs=0.02)
    assert rough.completeness_error <= 2 * TOLERANCE


def test_it_works_where_nothing_has_gradients() -> None:
    encoder = load_encoder("bundled/tecoa4")
    assert isinstance(encoder, ClipEncoder)
    pixels, exemplars = pixels_of(encoder), exemplars_of(encoder, 7)
    with torch.inference_mode():
        [inside] = attribute(encoder, pixels, exemplars)
    [outside] = attribute(encoder, pixels, exemplars)
    np.testing.assert_array_equal(inside.grid, outside.grid)


def test_a_grey_image_has_nothing_to_attribute() -> None:
    encoder = Line()
    [found] = attribute(encoder, np.full((3, 8, 8), 128, np.uint8), exemplars_of(encoder, 7))
    assert np.abs(found.grid).max() < 1e-2
    assert found.similarity == pytest.approx(found.baseline_similarity, abs=0.01)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("gradient", "an attribution is not a finite number"),
        ("zero", "no embedding"),
        ("embedding", "no embedding"),
    ],
)
def test_what_is_not_finite_is_an_error_and_never_zeros(how: str, reason: str) -> None:
    encoder = Broken(how)
    with pytest.raises(AttributionFailed, match=reason):
        attribute(encoder, pixels_of(encoder), unit_embeddings(torch.ones(1, 2)).numpy())


def test_an_exemplar_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(AttributionFailed, match="a similarity is not a finite number"):
        attribute(Line(), pixels_of(Line()), np.array([[np.nan, 1.0]], np.float32))


def test_steps_are_bounded_and_not_refined_without_time() -> None:
    """Near grey the cosine of this one is a jump, which no number of steps resolves."""
    encoder = Line()
    encoder.w *= 1e9
    pixels, exemplars = pixels_of(encoder), np.array([[0.0, 1.0]], np.float32)
    [found] = attribute(encoder, pixels, exemplars)
    assert 8 < found.steps <= MAX_STEPS
    [hasty] = attribute(encoder, pixels, exemplars, refine=lambda: False)
    assert hasty.steps == 8
    assert hasty.completeness_error > TOLERANCE  # and says so


def test_who_has_gone_gets_nothing_more_done() -> None:
    asked: list[None] = []

    def wanted() -> bool:
        asked.append(None)
        return len(asked) < 2

    with pytest.raises(Abandoned):
        attribute(Line(), pixels_of(Line()), np.array([[0.0, 1.0]], np.float32), wanted=wanted)
    assert len(asked) == 2


SIZES = {224: 16, 128: 16, 64: 16, 384: 16, 336: 16, 518: 14, 8: 8, 9: 9, 17: 16, 31: 16, 37: 16, 5: 5, 1: 1, 130: 13}


@pytest.mark.parametrize("size", SIZES)
def test_pooling_keeps_the_sum_whatever_the_size(size: int) -> None:
    values = np.random.default_rng(size).normal(size=(size, size))
    found = pooled(values)
    assert found.shape == (SIZES[size],) * 2
    assert found.sum() == pytest.approx(values.sum(), rel=1e-12, abs=1e-9)


@pytest.mark.parametrize("size", [64, 31, 9])
def test_a_pixel_is_in_the_cell_where_it_lies(size: int) -> None:
    cells = pooled(np.zeros((size, size))).shape[0]
    for row, column in product((0, size // 3, size - 1), repeat=2):
        values = np.zeros((size, size))
        values[row, column] = 1.0
        [[at_row, at_column]] = np.argwhere(pooled(values))
        assert abs((at_row + 0.5) / cells - (row + 0.5) / size) <= 1 / cells
        assert abs((at_column + 0.5) / cells - (column + 0.5) / size) <= 1 / cells


def test_the_hit_is_seen_where_it_is() -> None:
    """An exemplar pasted into one quarter of a grey image: that quarter is what makes it similar to itself."""
    encoder = load_encoder("bundled/lipsim")
    hit = encoder.preprocess.apply(load_image(benign_hits()[-1].file))
    pixels = np.full_like(hit, 128)
    pixels[:, :32, 32:] = hit[:, :32, 32:]
    with torch.no_grad():
        exemplar = encoder.encode(to_pixels([hit])).numpy()
    [found] = attribute(encoder, pixels, exemplar)
    share = np.abs(found.grid[:8, 8:]).sum() / np.abs(found.grid).sum()
    assert share > 0.95
    assert found.grid.sum() > 0


def load_image(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file)).convert("RGB")
