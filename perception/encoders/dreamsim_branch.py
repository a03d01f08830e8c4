"""One ViT of DreamSim: its shape, its tower, and the base weights of the release in DINO's names (methods 1.2, 1.4).

The tower is timm's. What the released code does decides the details: OpenAI's CLIP has QuickGELU and OpenCLIP plain
GELU, both with LayerNorm eps 1e-5; DINO and DINOv2 have plain GELU and 1e-6, and their feature is the CLS token before
the final norm. Knows nothing of adapters or of other branches.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception.encoders.weights import read_state_dict
from perception.errors import CheckpointError

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HEAD_WIDTH = 64  # of every tower of the release; the weights do not show it
_OFFSET = 0.1  # added to the new grid's side by the original's resampling of position embeddings


@dataclass(frozen=True)
class BranchKind:
    """What a branch's name says of it.

    Attributes:
        patch_size: in px.
        files: where the release keeps the base weights; the first that is there is read.
        clip: CLIP's projected embedding is the feature, else the CLS token before the final norm.
        quick_gelu: the activation is QuickGELU.
        layer_norm_eps: of all LayerNorms.
    """

    patch_size: int
    files: tuple[str, ...]
    clip: bool
    quick_gelu: bool
    layer_norm_eps: float


def _clip_kind(name: str, patch_size: int) -> BranchKind:
    return BranchKind(patch_size, (f"{name}_pretrain.pth.tar",), True, not name.startswith("open_"), 1e-5)


KINDS = {
    "dino_vitb16": BranchKind(
        16,
        # The release's code takes the backbone from the original release; its own file brings the whole checkpoint.
        ("dino_vitbase16_pretrain.pth", "checkpoints/dino_vitbase16_pretrain.pth", "dino_vitb16_pretrain.pth"),
        clip=False,
        quick_gelu=False,
        layer_norm_eps=1e-6,
    ),
    "dinov2_vitb14": BranchKind(
        14, ("dinov2_vitb14_pretrain.pth", "checkpoints/dinov2_vitb14_pretrain.pth"), False, False, 1e-6
    ),
    **{f"{kind}_vitb{p}": _clip_kind(f"{kind}_vitb{p}", p) for kind in ("clip", "open_clip") for p in (16, 32)},
}


@dataclass(frozen=True)
class BranchConfig:
    """The shape of a tower and what it does to pixels.

    Attributes:
        image_size: side in px of the pixels that it takes.
        width: of its tokens; hidden: of its feed-forward layers.
        dim: of CLIP's projection; 0 takes the CLS token before the final norm, of `width`.
        layer_scale: DINOv2's.
        mean, std: per RGB channel, of pixels in [0, 1]; applied inside.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    hidden: int
    dim: int
    layer_scale: bool
    quick_gelu: bool
    layer_norm_eps: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "width", "depth", "heads", "hidden"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)!r}")
        if type(self.dim) is not int or self.dim < 0:
            raise ValueError(f"dim must be an integer >= 0, got {self.dim!r}")
        if self.width % self.heads or self.image_size % self.patch_size:
            raise ValueError(
                f"width={self.width} must be a multiple of {self.heads} heads, image_size={self.image_size} of "
                f"patch_size={self.patch_size}"
            )
        if not 0 < self.layer_norm_eps < 1 or len(self.mean) != 3 or len(self.std) != 3 or not min(self.std) > 0:
            raise ValueError("layer_norm_eps must be in (0, 1), mean and std have 3 values, std positive ones")

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> "BranchConfig":
        """What `dataclasses.asdict` gave, also after a way through JSON.

        Raises:
            AttributeError, TypeError, ValueError: not such a table.
        """
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
        return cls(**fields)

    @property
    def feature_dim(self) -> int:
        """Length of the branch's feature."""
        return self.dim or self.width


class Branch(nn.Module):
    """Pixels (b, 3, h, w) in [0, 1], not normalised -> the branch's feature (b, feature_dim), not normalised."""

    def __init__(self, config: BranchConfig) -> None:
        super().__init__()
        self.config, self.tower = config, _tower(config)

    def forward(self, pixels: Tensor) -> Tensor:
        """See the class."""
        mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (self.config.mean, self.config.std))
        feature: Tensor = self.tower((pixels - mean) / std)
        return feature


