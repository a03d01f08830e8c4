"""CLIP encoders in open_clip's published formats.

Reads three layouts: an open_clip folder (`local-dir:` or fetched by `hf-hub:`: `open_clip_config.json` beside
`open_clip_model.safetensors`), and a visual-only state dict (`.pt` or `.safetensors`) for a named architecture. All of
them go through one strict check of names and shapes. Writes the first. Owns nothing of search or decisions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perception.encoder import Precision
from perception.encoders.tower import TowerEncoder
from perception.encoders.weights import first_weights, load_strictly, read_json, read_state_dict, write_checkpoint
from perception.errors import CheckpointError
from perception.preprocess import PreprocessSpec
from perception.text import TextEncoder

CONFIG_NAME = "open_clip_config.json"
WEIGHT_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_NATIVE_TEXT_KEYS = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")


class ClipEncoder(TowerEncoder):
    """The visual tower of a CLIP model, with the text tower of the same checkpoint where it has one."""

    def __init__(self, name: str, parts: "ClipParts", precision: Precision, device: str) -> None:
        super().__init__(
            name,
            parts.build_visual(),
            architecture={k: v for k, v in parts.model_config.items() if k != "text_cfg"},
            dim=int(parts.model_config["embed_dim"]),
            preprocess=parts.preprocess,
            precision=precision,
            device=device,
        )
        self._parts = replace(parts, visual_state={})  # the tower has them now

    @property
    def text(self) -> TextEncoder:
        """The text tower of the same checkpoint, loaded on first use, always in fp32.

        Raises:
            CheckpointError: the checkpoint is visual-only.
        """
        return self._text.to(self.device)

    # Not a submodule: what is trained, counted or saved through the encoder is the image tower alone.
    @cached_property
    def _text(self) -> TextEncoder:
        return self._parts.build_text(self.name)

    def export(self, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write an open_clip folder, with the text tower where the checkpoint had one; see `TowerEncoder.export`."""
        visual = {f"visual.{k}": v for k, v in self.visual.state_dict().items()}
        state = {**visual, **self._parts.other_state}
        write_open_clip_folder(folder, self._parts.model_config, self.preprocess, state, dtype)


