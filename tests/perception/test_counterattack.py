"""Counterattacks: the published vectors, closed forms on linear encoders, and the same answer in any company."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from perception import load_encoder
from perception.counterattack import Counterattack, CounterattackSettings, counterattack
from perception.encoder import Encoder, Precision, unit_embeddings
from perception.encoders.tower import TowerEncoder
from perception.errors import CheckpointError, NonFiniteEmbedding
from perception.preprocess import PreprocessSpec, to_pixels
from perception.testing import ToyEncoder, synthetic_image

SEED = b"a seed that nobody can guess"
ALWAYS, NEVER = 1e9, 0.0
SIZE_PX = 6


class Linear:
    """`f(x) = W x` on 6 x 6 pixels, in float64 where asked for."""

    def __init__(self, seed: int = 0, scale: float = 1.0) -> None:
        self.weight = scale * torch.randn(5, 3 * SIZE_PX**2, generator=torch.Generator().manual_seed(seed))
        self.name, self.dim, self.fingerprint = f"linear/{seed}", 5, f"{seed}"
        self.precision: Precision = "fp32"
        self.preprocess = PreprocessSpec(size_px=SIZE_PX, resize_px=SIZE_PX)

    def features(self, pixels: Tensor) -> Tensor:
        return pixels.flatten(1) @ self.weight.to(pixels).T

    def encode(self, pixels: Tensor) -> Tensor:
        return unit_embeddings(self.features(pixels))


def images(count: int = 4, seed: int = 1) -> Tensor:
    """In float64, with pixels at both ends of the box."""
    drawn = torch.rand(count, 3, SIZE_PX, SIZE_PX, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (1.4 * drawn - 0.2).clamp(0, 1)


def noise(like: Tensor, eps: float, seed: int = 2) -> Tensor:
    return eps * (2 * torch.rand(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype) - 1)


def closed_form(weight: Tensor, x: Tensor, drawn: Tensor, asked: CounterattackSettings) -> Tensor:
    """One image, flat: `grad |W delta|^2 = 2 W^T W delta`, step by step with numpy."""
    w, x_, d = (value.double().numpy() for value in (weight, x.flatten(), drawn.flatten()))
    deltas = [np.clip(x_ + d, 0, 1) - x_]
    for _ in range(asked.steps):
        delta = deltas[-1] + asked.step_size * np.sign(w.T @ (w @ deltas[-1]))
        deltas.append(np.clip(x_ + np.clip(delta, -asked.eps, asked.eps), 0, 1) - x_)
    powers = np.exp(asked.beta * np.arange(asked.steps + 1))
    total = sum(p * delta for p, delta in zip(powers / powers.sum(), deltas, strict=True))
    return torch.from_numpy(x_ + total)


# --- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "weights"),
    [
        (2, (0.015876, 0.117310, 0.866813)),
        (5, (3.926e-5, 2.901e-4, 2.1433e-3, 0.0158370, 0.1170204, 0.8646700)),
    ],
)
def test_weights_are_the_published_ones(steps: int, weights: tuple[float, ...]) -> None:
    found = CounterattackSettings(steps=steps).weights
    assert found == pytest.approx(weights, abs=5e-7)
    assert math.fsum(found) == pytest.approx(1, abs=1e-12)


def test_defaults_are_the_published_ones() -> None:
    assert CounterattackSettings() == CounterattackSettings(4 / 255, 2, 1 / 255, 2.0, 0.2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eps", 0.0), ("eps", 1.1), ("eps", math.nan), ("step_size", -1 / 255), ("step_size", 4.0), ("steps", 0),
        ("steps", 1.5), ("steps", True), ("beta", -1.0), ("beta", math.inf), ("threshold", -0.1),
        ("threshold", math.nan),
    ],
)  # fmt: skip
def test_impossible_parameters_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be .* got "):
        CounterattackSettings(**{name: value})  # type: ignore[arg-type]


def test_huge_weights_do_not_overflow() -> None:
    assert CounterattackSettings(steps=50, beta=100.0).weights[-1] == pytest.approx(1)


# --- the counterattack -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_linear_encoder_has_a_closed_form(steps: int) -> None:
    encoder, asked = Linear(), CounterattackSettings(eps=0.1, steps=steps, step_size=0.04, threshold=ALWAYS)
    x = images()
    drawn = noise(x, asked.eps)
    found = counterattack(encoder, x, drawn, asked)
    assert found.countered.all()
    for i in range(len(x)):
        expected = closed_form(encoder.weight, x[i], drawn[i], asked)
        torch.testing.assert_close(found.pixels[i].flatten(), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.clean, encoder.features(x))


def test_an_unstable_image_gets_noise_and_is_not_returned_as_it_is() -> None:
    """Rule 10 of methods 0."""
    x = images()
    drawn = noise(x, 4 / 255)
    found = counterattack(Linear(), x, drawn, CounterattackSettings(threshold=NEVER))
    assert not found.countered.any()
    torch.testing.assert_close(found.pixels, (x + drawn).clamp(0, 1))
    assert ((found.pixels - x).abs().flatten(1).amax(dim=1) > 1 / 255).all()


def test_tau_is_of_embeddings_that_are_not_normalised() -> None:
    encoder, x = Linear(), images()
    drawn = noise(x, 0.1)
    w, start = encoder.weight.double(), ((x + drawn).clamp(0, 1) - x).flatten(1)
    expected = (start @ w.T).norm(dim=1) / (x.flatten(1) @ w.T).norm(dim=1)
    asked = CounterattackSettings(eps=0.1)
    torch.testing.assert_close(counterattack(encoder, x, drawn, asked).tau, expected)
    torch.testing.assert_close(counterattack(Linear(scale=7.0), x, drawn, asked).tau, expected)  # a ratio


def test_the_gate_decides_for_each_image_and_equality_is_noise() -> None:
    encoder, x = Linear(), images(8)
    drawn = noise(x, 0.1)
    tau = counterattack(encoder, x, drawn, CounterattackSettings(eps=0.1)).tau
    at = float(tau.sort().values[3])
    found = counterattack(encoder, x, drawn, CounterattackSettings(eps=0.1, threshold=at))
    assert found.countered.tolist() == (tau < at).tolist()
    assert int(found.countered.sum()) == 3
    always = counterattack(encoder, x, drawn, CounterattackSettings(eps=0.1, threshold=ALWAYS)).pixels
    expected = torch.where(found.countered.view(-1, 1, 1, 1), always, (x + drawn).clamp(0, 1))
    torch.testing.assert_close(found.pixels, expected, rtol=0, atol=1e-12)


def test_the_original_gates_and_the_deployed_one_is_followed() -> None:
    deployed, original, x = Linear(0), Linear(1), images(8)
    drawn = noise(x, 0.1)
    asked = CounterattackSettings(eps=0.1, threshold=ALWAYS)
    tau = counterattack(original, x, drawn, asked).tau
    both = counterattack(deployed, x, drawn, asked, original)
    torch.testing.assert_close(both.tau, tau)
    torch.testing.assert_close(both.pixels, counterattack(deployed, x, drawn, asked).pixels)
    at = float(tau.median())
    gated = counterattack(deployed, x, drawn, CounterattackSettings(eps=0.1, threshold=at), original)
    assert gated.countered.tolist() == (tau < at).tolist()


@settings(max_examples=40, deadline=None)
@given(
    eps=st.floats(0.001, 1),
    step_size=st.floats(0.001, 1),
    steps=st.integers(1, 4),
    beta=st.floats(0, 5),
    threshold=st.sampled_from([NEVER, 0.1, ALWAYS]),
    seed=st.integers(0, 1000),
)
def test_ball_and_box_are_kept(
    eps: float, step_size: float, steps: int, beta: float, threshold: float, seed: int
) -> None:
    x = images(3, seed).float()
    defended = Counterattack(Linear(), CounterattackSettings(eps, steps, step_size, beta, threshold), seed=SEED)
    found = defended.defend(x).pixels
    assert found.min() >= 0
    assert found.max() <= 1
    assert (found - x).abs().max() <= eps + 1e-6


# --- the wrapper -----------------------------------------------------------------------------------------------------


def test_it_is_the_encoder_to_the_pools() -> None:
    encoder = ToyEncoder()
    defended = Counterattack(encoder, seed=SEED)
    assert isinstance(defended, Encoder)
    same = ("name", "dim", "fingerprint", "preprocess", "precision")
    assert [getattr(defended, name) for name in same] == [getattr(encoder, name) for name in same]
    assert defended.lipschitz is None
    assert defended.text is None
    rows = defended.encode(to_pixels([encoder.preprocess.apply(synthetic_image(i)) for i in range(3)]))
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))


def test_noise_is_uniform_and_follows_from_seed_and_pixels() -> None:
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    defended = Counterattack(ToyEncoder(), seed=SEED)
    drawn = defended.noise(x)
    flat = drawn[0].flatten().double() * 255 / 4
    assert flat.abs().max() <= 1
    assert [float((flat.pow(k)).mean()) for k in (1, 2, 4)] == pytest.approx([0, 1 / 3, 1 / 5], abs=0.02)
    assert torch.equal(drawn[1:], defended.noise(x[1:].clone()))
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn, Counterattack(ToyEncoder(), seed=SEED + b"!").noise(x))
    nearly = x.clone()
    nearly[0, 0, 0, 0] += 1 / 255
    other = defended.noise(nearly)[0]
    assert float((other - drawn[0]).abs().mean()) > 1 / 255  # all of it is new


def test_the_version_says_what_decides() -> None:
    def version(asked: CounterattackSettings | None = None, seed: bytes = SEED, original: int | None = None) -> str:
        other = None if original is None else ToyEncoder(seed=original)
        return Counterattack(ToyEncoder(), asked, seed=seed, original=other).defense

    assert version() == version(CounterattackSettings())
    all_different = {
        version(),
        version(CounterattackSettings(steps=3)),
        version(CounterattackSettings(threshold=0.3)),
        version(seed=SEED + b"!"),
        version(original=1),
        version(original=2),
    }
    assert len(all_different) == 6
    assert all(found.startswith("ttc-") and len(found) == 16 for found in all_different)


def test_short_seeds_and_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 16 bytes, got 5"):
        Counterattack(ToyEncoder(), seed=b"short")
    with pytest.raises(ValueError, match="together must be at least 1"):
        Counterattack(ToyEncoder(), seed=SEED, together=0)
    with pytest.raises(CheckpointError, match="toy/1 takes images of 32 px, toy/0 of 16 px"):
        Counterattack(ToyEncoder(), seed=SEED, original=ToyEncoder(seed=1, size_px=32))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_caller_s_mode_changes_nothing(mode: Callable[[], AbstractContextManager[None]]) -> None:
    defended = Counterattack(Linear(), CounterattackSettings(threshold=ALWAYS), seed=SEED)
    expected = defended.encode(images().float())
    with mode():
        found = defended.encode(images().float() + 0)  # in inference mode a tensor that can have no gradient
        both = defended.encode_both(images().float() + 0)
    torch.testing.assert_close(found.clone(), expected, rtol=0, atol=0)
    torch.testing.assert_close(both[0].clone(), expected, rtol=0, atol=0)
    torch.testing.assert_close(both[1].clone(), Linear().encode(images().float()))


def test_gradients_take_the_perturbation_for_a_constant() -> None:
    encoder = Linear()
    defended = Counterattack(encoder, CounterattackSettings(eps=0.1, step_size=0.05), seed=SEED)
    target = torch.randn(5, generator=torch.Generator().manual_seed(3))
    x = images().float().requires_grad_()
    at = defended.defend(x).pixels.requires_grad_()
    (found,) = torch.autograd.grad((defended.encode(x) @ target).sum(), x)
    (expected,) = torch.autograd.grad((encoder.encode(at) @ target).sum(), at)
    torch.testing.assert_close(found, expected)


class Broken(Linear):
    """Has no embedding for dark images."""

    def features(self, pixels: Tensor) -> Tensor:
        dark = (pixels.mean(dim=(1, 2, 3)) < 0.1)[:, None]
        return super().features(pixels).masked_fill(dark, torch.nan)


def test_what_has_no_embedding_is_named_by_its_row() -> None:
    x = images(3).float()
    x[1] = 0
    with pytest.raises(NonFiniteEmbedding) as caught:
        Counterattack(Broken(), seed=SEED).encode(x)
    assert caught.value.rows == (1,)


# --- towers ----------------------------------------------------------------------------------------------------------


class Tower(TowerEncoder):
    """A small convolutional tower."""

    def __init__(self, precision: Precision) -> None:
        torch.manual_seed(0)
        visual = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        spec = PreprocessSpec(size_px=12, resize_px=12)
        super().__init__(
            "a tower", visual, architecture={"a": 1}, dim=32, preprocess=spec, precision=precision, device="cpu"
        )  # fmt: skip

    def export(self, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_answer_does_not_depend_on_its_company(precision: Precision) -> None:
    encoder = Tower(precision)
    x = torch.rand(7, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    taus = Counterattack(encoder, seed=SEED).defend(x).tau
    asked = CounterattackSettings(threshold=float(taus.sort().values[3]))  # some of either kind
    defended = Counterattack(encoder, asked, seed=SEED)
    together, order = defended.defend(x), [5, 1, 1, 3]
    assert int(together.countered.sum()) == 3
    torch.testing.assert_close(defended.defend(x[order]).pixels, together.pixels[order], rtol=0, atol=0)
    for i in range(len(x)):
        torch.testing.assert_close(defended.defend(x[i : i + 1]).pixels, together.pixels[i : i + 1], rtol=0, atol=0)
    tolerance = {"fp32": 1e-5, "bf16": 2e-2}[precision]  # the encoder's own in batches of other sizes
    torch.testing.assert_close(defended.encode(x)[2:3], defended.encode(x[2:3]), rtol=0, atol=tolerance)


def test_the_counterattack_moves_the_embedding_farther_than_noise_does() -> None:
    encoder = Tower("fp32")
    x = torch.rand(7, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    defended = Counterattack(encoder, CounterattackSettings(threshold=ALWAYS), seed=SEED)
    pushed = encoder.features(defended.defend(x).pixels) - encoder.features(x)
    noisy = encoder.features((x + defended.noise(x)).clamp(0, 1)) - encoder.features(x)
    assert (pushed.norm(dim=1) > 1.5 * noisy.norm(dim=1)).all()


def test_a_bundled_encoder_answers_the_same_alone_and_in_company() -> None:
    encoder = load_encoder("bundled/fare4")
    defended = Counterattack(encoder, seed=SEED, original=load_encoder("bundled/clean"))
    x = to_pixels([encoder.preprocess.apply(synthetic_image(i)) for i in range(3)])
    with torch.inference_mode():
        together, alone = defended.encode(x), torch.cat([defended.encode(x[i : i + 1]) for i in range(3)])
        itself = (encoder.encode(x) - torch.cat([encoder.encode(x[i : i + 1]) for i in range(3)])).abs().max()
    assert (together - alone).abs().max() <= 1e-6 + 10 * itself
