"""LoRA adapters in PEFT's folders, read without PEFT and merged into a tower's weights: `W += scale * B @ A`.

Reads the layouts of methods 1.4: `adapter_config.json` beside `adapter_model.safetensors` or `.bin`, names wrapped once
or twice, with alias duplicates. What PEFT does otherwise than a plain merge would is refused, not guessed. Knows the
names of Linears; how an adapted encoder is built is the matter of `adapters` and `dreamsim` beside it.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perception.encoders.weights import first_weights, read_json
from perception.errors import CheckpointError
from perception.preprocess import PreprocessSpec

CONFIG_NAME = "adapter_config.json"
WEIGHT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
NOTES_NAME = "hardlook.json"
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(?:\.default)?\.weight")
_WRAPPERS = ("base_model", "model", "module")
# Keys of an adapter_config.json that do not change what a plain merge computes, or that are checked one by one.
_HARMLESS = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "bias", "init_lora_weights", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying",
    "merge_weights",
}  # fmt: skip
_ATTENTION = ("out_proj", "in_proj", "in_proj_weight", "attn", "self_attn", "attention")
_MHA = (
    "PEFT is wrong on nn.MultiheadAttention: it applies the change of out_proj twice; adapters are made for the plain "
    "Linears qkv, proj, fc1 and fc2"
)


@dataclass(frozen=True)
class LoraNotes:
    """What our own tuner writes beside an adapter; published ones come without.

    Attributes:
        layer_norm_eps: of blocks and final norm of the ViT that was adapted; None says nothing.
        quick_gelu: its activation; None says nothing.
        preprocess: of the images in training; None says nothing.
    """

    layer_norm_eps: float | None = None
    quick_gelu: bool | None = None
    preprocess: PreprocessSpec | None = None


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter as read, not yet fitted to a tower.

    Attributes:
        rank: r.
        scale: lora_alpha / r.
        tensors: (name in the file, module with wrappers such as 'base_model.model.' taken off, 'A' or 'B', values).
        targets: `target_modules`; the tower's Linears of these names must all be in `tensors`, unless `partial`.
        partial: the configuration itself leaves some of the targets out.
        wrapped: the adapted tower was wrapped in a model of its own, as all published ones were.
        notes: of our own tuner, or None.
        origin: the folder, for messages.
    """

    rank: int
    scale: float
    tensors: tuple[tuple[str, str, str, Tensor], ...]
    targets: tuple[str, ...] | str
    partial: bool
    wrapped: bool
    notes: LoraNotes | None
    origin: str


def read_lora(folder: Path) -> LoraAdapter:
    """Read a PEFT folder.

    Raises:
        CheckpointError: a file is absent or corrupt, the configuration asks for something other than plain LoRA on
            Linears, a name is no LoRA weight, or a value is not finite.
    """
    if not folder.is_dir():
        raise CheckpointError(f"LoRA adapter not found: {folder} is no folder")
    table, origin = read_json(folder / CONFIG_NAME), str(folder)
    rank, scale = _rank_and_scale(table, origin)
    _require_plain(table, origin)
    tensors, wrapped = [], False
    for name, values in first_weights(folder, WEIGHT_NAMES).items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise CheckpointError(f"{origin}: {name} is no LoRA weight: MODULE.lora_A.weight or MODULE.lora_B.weight")
        if not values.is_floating_point() or not bool(torch.isfinite(values).all()):
            raise CheckpointError(f"{origin}: {name} holds values that are not finite")
        module = match["module"]
        wrapped |= re.match(r"(?:base_model\.model\.)*model\.", module) is not None
        tensors.append((name, _unwrapped(module), match["half"], values))
    targets = table["target_modules"]
    return LoraAdapter(
        rank=rank,
        scale=scale,
        tensors=tuple(tensors),
        targets=targets if isinstance(targets, str) else tuple(targets),
        partial=any(table.get(key) not in (None, []) for key in ("layers_to_transform", "exclude_modules")),
        wrapped=wrapped,
        notes=_read_notes(folder / NOTES_NAME),
        origin=origin,
    )


def _unwrapped(module: str) -> str:
    """A module's path without the names of what wraps its tower; none of our towers has parts of these names."""
    return ".".join(part for part in module.split(".") if part not in _WRAPPERS)


