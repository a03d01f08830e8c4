"""Exports: what is trained in a copy is what the folder holds, for us and for open_clip."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

import perception.catalogue
from perception import load_encoder
from perception.encoders.clip import ClipEncoder, write_open_clip_folder
from perception.errors import CheckpointError
from perception.preprocess import PreprocessSpec

TEXT: dict[str, Any] = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VIT: dict[str, Any] = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": TEXT,
}
# Batch statistics, and integers among the weights.
TIMM: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"timm_model_name": "mobilenetv2_035", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32},
    "text_cfg": TEXT,
    "custom_text": True,
}
SIGNED = PreprocessSpec(32, 32, "squash", "bilinear", (0.5, 0.25, 0.5), (0.5, 0.5, 0.1))


def clip_folder(folder: Path, config: dict[str, Any], spec: PreprocessSpec = SIGNED, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    kinds = {False: open_clip.model.CLIP, True: open_clip.model.CustomTextCLIP}
    model = kinds[config.get("custom_text", False)](**{k: v for k, v in config.items() if k != "custom_text"})
    write_open_clip_folder(folder, config, spec, model.state_dict(), torch.float32)
    return folder


def trained_copy(encoder: Any) -> Any:
    """A student: a deep copy, some steps away."""
    student = copy.deepcopy(encoder)
    student.visual.requires_grad_(True)
    optimizer = torch.optim.SGD(student.visual.parameters(), lr=0.1)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    student(pixels).square().sum().backward()
    optimizer.step()
    return student


@pytest.mark.parametrize("config", [VIT, TIMM], ids=["native", "timm"])
def test_a_trained_copy_is_exported_as_it_is(config: dict[str, Any], tmp_path: Path) -> None:
    origin = load_encoder(f"local-dir:{clip_folder(tmp_path / 'origin', config)}")
    before = origin.features(torch.full((1, 3, 32, 32), 0.5))
    student = trained_copy(origin)
    assert student.fingerprint == origin.fingerprint
    assert torch.equal(origin.features(torch.full((1, 3, 32, 32), 0.5)), before)
    assert not any(p.requires_grad for p in origin.parameters())

    student.export(tmp_path / "out")
    back = load_encoder(f"local-dir:{tmp_path / 'out'}")
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(back.features(pixels), student.features(pixels))
        assert (back.encode(pixels) - origin.encode(pixels)).abs().max() > 1e-4
    assert back.preprocess == origin.preprocess
    assert back.fingerprint != origin.fingerprint
    prompts = ["a photo of a cat"]
    assert torch.equal(back.text.encode_text(prompts), origin.text.encode_text(prompts))
    assert not list((tmp_path / "out").glob("*.partial"))

    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (back.preprocess.mean, back.preprocess.std))
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")(prompts)
    with torch.no_grad():
        images = theirs.encode_image((pixels - mean) / std, normalize=True)
        torch.testing.assert_close(back.encode(pixels), images, atol=1e-5, rtol=0)
        texts = theirs.encode_text(tokens, normalize=True)
        torch.testing.assert_close(back.text.encode_text(prompts), texts, atol=1e-5, rtol=0)
    assert {k: theirs.visual.preprocess_cfg[k] for k in ("interpolation", "resize_mode")} == {
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }


def test_an_export_without_training_is_the_same_encoder(tmp_path: Path) -> None:
    origin = load_encoder(f"local-dir:{clip_folder(tmp_path / 'origin', VIT)}")
    origin.export(tmp_path / "again")
    origin.export(tmp_path / "again")
    assert load_encoder(f"local-dir:{tmp_path / 'again'}").fingerprint == origin.fingerprint


def test_an_export_is_there_to_be_read(tmp_path: Path) -> None:
    load_encoder(f"local-dir:{clip_folder(tmp_path / 'original', VIT)}").export(tmp_path / "again")
    assert (tmp_path / "again/open_clip_model.safetensors").stat().st_mode & 0o777 == 0o644


def test_half_precision_halves_the_floats_alone(tmp_path: Path) -> None:
    origin = load_encoder(f"local-dir:{clip_folder(tmp_path / 'origin', TIMM)}")
    origin.export(tmp_path / "half", dtype=torch.float16)
    kinds = {tensor.dtype for tensor in load_file(tmp_path / "half" / "open_clip_model.safetensors").values()}
    assert kinds == {torch.float16, torch.int64}
    pixels = torch.rand(2, 3, 32, 32)
    half = load_encoder(f"local-dir:{tmp_path / 'half'}")
    assert (half.encode(pixels) * origin.encode(pixels)).sum(1).min() > 0.999


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_what_could_not_be_loaded_is_not_written(tmp_path: Path, value: float) -> None:
    student = copy.deepcopy(load_encoder(f"local-dir:{clip_folder(tmp_path / 'origin', VIT)}"))
    with torch.no_grad():
        student.get_parameter("visual.proj")[0, 0] = value
    with pytest.raises(CheckpointError, match=r"float16 holds values that are not finite: visual\.proj"):
        student.export(tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "spec", [PreprocessSpec(32, 32), PreprocessSpec(24, 32), SIGNED, PreprocessSpec(224, 256), PreprocessSpec(256, 256)]
)
@pytest.mark.parametrize("trunk", [None, "convnext_base"])
def test_preprocessing_survives(spec: PreprocessSpec, trunk: str | None, tmp_path: Path) -> None:
    from perception.encoders.clip import read_folder

    config = {"embed_dim": 8, "vision_cfg": {"timm_model_name": trunk, "image_size": 256}, "text_cfg": TEXT}
    write_open_clip_folder(tmp_path, config, spec, {"visual.x": torch.zeros(1)}, torch.float32)
    assert read_folder(tmp_path).preprocess == spec
    table = json.loads((tmp_path / "open_clip_config.json").read_text())["preprocess_cfg"]
    follows = spec.size_px == (224 if trunk and spec.resize_px == 256 else spec.resize_px)
    assert ("crop_size" in table) is not follows


def test_a_visual_only_encoder_is_exported_visual_only(tmp_path: Path) -> None:
    origin = load_encoder(f"local-dir:{visual_only(clip_folder(tmp_path / 'origin', VIT))}")
    origin.export(tmp_path / "out")
    back = load_encoder(f"local-dir:{tmp_path / 'out'}")
    assert back.fingerprint == origin.fingerprint
    with pytest.raises(CheckpointError, match="visual-only"):
        _ = back.text


def visual_only(folder: Path) -> Path:
    weights = folder / "open_clip_model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if k.startswith("visual.")}, weights)
    return folder


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a whole bundled encoder, and one that shares its text tower."""
    root = tmp_path / "package"
    for name, seed in (("whole", 0), ("sharing", 1)):
        folder = clip_folder(root / "bundled" / name, VIT, seed=seed)
        (folder / "card.toml").write_text(f'name = "bundled/{name}"\nfamily = "clip"\n')
    visual_only(root / "bundled" / "sharing")
    with (root / "bundled" / "sharing" / "card.toml").open("a") as card:
        card.write('text_tower = "bundled/whole"\n')
    monkeypatch.setattr(perception.catalogue, "resources", SimpleNamespace(files=lambda _: root))
    return root / "bundled"


