"""Gradients in bfloat16, beliefs in full precision."""

from dataclasses import dataclass
from typing import Self

import pytest
import torch
from torch import Tensor

from offline.attacks.apgd import Apgd
from offline.attacks.precision import Bf16Gradients
from offline.attacks.square import Square
from offline.criteria import ArgmaxWrong
from offline.objectives import CrossEntropy, EmbeddingShift
from offline.threat import ThreatModel
from perception.testing import ToyEncoder
from tests.offline.attack_toys import generator


def pixels(count: int = 6) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=generator(3))


def test_only_passes_with_a_gradient_are_rounded() -> None:
    encoder = ToyEncoder()
    wrapped = Bf16Gradients(encoder)
    exact = encoder.encode(pixels()).detach()
    rounded = wrapped.encode(pixels()).detach()
    with torch.no_grad():
        assert torch.equal(wrapped.encode(pixels()), exact)
    assert rounded.dtype == torch.float32
    assert 1e-4 < float((rounded - exact).abs().max()) < 0.05


def test_an_attack_finds_about_as_much() -> None:
    encoder, threat = ToyEncoder(), ThreatModel("linf", 4 / 255)
    with torch.no_grad():
        shift = EmbeddingShift(encoder.encode(pixels()))
    full, half = (
        Apgd(steps=20).attack(attacked, shift, None, pixels(), threat, generator=generator())
        for attacked in (encoder, Bf16Gradients(encoder))
    )
    with torch.no_grad():
        reached = shift(encoder.encode(half.adversarial))
    assert float(reached.mean()) == pytest.approx(float(full.objective.mean()), rel=0.05)
    assert not torch.equal(half.adversarial, full.adversarial)
    assert half.adversarial.dtype == torch.float32


class Doubtful:
    """Its passes with a gradient say that every image is of class 1; the exact ones, that bright images are."""

    def encode(self, images: Tensor) -> Tensor:
        bright = images.mean(dim=(1, 2, 3)) - 0.5
        if torch.is_grad_enabled():
            bright = bright + 1
        return torch.stack([-bright, bright], dim=1)


def test_nobody_is_fooled_whom_the_exact_pass_calls_right() -> None:
    images = torch.stack([torch.full((3, 4, 4), mean) for mean in (0.2, 0.495, 0.7)])
    labels = torch.zeros(3, dtype=torch.int64)
    criterion = ArgmaxWrong(None, labels)
    found = Apgd(steps=10, start="clean").attack(
        Bf16Gradients(Doubtful()),
        CrossEntropy(None, labels),
        criterion,
        images,
        ThreatModel("linf", 0.05),
        generator=generator(),
    )
    assert found.fooled.tolist() == [False, True, True]
    assert found.updates.tolist() == [10, 1, 0]
    with torch.no_grad():
        assert torch.equal(criterion(Doubtful().encode(found.adversarial)), found.fooled)


@dataclass(frozen=True)
class Never:
    def __call__(self, embeddings: Tensor) -> Tensor:
        return torch.zeros(len(embeddings), dtype=torch.bool)

    def rows(self, index: Tensor) -> Self:
        return self


def test_without_gradients_nothing_is_rounded() -> None:
    encoder, threat = ToyEncoder(), ThreatModel("linf", 4 / 255)
    with torch.no_grad():
        shift = EmbeddingShift(encoder.encode(pixels()))
    plain, wrapped = (
        Square(queries=10).attack(attacked, shift, Never(), pixels(), threat, generator=generator())
        for attacked in (encoder, Bf16Gradients(encoder))
    )
    assert torch.equal(plain.adversarial, wrapped.adversarial)
