"""Tiny DINO and DINOv2 checkpoints in the layout of `transformers`, with random weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

VIT: dict[str, Any] = {
    "model_type": "vit", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 46,
    "image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-2,
}  # fmt: skip
DINOV2: dict[str, Any] = {
    "model_type": "dinov2", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "mlp_ratio": 2,
    "image_size": 42, "patch_size": 14,
}  # fmt: skip
NAMES = {
    "vit": {
        "norm1": "layernorm_before", "norm2": "layernorm_after", "fc1": "intermediate.dense", "fc2": "output.dense",
    },
    "dinov2": {"norm1": "norm1", "norm2": "norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"},
}  # fmt: skip


def published_state(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights by the names that `transformers` gives them."""
    d, p = config["hidden_size"], config["patch_size"]
    wide = config.get("intermediate_size", d * config.get("mlp_ratio", 4))
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, d),
        "embeddings.position_embeddings": (1, 1 + (config["image_size"] // p) ** 2, d),
        "embeddings.patch_embeddings.projection.weight": (d, 3, p, p),
        "embeddings.patch_embeddings.projection.bias": (d,),
        "layernorm.weight": (d,),
        "layernorm.bias": (d,),
    }
    names = NAMES[config["model_type"]]
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}."
        linears = {names["fc1"]: (wide, d), names["fc2"]: (d, wide), "attention.output.dense": (d, d)}
        for name, shape in linears.items():
            shapes |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
        for part in ("query", "key", "value"):
            shapes[f"{layer}attention.attention.{part}.weight"] = (d, d)
            if config.get("qkv_bias", True):
                shapes[f"{layer}attention.attention.{part}.bias"] = (d,)
        for name in (names["norm1"], names["norm2"]):
            shapes |= {f"{layer}{name}.weight": (d,), f"{layer}{name}.bias": (d,)}
        if config["model_type"] == "dinov2":
            shapes |= {f"{layer}layer_scale{n}.lambda1": (d,) for n in (1, 2)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def write(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> str:
    """Returns the name to load it by."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors")
    return f"local-dir:{folder}"
