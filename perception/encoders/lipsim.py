"""LipSim encoders: networks of SLL layers, of which a Lipschitz constant in L2 is proven (methods 8.1).

Reads the published checkpoints and folders of its own. Knows the network's shape and its file formats; the layers and
why they are 1-Lipschitz are in `perception.encoders.sll`, what follows from it is in `perception.certificates`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception.encoder import Precision
from perception.encoders.sll import SllConv2d, SllLinear
from perception.encoders.tower import TowerEncoder
from perception.encoders.weights import first_weights, load_strictly, read_json, read_state_dict, write_checkpoint
from perception.errors import CheckpointError
from perception.preprocess import PreprocessSpec

CONFIG_NAME = "lipsim_config.json"
WEIGHT_NAMES = ("lipsim.safetensors",)


@dataclass(frozen=True)
class LipsimConfig:
    """The shape of a network; the defaults are those of the published one.

    Attributes:
        image_size: side in px of the pixels that it takes.
        channels: width of the convolutional layers, to which the 3 of an image are padded with zeros.
        depth: number of convolutional layers, all at full resolution.
        inner_channels: rows of their kernels.
        kernel_size: side of their kernels in px; odd.
        pools: side in px of the windows of each sum pooling, in order.
        dense_layers: number of dense layers.
        dense_width: rows of their weights.
        dim: how many of the last layer's coordinates are kept, the first ones.
        bias_dim: append the constant 1, so that `|features| >= 1` and the unit embedding is 1-Lipschitz, too.
    """

    image_size: int = 224
    channels: int = 45
    depth: int = 20
    inner_channels: int = 5
    kernel_size: int = 3
    pools: tuple[int, ...] = (4, 4)
    dense_layers: int = 7
    dense_width: int = 1024
    dim: int = 1792
    bias_dim: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.pools, tuple):
            raise ValueError(f"pools must be a tuple of integers, got {self.pools!r}")
        sizes = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("pools", "bias_dim")}
        sizes |= {f"pools[{i}]": pool for i, pool in enumerate(self.pools)}
        for name, size in sizes.items():
            if type(size) is not int or size < 1:
                raise ValueError(f"{name} must be a positive integer, got {size!r}")
        if type(self.bias_dim) is not bool:
            raise ValueError(f"bias_dim must be true or false, got {self.bias_dim!r}")
        if self.channels < 3:
            raise ValueError(f"channels must be at least the 3 of an image, got {self.channels}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {self.kernel_size}")
        if self.image_size % prod(self.pools):
            raise ValueError(f"image_size={self.image_size} is no multiple of {prod(self.pools)}, the pools' product")
        if self.dim > self.dense_features:
            raise ValueError(f"dim={self.dim} is more than the {self.dense_features} coordinates of the dense layers")

    @property
    def dense_features(self) -> int:
        """Coordinates of the dense layers: those of the pooled images."""
        return self.channels * (self.image_size // prod(self.pools)) ** 2


_SIZES = {
    "lipsim-small": LipsimConfig(),
    "lipsim-medium": LipsimConfig(depth=30, channels=60, dense_layers=10, dense_width=2048),
    "lipsim-large": LipsimConfig(depth=50, channels=90, dense_layers=10, dense_width=2048),
    "lipsim-xlarge": LipsimConfig(depth=70, channels=120, dense_layers=15, dense_width=2048),
}
ARCHITECTURES = _SIZES | {f"{name}+bias": replace(config, bias_dim=True) for name, config in _SIZES.items()}
"""Methods 8.1; '+bias' appends the constant coordinate, which the authors leave off by default."""


class LipsimNetwork(nn.Module):
    """Padding, convolutional SLLs, sum pooling, dense SLLs, the first coordinates: 1-Lipschitz in L2.

    Every weight can be trained; the bound holds at each step. Tensors have the published names.

    Attributes:
        config: its shape.
    """

    def __init__(self, config: LipsimConfig) -> None:
        """Random weights, from torch's global generator."""
        super().__init__()
        self.config = c = config
        layers: list[nn.Module] = [SllConv2d(c.channels, c.inner_channels, c.kernel_size) for _ in range(c.depth)]
        # k^2 terms divided by k: rows of norm 1. An average, which divides by k^2, would shrink every distance.
        layers += [nn.AvgPool2d(k, stride=k, divisor_override=k) for k in c.pools]
        self.convs = nn.Sequential(*layers)
        dense = (SllLinear(c.dense_features, c.dense_width) for _ in range(c.dense_layers))
        self.linear = nn.Sequential(nn.Flatten(), *dense)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed a batch.

        Args:
            pixels: (b, 3, s, s) with s = `config.image_size`; the published weights take them in [0, 1] as they are.

        Returns:
            (b, dim), or (b, dim + 1) with the constant 1 at the end.

        Raises:
            ValueError: pixels of another shape.
        """
        size = self.config.image_size
        if tuple(pixels.shape[1:]) != (3, size, size):
            raise ValueError(f"pixels must be (b, 3, {size}, {size}), got {tuple(pixels.shape)}")
        padded = F.pad(pixels, (0, 0, 0, 0, 0, self.config.channels - 3))
        embeddings: Tensor = self.linear(self.convs(padded))[:, : self.config.dim]
        return F.pad(embeddings, (0, 1), value=1.0) if self.config.bias_dim else embeddings


class LipsimEncoder(TowerEncoder):
    """A LipSim network in service; it has no text tower.

    `lipschitz` is 1 / min(std), 1 for the published models, and is about `features`. In bf16 it is None: rounding moves
    an embedding by more than a small perturbation does. `encode` keeps the constant with the bias dimension; without
    it, it does so only between images whose features have a norm of at least 1 (methods 8.1).
    """

    def __init__(self, name: str, parts: "LipsimParts", precision: Precision, device: str) -> None:
        super().__init__(
            name,
            parts.build_visual(),
            architecture={"family": "lipsim", **asdict(parts.config)},
            dim=parts.config.dim + parts.config.bias_dim,
            preprocess=parts.preprocess,
            precision=precision,
            device=device,
        )
        self.lipschitz = 1.0 / min(parts.preprocess.std) if precision == "fp32" else None
        self.bias_dim = parts.config.bias_dim
        self._config = parts.config

    def export(self, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write lipsim_config.json and lipsim.safetensors; see `TowerEncoder.export`."""
        table = {"network": asdict(self._config), "preprocess": self.preprocess.as_dict()}
        write_checkpoint(folder, (CONFIG_NAME, table), (WEIGHT_NAMES[0], self.visual.state_dict()), dtype)