@dataclass(frozen=True)
class ClipParts:
    """A checkpoint taken apart: what is needed to build either tower.

    Attributes:
        model_config: open_clip's `model_cfg`.
        preprocess: how images become pixels.
        visual_state: the visual tower's state dict, names without the `visual.` prefix.
        other_state: all else that the file holds, by its names there; empty for visual-only checkpoints.
        tokenizer_source: open_clip tokenizer name; 'local-dir:...' where the checkpoint brings its own.
        origin: path or id, for messages.
        without_text: why there is no text tower where `other_state` has none; for messages.
    """

    model_config: Mapping[str, Any]
    preprocess: PreprocessSpec
    visual_state: Mapping[str, Tensor]
    other_state: Mapping[str, Tensor]
    tokenizer_source: str
    origin: str
    without_text: str = "is a visual-only checkpoint"

    def __deepcopy__(self, memo: dict[int, Any]) -> "ClipParts":
        """Itself: it is frozen, and nothing writes to its tensors."""
        return self

    @property
    def text_state(self) -> dict[str, Tensor]:
        """The text tower's state dict; empty for visual-only checkpoints."""
        text = {k.removeprefix("text."): v for k, v in self.other_state.items() if k.startswith("text.")}
        return text or {k: v for k, v in self.other_state.items() if k.startswith(_NATIVE_TEXT_KEYS)}

    def with_text_of(self, donor: "ClipParts") -> "ClipParts":
        """These parts with the text tower of another checkpoint, of which this one's image tower was made.

        Raises:
            CheckpointError: this one has a text tower of its own, the donor has none, or they are of two kinds.
        """
        if self.text_state:
            raise CheckpointError(
                f"{self.origin} has a text tower of its own, and its card names that of {donor.origin}"
            )
        if not donor.text_state:
            raise CheckpointError(f"{donor.origin} has no text tower that {self.origin} could share")
        for key in ("embed_dim", "text_cfg", "quick_gelu", "custom_text"):
            own, other = self.model_config.get(key, False), donor.model_config.get(key, False)
            if own != other:
                raise CheckpointError(f"{self.origin} cannot share {donor.origin}'s text tower: {key} {own} != {other}")
        return replace(self, other_state=donor.other_state, tokenizer_source=donor.tokenizer_source)

    def build(self, name: str, precision: Precision, device: str) -> ClipEncoder:
        """Assemble the encoder; see `perception.load_encoder`."""
        return ClipEncoder(name, self, precision, device)

    def build_visual(self) -> nn.Module:
        """Build the visual tower and load it strictly, in fp32.

        Raises:
            CheckpointError: unknown architecture, or names or shapes that do not fit it.
        """
        from open_clip.model import _build_vision_tower

        try:
            visual: nn.Module = _build_vision_tower(
                self.model_config["embed_dim"],
                self.model_config["vision_cfg"],
                bool(self.model_config.get("quick_gelu", False)),
            )
        except Exception as error:  # open_clip and timm raise whatever a bad value leads to
            raise CheckpointError(f"{self.origin}: cannot build the visual tower: {error}") from error
        load_strictly(visual, self.visual_state, f"{self.origin}: visual tower")
        _set_layer_norm_eps(visual, self.model_config, self.origin)
        return visual

    def build_text(self, name: str) -> TextEncoder:
        """Build the text tower and load it strictly, in fp32.

        Raises:
            CheckpointError: visual-only checkpoint, or names or shapes that do not fit.
        """
        if not self.text_state:
            raise CheckpointError(f"{name} has no text tower: {self.origin} {self.without_text}")
        import open_clip
        from open_clip.model import _build_text_tower

        try:
            tower: nn.Module = _build_text_tower(
                self.model_config["embed_dim"],
                self.model_config["text_cfg"],
                bool(self.model_config.get("quick_gelu", False)),
            )
            tokenizer = open_clip.get_tokenizer(
                self.tokenizer_source, context_length=self.model_config["text_cfg"].get("context_length", 77)
            )
        except Exception as error:
            raise CheckpointError(f"{self.origin}: cannot build the text tower: {error}") from error
        load_strictly(tower, self.text_state, f"{self.origin}: text tower")
        return TextEncoder(tower, tokenizer)


def read_folder(folder: Path, preprocess: PreprocessSpec | None = None, quick_gelu: bool | None = None) -> ClipParts:
    """Read an open_clip folder, as published on the hub or written locally.

    Args:
        folder: holds open_clip_config.json and the weights.
        preprocess: overrides what the configuration says.
        quick_gelu: overrides what the configuration says (methods 1.3: OpenAI weights need it).

    Raises:
        CheckpointError: a file is absent, corrupt, or lacks a key.
    """
    model_config, table = _read_config(folder / CONFIG_NAME)
    if quick_gelu is not None:
        model_config = {**model_config, "quick_gelu": quick_gelu}
    state = first_weights(folder, WEIGHT_NAMES)
    visual = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
    other = {k: v for k, v in state.items() if not k.startswith("visual.")}
    spec = preprocess or preprocess_of(model_config, table, str(folder))
    return ClipParts(model_config, spec, visual, other, f"local-dir:{folder}", str(folder))


def layer_norm_eps(model_config: Mapping[str, Any]) -> float:
    """LayerNorm eps of a ViT's blocks and final norm: our own key `layer_norm_eps`, else open_clip's own."""
    own = model_config.get("layer_norm_eps")
    norm_kwargs = model_config["vision_cfg"].get("norm_kwargs") or {}
    return float(norm_kwargs.get("eps", 1e-5) if own is None else own)


