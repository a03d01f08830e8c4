"""LoRA adapters: published layouts against a naive forward pass, equal duplicates, and the merge vector."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from perception import load_encoder
from perception.encoders.clip import ClipEncoder
from perception.encoders.lora import linear_names, merged, read_lora
from perception.errors import CheckpointError
from tests.perception.adapter_checkpoints import (
    VISION,
    lora_config,
    lora_pair,
    write_clip,
    write_lora,
    write_tower,
)

ONCE, TWICE = "base_model.model.model.", "base_model.model.base_model.model.model."


def visual_state(folder: Path) -> dict[str, Tensor]:
    state = load_file(folder / "open_clip_model.safetensors")
    return {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}


def with_faint_tokens(folder: Path) -> None:
    """Make what enters the blocks so small that the LayerNorm eps decides."""
    path = folder / "open_clip_model.safetensors"
    state = load_file(path)
    state["visual.ln_pre.weight"] *= 1e-3
    state["visual.ln_pre.bias"] *= 1e-3
    save_file(state, path)


def published_vit(state: dict[str, Tensor], prefix: str, *, aliases: bool) -> dict[str, Tensor]:
    """Adapter weights for every `qkv`, with the wrapper's second name of its blocks."""
    lora: dict[str, Tensor] = {}
    for i in range(VISION["vit"]["layers"]):
        weight = state[f"transformer.resblocks.{i}.attn.in_proj_weight"]
        pair = lora_pair(weight, 2, i, f"blocks.{i}.attn.qkv")
        for start in (prefix, prefix.removesuffix("model.")) if aliases else (prefix,):
            lora |= {start + key: values for key, values in pair.items()}
    return lora


