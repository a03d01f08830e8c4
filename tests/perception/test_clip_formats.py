"""Published formats: what is loaded must compute exactly what open_clip itself computes."""

import json
import logging
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from perception import load_encoder
from perception.errors import CheckpointError, HubUnreachable, UnknownEncoder

SMALL_VIT: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def write_hub_folder(folder: Path, model: torch.nn.Module, model_config: dict[str, Any], **preprocess: Any) -> Path:
    """Write a model as it is published on the hub."""
    folder.mkdir()
    config = {"model_cfg": model_config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[open_clip.model.CLIP, Path]:
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**SMALL_VIT).eval()
    return model, write_hub_folder(tmp_path_factory.mktemp("hub") / "small", model, SMALL_VIT)


@pytest.mark.parametrize("architecture", ["ViT-B-32", "convnext_base_w"])
def test_full_size_models_encode_as_open_clip_does(architecture: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = open_clip.create_model(architecture, pretrained=None).eval()
    folder = write_hub_folder(tmp_path / "hub", model, open_clip.get_model_config(architecture))
    torch.save(model.visual.state_dict(), tmp_path / "visual.pt")
    pixels = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        mean, std = (
            torch.tensor(v).view(1, 3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        )
        expected = model.encode_image((pixels - mean) / std, normalize=True)
        full = load_encoder(f"local-dir:{folder}")
        visual = load_encoder(f"visual:{architecture}:{tmp_path / 'visual.pt'}")
        torch.testing.assert_close(full.encode(pixels), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(visual.encode(pixels), expected, atol=1e-5, rtol=0)
        tokens = open_clip.get_tokenizer(architecture)(["a photo of a cat"])
        torch.testing.assert_close(
            full.text.encode_text(["a photo of a cat"]), model.encode_text(tokens, normalize=True), atol=1e-5, rtol=0
        )
    assert full.fingerprint == visual.fingerprint
    assert full.dim == expected.shape[1]
    card = {"ViT-B-32": "fare4-vit-b-32", "convnext_base_w": "fare4-convnext_base_w"}[architecture]
    by_card = load_encoder(f"visual:{card}:{tmp_path / 'visual.pt'}")
    assert by_card.fingerprint == visual.fingerprint
    assert by_card.preprocess == visual.preprocess
    with pytest.raises(CheckpointError, match="visual-only"):
        _ = visual.text


def test_convnext_resizes_to_256_and_crops_224() -> None:
    from perception.encoders.clip import architecture_config, preprocess_of

    spec = preprocess_of(architecture_config("convnext_base_w"), {}, "")
    assert (spec.resize_px, spec.size_px) == (256, 224)


def test_quick_gelu_is_taken_from_the_configuration(small: tuple[open_clip.model.CLIP, Path], tmp_path: Path) -> None:
    model, folder = small
    quick = write_hub_folder(tmp_path / "quick", model, {**SMALL_VIT, "quick_gelu": True})
    a, b = load_encoder(f"local-dir:{folder}"), load_encoder(f"local-dir:{quick}")
    pixels = torch.rand(1, 3, 32, 32)
    assert not torch.allclose(a.encode(pixels), b.encode(pixels), atol=1e-4)
    assert a.fingerprint != b.fingerprint


def test_nested_and_prefixed_visual_files_load(small: tuple[open_clip.model.CLIP, Path], tmp_path: Path) -> None:
    from perception.encoders.weights import read_state_dict

    model, _ = small
    state = model.visual.state_dict()
    for i, content in enumerate(
        [
            {"vision_encoder_state_dict": state, "epoch": 3},
            {"state_dict": {f"module.{k}": v for k, v in state.items()}},
        ]
    ):
        torch.save(content, tmp_path / f"{i}.pt")
        assert read_state_dict(tmp_path / f"{i}.pt").keys() == state.keys()


def test_gradients_reach_the_pixels(small: tuple[open_clip.model.CLIP, Path]) -> None:
    encoder = load_encoder(f"local-dir:{small[1]}")
    pixels = torch.rand(2, 3, 32, 32, requires_grad=True)
    encoder.encode(pixels)[:, 0].sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0
    assert all(p.grad is None for p in encoder.parameters())


def test_bf16_weights_are_another_encoder_close_to_the_first(small: tuple[open_clip.model.CLIP, Path]) -> None:
    fp32, bf16 = (load_encoder(f"local-dir:{small[1]}", precision=p) for p in ("fp32", "bf16"))
    pixels = torch.rand(4, 3, 32, 32)
    assert fp32.fingerprint != bf16.fingerprint
    assert bf16.encode(pixels).dtype == torch.float32
    assert (fp32.encode(pixels) * bf16.encode(pixels)).sum(1).min() > 0.99


def test_wrong_dimensions_are_named(small: tuple[open_clip.model.CLIP, Path], tmp_path: Path) -> None:
    model, _ = small
    folder = write_hub_folder(tmp_path / "wide", model, {**SMALL_VIT, "embed_dim": 48})
    with pytest.raises(CheckpointError, match=r"wrong shape 1: proj is \(64, 32\), expected \(64, 48\)"):
        load_encoder(f"local-dir:{folder}")


def test_missing_and_unexpected_keys_are_named(small: tuple[open_clip.model.CLIP, Path], tmp_path: Path) -> None:
    state = dict(small[0].visual.state_dict())
    state["stranger"] = state.pop("ln_post.bias")
    torch.save(state, tmp_path / "bad.pt")
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text((small[1] / "open_clip_config.json").read_text())
    save_file({f"visual.{k}": v.contiguous() for k, v in state.items()}, folder / "open_clip_model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing 1: ln_post\.bias; unexpected 1: stranger"):
        load_encoder(f"local-dir:{folder}")


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_config.json"])
def test_a_corrupt_file_is_one_clear_error(small: tuple[open_clip.model.CLIP, Path], tmp_path: Path, name: str) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    for source in small[1].iterdir():
        (folder / source.name).write_bytes(source.read_bytes())
    (folder / name).write_bytes((folder / name).read_bytes()[:1000][:-300])
    with pytest.raises(CheckpointError, match=name):
        load_encoder(f"local-dir:{folder}")


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    import os
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'pwned'}",)

    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(CheckpointError):
        load_encoder(f"visual:ViT-B-32:{tmp_path / 'evil.pt'}")
    assert not (tmp_path / "pwned").exists()


def test_weights_that_are_not_finite_are_refused(small: tuple[open_clip.model.CLIP, Path], tmp_path: Path) -> None:
    model, _ = small
    broken = open_clip.model.CLIP(**SMALL_VIT)
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.visual.proj[0, 0] = float("nan")
    folder = write_hub_folder(tmp_path / "nan", broken, SMALL_VIT)
    with pytest.raises(CheckpointError, match="not finite: proj"):
        load_encoder(f"local-dir:{folder}")


@pytest.mark.parametrize("name", ["no-such-model", "bundled/none", "local-dir:", "visual:ViT-B-32", "ftp:x", ""])
def test_unknown_names_list_the_choices(name: str) -> None:
    with pytest.raises(UnknownEncoder, match=r"bundled/clean"):
        load_encoder(name)


def test_an_unreachable_hub_names_the_choices(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import huggingface_hub

    client_log = logging.getLogger("huggingface_hub")
    level = client_log.level

    def unreachable(*args: Any, **kwargs: Any) -> str:
        client_log.warning("retrying")
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(
        HubUnreachable, match=r"owner/model.*ConnectionError: no route to host.*local-dir.*bundled/fare4"
    ):
        load_encoder("hf-hub:owner/model")
    assert "retrying" not in caplog.text
    assert client_log.level == level


def test_a_hub_model_loads_from_where_the_client_put_it(
    small: tuple[open_clip.model.CLIP, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked = []

    def cached(repository: str, filename: str, revision: str | None) -> str:
        asked.append((repository, filename, revision))
        return str(small[1] / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", cached)
    encoder = load_encoder("hf-hub:owner/model@v2")
    assert encoder.fingerprint == load_encoder(f"local-dir:{small[1]}").fingerprint
    assert asked[0] == ("owner/model", "open_clip_config.json", "v2")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_an_empty_file_is_a_checkpoint_error(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"empty{suffix}").touch()
    with pytest.raises(CheckpointError, match="cannot read weights"):
        load_encoder(f"visual:ViT-B-32:{tmp_path / f'empty{suffix}'}")
