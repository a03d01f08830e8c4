"""Folding: the same function, weights that follow the encoder's, and towers that must not be folded."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from offline.folding import fold
from perception.encoder import Precision
from perception.encoders.tower import TowerEncoder
from perception.preprocess import PreprocessSpec
from perception.text import TextEncoder


class Tower(TowerEncoder):
    """Any small tower as an encoder."""

    def __init__(self, visual: nn.Module, precision: Precision = "fp32") -> None:
        spec = PreprocessSpec(size_px=16, resize_px=16)
        architecture: Mapping[str, Any] = {"test": 1}
        super().__init__(
            "test", visual, architecture=architecture, dim=8, preprocess=spec, precision=precision, device="cpu"
        )

    @property
    def text(self) -> TextEncoder:
        raise NotImplementedError

    def export(self, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
        raise NotImplementedError


class Block(nn.Module):
    """Plain and activating norms, a strided, a grouped and a biased convolution, and a norm that reads no convolution.

    The names are out of order: only the data says which norm belongs to which convolution.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm_b = BatchNormAct2d(12, act_layer=nn.ReLU6)
        self.conv_a = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False)
        self.conv_c = nn.Conv2d(12, 8, 1)
        self.norm_a = nn.BatchNorm2d(6)
        self.conv_b = nn.Conv2d(6, 12, 3, groups=3, bias=False)
        self.norm_c = nn.BatchNorm2d(8, affine=False)
        self.alone = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_a(self.conv_a(x)).relu()
        x = self.norm_b(self.conv_b(x))
        x = self.norm_c(self.conv_c(x))
        output: Tensor = self.alone(x.relu()).mean(dim=(2, 3))
        return output


class ReadTwice(nn.Module):
    """The convolution's output is read beside its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        output: Tensor = (self.norm(x) + x).mean(dim=(2, 3))
        return output


class UsedTwice(nn.Module):
    """One convolution, two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.last = nn.Linear(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.conv(self.one(self.conv(x)).relu()))
        output: Tensor = self.last(x.mean(dim=(2, 3)))
        return output


class Activated(nn.Module):
    """Something stands between convolution and norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.norm(self.conv(x).relu()).mean(dim=(2, 3))
        return output


def seeded(visual: nn.Module, precision: Precision = "fp32") -> Tower:
    """An encoder whose norms have statistics and weights of their own."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in visual.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return Tower(visual, precision)


def pixels() -> Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def norms_in(network: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in network.modules())


def test_the_twin_computes_the_same_embeddings_and_gradients() -> None:
    encoder = seeded(Block())
    folded = fold(encoder)
    assert folded is not None
    assert norms_in(folded) == 1  # the one that reads no convolution
    assert norms_in(encoder) == 4  # the encoder keeps its own
    gradients = []
    for network in (encoder, folded):
        x = pixels().requires_grad_(True)
        gradients.append(torch.autograd.grad(network.encode(x)[:, 0].sum(), x)[0])
    torch.testing.assert_close(folded(pixels()), encoder.features(pixels()), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(folded.encode(pixels()), encoder.encode(pixels()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)


def test_refresh_follows_weights_and_statistics_in_place() -> None:
    encoder = seeded(Block())
    folded = fold(encoder)
    assert folded is not None
    addresses = [tensor.data_ptr() for tensor in folded.state_dict().values()]
    before = folded(pixels())
    with torch.no_grad():
        for tensor in (*encoder.visual.parameters(), *encoder.visual.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1.3)
    encoder.train()
    assert torch.equal(folded(pixels()), before)  # until it is told
    folded.refresh()
    encoder.eval()
    torch.testing.assert_close(folded(pixels()), encoder.features(pixels()), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(folded(pixels()), before)
    assert [tensor.data_ptr() for tensor in folded.state_dict().values()] == addresses


def test_the_encoder_is_left_as_it_was() -> None:
    encoder = seeded(Block())
    encoder.visual.train().requires_grad_(True)
    before = copy.deepcopy(encoder.visual.state_dict())
    folded = fold(encoder)
    assert folded is not None
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert all(module.training for module in encoder.visual.modules())
    assert all(parameter.requires_grad for parameter in encoder.visual.parameters())
    after = encoder.visual.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in encoder.modules())


@pytest.mark.parametrize(
    "visual", [ReadTwice(), UsedTwice(), Activated(), nn.Sequential(nn.Conv2d(3, 8, 16), nn.Flatten())]
)
def test_what_cannot_be_folded_exactly_is_not_folded(visual: nn.Module) -> None:
    assert fold(seeded(visual)) is None


def test_half_precision_is_not_folded() -> None:
    assert fold(seeded(Block(), "bf16")) is None


def test_the_bundled_encoder_is_folded_altogether() -> None:
    from perception import load_encoder

    encoder = load_encoder("bundled/clean")
    folded = fold(encoder)
    assert folded is not None
    assert norms_in(encoder) == 52
    assert norms_in(folded) == 0
    size = encoder.preprocess.size_px
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(folded.encode(images), encoder.encode(images), rtol=0, atol=1e-5)
