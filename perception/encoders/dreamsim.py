"""DreamSim: ViTs fine-tuned by LoRA on human judgements, alone or as an ensemble of three (methods 1.2, 1.4).

Reads an unpacked release folder, where base weights lie beside one PEFT folder over the whole model, or one for each
branch as in the first releases, and merges them. Writes and reads `dreamsim_config.json` beside `dreamsim.safetensors`.
Centring of embeddings, which the release's wrapper does by default and the paper does not, is a property of the
architecture: `ensemble-centred`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perception.encoder import Precision
from perception.encoders.dreamsim_branch import Branch, BranchConfig, read_base, resample_positions
from perception.encoders.lora import linear_names, merged, read_lora
from perception.encoders.tower import TowerEncoder
from perception.encoders.weights import first_weights, load_strictly, read_json, write_checkpoint
from perception.errors import CheckpointError
from perception.preprocess import PreprocessSpec

CONFIG_NAME = "dreamsim_config.json"
WEIGHT_NAMES = ("dreamsim.safetensors",)
CENTRED = "-centred"
"""Suffix of an architecture whose embeddings have their own mean over dimensions taken off."""
_BRANCHES = {
    "ensemble": ("dino_vitb16", "clip_vitb16", "open_clip_vitb16"),
    **{name: (name,) for name in ("dino_vitb16", "clip_vitb32", "open_clip_vitb32", "dinov2_vitb14")},
}
ARCHITECTURES = tuple(name + suffix for suffix in ("", CENTRED) for name in _BRANCHES)
_PUBLISHED_SIDE_PX = 224
_UNCHANGED = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


class DreamSimNetwork(nn.Module):
    """Pixels (b, 3, h, w) in [0, 1] -> the concatenated features of all branches (b, d), not normalised."""

    def __init__(self, configs: tuple[BranchConfig, ...], centred: bool) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Branch(config) for config in configs)
        self.centred = centred

    def forward(self, pixels: Tensor) -> Tensor:
        """See the class; `centred` subtracts each row's mean over d."""
        features = torch.cat([branch(pixels) for branch in self.branches], dim=-1)
        return features - features.mean(dim=-1, keepdim=True) if self.centred else features


