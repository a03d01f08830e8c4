"""Adapters of published encoders: the MLP head, and LoRA merged into the tower (methods 1.4).

Adapted models see images squashed straight to the input size (methods 0.3, 1.3). Owns how a base and an adapter make an
encoder; `perception.encoders.lora` reads and merges LoRA. Knows nothing of training.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception.encoder import Precision
from perception.encoders.clip import CONFIG_NAME as CLIP_CONFIG_NAME
from perception.encoders.clip import ClipParts, layer_norm_eps
from perception.encoders.dino import CONFIG_NAME as DINO_CONFIG_NAME
from perception.encoders.dino import DinoParts
from perception.encoders.lora import LoraAdapter, linear_names, merged, read_lora
from perception.encoders.tower import Parts, TowerEncoder
from perception.encoders.weights import load_strictly, read_json, read_state_dict, write_checkpoint
from perception.errors import CheckpointError
from perception.preprocess import PreprocessSpec
from perception.text import TextEncoder

CONFIG_NAME = "mlp_head.json"
WEIGHTS_NAME = "mlp_head.safetensors"
PUBLISHED_EPS = 1e-6
"""LayerNorm eps of blocks and final norm in the ViTs of published LoRA adapters (methods 0.6, 1.4)."""
MARK = "mlp_head"
"""Key of a base's configuration that says that a head belongs to it: without the head it is another encoder."""
_HEAD_KEY = re.compile(r"(?:(?:module|model|perceptual_model|mlp|head)\.)*(fc[12]\.(?:weight|bias))")
_NO_TEXT = "has an adapted image embedding, which no longer lives in a text tower's space"


class MlpHead(nn.Module):
    """`fc2(relu(fc1(e))) + e` on un-normalised embeddings (methods 1.4)."""

    def __init__(self, dim: int, hidden: int = 512) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, embeddings: Tensor) -> Tensor:
        """(b, d) -> (b, d)."""
        adapted: Tensor = self.fc2(F.relu(self.fc1(embeddings))) + embeddings
        return adapted


class HeadedTower(nn.Module):
    """A tower with an MLP head: normalised pixels (b, 3, h, w) -> embeddings (b, d)."""

    def __init__(self, tower: nn.Module, head: MlpHead) -> None:
        super().__init__()
        self.tower, self.head = tower, head

    def forward(self, pixels: Tensor) -> Tensor:
        """See the class."""
        adapted: Tensor = self.head(self.tower(pixels))
        return adapted


class MlpEncoder(TowerEncoder):
    """Any encoder with an MLP head on its embedding; it has no text tower."""

    def __init__(self, name: str, parts: "MlpParts", precision: Precision, device: str) -> None:
        base = parts.base.build(name, "fp32", "cpu")
        if isinstance(base, MlpEncoder):
            raise CheckpointError(f"{parts.origin}: the base has an MLP head already")
        if type(base).features is not TowerEncoder.features:
            raise CheckpointError(f"{parts.origin}: an MLP head does not fit a {type(base).__name__}")
        head = _build_head(parts.head_state, base.dim, parts.origin)
        super().__init__(
            name,
            HeadedTower(base.visual, head),
            architecture={"adapter": "mlp", "hidden": head.fc1.out_features, "base": base.fingerprint},
            dim=base.dim,
            preprocess=parts.preprocess,
            precision=precision,
            device=device,
        )
        self._base = (base,)  # in a tuple: its tower is a submodule already, as `visual.tower`

    @property
    def text(self) -> TextEncoder:
        """Never.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(f"{self.name} has no text tower: it {_NO_TEXT}")

    def export(self, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write the base's folder with `mlp_head.safetensors` and `mlp_head.json`; see `TowerEncoder.export`.

        The head names the files that it belongs to by their hash, and comes before them: a folder that a kill left
        between the two is refused.
        """
        staged = folder / "base.partial"
        try:
            self._base[0].export(staged, dtype=dtype)
            head = cast(HeadedTower, self.visual).head
            for path in staged.glob("*.json"):
                _mark(path)
            files = sorted(staged.iterdir(), key=lambda path: path.suffix == ".json")  # the configuration last
            table = {"adapter": "mlp", "base_sha256": {path.name: _sha256(path) for path in files}}
            write_checkpoint(folder, (CONFIG_NAME, table), (WEIGHTS_NAME, head.state_dict()), dtype)
            for path in files:
                path.replace(folder / path.name)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


