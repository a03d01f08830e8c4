"""DINO towers: against a naive forward pass written on the published names, and against timm's own models."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from perception import load_encoder
from perception.encoders.dino import DinoEncoder, resample_positions
from perception.errors import CheckpointError
from perception.preprocess import PreprocessSpec
from tests.perception.dino_checkpoints import DINOV2, NAMES, VIT, published_state, write

BESIDE = {
    "vit": {"pooler.dense.weight": torch.ones(24, 24), "pooler.dense.bias": torch.ones(24)},
    "dinov2": {"embeddings.mask_token": torch.ones(1, 24)},
}
both = pytest.mark.parametrize("config", [VIT, DINOV2], ids=["vit", "dinov2"])


def naive_features(config: dict[str, Any], state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """The CLS token of one image (3, h, w), token by token and head by head, on the published names."""
    names, d, heads = NAMES[config["model_type"]], config["hidden_size"], config["num_attention_heads"]
    p, eps = config["patch_size"], config.get("layer_norm_eps", {"vit": 1e-12, "dinov2": 1e-6}[config["model_type"]])

    def linear(x: Tensor, name: str) -> Tensor:
        bias = state.get(f"{name}.bias", torch.zeros(()))
        return x @ state[f"{name}.weight"].mT + bias

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled: Tensor = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    image = (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    kernel = state["embeddings.patch_embeddings.projection.weight"].reshape(d, -1)
    side = image.shape[1] // p
    tokens = [state["embeddings.cls_token"][0, 0]]
    for row in range(side):
        for column in range(side):
            patch = image[:, row * p : (row + 1) * p, column * p : (column + 1) * p]
            tokens.append(kernel @ patch.reshape(-1) + state["embeddings.patch_embeddings.projection.bias"])
    x = torch.stack(tokens) + state["embeddings.position_embeddings"][0]
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}."
        h = norm(x, layer + names["norm1"])
        query, key, value = (linear(h, f"{layer}attention.attention.{n}") for n in ("query", "key", "value"))
        mixed = []
        for head in range(heads):
            part = slice(head * d // heads, (head + 1) * d // heads)
            weights = (query[:, part] @ key[:, part].T / math.sqrt(d / heads)).softmax(-1)
            mixed.append(weights @ value[:, part])
        out = linear(torch.cat(mixed, dim=1), f"{layer}attention.output.dense")
        x = x + out * state.get(f"{layer}layer_scale1.lambda1", torch.ones(()))
        h = linear(norm(x, layer + names["norm2"]), layer + names["fc1"])
        h = linear(h * 0.5 * (1 + torch.erf(h / math.sqrt(2))), layer + names["fc2"])
        x = x + h * state.get(f"{layer}layer_scale2.lambda1", torch.ones(()))
    return norm(x[0], "layernorm")


@pytest.mark.parametrize("config", [VIT, DINOV2, {**VIT, "qkv_bias": False}], ids=["vit", "dinov2", "no qkv bias"])
def test_features_are_those_of_a_naive_forward_pass(config: dict[str, Any], tmp_path: Path) -> None:
    state = published_state(config)
    encoder = load_encoder(write(tmp_path / "hub", config, {**state, **BESIDE[config["model_type"]]}))
    size = config["image_size"]
    assert encoder.preprocess == PreprocessSpec(
        size, round(size * 8 / 7), "shortest", "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )
    pixels = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(1), requires_grad=True)
    expected = torch.stack([naive_features(config, state, image) for image in pixels])
    features = encoder.features(pixels)
    torch.testing.assert_close(features, expected, atol=2e-5, rtol=1e-5)
    assert encoder.dim == features.shape[1] == 24
    features.sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0
    with pytest.raises(CheckpointError, match="trained on images alone"):
        _ = encoder.text


@both
def test_a_trained_copy_is_exported_as_it_is(config: dict[str, Any], tmp_path: Path) -> None:
    state = {**published_state(config), **BESIDE[config["model_type"]]}
    origin = load_encoder(write(tmp_path / "hub", config, state))
    origin.export(tmp_path / "same")
    same = load_file(tmp_path / "same" / "model.safetensors")
    assert same.keys() == state.keys()
    assert all(torch.equal(same[key], state[key]) for key in state)
    written = json.loads((tmp_path / "same" / "config.json").read_text())
    assert {k: written[k] for k in config} == config
    assert load_encoder(f"local-dir:{tmp_path / 'same'}").fingerprint == origin.fingerprint

    student = copy.deepcopy(origin)
    student.visual.requires_grad_(True)
    with torch.no_grad():
        for parameter in student.visual.parameters():
            parameter.mul_(1.1)
    student.export(tmp_path / "out")
    back = load_encoder(f"local-dir:{tmp_path / 'out'}")
    pixels = torch.rand(2, 3, config["image_size"], config["image_size"])
    with torch.no_grad():
        assert torch.equal(back.features(pixels), student.features(pixels))
        assert not torch.equal(back.features(pixels), origin.features(pixels))
    assert back.preprocess == origin.preprocess


def test_dinov2_for_larger_images_is_used_and_exported_at_224(tmp_path: Path) -> None:
    config = {**DINOV2, "image_size": 518, "num_hidden_layers": 1}
    state = published_state(config)
    encoder = load_encoder(write(tmp_path / "hub", config, state))
    assert (encoder.preprocess.size_px, encoder.preprocess.resize_px) == (224, 256)
    table = state["embeddings.position_embeddings"]
    # As `transformers` does it: not antialiased.
    grid = table[:, 1:].reshape(1, 37, 37, 24).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(16, 16), mode="bicubic", align_corners=False).flatten(2).mT
    used = encoder.visual.state_dict()["pos_embed"]
    assert torch.equal(used, torch.cat([table[:, :1], expected], dim=1))

    encoder.export(tmp_path / "out")
    back = load_encoder(f"local-dir:{tmp_path / 'out'}")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["image_size"] == 224
    assert back.fingerprint == encoder.fingerprint
    assert back.features(torch.rand(1, 3, 224, 224)).shape == (1, 24)


def test_resampling_keeps_constants_and_ramps() -> None:
    constant = torch.full((1, 1 + 49, 3), 2.5)
    torch.testing.assert_close(resample_positions(constant, 7, 4), torch.full((1, 1 + 16, 3), 2.5))
    assert resample_positions(constant, 7, 7) is constant
    ramp = torch.cat([torch.zeros(1, 1, 1), torch.arange(8.0).repeat(8).view(1, 64, 1)], dim=1)
    halved = resample_positions(ramp, 8, 4)[0, 1:, 0].view(4, 4)
    torch.testing.assert_close(halved[:, 1:3], torch.tensor([2.5, 4.5]).expand(4, 2))  # centres of two old patches


@pytest.mark.parametrize(
    ("card", "kind", "size"),
    [("dino-vitb16", "vit_base_patch16_224.dino", 224), ("dinov2-vitb14", "vit_base_patch14_dinov2.lvd142m", 518)],
)
def test_state_dicts_in_timm_names_load_as_timm_does(card: str, kind: str, size: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model(kind, num_classes=0, pretrained=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    torch.save({"state_dict": {**model.state_dict(), "mask_token": torch.zeros(1, 768)}}, tmp_path / "visual.pt")
    if card == "dino-vitb16":
        with pytest.raises(CheckpointError, match="unexpected 1: mask_token"):
            load_encoder(f"visual:{card}:{tmp_path / 'visual.pt'}")
        torch.save(model.state_dict(), tmp_path / "visual.pt")
    encoder = load_encoder(f"visual:{card}:{tmp_path / 'visual.pt'}")
    assert isinstance(encoder, DinoEncoder)
    assert (encoder.preprocess.size_px, encoder.preprocess.resize_px, encoder.dim) == (224, 256, 768)
    pixels = torch.rand(1, 3, 224, 224)
    normalised = (pixels - encoder.get_buffer("mean")) / encoder.get_buffer("std")
    with torch.no_grad():
        if size != 224:
            positions = resample_positions(model.pos_embed, size // 14, 16)
            model.set_input_size(224)
            model.pos_embed.copy_(positions)
        expected = model.forward_features(normalised)[:, 0]
        torch.testing.assert_close(encoder.features(pixels), expected, atol=1e-5, rtol=1e-5)


@both
def test_missing_unexpected_and_misshapen_tensors_are_named(config: dict[str, Any], tmp_path: Path) -> None:
    state = published_state(config)
    state["classifier.weight"] = state.pop("layernorm.bias")
    with pytest.raises(CheckpointError, match=r"missing 1: norm\.bias; unexpected 1: classifier\.weight"):
        load_encoder(write(tmp_path / "a", config, state))
    state = published_state(config)
    del state["encoder.layer.1.attention.attention.key.weight"]
    with pytest.raises(CheckpointError, match=r"missing 1: blocks\.1\.attn\.qkv\.weight; unexpected 2"):
        load_encoder(write(tmp_path / "b", config, state))
    state = published_state(config)
    state["encoder.layer.1.attention.attention.key.weight"] = torch.zeros(12, 24)
    with pytest.raises(CheckpointError, match=r"attention\.key\.weight.* are not of one shape"):
        load_encoder(write(tmp_path / "c", config, state))
    state = published_state(config)
    state["layernorm.bias"] = torch.full((24,), float("inf"))
    with pytest.raises(CheckpointError, match=r"not finite: norm\.bias"):
        load_encoder(write(tmp_path / "d", config, state))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "clip"}, "model_type 'clip' is not one of vit, dinov2"),
        ({"hidden_act": "gelu_new"}, "hidden_act must be 'gelu', got 'gelu_new'"),
        ({"num_channels": 1}, "num_channels must be 3, got 1"),
        ({"hidden_size": 25}, "hidden_size=25 is no multiple of 3 heads"),
        ({"hidden_size": "24"}, "hidden_size must be a positive integer, got '24'"),
        ({"patch_size": 0}, "patch_size must be a positive integer, got 0"),
        ({"image_size": 64}, "position embeddings are for 4 x 4 patches, config.json says 8"),
        ({"preprocess": {"size_px": 36, "resize_px": 36}}, "size_px=36 is no multiple of patch_size=8"),
        ({"preprocess": {"size": 32}}, "preprocessing not understood"),
    ],
)
def test_what_is_not_understood_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_encoder(write(tmp_path / "hub", {**VIT, **change}, published_state(VIT)))


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "image_size"])
def test_a_size_that_is_not_said_is_named(key: str, tmp_path: Path) -> None:
    config = {k: v for k, v in VIT.items() if k != key}
    with pytest.raises(CheckpointError, match=f"config.json lacks '{key}'"):
        load_encoder(write(tmp_path / "hub", config, published_state(VIT)))


def test_dinov2_with_another_feed_forward_is_refused(tmp_path: Path) -> None:
    for change, message in (
        ({"use_swiglu_ffn": True}, "use_swiglu_ffn must be False"),
        ({"mlp_ratio": 2.5}, "mlp_ratio must be an integer, got 2.5"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_encoder(write(tmp_path / str(len(message)), {**DINOV2, **change}, published_state(DINOV2)))


def test_a_folder_of_neither_family_names_both_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds none of open_clip_config\.json, .*config\.json"):
        load_encoder(f"local-dir:{tmp_path}")


@pytest.mark.parametrize("name", ["hf-hub:owner/model", "dino-vitb16", "hf-hub:facebook/dino-vitb16@v1"])
def test_a_hub_model_loads_from_where_the_client_put_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    folder, asked = tmp_path / "hub", []
    config = {**VIT, "image_size": 224, "patch_size": 16}
    write(folder, config, {})
    torch.save(published_state(config), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()

    def cached(repository: str, filename: str, revision: str | None) -> str:
        asked.append(filename)
        if not (folder / filename).is_file():
            raise FileNotFoundError(filename)
        return str(folder / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", cached)
    encoder = load_encoder(name)
    assert (encoder.preprocess.size_px, encoder.preprocess.resize_px) == (224, 256)
    own = ["config.json", "model.safetensors", "pytorch_model.bin"]
    assert asked == (["open_clip_config.json", *own] if name == "hf-hub:owner/model" else own)
