"""DreamSim: releases of both layouts against a naive forward pass in DINO's names, with the adapter beside each qkv."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from perception import load_encoder
from perception.encoders.dreamsim import ARCHITECTURES, DreamSimEncoder, read_visual
from perception.encoders.dreamsim_branch import resample_positions
from perception.errors import CheckpointError
from perception.preprocess import PreprocessSpec
from tests.perception.dreamsim_checkpoints import (
    DEPTH,
    DIM,
    WIDTH,
    base_state,
    qkv_lora,
    write_base,
    write_old_release,
    write_release,
)

ENSEMBLE = ("dino_vitb16", "clip_vitb16", "open_clip_vitb16")
SINGLES = ("dino_vitb16", "clip_vitb32", "open_clip_vitb32", "dinov2_vitb14")
NORMALISATION = {
    "dino": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


def build(architecture: str, folder: Path, **options: Any) -> DreamSimEncoder:
    return read_visual(architecture, folder, **options).build(f"toy-{architecture}", "fp32", "cpu")


def pixels_of(encoder: DreamSimEncoder, count: int = 3) -> Tensor:
    side = encoder.preprocess.size_px
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(4))


def naive_feature(name: str, index: int, image: Tensor, scale: float, side: int = 2) -> Tensor:
    """One image's feature: what the released code does with its DINO-style ViT."""
    state, lora = base_state(name, side), qkv_lora(index, "")
    clip, eps = "clip" in name, 1e-5 if "clip" in name else 1e-6

    def linear(x: Tensor, layer: str) -> Tensor:
        return x @ state[f"{layer}.weight"].T + state[f"{layer}.bias"]

    def norm(x: Tensor, layer: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * state[f"{layer}.weight"] + state[f"{layer}.bias"]

    mean, std = (torch.tensor(v).view(3, 1, 1) for v in NORMALISATION["clip" if clip else "dino"])
    patches = F.conv2d(
        ((image - mean) / std)[None],
        state["patch_embed.proj.weight"],
        state["patch_embed.proj.bias"],
        stride=state["patch_embed.proj.weight"].shape[-1],
    )
    x = torch.cat([state["cls_token"][0], patches.flatten(2)[0].T]) + state["pos_embed"][0]
    x = norm(x, "pos_drop") if clip else x
    for i in range(DEPTH):
        block = f"blocks.{i}"
        h = norm(x, f"{block}.norm1")
        a, b = (lora[f"{block}.attn.qkv.lora_{half}.weight"] for half in "AB")
        query, key, value = (linear(h, f"{block}.attn.qkv") + scale * (h @ a.T) @ b.T).split(WIDTH, dim=1)
        heads = zip(*(t.split(64, dim=1) for t in (query, key, value)), strict=True)
        mixed = torch.cat([(q @ k.T / math.sqrt(64)).softmax(-1) @ v for q, k, v in heads], dim=1)
        h = linear(mixed, f"{block}.attn.proj")
        x = x + h * state.get(f"{block}.ls1.gamma", torch.ones(()))
        h = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        h = h * torch.sigmoid(1.702 * h) if name.startswith("clip") else F.gelu(h)
        x = x + linear(h, f"{block}.mlp.fc2") * state.get(f"{block}.ls2.gamma", torch.ones(()))
    return norm(x[0], "norm") @ state["proj"] if clip else x[0]  # DINO: before its final norm


@pytest.mark.parametrize("old", [False, True], ids=["one adapter", "one each"])
def test_the_ensemble_concatenates_its_adapted_branches(old: bool, tmp_path: Path) -> None:
    write = write_old_release if old else write_release
    encoder = build("ensemble", write(tmp_path / "release", ENSEMBLE, alpha=0.5 if old else 8))
    pixels = pixels_of(encoder)
    scale = 0.125 if old else 2.0
    expected = torch.stack(
        [torch.cat([naive_feature(name, i, image, scale) for i, name in enumerate(ENSEMBLE)]) for image in pixels]
    )
    with torch.no_grad():
        found = encoder.features(pixels)
    assert (found - expected).abs().max() < 1e-5
    assert encoder.dim == found.shape[1] == WIDTH + 2 * DIM
    assert encoder.preprocess == PreprocessSpec(32, 32, "squash", "bicubic", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    plain = torch.stack(
        [torch.cat([naive_feature(name, i, image, 0.0) for i, name in enumerate(ENSEMBLE)]) for image in pixels]
    )
    assert (plain - expected).abs().max() > 1e-2  # the adapters change something


@pytest.mark.parametrize("name", SINGLES)
@pytest.mark.parametrize("old", [False, True], ids=["whole", "branch"])
def test_single_branches(name: str, old: bool, tmp_path: Path) -> None:
    write = write_old_release if old else write_release
    encoder = build(name, write(tmp_path / "release", (name,), alpha=2))
    pixels = pixels_of(encoder)
    expected = torch.stack([naive_feature(name, 0, image, 0.5) for image in pixels])
    with torch.no_grad():
        assert (encoder.features(pixels) - expected).abs().max() < 1e-5
        assert encoder.features(pixels[:1]).shape == (1, encoder.dim)
    assert encoder.dim == (DIM if "clip" in name else WIDTH)
    with pytest.raises(CheckpointError, match="no text tower"):
        _ = encoder.text


def test_centring_is_chosen_by_the_architecture(tmp_path: Path) -> None:
    folder = write_release(tmp_path / "release", ENSEMBLE)
    plain, centred = build("ensemble", folder), build("ensemble-centred", folder)
    pixels = pixels_of(plain)
    features = plain.features(pixels)
    torch.testing.assert_close(centred.features(pixels), features - features.mean(1, keepdim=True))
    # The release divides by the norm first, or last: the direction is the same.
    unit = features / features.norm(dim=1, keepdim=True)
    cosine = F.cosine_similarity(unit - unit.mean(1, keepdim=True), centred.encode(pixels))
    torch.testing.assert_close(cosine, torch.ones(3))
    assert features.mean(1).abs().min() > 1e-3
    assert plain.fingerprint != centred.fingerprint
    assert {name + "-centred" for name in ("ensemble", *SINGLES)} < set(ARCHITECTURES)


@pytest.mark.parametrize("architecture", ["ensemble", "ensemble-centred", "dinov2_vitb14"])
def test_an_export_is_the_merged_encoder(architecture: str, tmp_path: Path) -> None:
    names = ENSEMBLE if architecture.startswith("ensemble") else (architecture,)
    encoder = build(architecture, write_release(tmp_path / "release", names))
    encoder.export(tmp_path / "out")
    back = load_encoder(f"local-dir:{tmp_path / 'out'}")
    assert isinstance(back, DreamSimEncoder)
    assert (back.fingerprint, back.preprocess, back.dim) == (encoder.fingerprint, encoder.preprocess, encoder.dim)
    pixels = pixels_of(encoder)
    with torch.no_grad():
        assert torch.equal(back.features(pixels), encoder.features(pixels))
    half = load_encoder(f"local-dir:{tmp_path / 'out'}", precision="bf16")
    with torch.no_grad():
        assert (half.encode(pixels) * encoder.encode(pixels)).sum(1).min() > 0.99


def test_a_trained_copy_is_exported_as_it_is_and_gradients_reach_the_pixels(tmp_path: Path) -> None:
    origin = build("dino_vitb16", write_release(tmp_path / "release", ("dino_vitb16",)))
    pixels = pixels_of(origin).requires_grad_(True)
    (gradient,) = torch.autograd.grad(origin.encode(pixels)[:, 0].sum(), pixels)
    assert gradient.abs().sum() > 0
    student = copy.deepcopy(origin)
    with torch.no_grad():
        for parameter in student.visual.parameters():
            parameter.mul_(1.1)
    student.export(tmp_path / "out")
    with torch.no_grad():
        back = load_encoder(f"local-dir:{tmp_path / 'out'}")
        assert torch.equal(back.features(pixels), student.features(pixels))
        assert not torch.equal(back.features(pixels), origin.features(pixels))


def test_dinov2_is_used_at_224_with_its_authors_resampling(tmp_path: Path) -> None:
    encoder = build("dinov2_vitb14", write_release(tmp_path / "release", ("dinov2_vitb14",), side=20))
    assert encoder.preprocess.size_px == 224
    table = base_state("dinov2_vitb14", 20)["pos_embed"]
    grid = table[:, 1:].reshape(1, 20, 20, WIDTH).permute(0, 3, 1, 2)
    used = encoder.visual.state_dict()["branches.0.tower.pos_embed"]
    assert torch.equal(used[:, 0], table[:, 0])
    patches = used[:, 1:].reshape(16, 16, WIDTH)
    # Bicubic by hand at one point: centre of new patch 7 lies at (7 + .5) * 20 / 16.1 - .5 of the old grid.
    at = 7.5 * 20 / 16.1 - 0.5
    low, t, a = math.floor(at), at - math.floor(at), -0.75
    far = [a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a for d in (t + 1, 2 - t)]
    near = [(a + 2) * d**3 - (a + 3) * d**2 + 1 for d in (t, 1 - t)]
    weights = torch.tensor([far[0], near[0], near[1], far[1]])
    around = grid[0, :, low - 1 : low + 3, low - 1 : low + 3]
    torch.testing.assert_close(patches[7, 7], torch.einsum("i,j,dij->d", weights, weights, around), atol=1e-5, rtol=0)
    assert resample_positions(table, 20) is table


def test_a_whole_dino_checkpoint_gives_the_teachers_backbone(tmp_path: Path) -> None:
    folder = write_release(tmp_path / "release", ("dino_vitb16",))
    plain = build("dino_vitb16", folder).fingerprint
    state = base_state("dino_vitb16")
    student = {f"module.backbone.{k}": v + 1 for k, v in state.items()}
    teacher = {**{f"backbone.{k}": v for k, v in state.items()}, "head.mlp.0.weight": torch.zeros(3, WIDTH)}
    torch.save({"student": student, "teacher": teacher, "epoch": 300}, folder / "dino_vitb16_pretrain.pth")
    assert build("dino_vitb16", folder).fingerprint == plain
    torch.save({"student": student}, folder / "dino_vitb16_pretrain.pth")
    with pytest.raises(CheckpointError, match=r"not a state dict.*put beside it as dino_vitbase16_pretrain\.pth"):
        build("dino_vitb16", folder)
    torch.save(state, folder / "dino_vitbase16_pretrain.pth")
    assert build("dino_vitb16", folder).fingerprint == plain


def test_adapters_and_files_that_lack_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no DreamSim architecture 'dino_vits8'; there are ensemble, dino_vitb16"):
        read_visual("dino_vits8", tmp_path)
    with pytest.raises(CheckpointError, match="expected an unpacked DreamSim release"):
        read_visual("ensemble", tmp_path / "nowhere")
    for name in ENSEMBLE[:2]:
        write_base(tmp_path / "base", name, base_state(name))
    with pytest.raises(CheckpointError, match=r"weights not found: .*open_clip_vitb16_pretrain\.pth\.tar"):
        read_visual("ensemble", tmp_path / "base")
    write_base(tmp_path / "base", ENSEMBLE[2], base_state(ENSEMBLE[2]))
    with pytest.raises(CheckpointError, match="neither the adapter ensemble_lora nor dino_vitb16_lora, clip_vitb16_l"):
        read_visual("ensemble", tmp_path / "base")
    folder = write_release(tmp_path / "two", ("dino_vitb16", "clip_vitb16"))
    write_base(folder, ENSEMBLE[2], base_state(ENSEMBLE[2]))
    with pytest.raises(CheckpointError, match=r"no weights for 2 of the targeted modules: branches\.2"):
        read_visual("ensemble", folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pos_embed": torch.zeros(1, 4, WIDTH)}, r"pos_embed must be \(1, 1 \+ side\^2, d\), got \(1, 4, 128\)"),
        ({"pos_embed": torch.zeros(5, WIDTH)}, r"is not a clip_vitb32 tower in DINO's names"),
        ({"pos_embed": torch.zeros(1, 5, 60)}, "width 60 is no multiple of the heads' 64"),
        ({"patch_embed.proj.weight": torch.zeros(WIDTH, 3, 16, 16)}, r"patches are \(16, 16\) px, expected 32"),
        ({"proj": None}, "tower in DINO's names: 'proj'"),
        ({"proj": torch.zeros(WIDTH)}, r"proj must be \(width, dim\), got \(128,\)"),
        ({"blocks.1.mlp.fc2.weight": None}, r"missing 1: branches\.0\.tower\.blocks\.1\.mlp\.fc2\.weight"),
        ({"blocks.999999999.norm1.bias": torch.zeros(1)}, "blocks are not numbered from 0 on"),
        ({"extra": torch.zeros(1)}, r"unexpected 1: branches\.0\.tower\.extra"),
        ({"norm.bias": torch.full((WIDTH,), float("nan"))}, r"not finite: branches\.0\.tower\.norm\.bias"),
    ],
)
def test_base_weights_of_another_tower_are_refused(
    change: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    folder = write_release(tmp_path / "release", ("clip_vitb32",))
    state = {k: v for k, v in {**base_state("clip_vitb32"), **change}.items() if v is not None}
    write_base(folder, "clip_vitb32", state)
    with pytest.raises(CheckpointError, match=message):
        build("clip_vitb32", folder)


def test_preprocessing_must_leave_normalisation_to_the_branches(tmp_path: Path) -> None:
    folder = write_release(tmp_path / "release", ("clip_vitb32",))
    with pytest.raises(CheckpointError, match="mean must be 0 and std 1"):
        build("clip_vitb32", folder, preprocess=PreprocessSpec(64, 64))
    unit: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    with pytest.raises(CheckpointError, match="size_px=48 is no multiple of clip_vitb32's 32"):
        build("clip_vitb32", folder, preprocess=PreprocessSpec(48, 48, **unit))
    larger = build("clip_vitb32", folder, preprocess=PreprocessSpec(96, 96, **unit))
    assert larger.features(pixels_of(larger)).shape == (3, DIM)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"centred": "no"}, "expected branches, centred"),
        ({"more": 1}, "expected branches, centred"),
        ({"branches": []}, "there are no branches"),
        ({"branches": [{"width": 64}]}, "not understood"),
        ({"branches": [3]}, "not understood"),
        ({"preprocess": {"size": 3}}, "not understood"),
        ({"preprocess": {"size_px": 16, "resize_px": 16, "mean": [0, 0, 0], "std": [1, 1, 1]}}, "the branches take"),
    ],
)
def test_an_exported_configuration_that_is_not_understood_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    build("dino_vitb16", write_release(tmp_path / "release", ("dino_vitb16",))).export(tmp_path / "out")
    path = tmp_path / "out" / "dreamsim_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **change}))
    with pytest.raises(CheckpointError, match=message):
        load_encoder(f"local-dir:{tmp_path / 'out'}")


@pytest.mark.parametrize("field", ["width", "heads", "patch_size", "layer_norm_eps", "std"])
def test_an_exported_shape_that_is_not_understood_is_refused(field: str, tmp_path: Path) -> None:
    build("dino_vitb16", write_release(tmp_path / "release", ("dino_vitb16",))).export(tmp_path / "out")
    path = tmp_path / "out" / "dreamsim_config.json"
    content = json.loads(path.read_text())
    wrong = {"width": 63, "heads": 3, "patch_size": 15, "layer_norm_eps": 0, "std": [0.0, 1.0, 1.0]}
    content["branches"][0][field] = wrong[field]
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"not understood|wrong shape"):
        load_encoder(f"local-dir:{tmp_path / 'out'}")