def test_a_text_tower_can_be_shared(shelf: Path, tmp_path: Path) -> None:
    whole, sharing = load_encoder("bundled/whole"), load_encoder("bundled/sharing")
    assert isinstance(sharing, ClipEncoder)
    assert sharing.fingerprint == load_encoder(f"local-dir:{shelf / 'sharing'}").fingerprint != whole.fingerprint
    prompts = ["a photo of a cat"]
    assert torch.equal(sharing.text.encode_text(prompts), whole.text.encode_text(prompts))
    sharing.export(tmp_path / "out")
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    own = load_file(shelf / "sharing" / "open_clip_model.safetensors")
    torch.testing.assert_close(theirs.visual.state_dict()["proj"], own["visual.proj"])


def test_a_text_tower_of_another_kind_is_refused(shelf: Path) -> None:
    path = shelf / "sharing" / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"]["heads"] = 4
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"cannot share .*whole's text tower: text_cfg"):
        load_encoder("bundled/sharing")


def test_two_text_towers_are_refused(shelf: Path) -> None:
    clip_folder(shelf / "sharing", VIT)
    with pytest.raises(CheckpointError, match="has a text tower of its own"):
        load_encoder("bundled/sharing")


def test_a_donor_without_text_tower_or_card_is_refused(shelf: Path) -> None:
    visual_only(shelf / "whole")
    with pytest.raises(CheckpointError, match="has no text tower that"):
        load_encoder("bundled/sharing")
    card = shelf / "sharing" / "card.toml"
    card.write_text(card.read_text().replace("bundled/whole", "bundled/none"))
    with pytest.raises(CheckpointError, match=r"bundled/none, which has no card"):
        load_encoder("bundled/sharing")


def test_the_text_tower_is_no_part_of_what_is_trained(tmp_path: Path) -> None:
    encoder = load_encoder(f"local-dir:{clip_folder(tmp_path / 'origin', VIT)}")
    names = set(encoder.state_dict())
    _ = encoder.text
    assert set(encoder.state_dict()) == names == {"mean", "std"} | {f"visual.{k}" for k in encoder.visual.state_dict()}
    student = copy.deepcopy(encoder)
    assert torch.equal(student.text.encode_text(["a cat"]), encoder.text.encode_text(["a cat"]))
