"""Toy encoders under names, as suites load them."""

from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from offline.benchmarks.suites import SuiteRequest
from perception.encoder import unit_embeddings
from perception.testing import ToyEncoder
from perception.text import TextEncoder
from tests.offline.test_audit_zero_shot import Letters, letters


class NamedToy(ToyEncoder):
    """A toy with a text tower, called as it was asked for."""

    def __init__(self, name: str, seed: int, size_px: int = 16) -> None:
        super().__init__(seed=seed, size_px=size_px)
        self.name = name
        self.text = TextEncoder(Letters(self.dim, seed), letters)


class DistanceToy(NamedToy):
    """A toy that compares by squared distance; its features have very different norms."""

    metric: ClassVar[str] = "l2"

    def features(self, pixels: Tensor) -> Tensor:
        small = torch.nn.functional.adaptive_avg_pool2d((pixels - 0.5) / 0.5, 8)
        return (small.flatten(1) @ self.weight.T / 4).exp()

    def encode(self, pixels: Tensor) -> Tensor:
        return unit_embeddings(self.features(pixels))


MAKERS: dict[str, Callable[[], NamedToy]] = {
    "toy/a": lambda: NamedToy("toy/a", 1),
    "toy/b": lambda: NamedToy("toy/b", 2),
    "toy/large": lambda: NamedToy("toy/large", 3, 48),
    "toy/l2": lambda: DistanceToy("toy/l2", 4),
}


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`load_encoder` knows toys alone; the list takes in the names that are loaded."""
    loaded: list[str] = []

    def load(name: str, **_: object) -> NamedToy:
        loaded.append(name)
        return MAKERS[name]()

    monkeypatch.setattr("perception.catalogue.load_encoder", load)
    return loaded


def quiet(task: str, done: int, total: int, text: str) -> None:
    """Shows nothing, but wants to be told sense."""
    assert task
    assert text
    assert 0 <= done <= total


def chosen(request: SuiteRequest, right: Callable[[NamedToy], list[bool]]) -> dict[str, float]:
    """Percent of a naive twin's right answers, by encoder."""
    answers = {name: right(MAKERS[name]()) for name in request.encoders}
    return {name: 100 * sum(of) / len(of) for name, of in answers.items()}
