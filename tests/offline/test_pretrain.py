"""Pretraining: the target space, the schedule, and a resumed run that is the run itself."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from offline.data.training import SOURCES, Source
from offline.errors import PlanError
from offline.finetune import pretrain as module
from offline.finetune.pretrain import PretrainPlan, TargetSpace, plan_from_table, pretrain
from offline.finetune.teacher import restore_batch_norm

PLAN = PretrainPlan(
    seed=0, embed_dim=8, image_size_px=32, teacher_size_px=32, text_width=16, text_layers=1, text_heads=2,
    context_length=16, image_steps=2, image_lr=1e-3, image_batch={"tiles": 3, "objects": 2, "scenes": 3},
    min_crop_area=0.5, text_steps=2, text_lr=1e-3, text_batch_named=6, text_batch_captions=3, caption_weight=0.5,
    name_weight=0.3, label_smoothing=0.1, weight_decay=0.01, warmup_steps=1, checkpoint_every=1, log_every=1,
)  # fmt: skip


def test_target_space_is_the_principal_components_of_standardised_features() -> None:
    features = torch.randn(500, 1280, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 1280) + 2
    space = TargetSpace.fit(features, 16)
    standard = (features - features.mean(0)) / (features.std(0) + 1e-3)
    _, _, components = torch.linalg.svd(standard, full_matrices=False)
    expected = nn.functional.normalize(standard @ components[:16].T, dim=-1)
    torch.testing.assert_close(space(features), expected, atol=1e-3, rtol=0)


def test_unknown_and_missing_keys_of_a_plan_are_named() -> None:
    with pytest.raises(PlanError, match="sed"):
        plan_from_table({"sed": 0})


@pytest.mark.parametrize("config", sorted(Path("offline/configs").glob("pretrain_*.toml")), ids=str)
def test_shipped_plans_are_plans(config: Path) -> None:
    import tomllib

    assert plan_from_table(tomllib.loads(config.read_text())).steps > 0


def test_restored_batch_norm_computes_the_same() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU6(), nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4))
    network.eval()
    pixels = torch.rand(8, 3, 12, 12)
    before = network(pixels)
    restore_batch_norm(network, pixels)
    torch.testing.assert_close(network(pixels), before, atol=1e-5, rtol=1e-5)
    network.train()  # batch statistics are now the running ones, so that training starts where the teacher ended
    torch.testing.assert_close(network(pixels), before, atol=1e-3, rtol=1e-3)


@pytest.fixture
def small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four images of each kind, and an untrained MobileNetV2 as the teacher."""
    import timm

    rng = np.random.default_rng(0)

    def load(data: Path) -> tuple[dict[str, Source], list[tuple[str, ...]]]:
        images = {name: rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8) for name in SOURCES}
        labels = torch.arange(6) % 2
        none: list[list[str]] = []
        return {
            "tiles": Source(images["tiles"], labels, none),
            "objects": Source(images["objects"], labels + 2, none),
            "scenes": Source(images["scenes"], torch.full((6,), -1), [["a dog", "it runs"]] * 6),
        }, [("tench",), ("koala",), ("lamp",), ("cup",)]

    def teacher(path: Path) -> nn.Module:
        nonlocal rng
        rng = np.random.default_rng(0)
        torch.manual_seed(1)
        network: nn.Module = timm.create_model("mobilenetv2_100", num_classes=0, pad_type="same")
        return network.eval()

    monkeypatch.setattr(module, "load_sources", load)
    monkeypatch.setattr(module, "load_teacher", teacher)


def run(plan: PretrainPlan, path: Path, **options: Any) -> list[float]:
    return [losses["loss"] for _, losses in pretrain(plan, Path(), path, **options)]


@pytest.mark.usefixtures("small_world")
def test_a_resumed_run_is_the_run_itself_to_the_last_bit(tmp_path: Path) -> None:
    whole = run(PLAN, tmp_path / "whole")
    parts = run(PLAN, tmp_path / "parts", stop_after=1)
    parts += run(PLAN, tmp_path / "parts", stop_after=3)
    parts += run(PLAN, tmp_path / "parts")
    assert parts == whole
    name = "export/open_clip_model.safetensors"
    assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.usefixtures("small_world")
def test_the_export_loads_like_any_published_model(tmp_path: Path) -> None:
    import open_clip

    from perception import load_encoder

    run(PLAN, tmp_path / "run")
    folder = f"local-dir:{tmp_path / 'run' / 'export'}"
    encoder, reference = load_encoder(folder), open_clip.create_model(folder).eval()
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode(pixels), reference.encode_image(pixels * 2 - 1, normalize=True))
    assert encoder.preprocess.size_px == 32
    rows = reference.token_embedding.weight.detach().abs().sum(1)
    tokens = open_clip.get_tokenizer(folder)
    assert rows[tokens(["tench"])[0][1]] > 0
    assert rows[tokens(["zebra"])[0][1]] == 0
    assert encoder.text.encode_text(["a photo of a tench"]).shape == (1, 8)


@pytest.mark.usefixtures("small_world")
def test_the_text_phase_leaves_the_image_tower_alone(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    plan = replace(PLAN, image_steps=1)
    list(pretrain(plan, Path(), tmp_path, stop_after=1))
    before = load_file(tmp_path / "checkpoint.safetensors")
    list(pretrain(plan, Path(), tmp_path))
    after = load_file(tmp_path / "checkpoint.safetensors")
    assert all(torch.equal(v, after[k]) for k, v in before.items() if k.startswith("model.visual."))
    assert not torch.equal(before["model.text_projection"], after["model.text_projection"])
