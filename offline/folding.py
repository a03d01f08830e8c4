"""Convolutions with their BatchNorm folded in: the same tower in eval mode, with fewer passes over memory.

An attack spends its time in forward and backward passes through a tower in eval mode, where BatchNorm is a fixed affine
map that the convolution before it can take over. For MobileNetV2 on a CPU the pair of passes takes about 0.6 of the
time. Only attacks use the twin: what a benchmark reports, the real encoder has judged.
"""

import copy
from typing import Any, cast

import torch
from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from perception.encoder import unit_embeddings
from perception.encoders.tower import TowerEncoder

_PLAIN = (nn.BatchNorm2d, nn.SyncBatchNorm)
_WITH_ACTIVATION = (BatchNormAct2d, SyncBatchNormAct)
_PROBE_IMAGES = 2


class FoldedEncoder(nn.Module):
    """A frozen twin of an encoder in eval mode, made by `fold`; it follows the encoder's weights at each `refresh`."""

    def __init__(self, encoder: TowerEncoder, pairs: dict[str, str]) -> None:
        """Fold `pairs`, BatchNorms by the names of their convolutions in the tower."""
        super().__init__()
        self.twin = copy.deepcopy(encoder).eval().requires_grad_(False)
        self.folded = _Folded(encoder.visual, pairs)
        self.twin.visual = self.folded.network

    def refresh(self) -> None:
        """Take over the encoder's present weights and statistics, in place."""
        self.folded.refresh()

    def features(self, pixels: Tensor) -> Tensor:
        """See `TowerEncoder.features`."""
        return self.twin.features(pixels)

    def forward(self, pixels: Tensor) -> Tensor:
        """The same as `features`."""
        return self.features(pixels)

    def encode(self, pixels: Tensor) -> Tensor:
        """See `perception.encoder.Encoder.encode`."""
        return unit_embeddings(self(pixels))


def fold(encoder: TowerEncoder) -> FoldedEncoder | None:
    """A faster twin for attacks, or None: then attack the encoder itself, which computes the same.

    A BatchNorm is folded where its input is the very tensor that a convolution returned, as a forward pass of a probe
    in float64 shows; the folded tower must then agree with the tower on that probe.

    Returns:
        None where the tower has nothing to fold, is not in fp32, where folding would round differently, or where
        folding changes the function, as when something else reads a convolution's output too.
    """
    if encoder.precision != "fp32" or not any(isinstance(m, _BatchNorm) for m in encoder.visual.modules()):
        return None
    exact = copy.deepcopy(encoder.visual).eval().requires_grad_(False).double()
    size_px = encoder.preprocess.size_px
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(_PROBE_IMAGES, 3, size_px, size_px, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        expected, pairs = _pairs(exact, probe.to(encoder.device))
        if not pairs:
            return None
        found = _Folded(exact, pairs).network(probe.to(encoder.device))
    if not torch.allclose(found, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max())):
        return None
    return FoldedEncoder(encoder, pairs)


class _Folded:
    """A tower's folded copy, and how its tensors follow from the tower's."""

    def __init__(self, source: nn.Module, pairs: dict[str, str]) -> None:
        self.network = copy.deepcopy(source).eval().requires_grad_(False)
        self._folds: list[tuple[nn.Conv2d, nn.Conv2d, _BatchNorm]] = []
        for conv_name, norm_name in pairs.items():
            conv = cast(nn.Conv2d, self.network.get_submodule(conv_name))
            if conv.bias is None:
                conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels), requires_grad=False)
            norm = cast(_BatchNorm, source.get_submodule(norm_name))
            self._folds.append((conv, cast(nn.Conv2d, source.get_submodule(conv_name)), norm))
            self.network.set_submodule(norm_name, _remainder(self.network.get_submodule(norm_name)))
        theirs = _tensors(source)
        folded = {f"{name}.{tensor}" for name in pairs for tensor in ("weight", "bias")}
        self._copies = [(ours, theirs[name]) for name, ours in _tensors(self.network).items() if name not in folded]
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """See `FoldedEncoder.refresh`."""
        for conv, source, norm in self._folds:
            mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
            weight, bias = fuse_conv_bn_weights(
                source.weight, source.bias, mean, variance, norm.eps, norm.weight, norm.bias
            )
            conv.weight.copy_(weight)
            cast(Tensor, conv.bias).copy_(bias)
        for ours, theirs in self._copies:
            ours.copy_(theirs)


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    parameters = network.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(network.named_buffers(remove_duplicate=False))}


def _remainder(norm: nn.Module) -> nn.Module:
    """What a BatchNorm still does once its affine map is gone: nothing, or timm's dropout and activation."""
    if isinstance(norm, _WITH_ACTIVATION):
        return nn.Sequential(cast(nn.Module, norm.drop), cast(nn.Module, norm.act))
    return nn.Identity()


def _pairs(network: nn.Module, probe: Tensor) -> tuple[Tensor, dict[str, str]]:
    """Run the probe; return its output, and the BatchNorms that read a convolution's output, by convolution."""
    outputs: list[tuple[str, Tensor]] = []  # kept, so that no tensor's memory, and so its identity, is used again
    inputs: list[tuple[str, Tensor]] = []
    hooks = []

    def watch(name: str, module: nn.Module) -> None:
        if type(module) is nn.Conv2d:  # a subclass may do something else with its weight
            hooks.append(module.register_forward_hook(lambda _, __, out: outputs.append((name, out))))
        elif type(module) in _PLAIN + _WITH_ACTIVATION and cast(_BatchNorm, module).running_mean is not None:
            hooks.append(module.register_forward_pre_hook(lambda _, args: inputs.append((name, args[0]))))

    for name, module in network.named_modules():
        watch(name, module)
    result: Any = network(probe)
    for hook in hooks:
        hook.remove()
    times = [name for name, _ in (*outputs, *inputs)]
    pairs = {
        conv: norm
        for conv, output in outputs
        for norm, read in inputs
        if read is output and times.count(conv) == times.count(norm) == 1
    }
    return result, pairs
