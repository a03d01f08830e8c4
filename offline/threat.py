"""The threat model: which perturbed images an attacker may show.

Owns the ball around an image, the box of pixel values, and the geometry that attacks need. Knows nothing of losses.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from offline.errors import PlanError, RunError

Norm = Literal["linf", "l2"]
NORMS = ("linf", "l2")
_TINY = 1e-12
_REFERENCE_PX = 224


@dataclass(frozen=True)
class ThreatModel:
    """All images within `eps` of the original that are images themselves.

    Attributes:
        norm: 'linf' or 'l2', over all 3 * h * w values of one image.
        eps: radius, in units of pixels in [0, 1].
    """

    norm: Norm
    eps: float

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            PlanError: no such norm, or a radius that is negative or not finite.
        """
        if self.norm not in NORMS:
            raise PlanError(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise PlanError(f"eps must be finite and not negative, got {self.eps}")

    def project(self, perturbed: Tensor, pixels: Tensor) -> Tensor:
        """Bring perturbed images back into the ball, then into [0, 1] (methods 5.1).

        For l2 the result is not the nearest point of the intersection: the clamp can only shorten the perturbation.

        Args:
            perturbed, pixels: (b, 3, h, w); `pixels` are the originals, in [0, 1].
        """
        if self.norm == "linf":
            return perturbed.clamp(pixels - self.eps, pixels + self.eps).clamp(0, 1)
        delta = perturbed - pixels
        scale = (self.eps / _norms(delta).clamp_min(_TINY)).clamp_max(1.0)
        return (pixels + delta * scale).clamp(0, 1)

    def random_perturbation(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """A perturbation to start from: uniform in the box for linf, uniform on the sphere for l2.

        It is not clamped to [0, 1]: the published fine-tuning recipe's first forward is not (methods 3.2).

        Args:
            pixels: (b, 3, h, w); gives shape, type and device.
            generator: on any device; a draw depends on the generator's device, not on the pixels'.
        """
        if self.norm == "linf":
            return self.eps * (2 * _draw(torch.rand, pixels, generator) - 1)
        return self.eps * self.steepest(_draw(torch.randn, pixels, generator))

    def random_start(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Images at a random perturbation, clamped to [0, 1]; see `random_perturbation`."""
        return self.project(pixels + self.random_perturbation(pixels, generator), pixels)

    def boundary_start(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """APGD's random start (methods 5.1), clamped to [0, 1]: a perturbation whose norm is eps exactly.

        For linf that is `eps * t / max|t|` with t uniform, unlike the start of `random_start`.
        """
        if self.norm == "l2":
            return self.random_start(pixels, generator)
        drawn = 2 * _draw(torch.rand, pixels, generator) - 1
        largest = drawn.flatten(1).abs().amax(1).view(-1, 1, 1, 1).clamp_min(_TINY)
        return self.project(pixels + self.eps * drawn / largest, pixels)

    def steepest(self, gradient: Tensor) -> Tensor:
        """The direction of steepest ascent within a ball of radius 1: (b, 3, h, w) -> the same."""
        if self.norm == "linf":
            return gradient.sign()
        return gradient / (_norms(gradient) + _TINY)

    def distance(self, perturbed: Tensor, pixels: Tensor) -> Tensor:
        """The perturbation's norm, in float64 so that rounding does not add up: (b, 3, h, w) twice -> (b,)."""
        delta = (perturbed.double() - pixels.double()).flatten(1)
        return delta.abs().amax(dim=1) if self.norm == "linf" else delta.square().sum(dim=1).sqrt()

    def contains(self, perturbed: Tensor, pixels: Tensor, tolerance: float = 1e-6) -> Tensor:
        """Whether each image is inside the ball and the box.

        Args:
            perturbed, pixels: (b, 3, h, w).
            tolerance: by which eps may be exceeded, absolute for linf and relative to eps as well for l2, whose float32
                rounding grows with the norm. The box [0, 1] has none: clamping is exact.

        Returns:
            (b,) bool; an image with NaN is outside.
        """
        slack = tolerance * max(1.0, self.eps)
        flat = perturbed.flatten(1)
        return (self.distance(perturbed, pixels) <= self.eps + slack) & ((flat >= 0) & (flat <= 1)).all(1)

    def require(self, perturbed: Tensor, pixels: Tensor, attack: str) -> None:
        """Check what an attack brought; see `contains`.

        Raises:
            RunError: an image is outside; names the attack and the largest norm.
        """
        if not bool(self.contains(perturbed, pixels).all()):
            largest = float(self.distance(perturbed, pixels).max())
            raise RunError(f"{attack} left its threat model {self}: a norm is {largest}, or pixels leave [0, 1]")


def parse_eps(value: str | float) -> float:
    """Read a radius: 0.0157, '0.0157' or '4/255'.

    Raises:
        PlanError: it is no number or fraction of numbers, is negative or not finite.
    """
    numerator, slash, denominator = str(value).partition("/")
    try:
        eps = float(numerator) / float(denominator) if slash else float(numerator)
    except (ValueError, ZeroDivisionError) as error:
        raise PlanError(f"eps must be a number or a fraction such as '4/255', got {value!r}") from error
    if isinstance(value, bool) or not (math.isfinite(eps) and eps >= 0):
        raise PlanError(f"eps must be finite and not negative, got {value!r}")
    return eps


def scaled_l2_eps(eps_at_224: float, size_px: int) -> float:
    """An l2 radius for another image size that allows the same change to each pixel.

    The l2 norm of a change of constant strength grows with the root of the number of values, that is with the side:
    eps 3 is a root mean square of 3 / sqrt(3 * 224 * 224) = 0.0077 a value, and stays so at `eps * size_px / 224`.
    """
    return eps_at_224 * size_px / _REFERENCE_PX


def _norms(tensor: Tensor) -> Tensor:
    """l2 norm of each image, (b, 1, 1, 1), summed in float64: float32 can be off by more than `contains` allows."""
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=(1, 2, 3), keepdim=True, dtype=torch.float64)
    return norms.to(tensor.dtype)


def _draw(sample: Callable[..., Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
    """A random tensor of `like`'s shape, drawn on the generator's device and moved to `like`'s."""
    return sample(like.shape, generator=generator, device=generator.device, dtype=like.dtype).to(like.device)
