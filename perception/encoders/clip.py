"""CLIP encoders in open_clip's published formats.

Reads three layouts: an open_clip folder (`local-dir:` or fetched by `hf-hub:`: `open_clip_config.json` beside
`open_clip_model.safetensors`), and a visual-only state dict (`.pt` or `.safetensors`) for a named architecture. All of
them go through one strict check of names and shapes. Owns nothing of search or decisions.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perception.encoder import ImageSource, Precision, fingerprint, image_similarity, unit_embeddings
from perception.errors import CheckpointError
from perception.preprocess import PreprocessSpec
from perception.text import TextEncoder

CONFIG_NAME = "open_clip_config.json"
WEIGHT_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_PRECISIONS: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_NATIVE_TEXT_KEYS = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")


class ClipEncoder(nn.Module):
    """The visual tower of a CLIP model; an `Encoder` (see there for the contract of `encode`).

    Normalisation by mean and std happens inside, so that perturbations are measured on [0, 1] pixels.
    """

    def __init__(self, name: str, visual: nn.Module, parts: "ClipParts", precision: Precision, device: str) -> None:
        super().__init__()
        self.name, self.precision, self.preprocess, self._parts = name, precision, parts.preprocess, parts
        self.dim = int(parts.model_config["embed_dim"])
        vision = {k: v for k, v in parts.model_config.items() if k != "text_cfg"}
        self.fingerprint = fingerprint(vision, parts.preprocess, precision, visual.state_dict())
        self.visual = visual.to(device=device, dtype=_PRECISIONS[precision]).eval().requires_grad_(False)
        if any(isinstance(m, nn.Conv2d) for m in visual.modules()):
            self.visual.to(memory_format=torch.channels_last)
        self.register_buffer("mean", torch.tensor(parts.preprocess.mean, device=device).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(parts.preprocess.std, device=device).view(1, 3, 1, 1))
        self._text: TextEncoder | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.visual.parameters()).device

    def features(self, pixels: Tensor) -> Tensor:
        """Embeddings before normalisation, which FARE's loss is defined on.

        Args:
            pixels: (b, 3, h, w) float RGB in [0, 1].

        Returns:
            (b, d) float32, differentiable.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"pixels must be (b, 3, h, w), got {tuple(pixels.shape)}")
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        normalised = (pixels.to(self.device) - mean) / std
        output: Tensor = self.visual(normalised.to(_PRECISIONS[self.precision]))
        return output.float()

    def encode(self, pixels: Tensor) -> Tensor:
        """See `perception.encoder.Encoder.encode`."""
        return unit_embeddings(self.features(pixels))

    def similarity(self, a: ImageSource, b: ImageSource) -> float:
        """Cosine similarity of two image files, in [-1, 1]."""
        return image_similarity(self, a, b)

    @property
    def text(self) -> TextEncoder:
        """The text tower of the same checkpoint, loaded on first use, always in fp32.

        Raises:
            CheckpointError: the checkpoint is visual-only.
        """
        if self._text is None:
            self._text = self._parts.build_text(self.name).to(self.device)
        return self._text