@dataclass(frozen=True)
class LipsimParts:
    """A checkpoint taken apart.

    Attributes:
        config: the network's shape.
        preprocess: how images become pixels.
        visual_state: the network's state dict.
        origin: path or id, for messages.
    """

    config: LipsimConfig
    preprocess: PreprocessSpec
    visual_state: Mapping[str, Tensor]
    origin: str

    def __deepcopy__(self, memo: dict[int, Any]) -> "LipsimParts":
        """Itself: it is frozen, and nothing writes to its tensors."""
        return self

    def build(self, name: str, precision: Precision, device: str) -> LipsimEncoder:
        """Assemble the encoder; see `perception.load_encoder`.

        Raises:
            CheckpointError: see `build_visual`.
        """
        return LipsimEncoder(name, self, precision, device)

    def build_visual(self) -> LipsimNetwork:
        """Build the network and load it strictly, in fp32.

        Raises:
            CheckpointError: names or shapes that do not fit, or pixels of another size than the network's.
        """
        if self.preprocess.size_px != self.config.image_size:
            raise CheckpointError(
                f"{self.origin}: size_px={self.preprocess.size_px} is not the network's {self.config.image_size}"
            )
        # First: a configuration that is not the file's must not decide how much memory is taken.
        _require_sizes(self.config, self.visual_state, self.origin)
        network = LipsimNetwork(self.config)
        load_strictly(network, self.visual_state, f"{self.origin}: visual tower")
        return network


