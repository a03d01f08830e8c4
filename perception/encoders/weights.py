"""Weight files: read without running code from them, checked strictly, written atomically.

Owns files and state dicts. Knows no architecture.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perception.errors import CheckpointError


def read_state_dict(path: Path, entry: str = "state_dict") -> dict[str, Tensor]:
    """Read a state dict from `.safetensors`, or from a published `.pt`/`.bin` without running code from it.

    Nested dicts (`state_dict`, `model_state_dict`, `vision_encoder_state_dict`) and `module.` prefixes are unwrapped.

    Args:
        entry: a further entry of the file that may hold the state dict.

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
        raise CheckpointError(
            f"cannot read weights {path}: {(str(error) or repr(error)).splitlines()[0][:200]}"
        ) from error
    for key in ("state_dict", "model_state_dict", "vision_encoder_state_dict", entry):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path} is not a state dict of tensors")
    return {str(k).removeprefix("module."): v for k, v in content.items()}


def first_weights(folder: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Read the first of some weight files that a folder holds.

    Raises:
        CheckpointError: it holds none of them; see `read_state_dict`.
    """
    for name in names:
        if (folder / name).is_file():
            return read_state_dict(folder / name)
    raise CheckpointError(f"{folder} holds none of {', '.join(names)}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: absent, corrupt, or not an object.
    """
    try:
        table = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return table


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
    _require_finite(floats, what)
    module.load_state_dict(floats, strict=False)


def _require_finite(state: Mapping[str, Tensor], what: str) -> None:
    bad = [k for k, v in state.items() if not bool(torch.isfinite(v).all())]
    if bad:
        raise CheckpointError(f"{what} holds values that are not finite: {', '.join(bad[:3])}")


def write_checkpoint(
    folder: Path,
    config: tuple[str, Mapping[str, Any]],
    weights: tuple[str, Mapping[str, Tensor]],
    dtype: torch.dtype,
) -> None:
    """Write a folder of a JSON configuration and safetensors weights; each file replaces its predecessor atomically.

    Args:
        folder: made where it does not exist.
        config: file name and content.
        weights: file name and tensors; those of integers stay as they are.
        dtype: of the floating-point tensors.

    Raises:
        CheckpointError: a value is not finite, in `dtype`; nothing is written.
    """
    from safetensors.torch import save_file

    (config_name, table), (weights_name, state) = config, weights
    written = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype, copy=True).contiguous()
        for name, tensor in state.items()
    }
    _require_finite(written, f"{folder / weights_name} as {dtype}")
    folder.mkdir(parents=True, exist_ok=True)
    # The configuration comes last: a folder without one is refused, so a kill leaves no half of a new checkpoint.
    partial = folder / f"{weights_name}.partial"
    save_file(written, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # safetensors writes for the owner alone; a checkpoint is there to be read
    os.replace(partial, folder / weights_name)
    partial = folder / f"{config_name}.partial"
    partial.write_text(json.dumps(table, indent=2) + "\n", encoding="utf8")
    os.replace(partial, folder / config_name)