@dataclass(frozen=True)
class ClipParts:
    """A checkpoint taken apart: what is needed to build either tower.

    Attributes:
        model_config: open_clip's `model_cfg`.
        preprocess: how images become pixels.
        visual_state: the visual tower's state dict, names without the `visual.` prefix.
        text_state: the text tower's state dict; empty for visual-only checkpoints.
        tokenizer_source: open_clip tokenizer name; 'local-dir:...' where the checkpoint brings its own.
        origin: path or id, for messages.
    """

    model_config: Mapping[str, Any]
    preprocess: PreprocessSpec
    visual_state: Mapping[str, Tensor]
    text_state: Mapping[str, Tensor]
    tokenizer_source: str
    origin: str

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
        return visual

    def build_text(self, name: str) -> TextEncoder:
        """Build the text tower and load it strictly, in fp32.

        Raises:
            CheckpointError: visual-only checkpoint, or names or shapes that do not fit.
        """
        if not self.text_state:
            raise CheckpointError(f"{name} has no text tower: {self.origin} is a visual-only checkpoint")
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


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load a state dict into a module as float32; every name and shape must fit.

    Raises:
        CheckpointError: lists the first missing, unexpected and misshapen tensors.
    """
    expected = module.state_dict()
    # Attention masks are derived, not learned; files differ in whether they hold them.
    state = {k: v for k, v in state.items() if k in expected or not k.endswith("attn_mask")}
    missing = [k for k in expected if k not in state and not k.endswith("attn_mask")]
    unexpected = [k for k in state if k not in expected]
    misshapen = [
        f"{k} is {tuple(v.shape)}, expected {tuple(expected[k].shape)}"
        for k, v in state.items()
        if k in expected and v.shape != expected[k].shape
    ]
    problems = [
        f"{label} {len(names)}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for label, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", misshapen))
        if names
    ]
    if problems:
        raise CheckpointError(f"{what} does not fit its architecture: {'; '.join(problems)}")
    floats = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    bad = [k for k, v in floats.items() if not bool(torch.isfinite(v).all())]
    if bad:
        raise CheckpointError(f"{what} holds values that are not finite: {', '.join(bad[:3])}")
    module.load_state_dict(floats, strict=False)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict from `.safetensors`, or from a published `.pt`/`.bin` without running code from it.

    Nested dicts (`state_dict`, `vision_encoder_state_dict`) and `module.` prefixes are unwrapped.

    Raises:
        CheckpointError: absent, corrupt, or not a state dict.
    """
    if not path.is_file():
        raise CheckpointError(f"weights not found: {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and safetensors readers raise many types
        raise CheckpointError(f"cannot read weights {path}: {str(error).splitlines()[0][:200]}") from error
    for key in ("state_dict", "vision_encoder_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path} is not a state dict of tensors")
    return {str(k).removeprefix("module."): v for k, v in content.items()}


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
    weights = next((folder / n for n in WEIGHT_NAMES if (folder / n).is_file()), None)
    if weights is None:
        raise CheckpointError(f"{folder} holds none of {', '.join(WEIGHT_NAMES)}")
    state = read_state_dict(weights)
    visual = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
    text = {k.removeprefix("text."): v for k, v in state.items() if k.startswith("text.")}
    text = text or {k: v for k, v in state.items() if k.startswith(_NATIVE_TEXT_KEYS)}
    spec = preprocess or preprocess_of(model_config, table, str(folder))
    return ClipParts(model_config, spec, visual, text, f"local-dir:{folder}", str(folder))


def _read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`(model_cfg, preprocess_cfg)` of an open_clip_config.json."""
    try:
        config = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    model_config = config.get("model_cfg") if isinstance(config, dict) else None
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
    try:
        spec = PreprocessSpec(
            size_px=size, resize_px=size, resize_mode=table.get("resize_mode") or "shortest",
            interpolation=table.get("interpolation") or "bicubic",
        )  # fmt: skip
        if table.get("mean"):
            spec = replace(spec, mean=tuple(table["mean"]))
        if table.get("std"):
            spec = replace(spec, std=tuple(table["std"]))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{origin}: preprocessing not understood: {error}") from error
    if str(vision.get("timm_model_name", "")).startswith("convnext_base") and size == 256:
        spec = replace(spec, size_px=224)
    return spec


def build_encoder(name: str, parts: ClipParts, precision: Precision, device: str) -> ClipEncoder:
    """Assemble an encoder; see `perception.load_encoder`."""
    if precision not in _PRECISIONS:
        raise CheckpointError(f"precision must be one of {', '.join(_PRECISIONS)}, got {precision!r}")
    return ClipEncoder(name, parts.build_visual(), parts, precision, device)