@dataclass(frozen=True)
class MlpParts:
    """An encoder's parts and an MLP head, not yet built.

    Attributes:
        base: of the encoder, with the preprocessing of the adapted one.
        head_state: by the names of `MlpHead`.
        origin: the head's file, for messages.
    """

    base: Parts
    head_state: Mapping[str, Tensor]
    origin: str

    def __deepcopy__(self, memo: dict[int, Any]) -> "MlpParts":
        """Itself: it is frozen, and nothing writes to its tensors."""
        return self

    @property
    def preprocess(self) -> PreprocessSpec:
        """How images become pixels."""
        return self.base.preprocess

    def build(self, name: str, precision: Precision, device: str) -> MlpEncoder:
        """Assemble the encoder; see `perception.load_encoder`.

        Raises:
            CheckpointError: the head does not fit the base, or a value is not finite.
        """
        return MlpEncoder(name, self, precision, device)


def adapted_preprocess(base: PreprocessSpec) -> PreprocessSpec:
    """What adapted models are trained and used with: squash straight to the base's size, bicubic (methods 1.3)."""
    return replace(base, resize_px=base.size_px, resize_mode="squash", interpolation="bicubic")


def read_adapted(kind: str, base: Parts, path: Path, preprocess: PreprocessSpec | None = None) -> Parts:
    """Apply a published adapter, or one of our own tuner's, to an encoder's parts.

    Args:
        kind: 'mlp' for a head's file, 'lora' for a PEFT folder.
        base: any family's for a head; CLIP or DINO for LoRA.
        path: the file or folder.
        preprocess: overrides `adapted_preprocess` of the base, and what our tuner noted beside the adapter.

    Raises:
        CheckpointError: a file is absent or corrupt, it does not fit the base, or it is of a kind that would be applied
            wrongly; see `perception.encoders.lora`.
    """
    if kind == "mlp":
        spec = preprocess or adapted_preprocess(base.preprocess)
        return MlpParts(_with_preprocess(base, spec, str(path)), _read_head(path), str(path))
    if kind != "lora":
        raise CheckpointError(f"no kind of adapter {kind!r}; there are mlp, lora")
    adapter = read_lora(path)
    noted = adapter.notes.preprocess if adapter.notes else None
    adapted = _with_preprocess(base, preprocess or noted or adapted_preprocess(base.preprocess), adapter.origin)
    if isinstance(adapted, ClipParts):
        return _adapted_clip(adapted, adapter)
    if isinstance(adapted, DinoParts):
        state = merged(adapted.visual_state, linear_names(adapted.visual_state), adapter)
        return replace(adapted, visual_state=state, origin=f"{adapted.origin} with {adapter.origin}")
    raise CheckpointError(f"{adapter.origin}: LoRA is for CLIP and DINO without a head, not for {type(base).__name__}")


def with_exported_head(base: Parts, folder: Path) -> Parts:
    """Apply the head that `MlpEncoder.export` wrote beside a base.

    Args:
        base: of the same folder.
        folder: with `mlp_head.json` and `mlp_head.safetensors`.

    Raises:
        CheckpointError: a file is absent or corrupt, or the base's files are not those that the head was written for.
    """
    path = folder / CONFIG_NAME
    table = read_json(path)
    files = table.get("base_sha256")
    if table.get("adapter") != "mlp" or not isinstance(files, dict) or not files:
        raise CheckpointError(f"{path}: expected adapter 'mlp' and base_sha256 of the files that the head is for")
    for name, digest in files.items():
        if Path(name).name != name or not (folder / name).is_file() or _sha256(folder / name) != digest:
            raise CheckpointError(
                f"{folder}: {name} is not the file that {CONFIG_NAME} is for; export again, or remove {CONFIG_NAME} to "
                "use the base without its head"
            )
    return MlpParts(base, _read_head(folder / WEIGHTS_NAME), str(folder / WEIGHTS_NAME))


