"""The inner maximisation of adversarial fine-tuning: PGD with a momentum buffer (methods 3.2).

Owns the start and the steps. Which module is attacked, and in which mode, is the caller's matter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offline.threat import ThreatModel

PerImageLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class InnerAttack:
    """PGD of a fixed number of steps.

    `v <- n(momentum * v + n(g)); delta <- project(delta + step_size * v)`, n the sign for linf and the unit vector for
    l2. The start is random and its first forward is not clamped to [0, 1], as in the reference.

    Attributes:
        threat: norm and radius.
        steps: gradient steps; 0 leaves the random start.
        step_size: in [0, 1] pixel units.
        momentum: 0.9 in the published recipe.
        chunk: images attacked at a time, 0 for all; images do not influence each other, so only speed depends on it.
    """

    threat: ThreatModel
    steps: int
    step_size: float
    momentum: float = 0.9
    chunk: int = 0

    def __call__(
        self,
        features: Callable[[Tensor], Tensor],
        loss: PerImageLoss,
        pixels: Tensor,
        target: Tensor,
        start: Tensor,
    ) -> Tensor:
        """Perturb a batch.

        Args:
            features: (b, 3, h, w) pixels -> (b, d); differentiable and independent between images.
            loss: per-image loss to maximise.
            pixels: (b, 3, h, w) in [0, 1]; target: (b, ...) what the loss compares with.
            start: (b, 3, h, w) starting perturbation, from `start_of`.

        Returns:
            (b, 3, h, w) perturbed pixels inside the ball and the box, without gradient.
        """
        size = self.chunk or len(pixels)
        parts = zip(pixels.split(size), target.split(size), start.split(size), strict=True)
        return torch.cat([self._attack(features, loss, *part) for part in parts])

    def _attack(
        self,
        features: Callable[[Tensor], Tensor],
        loss: PerImageLoss,
        pixels: Tensor,
        target: Tensor,
        start: Tensor,
    ) -> Tensor:
        perturbed, velocity = (pixels + start).detach(), torch.zeros_like(pixels)
        for _ in range(self.steps):
            perturbed.requires_grad_(True)
            total = loss(features(perturbed), target).sum()
            (gradient,) = torch.autograd.grad(total, perturbed)
            with torch.no_grad():
                steepest = self.threat.steepest
                velocity = steepest(self.momentum * velocity + steepest(gradient))
                perturbed = self.threat.project(perturbed + self.step_size * velocity, pixels)
        return perturbed.detach() if self.steps else self.threat.project(perturbed, pixels)

    def start_of(self, pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        """A random start for each image, from its own seed: it does not depend on the batch or rank it is in.

        Args:
            pixels: (b, 3, h, w); seeds: b non-negative integers below 2^63.
        """
        rows = []
        for image, seed in zip(pixels, seeds, strict=True):
            generator = torch.Generator(device=pixels.device).manual_seed(seed)
            rows.append(self.threat.random_perturbation(image[None], generator))
        return torch.cat(rows)