class DreamSimEncoder(TowerEncoder):
    """DreamSim with its adapters merged; each branch normalises pixels itself."""

    def __init__(self, name: str, parts: "DreamSimParts", precision: Precision, device: str) -> None:
        super().__init__(
            name,
            parts.build_visual(),
            architecture={"family": "dreamsim", **parts.table},
            dim=sum(config.feature_dim for config in parts.configs),
            preprocess=parts.preprocess,
            precision=precision,
            device=device,
        )
        self._parts = replace(parts, state={})  # the network has them now

    def export(self, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write dreamsim_config.json and dreamsim.safetensors, merged; see `TowerEncoder.export`."""
        table = {**self._parts.table, "preprocess": self.preprocess.as_dict()}
        write_checkpoint(folder, (CONFIG_NAME, table), (WEIGHT_NAMES[0], self.visual.state_dict()), dtype)


@dataclass(frozen=True)
class DreamSimParts:
    """A checkpoint taken apart, adapters merged.

    Attributes:
        configs: of the branches, in the order of the embedding.
        centred: embeddings are mean-centred.
        preprocess: how images become pixels; with mean 0 and std 1, since branches normalise.
        state: the network's state dict.
        origin: path, for messages.
    """

    configs: tuple[BranchConfig, ...]
    centred: bool
    preprocess: PreprocessSpec
    state: Mapping[str, Tensor]
    origin: str

    def __deepcopy__(self, memo: dict[int, Any]) -> "DreamSimParts":
        """Itself: it is frozen, and nothing writes to its tensors."""
        return self

    @property
    def table(self) -> dict[str, Any]:
        """Plain values of what decides an embedding besides weights, preprocessing and precision."""
        return {"branches": [asdict(config) for config in self.configs], "centred": self.centred}

    def build(self, name: str, precision: Precision, device: str) -> DreamSimEncoder:
        """Assemble the encoder; see `perception.load_encoder`."""
        return DreamSimEncoder(name, self, precision, device)

    def build_visual(self) -> nn.Module:
        """Build the network and load it strictly, in fp32.

        Raises:
            CheckpointError: names or shapes that do not fit, or preprocessing that normalises a second time.
        """
        spec, sides = self.preprocess, {config.image_size for config in self.configs}
        if (tuple(spec.mean), tuple(spec.std)) != (_UNCHANGED["mean"], _UNCHANGED["std"]):
            raise CheckpointError(
                f"{self.origin}: the branches of DreamSim normalise pixels themselves; mean must be 0 and std 1, got "
                f"{spec.mean} and {spec.std}"
            )
        if sides != {spec.size_px}:
            raise CheckpointError(f"{self.origin}: size_px={spec.size_px}, and the branches take {sorted(sides)}")
        network = DreamSimNetwork(self.configs, self.centred)
        load_strictly(network, self.state, f"{self.origin}: DreamSim")
        return network


def read_folder(folder: Path, preprocess: PreprocessSpec | None = None) -> DreamSimParts:
    """Read what `DreamSimEncoder.export` wrote.

    Args:
        folder: holds dreamsim_config.json and dreamsim.safetensors.
        preprocess: overrides what the configuration says.

    Raises:
        CheckpointError: a file is absent or corrupt, or the configuration is not understood.
    """
    path = folder / CONFIG_NAME
    table = read_json(path)
    if table.keys() != {"branches", "centred", "preprocess"} or type(table["centred"]) is not bool:
        raise CheckpointError(f"{path}: expected branches, centred (true or false) and preprocess")
    try:
        configs = tuple(BranchConfig.from_dict(branch) for branch in table["branches"])
        spec = preprocess or PreprocessSpec.from_dict(table["preprocess"])
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} not understood: {error}") from error
    if not configs:
        raise CheckpointError(f"{path}: there are no branches")
    return DreamSimParts(configs, table["centred"], spec, first_weights(folder, WEIGHT_NAMES), str(folder))


def read_visual(architecture: str, path: Path, preprocess: PreprocessSpec | None = None) -> DreamSimParts:
    """Read an unpacked release folder and merge its adapters.

    Widths and depths are those that the weights have; every tower of the release has heads of 64 dimensions.

    Args:
        architecture: one of `ARCHITECTURES`.
        path: the folder; base weights, and `ensemble_lora` or `NAME_single_lora`, or `NAME_lora` for each branch.
        preprocess: overrides the default: squash to 224 px, bicubic (methods 1.3).

    Raises:
        CheckpointError: unknown architecture, a file that is absent, corrupt or of another tower, or an adapter that
            cannot be merged; see `perception.encoders.lora`.
    """
    if architecture not in ARCHITECTURES:
        raise CheckpointError(f"no DreamSim architecture {architecture!r}; there are {', '.join(ARCHITECTURES)}")
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder: expected an unpacked DreamSim release")
    kind = architecture.removesuffix(CENTRED)
    names = _BRANCHES[kind]
    bases = [read_base(path, name) for name in names]
    side = preprocess.size_px if preprocess else min(_PUBLISHED_SIDE_PX, *(c.image_size for c, _ in bases))
    configs: list[BranchConfig] = []
    state: dict[str, Tensor] = {}
    for index, (config, tower) in enumerate(bases):
        if side % config.patch_size:
            raise CheckpointError(f"{path}: size_px={side} is no multiple of {names[index]}'s {config.patch_size}")
        positions = resample_positions(tower["pos_embed"], side // config.patch_size)
        configs.append(replace(config, image_size=side))
        state |= {f"branches.{index}.tower.{k}": v for k, v in {**tower, "pos_embed": positions}.items()}
    spec = preprocess or PreprocessSpec(side, side, "squash", "bicubic", **_UNCHANGED)
    return DreamSimParts(tuple(configs), architecture != kind, spec, _with_adapters(path, kind, state), str(path))


def _with_adapters(folder: Path, kind: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Merge the adapter of the whole model, or where there is none those of the branches."""
    names = _BRANCHES[kind]
    whole = folder / ("ensemble_lora" if kind == "ensemble" else f"{kind}_single_lora")
    each = [folder / f"{name}_lora" for name in names]
    if whole.is_dir():
        linears = {
            f"extractor_list.{index}.{name}": weight
            for index in range(len(names))
            for name, weight in _branch_linears(state, index).items()
        }
        # A single model of the first releases has an adapter of its one branch under this name.
        linears |= _branch_linears(state, 0) if len(names) == 1 else {}
        return merged(state, linears, read_lora(whole))
    if not all(path.is_dir() for path in each):
        raise CheckpointError(
            f"{folder} holds neither the adapter {whole.name} nor {', '.join(path.name for path in each)}"
        )
    for index, path in enumerate(each):
        state = merged(state, _branch_linears(state, index), read_lora(path))
    return state


def _branch_linears(state: Mapping[str, Tensor], index: int) -> dict[str, str]:
    """The Linears of a branch: names within its tower, and those of their weights in the network's state dict."""
    prefix = f"branches.{index}.tower."
    own = {key.removeprefix(prefix): values for key, values in state.items() if key.startswith(prefix)}
    return {name: prefix + key for name, key in linear_names(own).items()}