def save_head(head: MlpHead, path: Path) -> None:
    """Write a head as safetensors, by the names in published files; `BASE+mlp:FILE` reads it.

    Raises:
        CheckpointError: a value is not finite.
    """
    from safetensors.torch import save_file

    state = {f"perceptual_model.mlp.{k}": v.detach().float().cpu().contiguous() for k, v in head.state_dict().items()}
    bad = [name for name, values in state.items() if not bool(torch.isfinite(values).all())]
    if bad:
        raise CheckpointError(f"{path}: the head holds values that are not finite: {', '.join(bad)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    save_file(state, partial)
    partial.replace(path)


def _read_head(path: Path) -> dict[str, Tensor]:
    """A head's tensors by the names of `MlpHead`, whatever prefixes they have in the file."""
    state: dict[str, Tensor] = {}
    for name, values in read_state_dict(path).items():
        match = _HEAD_KEY.fullmatch(name)
        if match is None or match[1] in state:
            raise CheckpointError(f"{path}: {name} is not of an MLP head, which has fc1 and fc2 with weight and bias")
        state[match[1]] = values
    return state


def _build_head(state: Mapping[str, Tensor], dim: int, origin: str) -> MlpHead:
    first = state.get("fc1.weight")
    if first is None or first.ndim != 2 or not first.shape[0]:
        found = "missing" if first is None else tuple(first.shape)
        raise CheckpointError(f"{origin}: fc1.weight must be (hidden, {dim}), found {found}")
    head = MlpHead(dim, first.shape[0])
    load_strictly(head, state, f"{origin}: MLP head for {dim} dimensions")
    return head


def _with_preprocess(base: Parts, spec: PreprocessSpec, origin: str) -> Parts:
    if spec.size_px != base.preprocess.size_px:
        raise CheckpointError(f"{origin}: size_px={spec.size_px}, and the base takes {base.preprocess.size_px}")
    if isinstance(base, MlpParts):
        return replace(base, base=_with_preprocess(base.base, spec, origin))
    parts: Parts = replace(cast(Any, base), preprocess=spec)  # every family's is a frozen dataclass
    return parts


def _adapted_clip(base: ClipParts, adapter: LoraAdapter) -> ClipParts:
    """Merge LoRA into a CLIP tower; a ViT then has the LayerNorm eps and the activation that the adapter is for."""
    state = merged(base.visual_state, linear_names(base.visual_state), adapter)
    config, vit = dict(base.model_config), "class_embedding" in base.visual_state
    eps = adapter.notes.layer_norm_eps if adapter.notes else PUBLISHED_EPS if adapter.wrapped else None
    quick_gelu = bool(config.get("quick_gelu", False))
    expected = adapter.notes.quick_gelu if adapter.notes else False if adapter.wrapped else None
    if vit and expected not in (None, quick_gelu):
        kinds = {True: "QuickGELU", False: "plain GELU"}
        raise CheckpointError(
            f"{adapter.origin} is for a ViT with {kinds[expected is True]}, and {base.origin} has {kinds[quick_gelu]}"
        )
    if vit and eps is not None and eps != layer_norm_eps(config):
        config["layer_norm_eps"] = eps
    return replace(
        base,
        model_config=config,
        visual_state=state,
        other_state={},
        origin=f"{base.origin} with {adapter.origin}",
        without_text=_NO_TEXT,
    )


def _mark(config: Path) -> None:
    """Say in a base's configuration that a head belongs to it, where its family reads keys that it does not know."""
    if config.name in (CLIP_CONFIG_NAME, DINO_CONFIG_NAME):
        config.write_text(json.dumps({**read_json(config), MARK: CONFIG_NAME}, indent=2) + "\n", encoding="utf8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
