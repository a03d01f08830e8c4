"""LoRA adapters that would be applied wrongly, and those that are damaged, are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from perception import load_encoder
from perception.encoders.lora import read_lora, write_notes
from perception.errors import CheckpointError
from tests.perception.adapter_checkpoints import VISION, lora_config, lora_pair, write_clip, write_lora

WRAPPED = "base_model.model.model."
QKV = torch.zeros(192, 64)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_clip(tmp_path_factory.mktemp("vit") / "base", "vit")


def good(prefix: str = WRAPPED) -> dict[str, Tensor]:
    lora: dict[str, Tensor] = {}
    for i in range(VISION["vit"]["layers"]):
        lora |= lora_pair(QKV, 2, i, f"{prefix}blocks.{i}.attn.qkv")
    return lora


def refused(base: str, folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_encoder(f"{base}+lora:{folder}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type must be 'LORA', got 'LOHA'"),
        ({"peft_type": None}, "peft_type must be 'LORA', got None"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"use_rslora": True}, "use_rslora=True is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True is not supported"),
        ({"rank_pattern": {"blocks.0.attn.qkv": 4}}, "rank_pattern=.* is not supported"),
        ({"alpha_pattern": {"qkv": 4}}, "alpha_pattern=.* is not supported"),
        ({"modules_to_save": ["norm"]}, "modules_to_save=.* is not supported"),
        ({"layer_replication": [[0, 2]]}, "layer_replication=.* is not supported"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"a_new_option": 1}, "a_new_option=1 is not supported"),
        ({"bias": "lora_only"}, "bias must be 'none', got 'lora_only'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' may change"),
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"r": 2.0}, "r must be a positive integer, got 2.0"),
        ({"lora_alpha": "8"}, "lora_alpha must be a finite number, got '8'"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number, got nan"),
        ({"target_modules": "all-linear"}, r"'all-linear' takes in attention modules.*nn\.MultiheadAttention"),
        ({"target_modules": r".*\.out_proj"}, r"nn\.MultiheadAttention"),
        ({"target_modules": ["qkv", "out_proj"]}, r"target_modules out_proj: PEFT is wrong on nn\.MultiheadAttention"),
        ({"target_modules": ["attn.out_proj"]}, r"attn\.out_proj: PEFT is wrong"),
        ({"target_modules": ["attn.in_proj"]}, r"attn\.in_proj: PEFT is wrong"),
        ({"target_modules": ["attn"]}, r"target_modules attn: PEFT is wrong"),
        ({"target_modules": None}, "target_modules must be a list of names"),
        ({"target_modules": []}, "target_modules must be a list of names"),
        ({"target_modules": "(qkv"}, "is no pattern"),
        ({"target_modules": ["qkv", "fc1"]}, "no weights for 2 of the targeted modules"),
    ],
)
def test_what_is_not_plain_lora_on_linears_is_refused(
    base: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = lora_config(["qkv"])
    refused(base, write_lora(tmp_path / "lora", {**config, **change}, good()), message)


def test_the_same_folder_without_the_change_loads(base: str, tmp_path: Path) -> None:
    load_encoder(f"{base}+lora:{write_lora(tmp_path / 'lora', lora_config(['qkv']), good())}")


def first(state: dict[str, Tensor], half: str) -> str:
    return next(key for key in state if key.endswith(f"lora_{half}.weight"))


def test_damaged_weights_are_named(base: str, tmp_path: Path) -> None:
    def damaged(name: str, change: dict[str, Tensor | None], message: str) -> None:
        state = {**good(), **change}
        kept = {key: values for key, values in state.items() if values is not None}
        refused(base, write_lora(tmp_path / name, lora_config(["qkv"]), kept), message)

    a, b = (first(good(), half) for half in "AB")
    damaged("half", {b: None}, r"in_proj_weight has lora_A without lora_B")
    damaged("block", {a: None, b: None}, r"no weights for 1 of the targeted modules: .*resblocks\.0")
    damaged("rank", {a: torch.zeros(3, 64)}, r"lora_A\.weight is \(3, 64\), expected \(2, 64\)")
    damaged("width", {b: torch.zeros(64, 2)}, r"lora_B\.weight is \(64, 2\), expected \(192, 2\)")
    damaged("nan", {a: torch.full((2, 64), float("nan"))}, "not finite")
    damaged("integers", {a: torch.zeros(2, 64, dtype=torch.int64)}, "not finite")
    damaged("huge", {a: torch.full((2, 64), 3e38), b: torch.full((192, 2), 3e38)}, "merged into .* not finite")
    damaged("magnitude", {f"{WRAPPED}blocks.0.attn.qkv.lora_magnitude_vector": torch.ones(192)}, "no LoRA weight")
    pair = lora_pair(QKV, 2, 0, f"{WRAPPED}blocks.7.attn.qkv")
    damaged("far", {**pair}, r"2 weights are for modules that the tower does not have.*blocks\.7")
    pair = lora_pair(QKV, 2, 0, "base_model.model.transformer.resblocks.0.attn.out_proj")
    damaged("mha", {**pair}, r"out_proj.*PEFT is wrong on nn\.MultiheadAttention")
    text = lora_pair(QKV, 2, 0, f"{WRAPPED}text.transformer.resblocks.0.mlp.c_fc")
    damaged("text", {**text}, "modules that the tower does not have")


def test_duplicates_must_be_equal(base: str, tmp_path: Path) -> None:
    alias = good("base_model.model.")
    load_encoder(f"{base}+lora:{write_lora(tmp_path / 'equal', lora_config(['qkv']), {**good(), **alias})}")
    alias[first(alias, "B")][0, 0] += 1e-3
    folder = write_lora(tmp_path / "other", lora_config(["qkv"]), {**good(), **alias})
    refused(base, folder, r"should duplicate base_model\..*, and they differ")


def test_a_wrapped_adapter_does_not_fit_a_quick_gelu_vit(tmp_path: Path) -> None:
    quick = write_clip(tmp_path / "base", "vit", quick_gelu=True)
    folder = write_lora(tmp_path / "lora", lora_config(["qkv"]), good())
    refused(quick, folder, "is for a ViT with plain GELU, and .* has QuickGELU")
    write_notes(folder, layer_norm_eps=1e-6, quick_gelu=True)
    assert load_encoder(f"{quick}+lora:{folder}").fingerprint != load_encoder(quick).fingerprint
    plain = write_clip(tmp_path / "plain", "vit")
    refused(plain, folder, "is for a ViT with QuickGELU, and .* has plain GELU")


def test_absent_and_corrupt_files_are_named(base: str, tmp_path: Path) -> None:
    refused(base, tmp_path / "nowhere", "is no folder")
    folder = write_lora(tmp_path / "lora", lora_config(["qkv"]), good())
    (folder / "adapter_model.safetensors").write_bytes(b"\x00" * 16)
    refused(base, folder, "cannot read weights")
    (folder / "adapter_model.safetensors").unlink()
    refused(base, folder, r"holds none of adapter_model\.safetensors, adapter_model\.bin")
    (folder / "adapter_config.json").write_text("[]")
    refused(base, folder, "is not a JSON object")
    (folder / "adapter_config.json").unlink()
    refused(base, folder, "cannot read")


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        ({"layer_norm_eps": 2.0}, r"layer_norm_eps must be in \(0, 1\), got 2.0"),
        ({"layer_norm_eps": "1e-6"}, "layer_norm_eps must be in"),
        ({"quick_gelu": 1}, "quick_gelu must be true, false or null, got 1"),
        ({"preprocess": {"size": 3}}, "preprocessing not understood"),
        ({"preprocess": [1]}, "preprocessing not understood"),
    ],
)
def test_notes_that_are_not_understood_are_refused(notes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "lora", lora_config(["qkv"]), good())
    (folder / "hardlook.json").write_text(json.dumps(notes))
    with pytest.raises(CheckpointError, match=message):
        read_lora(folder)


def test_other_families_have_no_lora(tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "lora", lora_config(["qkv"]), good())
    refused("bundled/clean", folder, "modules that the tower does not have as plain Linears")