def dino_style_features(state: dict[str, Tensor], lora: dict[str, Tensor], pixels: Tensor, eps: float) -> Tensor:
    """CLIP's ViT converted to a DINO-style one with a LoRA branch beside each qkv, image by image (methods 1.4)."""

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    patch, width, heads = VISION["vit"]["patch_size"], VISION["vit"]["width"], 2
    rows = []
    for image in pixels:
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        image = (image - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        patches = F.conv2d(image[None], state["conv1.weight"], stride=patch).flatten(2)[0].T
        x = torch.cat([state["class_embedding"][None], patches]) + state["positional_embedding"]
        x = norm(x, "ln_pre", 1e-5)
        for i in range(VISION["vit"]["layers"]):
            block = f"transformer.resblocks.{i}"
            h = norm(x, f"{block}.ln_1", eps)
            qkv = h @ state[f"{block}.attn.in_proj_weight"].T + state[f"{block}.attn.in_proj_bias"]
            a, b = (lora[f"blocks.{i}.attn.qkv.lora_{half}.weight"] for half in "AB")
            query, key, value = (qkv + 0.25 * (h @ a.T) @ b.T).split(width, dim=1)  # lora_alpha / r = .5 / 2
            parts = []
            for q, k, v in zip(*(t.chunk(heads, dim=1) for t in (query, key, value)), strict=True):
                parts.append((q @ k.T / math.sqrt(width / heads)).softmax(-1) @ v)
            x = x + torch.cat(parts, 1) @ state[f"{block}.attn.out_proj.weight"].T
            x = x + state[f"{block}.attn.out_proj.bias"]
            h = norm(x, f"{block}.ln_2", eps) @ state[f"{block}.mlp.c_fc.weight"].T + state[f"{block}.mlp.c_fc.bias"]
            x = x + F.gelu(h) @ state[f"{block}.mlp.c_proj.weight"].T + state[f"{block}.mlp.c_proj.bias"]
        rows.append(norm(x[0], "ln_post", eps) @ state["proj"])
    return torch.stack(rows)


@pytest.mark.parametrize("prefix", [ONCE, TWICE], ids=["once", "twice"])
@pytest.mark.parametrize("binary", [True, False], ids=["bin", "safetensors"])
def test_a_published_vit_adapter_computes_what_its_authors_did(prefix: str, binary: bool, tmp_path: Path) -> None:
    name = write_clip(tmp_path / "base", "vit")
    with_faint_tokens(tmp_path / "base")
    state = visual_state(tmp_path / "base")
    lora = published_vit(state, prefix, aliases=True)
    write_lora(tmp_path / "lora", lora_config(["qkv"]), lora, binary=binary)
    encoder = load_encoder(f"{name}+lora:{tmp_path / 'lora'}")
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    halves = {key.removeprefix(prefix): values for key, values in lora.items() if key.startswith(prefix)}
    with torch.no_grad():
        expected = dino_style_features(state, halves, pixels, 1e-6)
        found = encoder.features(pixels)
        other_eps = dino_style_features(state, halves, pixels, 1e-5)
    assert (found - expected).abs().max() < 1e-5
    assert (other_eps - expected).abs().max() > 1e-2  # the eps of the published adapters is not open_clip's
    assert (encoder.preprocess.size_px, encoder.preprocess.resize_px, encoder.preprocess.resize_mode) == (
        32,
        32,
        "squash",
    )
    with pytest.raises(CheckpointError, match="no longer lives in a text tower's space"):
        _ = encoder.text


def test_names_of_wrappers_and_aliases_do_not_matter(tmp_path: Path) -> None:
    name = write_clip(tmp_path / "base", "vit")
    state = visual_state(tmp_path / "base")
    prints = set()
    for i, (prefix, aliases) in enumerate([(ONCE, False), (ONCE, True), (TWICE, False), (TWICE, True)]):
        folder = write_lora(tmp_path / str(i), lora_config(["qkv"]), published_vit(state, prefix, aliases=aliases))
        prints.add(load_encoder(f"{name}+lora:{folder}").fingerprint)
    assert len(prints) == 1
    assert load_encoder(name).fingerprint not in prints


def test_an_adapter_of_a_bare_tower_keeps_the_eps_of_its_base(tmp_path: Path) -> None:
    name = write_clip(tmp_path / "base", "vit")
    with_faint_tokens(tmp_path / "base")
    state = visual_state(tmp_path / "base")
    folder = write_lora(
        tmp_path / "lora", lora_config(["qkv"]), published_vit(state, "base_model.model.", aliases=False)
    )
    encoder = load_encoder(f"{name}+lora:{folder}")
    halves = published_vit(state, "", aliases=False)
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (encoder.features(pixels) - dino_style_features(state, halves, pixels, 1e-5)).abs().max() < 1e-5


def convnext_lora(state: dict[str, Tensor], scheme: str) -> dict[str, Tensor]:
    """Adapter weights for every feed-forward Linear of a ConvNeXt, by one of the names in published files."""
    lora: dict[str, Tensor] = {}
    weights = [k for k in state if k.endswith(("mlp.fc1.weight", "mlp.fc2.weight"))]
    for seed, key in enumerate(weights):
        module = key.removesuffix(".weight").removeprefix("trunk.")
        start = {"trunk": f"{ONCE}trunk.", "bare": ONCE, "alias": "base_model.model."}
        names = [start["trunk"] + module]
        if scheme == "bare":
            names = [start["bare"] + module]
        elif scheme == "alias":
            names += [start["alias"] + module.replace("stages.", "blocks.", 1)]
        for name in names:
            lora |= lora_pair(state[key], 2, seed, name)
    return lora


@pytest.mark.parametrize("scheme", ["trunk", "bare", "alias"])
def test_a_published_convnext_adapter_is_merged(scheme: str, tmp_path: Path) -> None:
    name = write_clip(tmp_path / "base", "convnext")
    state = visual_state(tmp_path / "base")
    lora = convnext_lora(state, scheme)
    targets = [k.removesuffix(".weight") for k in state if k.endswith(("mlp.fc1.weight", "mlp.fc2.weight"))]
    write_lora(tmp_path / "lora", lora_config(targets), lora, binary=True)
    encoder = load_encoder(f"{name}+lora:{tmp_path / 'lora'}")
    found = encoder.visual.state_dict()
    prefix = ONCE if scheme == "bare" else f"{ONCE}trunk."
    for key, weight in state.items():
        if key.removesuffix(".weight") in targets:
            module = prefix + key.removesuffix(".weight").removeprefix("trunk.")
            delta = 0.25 * lora[f"{module}.lora_B.weight"] @ lora[f"{module}.lora_A.weight"]
            torch.testing.assert_close(found[key], weight + delta, atol=1e-5, rtol=1e-6)
        else:
            assert torch.equal(found[key], weight), key


def test_the_merge_vector(tmp_path: Path) -> None:
    # Methods 9.2: r = 16, only the first rank non-zero, alpha .5, so scale .03125.
    a, b = torch.zeros(16, 2), torch.zeros(2, 16)
    a[0], b[:, 0] = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    lora = {"base_model.model.fc.lora_A.weight": a, "base_model.model.fc.lora_B.weight": b}
    adapter = read_lora(write_lora(tmp_path / "lora", lora_config(["fc"], rank=16), lora))
    assert adapter.scale == 0.03125
    state = {"fc.weight": torch.zeros(2, 2), "fc.bias": torch.ones(2)}
    result = merged(state, linear_names(state), adapter)
    assert torch.equal(result["fc.weight"], torch.tensor([[0.09375, 0.1875], [0.125, 0.25]]))
    assert torch.equal(result["fc.bias"], state["fc.bias"])
    assert torch.equal(state["fc.weight"], torch.zeros(2, 2))  # the base's own stay


def test_open_clip_vits_go_by_the_names_of_dino(tmp_path: Path) -> None:
    write_clip(tmp_path / "base", "vit")
    names = linear_names(visual_state(tmp_path / "base"))
    block = "transformer.resblocks.1"
    assert names["blocks.1.attn.qkv"] == f"{block}.attn.in_proj_weight"
    assert names["blocks.1.attn.proj"] == f"{block}.attn.out_proj.weight"
    assert names["blocks.1.mlp.fc1"] == names[f"{block}.mlp.c_fc"] == f"{block}.mlp.c_fc.weight"
    assert names["blocks.1.mlp.fc2"] == f"{block}.mlp.c_proj.weight"
    assert f"{block}.attn.out_proj" not in names  # there PEFT is wrong


@pytest.mark.parametrize("kind", ["vit", "dino", "convnext"])
def test_an_export_computes_what_the_adapted_encoder_does(kind: str, tmp_path: Path) -> None:
    name = write_tower(tmp_path / "base", kind)
    base = load_encoder(name)
    names = linear_names(base.visual.state_dict())
    targets = ["qkv"] if kind != "convnext" else ["fc1", "fc2"]
    weights = {v: k for k, v in names.items() if k.rpartition(".")[2] in targets}
    lora: dict[str, Tensor] = {}
    for seed, (key, module) in enumerate(weights.items()):
        lora |= lora_pair(base.visual.state_dict()[key], 2, seed, ONCE + module)
    encoder = load_encoder(f"{name}+lora:{write_lora(tmp_path / 'lora', lora_config(targets), lora)}")
    encoder.export(tmp_path / "out")
    back = load_encoder(f"local-dir:{tmp_path / 'out'}")
    assert back.fingerprint == encoder.fingerprint
    assert back.preprocess == encoder.preprocess
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(back.features(pixels), encoder.features(pixels))
        assert not torch.allclose(back.features(pixels), base.features(pixels), atol=1e-2)
    if kind == "vit":
        assert isinstance(back, ClipEncoder)
        found: Any = back.visual
        assert found.transformer.resblocks[0].ln_1.eps == found.ln_post.eps == 1e-6
        assert found.ln_pre.eps == 1e-5
        with pytest.raises(CheckpointError, match="no text tower"):
            _ = back.text


def test_an_adapter_upon_an_adapter_adds_both(tmp_path: Path) -> None:
    name = write_clip(tmp_path / "base", "vit")
    state = visual_state(tmp_path / "base")
    folder = write_lora(tmp_path / "lora", lora_config(["qkv"]), published_vit(state, ONCE, aliases=False))
    twice = load_encoder(f"{name}+lora:{folder}+lora:{folder}").visual.state_dict()
    once = load_encoder(f"{name}+lora:{folder}").visual.state_dict()
    key = "transformer.resblocks.0.attn.in_proj_weight"
    torch.testing.assert_close(twice[key] - once[key], once[key] - state[key], atol=1e-6, rtol=1e-5)
