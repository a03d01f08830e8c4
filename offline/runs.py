"""Run directories: what a long job leaves behind, and how it goes on after a kill.

A run directory holds `plan.json` (what was asked), `metrics.jsonl` (one line an event, append-only) and
`checkpoint.safetensors` (tensors plus a JSON header of scalars, replaced atomically). No pickle anywhere.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from offline.errors import RunError
from offline.jsonlines import JsonLines


class RunDirectory:
    """One job's folder; opening it again with the same plan resumes the job."""

    def __init__(self, path: Path, plan: dict[str, Any]) -> None:
        """Create the folder, or open it to resume.

        Raises:
            RunError: the folder was made by another plan.
        """
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        plan_path = path / "plan.json"
        text = json.dumps(plan, indent=2, sort_keys=True) + "\n"
        if not plan_path.exists():
            write_atomically(plan_path, text.encode())
        elif plan_path.read_text() != text:
            raise RunError(f"{path} holds a run of another plan; choose another --run folder or remove it")

    def log(self, **event: Any) -> None:
        """Append one event to metrics.jsonl; what a kill left of an unfinished one gives way."""
        entry = {"time_s": round(time.time(), 3), **event}
        JsonLines(self.path / "metrics.jsonl").append([entry], allow_nan=True)  # a loss may be what went wrong

    def save_checkpoint(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Replace the checkpoint; a kill at any moment leaves the old one or the new one."""
        target = self.path / "checkpoint.safetensors"
        partial = target.with_suffix(".partial")
        contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(contiguous, partial, metadata={"state": json.dumps(state)})
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # on the disk before it takes the old one's place: power may fail too
        os.replace(partial, target)

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return (tensors, state) of the last checkpoint, or None where there is none.

        Raises:
            RunError: the checkpoint is damaged.
        """
        path = self.path / "checkpoint.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                state: dict[str, Any] = json.loads((file.metadata() or {})["state"])
                return tensors, state
        except (SafetensorError, KeyError, ValueError) as error:
            raise RunError(f"damaged checkpoint {path}: {error}") from error


def read_events(path: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind in a run directory, oldest first; an unfinished last line, as a kill leaves, is none."""
    metrics = path / "metrics.jsonl"
    content = metrics.read_text() if metrics.exists() else ""
    lines = content[: content.rfind("\n") + 1].splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def adam_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Flatten an Adam-type optimizer's state to named tensors."""
    flat = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            flat[f"optimizer.{index}.{key}"] = value
    return flat


def restore_adam(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `adam_tensors` took out."""
    content = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": content["param_groups"]})
