"""The encoder as a graph: the same bits, or not used."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perception.catalogue import load_encoder
from perception.certificates import FeatureBound, feature_bound
from perception.encoders.lipsim import LipsimConfig, LipsimNetwork, LipsimParts, preprocess_of
from perception.encoders.tower import TowerEncoder
from perception.errors import NonFiniteEmbedding
from perception.preprocess import PreprocessSpec
from perception.testing import ToyEncoder
from service.graph import GraphEncoder, as_graph


def lipsim() -> TowerEncoder:
    """A family without a text tower."""
    torch.manual_seed(0)
    config = LipsimConfig(16, channels=6, depth=2, pools=(4,), dense_layers=2, dense_width=8, dim=12, bias_dim=True)
    parts = LipsimParts(config, preprocess_of(config), LipsimNetwork(config).state_dict(), "a toy")
    return parts.build("lipsim", "fp32", "cpu")


class Tower(TowerEncoder):
    """A small tower around any network."""

    def __init__(self, visual: nn.Module) -> None:
        spec = PreprocessSpec(size_px=8, resize_px=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        super().__init__(
            "a tower", visual, architecture={"a": 1}, dim=4, preprocess=spec, precision="fp32", device="cpu"
        )

    @property
    def text(self) -> Any:
        return "its text tower"

    def export(self, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
        raise NotImplementedError


def network(*more: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), *more, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class PerBatch(nn.Module):
    """Does in Python what a graph cannot see: it treats batches of three differently."""

    def forward(self, values: Tensor) -> Tensor:
        return values * 2 + 1 if len(values) == 3 else values


class Unsure(nn.Module):
    """Cannot be run twice alike."""

    def forward(self, values: Tensor) -> Tensor:
        raise RuntimeError("only in Python\nand at length")


@pytest.mark.parametrize("name", ["bundled/fare4", "bundled/clean"])
def test_bits_of_the_bundled_encoders_are_the_same(name: str) -> None:
    encoder = load_encoder(name)
    graph = as_graph(encoder, (1, 2, 5))
    assert isinstance(graph, GraphEncoder)
    generator = torch.Generator().manual_seed(1)
    for batch in (1, 3, 4, 16):
        pixels = torch.rand(batch, 3, 128, 128, generator=generator)
        with torch.inference_mode():
            assert torch.equal(graph.encode(pixels), encoder.encode(pixels))
    for attribute in ("name", "dim", "fingerprint", "preprocess", "precision", "device"):
        assert getattr(graph, attribute) == getattr(encoder, attribute)


def test_everything_else_is_the_towers() -> None:
    graph = as_graph(Tower(network()), (1, 2))
    assert isinstance(graph, GraphEncoder)
    assert graph.text == "its text tower"
    with pytest.raises(NonFiniteEmbedding):
        graph.encode(torch.full((1, 3, 8, 8), float("nan")))


def test_a_graph_that_differs_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    encoder = Tower(network(PerBatch()))
    with caplog.at_level(logging.WARNING):
        assert as_graph(encoder, (1, 3)) is encoder
    assert "differs" in caplog.text


def test_what_has_no_graph_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    encoder = Tower(network(Unsure()))
    with caplog.at_level(logging.WARNING):
        assert as_graph(encoder, (1,)) is encoder
    assert "no graph of a tower: only in Python" in caplog.text
    toy = ToyEncoder()
    assert as_graph(toy, (1,)) is toy


def test_a_graph_has_the_features_of_its_tower_and_what_is_proven_of_them() -> None:
    tower = Tower(network())
    tower.lipschitz, tower.bias_dim = 2.0, True
    graph = as_graph(tower, (1, 2))
    assert isinstance(graph, GraphEncoder)
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(graph.features(pixels), tower.features(pixels))
    assert feature_bound(graph) == feature_bound(tower) == FeatureBound(2.0, 3 * 8 * 8, fixed=1)


def test_an_encoder_without_a_text_tower_has_a_graph() -> None:
    encoder = lipsim()
    graph = as_graph(encoder, (1, 2, 5))
    assert isinstance(graph, GraphEncoder)
    pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(graph.features(pixels), encoder.features(pixels))
    assert feature_bound(graph) == feature_bound(encoder)
