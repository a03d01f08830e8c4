"""PGD with a fixed step size and, as in the published fine-tuning recipe, a momentum buffer (methods 3.2)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from offline.attacks.search import GradientAttack, Problem, Search, Start, lowest
from offline.errors import PlanError
from offline.threat import ThreatModel

_REACH = 2.5  # the steps together are so many radii long, as in Madry et al.


@dataclass(frozen=True)
class Pgd(GradientAttack):
    """Projected gradient ascent.

    `v <- n(momentum * v + n(g)); x <- P(x + step_size * v)`, n the sign for linf and the unit vector for l2. The point
    of the highest objective is kept.

    Attributes:
        steps: updates; there is one forward pass more, and no gradient after the last.
        step_size: in [0, 1] pixel units; None for 2.5 eps / steps.
        momentum: 0 for none; 0.9 in the fine-tuning recipe.
        restarts: runs from different starts, each on those that are not yet fooled.
        start: see `Apgd`.
    """

    steps: int = 40
    step_size: float | None = None
    momentum: float = 0.0
    restarts: int = 1
    start: Start = "uniform"

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            PlanError: fewer than one step or restart, a step size that is not positive, a negative momentum, or no
                such start.
        """
        self._require_counts("steps", "restarts")
        self._require_start()
        if self.step_size is not None and not (math.isfinite(self.step_size) and self.step_size > 0):
            raise PlanError(f"PGD's step_size must be finite and positive, got {self.step_size}")
        if not (math.isfinite(self.momentum) and self.momentum >= 0):
            raise PlanError(f"PGD's momentum must be finite and not negative, got {self.momentum}")

    def _begin(self, problem: Problem, rows: Tensor, pixels: Tensor, generator: torch.Generator) -> "_Search":
        start = self._starts(pixels, problem.threat, generator)[rows]
        step_size = _REACH * problem.threat.eps / self.steps if self.step_size is None else self.step_size
        return _Search(
            rows=rows,
            pixels=pixels[rows],
            current=start,
            best=start.clone(),
            best_value=lowest(start),
            gradient=torch.zeros_like(start),
            velocity=torch.zeros_like(start),
            step_size=step_size,
            momentum=self.momentum,
        )


@dataclass
class _Search(Search):
    """Adds to `Search` the gradient here and the velocity v, both (k, 3, h, w), and `Pgd`'s parameters."""

    gradient: Tensor
    velocity: Tensor
    step_size: float
    momentum: float

    def move(self, threat: ThreatModel, update: int) -> None:
        """See `Search`."""
        self.velocity = threat.steepest(self.momentum * self.velocity + threat.steepest(self.gradient))
        self.current = threat.project(self.current + self.step_size * self.velocity, self.pixels)

    def observe(self, value: Tensor, gradient: Tensor | None, update: int) -> Tensor:
        """See `Search`."""
        if gradient is not None:
            self.gradient = gradient
        return super().observe(value, gradient, update)