def _set_layer_norm_eps(visual: nn.Module, model_config: Mapping[str, Any], origin: str) -> None:
    """Apply our own key `layer_norm_eps`: LoRA adapters were published for ViTs with 1e-6 behind the first LayerNorm.

    open_clip's `norm_kwargs` would change that first one (`ln_pre`) too, so it cannot say it (methods 1.4).
    """
    eps = model_config.get("layer_norm_eps")
    if eps is None:
        return
    if not isinstance(eps, float) or not 0 < eps < 1 or not hasattr(visual, "transformer"):
        raise CheckpointError(f"{origin}: layer_norm_eps must be a number in (0, 1), of a ViT; got {eps!r}")
    for name, module in visual.named_modules():
        if isinstance(module, nn.LayerNorm) and name != "ln_pre":
            module.eps = eps


def write_open_clip_folder(
    folder: Path,
    model_config: Mapping[str, Any],
    preprocess: PreprocessSpec,
    state: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """Write what `read_folder` and open_clip's own `local-dir:` read.

    Args:
        folder: made where it does not exist.
        model_config: open_clip's `model_cfg`.
        preprocess: how images become pixels.
        state: the whole model's, or its `visual.*` alone, which only `read_folder` reads.
        dtype: of the floating-point tensors.

    Raises:
        CheckpointError: a value is not finite, in `dtype`; nothing is written.
    """
    table: dict[str, Any] = {
        "size": preprocess.resize_px,
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "interpolation": preprocess.interpolation,
        "resize_mode": preprocess.resize_mode,
    }
    if preprocess_of(model_config, table, str(folder)) != preprocess:
        table["crop_size"] = preprocess.size_px  # ours; open_clip crops to what it resizes to
    config = {"model_cfg": dict(model_config), "preprocess_cfg": table}
    write_checkpoint(folder, (CONFIG_NAME, config), (WEIGHT_NAMES[0], state), dtype)


def _read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`(model_cfg, preprocess_cfg)` of an open_clip_config.json."""
    config = read_json(path)
    model_config = config.get("model_cfg")
    if not isinstance(model_config, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= model_config.keys():
        raise CheckpointError(f"{path}: 'model_cfg' with embed_dim, vision_cfg and text_cfg is missing")
    return model_config, config.get("preprocess_cfg") or {}


def read_visual(architecture: str, path: Path, preprocess: PreprocessSpec | None = None) -> ClipParts:
    """Read a visual-only state dict for one of open_clip's architectures, e.g. 'convnext_base_w'.

    Raises:
        CheckpointError: unknown architecture; see `read_state_dict`.
    """
    model_config = architecture_config(architecture)
    state = read_state_dict(path)
    if any(k.startswith("visual.") for k in state):
        state = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
    spec = preprocess or preprocess_of(model_config, {}, architecture)
    return ClipParts(model_config, spec, state, {}, architecture, str(path))


def architecture_config(architecture: str) -> dict[str, Any]:
    """open_clip's own `model_cfg` of a named architecture.

    Raises:
        CheckpointError: open_clip knows no such architecture.
    """
    import open_clip

    config = open_clip.get_model_config(architecture)
    if config is None:
        raise CheckpointError(f"open_clip knows no architecture {architecture!r}")
    return dict(config)


def preprocess_of(model_config: Mapping[str, Any], table: Mapping[str, Any], origin: str) -> PreprocessSpec:
    """The evaluation transform that a configuration asks for.

    ConvNeXt-B towers are native to 256 px but are used as in the paper: resized to 256, cropped to 224.

    Raises:
        CheckpointError: a value that this code does not know.
    """
    vision = model_config["vision_cfg"]
    size = table.get("size", vision.get("image_size", 224))
    size = size[0] if isinstance(size, list | tuple) else size
    convnext = str(vision.get("timm_model_name", "")).startswith("convnext_base")
    native = 224 if convnext and size == 256 else size
    try:
        spec = PreprocessSpec(
            size_px=table.get("crop_size", native), resize_px=size, resize_mode=table.get("resize_mode") or "shortest",
            interpolation=table.get("interpolation") or "bicubic",
        )  # fmt: skip
        if table.get("mean"):
            spec = replace(spec, mean=tuple(table["mean"]))
        if table.get("std"):
            spec = replace(spec, std=tuple(table["std"]))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{origin}: preprocessing not understood: {error}") from error
    return spec