def _rank_and_scale(table: Mapping[str, Any], origin: str) -> tuple[int, float]:
    if table.get("peft_type") != "LORA":
        raise CheckpointError(f"{origin}: peft_type must be 'LORA', got {table.get('peft_type')!r}")
    rank, alpha = table.get("r"), table.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise CheckpointError(f"{origin}: r must be a positive integer, got {rank!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(f"{origin}: lora_alpha must be a finite number, got {alpha!r}")
    return rank, alpha / rank


def _require_plain(table: Mapping[str, Any], origin: str) -> None:
    """Refuse every option under which PEFT computes something other than `W + lora_alpha / r * B @ A`."""
    if table.get("bias") not in (None, "none"):
        raise CheckpointError(f"{origin}: bias must be 'none', got {table['bias']!r}")
    if table.get("init_lora_weights", True) not in (True, False, None, "gaussian"):
        raise CheckpointError(
            f"{origin}: init_lora_weights {table['init_lora_weights']!r} may change the weights that are adapted"
        )
    for key, value in table.items():
        if value and key not in _HARMLESS:
            raise CheckpointError(f"{origin}: {key}={value!r} is not supported: expected plain LoRA on Linears")
    targets = table.get("target_modules")
    if isinstance(targets, str):
        if targets == "all-linear" or any(name in targets for name in ("out_proj", "in_proj")):
            raise CheckpointError(f"{origin}: target_modules {targets!r} takes in attention modules. {_MHA}")
    elif not isinstance(targets, list) or not targets or not all(isinstance(t, str) and t for t in targets):
        raise CheckpointError(f"{origin}: target_modules must be a list of names, or a pattern, got {targets!r}")
    else:
        wrong = [t for t in targets if t.rpartition(".")[2] in _ATTENTION]
        if wrong:
            raise CheckpointError(f"{origin}: target_modules {', '.join(wrong)}: {_MHA}")


def linear_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """The names that adapters have for a tower's Linears.

    Args:
        state: a tower's state dict: open_clip's ViT, a timm trunk in open_clip's wrapper, or timm's own names.

    Returns:
        By each name of a module, the name of its weight in `state`. open_clip's ViTs go by the names of DINO-style ViTs
        (`blocks.0.attn.qkv`, `mlp.fc1`) too, trunks with and without `trunk.`, and ConvNeXt stages also as `blocks`,
        the alias in published files.
    """
    names: dict[str, str] = {}
    for key, tensor in state.items():
        block = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(attn|mlp)\.(\w+)(?:\.weight)?", key)
        if block and tensor.ndim == 2:
            ours = {"in_proj_weight": "qkv", "out_proj": "proj", "c_fc": "fc1", "c_proj": "fc2"}.get(block[3])
            if ours:
                names[f"blocks.{block[1]}.{block[2]}.{ours}"] = key
            if block[2] == "mlp":
                names[key.removesuffix(".weight")] = key
        elif tensor.ndim == 2 and key.endswith(".weight"):
            module = key.removesuffix(".weight")
            names[module] = key
            bare = module.removeprefix("trunk.")
            names[bare] = key
            if re.match(r"stages\.\d+\.", bare):
                names[bare.replace("stages.", "blocks.", 1)] = key
    return names


def merged(state: Mapping[str, Tensor], names: Mapping[str, str], adapter: LoraAdapter) -> dict[str, Tensor]:
    """A state dict with an adapter merged in; products and sums are accumulated in float64, the result is float32.

    Args:
        state: the tower's own.
        names: by a name that the adapter may have for a Linear, its weight in `state`; see `linear_names`.

    Raises:
        CheckpointError: an unknown module, duplicates that differ, one half without the other, a shape or rank that
            does not fit, a targeted Linear without weights, or a result that is not finite.
    """
    halves = _by_weight(names, adapter)
    _require_complete(names, adapter, halves)
    result = dict(state)
    for key, pair in halves.items():
        if pair.keys() != {"A", "B"}:
            present = next(iter(pair))
            raise CheckpointError(f"{adapter.origin}: {key} has lora_{present} without lora_{'AB'.strip(present)}")
        (a_name, a), (b_name, b) = pair["A"], pair["B"]
        rank, (out_features, in_features) = adapter.rank, state[key].shape
        for name, tensor, shape in (
            (a_name, a, (rank, in_features)),
            (b_name, b, (out_features, rank)),
        ):
            if tuple(tensor.shape) != shape:
                raise CheckpointError(
                    f"{adapter.origin}: {name} is {tuple(tensor.shape)}, expected {shape} for {key} and r={rank}"
                )
        weight = (state[key].double() + adapter.scale * (b.double() @ a.double())).float()
        if not bool(torch.isfinite(weight).all()):
            raise CheckpointError(f"{adapter.origin}: merged into {key}, it gives values that are not finite")
        result[key] = weight
    return result


def _by_weight(names: Mapping[str, str], adapter: LoraAdapter) -> dict[str, dict[str, tuple[str, Tensor]]]:
    """The two halves of each adapted weight, with their names in the file; aliases dropped once they are equal."""
    found: dict[str, dict[str, tuple[str, Tensor]]] = {}
    unknown = []
    for name, module, half, tensor in adapter.tensors:
        if module not in names:
            unknown.append(name)
            continue
        first, values = found.setdefault(names[module], {}).setdefault(half, (name, tensor))
        if not torch.equal(values, tensor):
            raise CheckpointError(f"{adapter.origin}: {name} should duplicate {first}, and they differ")
    if unknown:
        parts = {part for name in unknown for part in name.split(".")}
        why = f" {_MHA}" if parts & {"out_proj", "in_proj", "in_proj_weight"} else ""
        raise CheckpointError(
            f"{adapter.origin}: {len(unknown)} weights are for modules that the tower does not have as plain Linears: "
            f"{', '.join(unknown[:3])}.{why}"
        )
    return found


def _require_complete(names: Mapping[str, str], adapter: LoraAdapter, found: Mapping[str, object]) -> None:
    """Every Linear that the configuration targets has weights: a file that lost some is not served."""
    if adapter.partial:
        return
    is_target = _targets(adapter.targets, adapter.origin)
    lacking = sorted({key for name, key in names.items() if is_target(name)} - found.keys())
    if lacking or not found:
        raise CheckpointError(
            f"{adapter.origin}: no weights for {len(lacking)} of the targeted modules: {', '.join(lacking[:3])}"
        )


def _targets(targets: tuple[str, ...] | str, origin: str) -> Callable[[str], bool]:
    """PEFT's rule: a name ends in a listed one, or is matched whole by a pattern."""
    if isinstance(targets, tuple):
        listed = tuple(_unwrapped(target) for target in targets)
        return lambda name: any(name == target or name.endswith(f".{target}") for target in listed)
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise CheckpointError(f"{origin}: target_modules {targets!r} is no pattern: {error}") from error
    return lambda name: any(pattern.fullmatch(prefix + name) for prefix in ("", "model."))


def write_notes(
    folder: Path,
    *,
    layer_norm_eps: float | None = None,
    quick_gelu: bool | None = None,
    preprocess: PreprocessSpec | None = None,
) -> None:
    """Write `LoraNotes` beside an adapter; see there for the arguments."""
    table = {
        "layer_norm_eps": layer_norm_eps,
        "quick_gelu": quick_gelu,
        "preprocess": preprocess.as_dict() if preprocess else None,
    }
    (folder / NOTES_NAME).write_text(json.dumps(table, indent=2) + "\n", encoding="utf8")


def _read_notes(path: Path) -> LoraNotes | None:
    if not path.is_file():
        return None
    table = read_json(path)
    eps, quick_gelu, own = (table.get(key) for key in ("layer_norm_eps", "quick_gelu", "preprocess"))
    if eps is not None and not (isinstance(eps, float) and 0 < eps < 1):
        raise CheckpointError(f"{path}: layer_norm_eps must be in (0, 1), got {eps!r}")
    if not isinstance(quick_gelu, bool | None):
        raise CheckpointError(f"{path}: quick_gelu must be true, false or null, got {quick_gelu!r}")
    try:
        return LoraNotes(eps, quick_gelu, PreprocessSpec.from_dict(own) if own else None)
    except ValueError as error:
        raise CheckpointError(f"{path}: preprocessing not understood: {error}") from error
