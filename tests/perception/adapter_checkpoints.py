"""Tiny towers and adapters for them, written in the published layouts of methods 1.4."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.perception.dino_checkpoints import VIT, published_state
from tests.perception.dino_checkpoints import write as write_dino

TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
VISION: dict[str, dict[str, Any]] = {
    "vit": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "convnext": {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear", "image_size": 32},
}
TOWERS = ("vit", "dino", "convnext")


def write_clip(folder: Path, kind: str, **config: Any) -> str:
    """Write a CLIP of a kind of `VISION`, with random weights and a text tower; returns its name."""
    import open_clip

    torch.manual_seed(3)
    table = {"embed_dim": 24, "vision_cfg": VISION[kind], "text_cfg": TEXT, **config}
    model = open_clip.model.CLIP(**table)
    with torch.no_grad():
        for parameter in model.visual.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": table, "preprocess_cfg": {}}))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def write_tower(folder: Path, kind: str) -> str:
    """Write an encoder of a kind of `TOWERS`; returns its name."""
    return write_dino(folder, VIT, published_state(VIT)) if kind == "dino" else write_clip(folder, kind)


def lora_config(targets: list[str] | str, rank: int = 2, **changes: Any) -> dict[str, Any]:
    """An adapter_config.json as it was published, for another rank."""
    return {
        "auto_mapping": None, "base_model_name_or_path": None, "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None,
        "lora_alpha": 0.5, "lora_dropout": 0.3, "modules_to_save": None, "peft_type": "LORA", "r": rank,
        "revision": None, "target_modules": targets, "task_type": None, **changes,
    }  # fmt: skip


def lora_pair(weight: Tensor, rank: int, seed: int, prefix: str) -> dict[str, Tensor]:
    """Random halves for a Linear's weight (out, in), large enough that a wrong merge is seen."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{prefix}.lora_A.weight": torch.randn(rank, weight.shape[1], generator=generator),
        f"{prefix}.lora_B.weight": torch.randn(weight.shape[0], rank, generator=generator),
    }


def write_lora(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor], *, binary: bool = False) -> Path:
    """Write a PEFT folder, with safetensors or with the older .bin."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if binary:
        torch.save(dict(state), folder / "adapter_model.bin")
    else:
        save_file({k: v.clone().contiguous() for k, v in state.items()}, folder / "adapter_model.safetensors")
    return folder
