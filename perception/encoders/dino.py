"""DINO and DINOv2 encoders: the CLS token after the last LayerNorm, before normalisation (methods 1.2).

Reads the layout of `transformers` (`config.json` with model_type 'vit' or 'dinov2' beside `model.safetensors`) and a
state dict in the names of timm and the original release. Writes the first. Inside, the tower is timm's.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception.encoder import Precision
from perception.encoders.tower import TowerEncoder
from perception.encoders.weights import first_weights, load_strictly, read_json, read_state_dict, write_checkpoint
from perception.errors import CheckpointError
from perception.preprocess import PreprocessSpec
from perception.text import TextEncoder

CONFIG_NAME = "config.json"
WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# What `transformers` keeps beside the tower: not part of the feature, and not in every file.
_MASK_TOKEN = "embeddings.mask_token"
_BESIDE = {"vit": ("pooler.dense.weight", "pooler.dense.bias"), "dinov2": (_MASK_TOKEN,)}
# timm's name within a block: that of `transformers`, for 'vit' and for 'dinov2'.
_BLOCK = {
    "vit": {
        "norm1": "layernorm_before", "attn.proj": "attention.output.dense", "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    },
    "dinov2": {
        "norm1": "norm1", "attn.proj": "attention.output.dense", "norm2": "norm2", "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
}  # fmt: skip


@dataclass(frozen=True)
class VitConfig:
    """The shape of a tower; names are those of `transformers`.

    Attributes:
        model_type: 'vit' (DINO) or 'dinov2', which has LayerScale.
        image_size: side in px that the position embeddings are for.
    """

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    image_size: int
    patch_size: int
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if type(self.image_size) is not int or self.image_size < self.patch_size:
            raise ValueError(f"image_size must be an integer >= patch_size={self.patch_size}, got {self.image_size!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is no multiple of {self.num_attention_heads} heads")
        if self.model_type == "dinov2" and self.intermediate_size % self.hidden_size:
            raise ValueError(f"mlp_ratio must be an integer, got {self.intermediate_size / self.hidden_size}")


ARCHITECTURES = {
    "vit_base_patch16_224": VitConfig("vit", 768, 12, 12, 3072, 224, 16),
    "vit_base_patch14_dinov2": VitConfig("dinov2", 768, 12, 12, 3072, 518, 14),
}


class DinoEncoder(TowerEncoder):
    """A DINO or DINOv2 tower; it has no text tower."""

    def __init__(self, name: str, parts: "DinoParts", precision: Precision, device: str) -> None:
        super().__init__(
            name,
            parts.build_visual(),
            architecture={"family": "dino", **asdict(parts.config)},
            dim=parts.config.hidden_size,
            preprocess=parts.preprocess,
            precision=precision,
            device=device,
        )
        self._parts = replace(parts, visual_state={})  # the tower has them now

    @property
    def text(self) -> TextEncoder:
        """Never: DINO was trained on images alone.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(f"{self.name} has no text tower: DINO models are trained on images alone")

    def export(self, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write the layout of `transformers`; see `TowerEncoder.export`.

        Position embeddings are written as they are in use, so a DINOv2 comes out with an `image_size` of 224.
        """
        config = self._parts.config
        visual = self.visual.state_dict()
        state = dict(self._parts.other_state)
        for name, published in transformers_names(config).items():
            state.update(zip(published, visual[name].chunk(len(published)), strict=True))
        table = {
            "architectures": [{"vit": "ViTModel", "dinov2": "Dinov2Model"}[config.model_type]],
            "hidden_act": "gelu",
            "num_channels": 3,
            **asdict(config),
            "preprocess": self.preprocess.as_dict(),  # ours; `transformers` keeps it and heeds it not
        }
        if config.model_type == "dinov2":
            table |= {"mlp_ratio": config.intermediate_size // config.hidden_size, "use_swiglu_ffn": False}
        write_checkpoint(folder, (CONFIG_NAME, table), (WEIGHT_NAMES[0], state), dtype)


@dataclass(frozen=True)
class DinoParts:
    """A checkpoint taken apart.

    Attributes:
        config: of the tower as it is used: `image_size` is the side of the pixels that it takes.
        preprocess: how images become pixels.
        visual_state: the tower's state dict in timm's names, position embeddings resampled to `config.image_size`.
        other_state: what `transformers` keeps beside the tower (mask token, pooler), in its names; for export alone.
        origin: path or id, for messages.
    """

    config: VitConfig
    preprocess: PreprocessSpec
    visual_state: Mapping[str, Tensor]
    other_state: Mapping[str, Tensor]
    origin: str

    def __deepcopy__(self, memo: dict[int, Any]) -> "DinoParts":
        """Itself: it is frozen, and nothing writes to its tensors."""
        return self

    def build(self, name: str, precision: Precision, device: str) -> DinoEncoder:
        """Assemble the encoder; see `perception.load_encoder`."""
        return DinoEncoder(name, self, precision, device)

    def build_visual(self) -> nn.Module:
        """Build the tower and load it strictly, in fp32.

        Raises:
            CheckpointError: names or shapes that do not fit.
        """
        from timm.models.vision_transformer import VisionTransformer

        c = self.config
        tower = VisionTransformer(
            img_size=c.image_size,
            patch_size=c.patch_size,
            num_classes=0,
            global_pool="token",
            embed_dim=c.hidden_size,
            depth=c.num_hidden_layers,
            num_heads=c.num_attention_heads,
            mlp_ratio=(c.intermediate_size + 0.5) / c.hidden_size,  # timm rounds the product down
            qkv_bias=c.qkv_bias,
            init_values=1.0 if c.model_type == "dinov2" else None,
            weight_init="skip",
            norm_layer=partial(nn.LayerNorm, eps=c.layer_norm_eps),
        )
        load_strictly(tower, self.visual_state, f"{self.origin}: visual tower")
        return tower


def transformers_names(config: VitConfig) -> dict[str, tuple[str, ...]]:
    """The tensors of a tower: timm's name, and those of `transformers`, which are its equal parts in order."""
    names: dict[str, tuple[str, ...]] = {
        "cls_token": ("embeddings.cls_token",),
        "pos_embed": ("embeddings.position_embeddings",),
    }
    pairs = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
    for i in range(config.num_hidden_layers):
        block, layer = f"blocks.{i}", f"encoder.layer.{i}"
        pairs |= {f"{block}.{ours}": f"{layer}.{theirs}" for ours, theirs in _BLOCK[config.model_type].items()}
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            names[f"{block}.attn.qkv.{kind}"] = tuple(
                f"{layer}.attention.attention.{part}.{kind}" for part in ("query", "key", "value")
            )
        if config.model_type == "dinov2":
            names |= {f"{block}.ls{n}.gamma": (f"{layer}.layer_scale{n}.lambda1",) for n in (1, 2)}
    for ours, theirs in pairs.items():
        names |= {f"{ours}.{kind}": (f"{theirs}.{kind}",) for kind in ("weight", "bias")}
    return names


def read_folder(folder: Path, preprocess: PreprocessSpec | None = None) -> DinoParts:
    """Read a folder in the layout of `transformers`, as published on the hub or written by `DinoEncoder.export`.

    Args:
        folder: holds config.json and the weights.
        preprocess: overrides the default: see `preprocess_of`.

    Raises:
        CheckpointError: a file is absent, corrupt, of another kind of model, or lacks a key.
    """
    table, origin = read_json(folder / CONFIG_NAME), str(folder)
    config = config_of(table, origin)
    state = first_weights(folder, WEIGHT_NAMES)
    other = {key: state.pop(key) for key in _BESIDE[config.model_type] if key in state}
    visual: dict[str, Tensor] = {}
    for name, published in transformers_names(config).items():
        if any(key not in state for key in published):
            continue  # reported by the strict load, as missing
        tensors = [state.pop(key) for key in published]
        if len({t.shape for t in tensors}) != 1:
            raise CheckpointError(f"{origin}: {', '.join(published)} are not of one shape")
        visual[name] = torch.stack(tensors).reshape(-1, *tensors[0].shape[1:])
    side, expected = _grid_side(visual, origin), config.image_size // config.patch_size
    if side != expected:
        raise CheckpointError(
            f"{origin}: position embeddings are for {side} x {side} patches, config.json says {expected}"
        )
    return _parts(config, preprocess or preprocess_of(config, table, origin), {**visual, **state}, other, origin)


def read_visual(architecture: str, path: Path, preprocess: PreprocessSpec | None = None) -> DinoParts:
    """Read a state dict in timm's names, which are those of the original releases too.

    Args:
        architecture: one of `ARCHITECTURES`.
        preprocess: overrides the default: see `preprocess_of`.

    Raises:
        CheckpointError: unknown architecture; see `read_state_dict`.
    """
    if architecture not in ARCHITECTURES:
        raise CheckpointError(f"no DINO architecture {architecture!r}; there are {', '.join(ARCHITECTURES)}")
    config, state, other = ARCHITECTURES[architecture], read_state_dict(path), {}
    if config.model_type == "dinov2" and "mask_token" in state:
        other[_MASK_TOKEN] = state.pop("mask_token")
    return _parts(config, preprocess or preprocess_of(config, {}, str(path)), state, other, str(path))


def _parts(
    config: VitConfig, spec: PreprocessSpec, visual: dict[str, Tensor], other: Mapping[str, Tensor], origin: str
) -> DinoParts:
    """Fit the position embeddings to the pixels that will come."""
    if spec.size_px % config.patch_size:
        raise CheckpointError(f"{origin}: size_px={spec.size_px} is no multiple of patch_size={config.patch_size}")
    side = _grid_side(visual, origin)
    visual["pos_embed"] = resample_positions(visual["pos_embed"], side, spec.size_px // config.patch_size)
    return DinoParts(replace(config, image_size=spec.size_px), spec, visual, other, origin)


def _grid_side(visual: Mapping[str, Tensor], origin: str) -> int:
    """Patches a side that the position embeddings are for."""
    if "pos_embed" not in visual:
        raise CheckpointError(f"{origin}: there are no position embeddings")
    shape = visual["pos_embed"].shape
    if len(shape) != 3 or shape[0] != 1 or shape[1] < 2 or math.isqrt(shape[1] - 1) ** 2 != shape[1] - 1:
        raise CheckpointError(f"{origin}: position embeddings must be (1, 1 + side^2, d), got {tuple(shape)}")
    return math.isqrt(shape[1] - 1)


def resample_positions(positions: Tensor, side: int, new_side: int) -> Tensor:
    """Position embeddings for another grid, as `transformers` resamples them: bicubic, not antialiased.

    Args:
        positions: (1, 1 + side^2, d), the CLS token's first.

    Returns:
        (1, 1 + new_side^2, d); the argument itself where the grid stays.
    """
    if side == new_side:
        return positions
    grid = positions[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new_side, new_side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1].float(), grid.flatten(2).transpose(1, 2)], dim=1)


