"""Towers for LoRA: equal to the encoder's own, and what PEFT trains on them is what `+lora:` serves."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from offline.errors import PlanError
from offline.finetune.towers import linear_tower, lora_targets, save_lora
from perception import load_encoder
from perception.encoders.lora import read_lora
from perception.encoders.tower import TowerEncoder
from tests.perception.adapter_checkpoints import TOWERS, VISION, write_clip, write_tower


def normalised(encoder: TowerEncoder, pixels: torch.Tensor) -> torch.Tensor:
    return (pixels - encoder.get_buffer("mean")) / encoder.get_buffer("std")


def probe(encoder: TowerEncoder) -> torch.Tensor:
    side = encoder.preprocess.size_px
    return torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(5))


def adapted(tower: nn.Module) -> peft.PeftModel:
    """PEFT's model with random weights in both halves, as after training."""
    alpha: Any = 0.5  # as published, where PEFT says int
    config = peft.LoraConfig(r=4, lora_alpha=alpha, lora_dropout=0.3, bias="none", target_modules=lora_targets(tower))
    model = peft.get_peft_model(tower, config)
    torch.manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model.eval()


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("ours", [True, False], ids=["save_lora", "save_pretrained"])
def test_merged_output_is_the_adapter_output(kind: str, ours: bool, tmp_path: Path) -> None:
    base = load_encoder(write_tower(tmp_path / "base", kind))
    model = adapted(linear_tower(base))
    if ours:
        save_lora(model, base, tmp_path / "lora")
    else:
        model.save_pretrained(str(tmp_path / "lora"))
    encoder = load_encoder(f"{base.name}+lora:{tmp_path / 'lora'}")
    pixels = probe(base)
    with torch.no_grad():
        expected, plain = model(normalised(base, pixels)), base.features(pixels)
        found = encoder.features(pixels)
    assert (expected - plain).abs().max() > 1e-2  # the adapter changes something
    assert (found - expected).abs().max() < 1e-5
    assert encoder.preprocess.resize_mode == "squash"
    assert encoder.fingerprint != base.fingerprint
    notes = read_lora(tmp_path / "lora").notes
    assert (notes is not None) == ours
    if ours and kind == "vit":
        assert notes is not None
        assert (notes.layer_norm_eps, notes.quick_gelu) == (1e-5, False)


class Wrapper(nn.Module):
    """What published adapters were trained in: the tower, and a second name for its blocks."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.model = tower
        self.blocks = tower.blocks if hasattr(tower, "blocks") else tower.trunk.stages

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.model(pixels)
        return features


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
def test_peft_on_a_wrapped_tower_writes_what_is_merged(kind: str, twice: bool, tmp_path: Path) -> None:
    base = load_encoder(write_tower(tmp_path / "base", kind))
    tower: Any = linear_tower(base)
    if kind == "vit":  # the published conversion has this eps behind the first LayerNorm
        for name, module in tower.named_modules():
            if isinstance(module, nn.LayerNorm) and name != "norm_pre":
                module.eps = 1e-6
    model = adapted(Wrapper(tower))
    model.save_pretrained(str(tmp_path / "lora"), safe_serialization=False)
    state = torch.load(tmp_path / "lora" / "adapter_model.bin", weights_only=True)
    assert any(".model.model." in key for key in state)
    # PEFT of today writes the alias where targets are the ends of names, and not where they are whole names.
    assert any(".model.blocks." in key for key in state) == (kind != "convnext")
    if twice:
        torch.save({f"base_model.model.{key}": v for key, v in state.items()}, tmp_path / "lora" / "adapter_model.bin")
    encoder, pixels = load_encoder(f"{base.name}+lora:{tmp_path / 'lora'}"), probe(base)
    with torch.no_grad():
        assert (encoder.features(pixels) - model(normalised(base, pixels))).abs().max() < 1e-5


@pytest.mark.parametrize("kind", TOWERS)
def test_a_linear_tower_computes_what_the_encoder_computes(kind: str, tmp_path: Path) -> None:
    base = load_encoder(write_tower(tmp_path / "base", kind))
    before = base.fingerprint
    tower = linear_tower(base)
    assert not any(isinstance(m, nn.MultiheadAttention) for m in tower.modules())
    assert not any(p.requires_grad for p in tower.parameters())
    assert {p.data_ptr() for p in tower.parameters()}.isdisjoint(p.data_ptr() for p in base.visual.parameters())
    pixels = probe(base)
    with torch.no_grad():
        torch.testing.assert_close(tower(normalised(base, pixels)), base.features(pixels), atol=1e-5, rtol=0)
    targets = lora_targets(tower)
    if kind == "convnext":
        assert len(targets) == 2 * len([m for m in tower.modules() if type(m).__name__ == "ConvNeXtBlock"])
        assert targets[0] == "trunk.stages.0.blocks.0.mlp.fc1"
    else:
        assert targets == ["qkv"]
    assert base.fingerprint == before


@pytest.mark.parametrize(
    ("config", "vision"),
    [
        ({"quick_gelu": True}, {}),
        ({}, {"mlp_ratio": 1.5}),
        ({}, {"norm_kwargs": {"eps": 1e-2}}),
    ],
    ids=["quick gelu", "narrow", "eps"],
)
def test_a_vit_converts_with_its_activation_width_and_eps(
    config: dict[str, bool], vision: dict[str, float], tmp_path: Path
) -> None:
    name = write_clip(tmp_path / "base", "vit", **config, vision_cfg={**VISION["vit"], **vision})
    base = load_encoder(name)
    tower, pixels = linear_tower(base), probe(base)
    with torch.no_grad():
        torch.testing.assert_close(tower(normalised(base, pixels)), base.features(pixels), atol=1e-5, rtol=0)
    model = adapted(tower)
    save_lora(model, base, tmp_path / "lora")
    encoder = load_encoder(f"{name}+lora:{tmp_path / 'lora'}")
    with torch.no_grad():
        torch.testing.assert_close(encoder.features(pixels), model(normalised(base, pixels)), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "vision", [{"pool_type": "avg"}, {"no_ln_pre": True}, {"ls_init_value": 0.1}, {"qk_norm": True}]
)
def test_a_vit_that_does_not_convert_is_refused(vision: dict[str, object], tmp_path: Path) -> None:
    base = load_encoder(write_clip(tmp_path / "base", "vit", vision_cfg={**VISION["vit"], **vision}))
    with pytest.raises(PlanError, match=r"differ by .* on a probe|has no equal among timm's"):
        linear_tower(base)


def test_towers_that_lora_does_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="the tower has none"):
        lora_targets(linear_tower(load_encoder("bundled/clean")))
    name = write_clip(tmp_path / "base", "vit")
    with pytest.raises(PlanError, match=r"nn\.MultiheadAttention"):
        lora_targets(load_encoder(name).visual)
    with pytest.raises(PlanError, match="fp32"):
        linear_tower(load_encoder(name, precision="bf16"))
