"""Tiny DreamSim releases in the exact layout of the published zips: DINO-style names, one PEFT folder (methods 1.4)."""

from pathlib import Path

import torch
from torch import Tensor

from tests.perception.adapter_checkpoints import lora_config, lora_pair, write_lora

WIDTH, DEPTH, HIDDEN, DIM = 128, 2, 96, 24
FILES = {
    "dino_vitb16": "dino_vitb16_pretrain.pth",
    "dinov2_vitb14": "dinov2_vitb14_pretrain.pth",
    **{f"{kind}_vitb{p}": f"{kind}_vitb{p}_pretrain.pth.tar" for kind in ("clip", "open_clip") for p in (16, 32)},
}


def base_state(name: str, side: int = 2) -> dict[str, Tensor]:
    """Random base weights of one branch for side x side patches, by the names in the release."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    patch = int(name[-2:])
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH), "pos_embed": (1, 1 + side**2, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, patch, patch), "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,), "norm.bias": (WIDTH,),
    }  # fmt: skip
    for i in range(DEPTH):
        block = f"blocks.{i}."
        for layer, shape in {
            "norm1": (WIDTH,), "attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH), "norm2": (WIDTH,),
            "mlp.fc1": (HIDDEN, WIDTH), "mlp.fc2": (WIDTH, HIDDEN),
        }.items():  # fmt: skip
            shapes |= {f"{block}{layer}.weight": shape, f"{block}{layer}.bias": shape[:1]}
        if "dinov2" in name:
            shapes |= {f"{block}ls{n}.gamma": (WIDTH,) for n in (1, 2)}
    if "dinov2" in name:
        shapes["mask_token"] = (1, WIDTH)
    if "clip" in name:
        shapes |= {"pos_drop.weight": (WIDTH,), "pos_drop.bias": (WIDTH,), "proj": (WIDTH, DIM)}
    state = {}
    for key, shape in shapes.items():
        scale = 1 + torch.zeros(shape) if "norm" in key and key.endswith("weight") else torch.zeros(shape)
        state[key] = scale + torch.randn(shape, generator=generator) * (0.1 if len(shape) < 4 else 0.05)
    if "clip" in name:
        # Faint tokens enter the blocks, so that the LayerNorm eps shows; and OpenAI's convolution has no bias.
        state["pos_drop.weight"], state["pos_drop.bias"] = state["pos_drop.weight"] * 0.02, torch.zeros(WIDTH)
        state["patch_embed.proj.bias"] = torch.zeros(WIDTH)
    return state


def qkv_lora(index: int, prefix: str) -> dict[str, Tensor]:
    """Adapter weights for every qkv of one branch; the values depend on `index` and block alone."""
    lora: dict[str, Tensor] = {}
    for i in range(DEPTH):
        weight = torch.zeros(3 * WIDTH, WIDTH)
        pair = lora_pair(weight, 4, 10 * index + i, f"{prefix}blocks.{i}.attn.qkv")
        lora |= {key: values * 0.15 for key, values in pair.items()}
    return lora


def write_base(folder: Path, name: str, state: dict[str, Tensor]) -> None:
    """Write a branch's base weights as the release has them."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state} if "clip" in name else state, folder / FILES[name])


def write_release(folder: Path, names: tuple[str, ...], *, side: int = 2, alpha: float = 32) -> Path:
    """Write a release of today: one PEFT folder over the whole model."""
    lora: dict[str, Tensor] = {}
    for index, name in enumerate(names):
        write_base(folder, name, base_state(name, side))
        lora |= qkv_lora(index, f"base_model.model.extractor_list.{index}.model.")
    tag = "ensemble_lora" if len(names) > 1 else f"{names[0]}_single_lora"
    write_lora(folder / tag, lora_config(["qkv"], rank=4, lora_alpha=alpha), lora)
    return folder


def write_old_release(folder: Path, names: tuple[str, ...], *, side: int = 2, alpha: float = 0.5) -> Path:
    """Write a release of 2023: one PEFT folder for each branch, wrapped twice, with aliases of its blocks."""
    for index, name in enumerate(names):
        write_base(folder, name, base_state(name, side))
        twice = "base_model.model.base_model.model."
        lora = {**qkv_lora(index, f"{twice}model."), **qkv_lora(index, twice)}
        tag = "lora" if len(names) > 1 else "single_lora"
        write_lora(folder / f"{name}_{tag}", lora_config(["qkv"], rank=4, lora_alpha=alpha), lora, binary=True)
    return folder
