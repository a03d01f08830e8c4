"""A small classifier in float64 and what attacks on it need, so that twins differ by nothing that matters."""

from collections.abc import Callable

import torch
from torch import Tensor

CLASSES = 12


class Network:
    """A seeded two-layer network: (b, 3, 6, 6) -> (b, CLASSES) logits; counts what it is asked."""

    def __init__(self, seed: int = 0) -> None:
        made = torch.Generator().manual_seed(seed)
        self.first = torch.randn(108, 24, generator=made, dtype=torch.float64) / 4
        self.second = torch.randn(24, CLASSES, generator=made, dtype=torch.float64)
        self.images_seen: list[int] = []
        self.with_gradient: list[bool] = []

    def encode(self, pixels: Tensor) -> Tensor:
        self.images_seen.append(len(pixels))
        self.with_gradient.append(torch.is_grad_enabled())
        return ((pixels.flatten(1) - 0.5) @ self.first).tanh() @ self.second

    def labels(self, pixels: Tensor) -> Tensor:
        """What it says itself: every image is classified right."""
        return ((pixels.flatten(1) - 0.5) @ self.first).tanh().matmul(self.second).argmax(dim=1)


def images(seed: int, count: int = 6) -> Tensor:
    return torch.rand(count, 3, 6, 6, generator=generator(seed), dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradient_of(value: Callable[[Tensor], Tensor], point: Tensor) -> tuple[Tensor, Tensor]:
    """`(value, its gradient)` at a point."""
    at = point.detach().clone().requires_grad_(True)
    result = value(at)
    (gradient,) = torch.autograd.grad(result.sum(), at)
    return result.detach(), gradient