def config_of(table: Mapping[str, Any], origin: str) -> VitConfig:
    """The tower that a config.json describes; absent keys mean what they mean to `transformers`.

    Raises:
        CheckpointError: another kind of model, or a value that this code does not know.
    """
    kind = table.get("model_type")
    if kind not in _BLOCK:
        raise CheckpointError(f"{origin}: model_type {kind!r} is not one of {', '.join(_BLOCK)}")
    for key, known in (("hidden_act", "gelu"), ("num_channels", 3), ("use_swiglu_ffn", False)):
        if table.get(key, known) != known:
            raise CheckpointError(f"{origin}: {key} must be {known!r}, got {table[key]!r}")
    required = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    try:
        sizes = {key: table[key] for key in required}
        width = table["intermediate_size"] if kind == "vit" else sizes["hidden_size"] * table.get("mlp_ratio", 4)
        width = int(width) if isinstance(width, float) and width.is_integer() else width
        eps = float(table.get("layer_norm_eps", 1e-12 if kind == "vit" else 1e-6))
        return VitConfig(
            kind, intermediate_size=width, layer_norm_eps=eps, qkv_bias=bool(table.get("qkv_bias", True)), **sizes
        )
    except KeyError as error:
        raise CheckpointError(f"{origin}: config.json lacks {error}") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{origin}: config.json not understood: {error}") from error


def preprocess_of(config: VitConfig, table: Mapping[str, Any], origin: str) -> PreprocessSpec:
    """The transform that our own exports name, else the paper's (methods 1.3): resize to 256, crop to 224.

    The published preprocessor files say otherwise, and the published figures do not follow them. Towers for smaller
    images crop to their size, in the same proportion.

    Raises:
        CheckpointError: a value that this code does not know.
    """
    size = min(224, config.image_size)
    default = {"size_px": size, "resize_px": round(size * 256 / 224), **_IMAGENET}
    try:
        own: Mapping[str, Any] = table.get("preprocess", default)
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in own.items()}
        return PreprocessSpec(**fields)
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{origin}: preprocessing not understood: {error}") from error