def read_folder(folder: Path, preprocess: PreprocessSpec | None = None) -> LipsimParts:
    """Read what `LipsimEncoder.export` wrote.

    Args:
        folder: holds lipsim_config.json and lipsim.safetensors.
        preprocess: overrides what the configuration says.

    Raises:
        CheckpointError: a file is absent or corrupt, or the configuration is not understood.
    """
    path, table = folder / CONFIG_NAME, read_json(folder / CONFIG_NAME)
    if table.keys() - {"network", "preprocess"} or not isinstance(table.get("network"), dict):
        raise CheckpointError(
            f"{path}: expected 'network' and 'preprocess', got {', '.join(sorted(table)) or 'nothing'}"
        )
    try:
        config = LipsimConfig(**_with_tuples(table["network"]))
        spec = preprocess or (
            PreprocessSpec(**_with_tuples(table["preprocess"])) if "preprocess" in table else preprocess_of(config)
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} not understood: {error}") from error
    return LipsimParts(config, spec, _network_state(first_weights(folder, WEIGHT_NAMES), str(folder)), str(folder))


def _with_tuples(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}


def read_visual(architecture: str, path: Path, preprocess: PreprocessSpec | None = None) -> LipsimParts:
    """Read a published checkpoint, such as `model.ckpt-435`.

    Args:
        architecture: one of `ARCHITECTURES`. The published weights are 'lipsim-small'; 'lipsim-small+bias' is the same
            network with the constant coordinate, which is no part of a file.
        path: holds `model_state_dict` with `module.model.convs.0.kernel` and so on.
        preprocess: overrides the default: see `preprocess_of`.

    Raises:
        CheckpointError: unknown architecture, or the two copies of a tensor differ; see `read_state_dict`.
    """
    if architecture not in ARCHITECTURES:
        raise CheckpointError(f"no LipSim architecture {architecture!r}; there are {', '.join(ARCHITECTURES)}")
    config = ARCHITECTURES[architecture]
    return LipsimParts(
        config, preprocess or preprocess_of(config), _network_state(read_state_dict(path), str(path)), str(path)
    )


def preprocess_of(config: LipsimConfig) -> PreprocessSpec:
    """The published evaluation's: a resize that ignores the aspect ratio, pixels as they are (methods 1.2, 1.3)."""
    size = config.image_size
    return PreprocessSpec(size, size, "squash", "bicubic", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def _network_state(state: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Our names and shapes for published tensors, each of which a checkpoint holds twice."""
    network: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = key.removeprefix("model.")
        for alias, own in (("base.1.", "convs."), ("base.2.", "linear.")):
            if name.startswith(alias):
                name = own + name.removeprefix(alias)
        if name in network and not torch.equal(network[name], tensor):
            raise CheckpointError(f"{origin} holds two tensors that should be one: {name} and its copy {key} differ")
        network[name] = tensor
    for name, tensor in network.items():
        if name.endswith(".bias") and tensor.numel() == max(tensor.shape, default=0):
            network[name] = tensor.flatten()  # (1, inner, 1, 1) or (1, inner)
        elif name.startswith("convs.") and name.endswith(".q"):
            network[name] = torch.zeros_like(tensor)  # published, and without effect: methods 8.1
    return network


def _require_sizes(config: LipsimConfig, state: Mapping[str, Tensor], origin: str) -> None:
    """Compare the sizes that a configuration names with those that the tensors have."""

    def shape_of(name: str) -> tuple[int, ...]:
        return tuple(state[name].shape) if name in state else ()

    c, k = config, config.kernel_size
    expected = (c.depth, (c.inner_channels, c.channels, k, k), c.dense_layers, (c.dense_width, c.dense_features))
    found = (
        sum(name.startswith("convs.") and name.endswith(".kernel") for name in state),
        shape_of("convs.0.kernel"),
        sum(name.startswith("linear.") and name.endswith(".weight") for name in state),
        shape_of("linear.1.weight"),
    )
    if found != expected:
        said = "{} convolutions {} and {} dense layers {}"
        raise CheckpointError(
            f"{origin} does not fit its architecture: it has {said.format(*found)}, expected {said.format(*expected)}"
        )