def _tower(config: BranchConfig) -> nn.Module:
    from timm.layers import QuickGELU
    from timm.models.vision_transformer import VisionTransformer

    tower = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        num_classes=0,
        global_pool="token",
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=(config.hidden + 0.5) / config.width,  # timm rounds the product down
        init_values=1.0 if config.layer_scale else None,
        final_norm=bool(config.dim),
        weight_init="skip",
        norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps),
        act_layer=QuickGELU if config.quick_gelu else nn.GELU,
    )
    if config.dim:
        # Set by hand: timm's own `pre_norm` takes the patch embedding's bias away, which the release has.
        tower.norm_pre = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        tower.head = nn.Linear(config.width, config.dim, bias=False)
    return tower


def read_base(folder: Path, name: str) -> tuple[BranchConfig, dict[str, Tensor]]:
    """Read a branch's base weights from an unpacked release.

    Args:
        name: one of `KINDS`.

    Returns:
        The shape that the weights have, at their own image size; and the tower's state dict.

    Raises:
        CheckpointError: no file, a corrupt one, or weights that are not of that kind of tower.
    """
    kind = KINDS[name]
    path = next((folder / file for file in kind.files if (folder / file).is_file()), folder / kind.files[-1])
    try:
        # A whole DINO checkpoint: the backbone that was released is the teacher's.
        state = read_state_dict(path, "teacher")
    except CheckpointError as error:
        hint = f"; the backbone alone may be put beside it as {kind.files[0]}" if len(kind.files) > 1 else ""
        raise CheckpointError(f"{error}{hint}") from error
    state = {key.removeprefix("backbone."): values for key, values in state.items()}
    try:
        config = _config(kind, state)
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path} is not a {name} tower in DINO's names: {error}") from error
    return config, _tower_state(kind, state)


def _config(kind: BranchKind, state: Mapping[str, Tensor]) -> BranchConfig:
    """The shape that the weights show; KeyError, ValueError or IndexError where they are no such tower's."""
    positions, kernel = state["pos_embed"], state["patch_embed.proj.weight"]
    side = math.isqrt(positions.shape[1] - 1)
    if positions.ndim != 3 or positions.shape[0] != 1 or side**2 != positions.shape[1] - 1 or not side:
        raise ValueError(f"pos_embed must be (1, 1 + side^2, d), got {tuple(positions.shape)}")
    if kernel.shape[-2:] != (kind.patch_size, kind.patch_size):
        raise ValueError(f"patches are {tuple(kernel.shape[-2:])} px, expected {kind.patch_size}")
    width = positions.shape[2]
    if width % _HEAD_WIDTH:
        raise ValueError(f"width {width} is no multiple of the heads' {_HEAD_WIDTH}")
    if kind.clip and (state["proj"].ndim != 2 or not state["proj"].shape[1]):
        raise ValueError(f"proj must be (width, dim), got {tuple(state['proj'].shape)}")
    blocks = {int(match[1]) for match in map(re.compile(r"blocks\.(\d+)\.").match, state) if match}
    if blocks != set(range(len(blocks))):
        raise ValueError("blocks are not numbered from 0 on")
    mean, std = _CLIP if kind.clip else _IMAGENET
    return BranchConfig(
        image_size=side * kind.patch_size,
        patch_size=kind.patch_size,
        width=width,
        depth=len(blocks),
        heads=width // _HEAD_WIDTH,
        hidden=state["blocks.0.mlp.fc1.weight"].shape[0],
        dim=state["proj"].shape[1] if kind.clip else 0,
        layer_scale="blocks.0.ls1.gamma" in state,
        quick_gelu=kind.quick_gelu,
        layer_norm_eps=kind.layer_norm_eps,
        mean=mean,
        std=std,
    )


def _tower_state(kind: BranchKind, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """From DINO's names, which are timm's, but for CLIP's first norm and projection."""
    if kind.clip:
        named = {key.replace("pos_drop.", "norm_pre.", 1): values for key, values in state.items() if key != "proj"}
        return {**named, "head.weight": state["proj"].T.contiguous()}
    beside = ("norm.", "head.", "mask_token", "proj")  # behind the feature, or of the pretraining
    return {key: values for key, values in state.items() if not key.startswith(beside)}


def resample_positions(positions: Tensor, new_side: int) -> Tensor:
    """Position embeddings for another grid as the originals of DINO and DINOv2 resample them.

    Bicubic, not antialiased, by the factor (new side + 0.1) / old side instead of to a size: a little other values than
    those of `perception.encoders.dino.resample_positions`.

    Args:
        positions: (1, 1 + side^2, d), the CLS token's first.

    Returns:
        (1, 1 + new_side^2, d); the argument itself where the grid stays.
    """
    side = math.isqrt(positions.shape[1] - 1)
    if side == new_side:
        return positions
    grid = positions[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    factor = (new_side + _OFFSET) / side
    grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1].float(), grid.flatten(2).transpose(1, 2)], dim=1)
