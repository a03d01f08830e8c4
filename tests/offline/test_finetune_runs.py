"""Whole fine-tuning runs on tiny encoders: families, resuming, ranks, kills and bad images."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from offline.data.batches import BatchPlan, BatchReader
from offline.data.labelled import joined
from offline.errors import PlanError, RunError
from offline.finetune.inner import InnerAttack
from offline.finetune.loop import Finetuning, finetune, open_source
from offline.finetune.objectives import Fare
from offline.finetune.plan import FinetunePlan, plan_from_table
from offline.runs import read_events
from offline.seeds import mixed_seed
from perception import load_encoder
from perception.errors import CheckpointError
from perception.testing import synthetic_image
from tests.offline.data_layouts import labelled_zip, mosaic_zip, samples, shard
from tests.perception.dino_checkpoints import DINOV2, VIT, published_state, write

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VISION: dict[str, dict[str, Any]] = {
    "vit": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "convnext": {"timm_model_name": "convnext_atto", "image_size": 32, "timm_pool": "", "timm_proj": "linear",
                 "timm_drop_path": 0.1},
    "mobilenet": {"timm_model_name": "mobilenetv2_035", "image_size": 32, "timm_pool": "avg", "timm_proj": "linear"},
}  # fmt: skip
PLAN: dict[str, Any] = {
    "method": "fare", "seed": 3, "steps": 2, "warmup_steps": 1, "batch_size": 4, "lr": 1e-3, "attack_steps": 2,
    "attack_step_size": "2/255", "log_every": 1, "checkpoint_every": 1, "eval_images": 3, "eval_attack_steps": 3,
    "train": [{"kind": "folder", "path": "train"}], "held_out": [{"kind": "folder", "path": "val"}],
}  # fmt: skip


def write_clip(folder: Path, family: str) -> str:
    """A tiny CLIP in open_clip's format; returns the name to load it by."""
    import open_clip

    torch.manual_seed(0)
    config = {"embed_dim": 16, "vision_cfg": VISION[family], "text_cfg": TEXT}
    state = open_clip.model.CLIP(**config).state_dict()
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny encoders and two folders of images in three classes."""
    root = tmp_path_factory.mktemp("world")
    for family in VISION:
        write_clip(root / family, family)
    for family, config in (("dino", VIT), ("dinov2", DINOV2)):
        write(root / family, config, published_state(config))
    for split, count in (("train", 5), ("val", 2)):
        for number, name in enumerate(("red fox", "tea pot", "sports car")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                synthetic_image(100 * number + i, (48, 40)).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def plan(world: Path) -> Callable[..., FinetunePlan]:
    def make(family: str = "vit", **changes: Any) -> FinetunePlan:
        return plan_from_table(PLAN | {"encoder": f"local-dir:{world / family}"} | changes)

    return make


def run(plan: FinetunePlan, data: Path, folder: Path, **options: Any) -> dict[str, Tensor]:
    """Run to the end and return the exported weights, or nothing where the run stopped early."""
    list(finetune(plan, data, folder, cpu=True, **options))
    weights = next(folder.glob("export/*.safetensors"), None)
    return {} if weights is None else load_file(weights)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Within 1e-5, but for the attention keys' bias: its gradient is zero, so Adam's steps follow rounding."""
    for name, tensor in theirs.items():
        mine, other = ours[name], tensor
        if name.endswith("attn.in_proj_bias"):
            query_and_value = torch.arange(len(other)).view(3, -1)[[0, 2]].flatten()
            mine, other = mine[query_and_value], other[query_and_value]
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["fare", "tecoa"])
@pytest.mark.parametrize("family", list(VISION))
def test_every_clip_family_is_trained_exported_and_pictured(
    family: str, method: str, plan: Callable[..., FinetunePlan], world: Path, tmp_path: Path
) -> None:
    weights = run(plan(family, method=method), world, tmp_path / "run")
    before = load_file(world / family / "open_clip_model.safetensors")
    changed = {name for name, tensor in weights.items() if not torch.equal(tensor, before[name])}
    assert {name for name in changed if not name.startswith("visual.")} == set()
    trained = {name for name in before if name.startswith("visual.") and before[name].is_floating_point()}
    assert {name for name in trained - changed if "running" not in name} == set()
    encoder = load_encoder(f"local-dir:{tmp_path / 'run/export'}")
    assert encoder.fingerprint != load_encoder(f"local-dir:{world / family}").fingerprint
    provenance = json.loads((tmp_path / "run/export/training.json").read_text())
    assert provenance["fingerprint"] == encoder.fingerprint
    (evaluation,) = read_events(tmp_path / "run", "evaluation")
    assert 0 <= evaluation["robust_accuracy"] <= evaluation["clean_accuracy"] <= 1
    assert evaluation["robust_loss"] >= evaluation["clean_loss"]
    assert (tmp_path / "run/curve.svg").read_text().lstrip().startswith("<?xml")


@pytest.mark.parametrize("family", ["dino", "dinov2"])
def test_dino_is_trained_on_its_cls_token_by_fare_alone(
    family: str, plan: Callable[..., FinetunePlan], world: Path, tmp_path: Path
) -> None:
    weights = run(plan(family), world, tmp_path / "run")
    before = load_file(world / family / "model.safetensors")
    assert {name for name, tensor in weights.items() if torch.equal(tensor, before[name])} == set()
    (evaluation,) = read_events(tmp_path / "run", "evaluation")
    assert evaluation["robust_loss"] > evaluation["clean_loss"]
    assert "clean_accuracy" not in evaluation
    with pytest.raises(CheckpointError, match="text tower"):
        run(plan(family, method="tecoa"), world, tmp_path / "tecoa")


@pytest.mark.parametrize("family", [*VISION, "dino"])
def test_one_step_and_one_resumed_are_two_to_the_last_bit(
    family: str, plan: Callable[..., FinetunePlan], world: Path, tmp_path: Path
) -> None:
    two = plan(family, flip=True, ema_decay=0.5, clean_weight=0.25)
    whole = run(two, world, tmp_path / "whole")
    assert run(two, world, tmp_path / "parts", stop_after=1) == {}
    torch.manual_seed(99)  # another process would not have the same global state
    assert_same(run(two, world, tmp_path / "parts"), whole)
    assert [e["step"] for e in read_events(tmp_path / "parts", "resumed")] == [1]


def test_updates_are_adamw_on_the_fare_loss(plan: Callable[..., FinetunePlan], world: Path, tmp_path: Path) -> None:
    """A naive twin of three updates with torch's own pieces."""
    three = plan(steps=3, warmup_steps=2, held_out=[])
    weights = run(three, world, tmp_path / "run")
    original, student = (load_encoder(three.encoder) for _ in range(2))
    student.visual.requires_grad_(True)
    parameters = list(student.visual.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-4)
    sources = joined([open_source(source, world) for source in three.train])
    reader = BatchReader(sources, BatchPlan([15], [4], three.seed), original.preprocess)
    for step, factor in enumerate((0.5, 1.0, 1.0)):
        pixels = reader.read(step).pixels.float() / 255
        attack = InnerAttack(three.threat, 2, 2 / 255)
        start = attack.start_of(pixels, [mixed_seed(3, 1, step, slot) for slot in range(4)])
        target = original.features(pixels)
        perturbed = attack(student.features, Fare().per_image, pixels, target, start)
        optimizer.param_groups[0]["lr"] = 1e-3 * factor
        optimizer.zero_grad()
        ((student.features(perturbed) - target) ** 2).sum(1).mean().backward()
        optimizer.step()
    for name, tensor in student.visual.state_dict().items():
        torch.testing.assert_close(weights[f"visual.{name}"], tensor, atol=1e-5, rtol=0)


def test_the_attack_makes_the_loss_larger(plan: Callable[..., FinetunePlan], world: Path, tmp_path: Path) -> None:
    losses = []
    for steps in (0, 4):
        one = plan(steps=1, attack_steps=steps, held_out=[])
        losses += [figures["loss"] for _, figures in finetune(one, world, tmp_path / str(steps), cpu=True)]
    assert losses[1] > 1.5 * losses[0] > 0


def test_accumulated_micro_batches_are_the_batch(
    plan: Callable[..., FinetunePlan], world: Path, tmp_path: Path
) -> None:
    whole = run(plan(), world, tmp_path / "whole")
    parts = run(plan(accumulation_steps=2), world, tmp_path / "parts")
    assert_close(parts, whole)


def test_a_moving_average_is_exported_instead_of_the_last_weights(
    plan: Callable[..., FinetunePlan], world: Path, tmp_path: Path
) -> None:
    before = load_file(world / "vit/open_clip_model.safetensors")
    last = run(plan(steps=1), world, tmp_path / "last")
    average = run(plan(steps=1, ema_decay=0.75), world, tmp_path / "average")
    name = "visual.proj"
    torch.testing.assert_close(average[name], 0.75 * before[name] + 0.25 * last[name])


def test_bf16_trains_fp32_weights(plan: Callable[..., FinetunePlan], world: Path, tmp_path: Path) -> None:
    weights = run(plan(precision="bf16", held_out=[]), world, tmp_path / "run")
    assert weights["visual.proj"].dtype == torch.float32
    assert all(bool(torch.isfinite(t).all()) for t in weights.values())


def test_frozen_batch_norm_keeps_its_statistics(plan: Callable[..., FinetunePlan], world: Path, tmp_path: Path) -> None:
    before = load_file(world / "mobilenet/open_clip_model.safetensors")
    name = "visual.trunk.bn1.running_mean"
    frozen = run(plan("mobilenet", freeze_batch_norm=True), world, tmp_path / "frozen")
    assert torch.equal(frozen[name], before[name])
    free = run(plan("mobilenet"), world, tmp_path / "free")
    assert not torch.equal(free[name], before[name])


def test_another_size_trains_the_same_encoder(plan: Callable[..., FinetunePlan], world: Path, tmp_path: Path) -> None:
    run(plan("mobilenet", image_size_px=64), world, tmp_path / "run")
    assert load_encoder(f"local-dir:{tmp_path / 'run/export'}").preprocess.size_px == 32


def test_unreadable_images_are_counted_and_skipped(
    plan: Callable[..., FinetunePlan], world: Path, tmp_path: Path
) -> None:
    (tmp_path / "train/a").mkdir(parents=True)
    for i in range(4):
        synthetic_image(i, (40, 40)).save(tmp_path / f"train/a/{i}.png")
    (tmp_path / "train/a/bad.png").write_bytes(b"\x89PNG nothing")
    weights = run(plan(steps=5, held_out=[]), tmp_path, tmp_path / "run")
    assert weights
    found = read_events(tmp_path / "run", "unreadable")
    config = write_toml(
        tmp_path / "plan.toml", PLAN | {"encoder": f"local-dir:{world / 'vit'}", "steps": 5, "held_out": []}
    )
    again = [sys.executable, "-c", PROGRAM, *command(config, tmp_path / "again", tmp_path)]
    done = subprocess.run(again, capture_output=True, text=True, check=True)
    assert "unreadable images, replaced and listed in metrics.jsonl: 1" in done.stdout
    assert {Path(e["id"]).name for e in found} == {"bad.png"}
    assert len(found) >= 3  # 20 slots walk five images four times


def test_a_source_without_one_readable_image_ends_the_run(plan: Callable[..., FinetunePlan], tmp_path: Path) -> None:
    (tmp_path / "train/a").mkdir(parents=True)
    for i in range(4):
        (tmp_path / f"train/a/{i}.png").write_bytes(b"no image")
    with pytest.raises(RunError, match="100 images of train in a row cannot be read"):
        run(plan(held_out=[]), tmp_path, tmp_path / "run")


def test_all_kinds_of_sources_make_one_batch(plan: Callable[..., FinetunePlan], world: Path, tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", samples(["red fox", "yak"]))
    rows = [{"file": f"{i}.png", "class": "yak", "split": split} for i, split in enumerate(("train", "bench"))]
    labelled_zip(tmp_path / "b.zip", rows)
    mosaic_zip(tmp_path / "c.zip", {"n01": ("red fox, Vulpes vulpes", 2), "n02": ("tea pot", 3)})
    train = [
        {"kind": "folder", "path": str(world / "train"), "per_batch": 1},
        {"kind": "tar", "path": "a.tar", "per_batch": 1},
        {"kind": "labelled-zip", "path": "b.zip", "where": {"split": "train"}, "per_batch": 1},
        {"kind": "mosaic", "path": ["c.zip"], "per_batch": 1},
    ]
    mixed = plan(method="tecoa", train=train, held_out=[])
    sources = joined([open_source(source, tmp_path) for source in mixed.train])
    assert sorted(names[0] for names in sources.class_names) == ["red fox", "sports car", "tea pot", "yak"]
    assert run(mixed, tmp_path, tmp_path / "one").keys() == run(mixed, tmp_path, tmp_path / "two", workers=2).keys()
    assert_same(*(load_file(tmp_path / name / "export/open_clip_model.safetensors") for name in ("one", "two")))
    assert read_events(tmp_path / "one", "unreadable") == []


def test_another_plan_or_encoder_does_not_resume(
    plan: Callable[..., FinetunePlan], world: Path, tmp_path: Path
) -> None:
    run(plan(), world, tmp_path / "run", stop_after=1)
    with pytest.raises(RunError, match="another plan"):
        run(plan(seed=4), world, tmp_path / "run")
    moved = write_clip(tmp_path / "vit", "vit")
    state = load_file(tmp_path / "vit/open_clip_model.safetensors")
    state["visual.proj"] = state["visual.proj"] + 1
    save_file(state, tmp_path / "vit/open_clip_model.safetensors")
    with pytest.raises(RunError, match="another plan"):
        run(replace(plan(), encoder=moved), world, tmp_path / "run")


def test_tecoa_needs_a_text_tower_and_classes(plan: Callable[..., FinetunePlan], world: Path, tmp_path: Path) -> None:
    import open_clip

    torch.manual_seed(0)
    tower = open_clip.create_model("RN50", pretrained=None).visual
    torch.save(tower.state_dict(), tmp_path / "visual.pt")
    with pytest.raises(CheckpointError, match="visual-only"):
        run(plan(method="tecoa", encoder=f"visual:RN50:{tmp_path / 'visual.pt'}"), world, tmp_path / "run")
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "flat/a.png")
    sources: list[dict[str, Any]] = [
        {"kind": "folder", "path": str(world / "train"), "per_batch": 3},
        {"kind": "folder", "path": "flat"},
    ]
    with pytest.raises(PlanError, match="needs a class for every image; 'flat' has none"):
        run(plan(method="tecoa", train=sources[1:], held_out=[]), tmp_path, tmp_path / "r")
    mixed = [sources[0], {**sources[1], "per_batch": 1}]
    with pytest.raises(PlanError, match="needs a class for every image; 'flat' has none"):
        run(plan(method="tecoa", train=mixed, held_out=[]), tmp_path, tmp_path / "r")


def test_the_radius_may_grow(plan: Callable[..., FinetunePlan], world: Path) -> None:
    from accelerate import Accelerator

    training = Finetuning(plan(eps_warmup_steps=4, held_out=[]), world, Accelerator(cpu=True))
    radii = [training.attack_at(step).threat.eps * 255 for step in range(6)]
    assert radii == pytest.approx([1, 2, 3, 4, 4, 4])
    assert training.attack_at(1).step_size * 255 == pytest.approx(1)
    assert Finetuning(plan(held_out=[]), world, Accelerator(cpu=True)).attack_at(0).threat.eps == 4 / 255


PROGRAM = "from offline.cli import main; main()"


def write_toml(path: Path, table: dict[str, Any]) -> Path:
    """A plan as TOML: JSON's scalars are TOML's."""
    lines = [f"{k} = {json.dumps(v)}" for k, v in table.items() if not isinstance(v, list)]
    for key in ("train", "held_out"):
        for source in table.get(key, []):
            lines += [f"[[{key}]]", *(f"{k} = {json.dumps(v)}" for k, v in source.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def command(config: Path, folder: Path, data: Path, *more: str) -> list[str]:
    return ["finetune", str(config), "--run", str(folder), "--data", str(data), "--cpu", "--threads", "1", *more]


@pytest.mark.parametrize(("clean_weight", "accumulation"), [(0.0, 1), (0.5, 2)])
def test_two_ranks_are_one_process_with_the_same_global_batch(
    clean_weight: float, accumulation: int, world: Path, tmp_path: Path
) -> None:
    table = PLAN | {"encoder": f"local-dir:{world / 'vit'}", "steps": 3, "clean_weight": clean_weight}
    config = write_toml(tmp_path / "plan.toml", table | {"accumulation_steps": accumulation})
    one = run(plan_from_table(table), world, tmp_path / "one")
    ranks = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "--no-python",
             "--", sys.executable, "-c", PROGRAM]  # fmt: skip
    done = subprocess.run(
        ranks + command(config, tmp_path / "two", world), capture_output=True, text=True, check=False, timeout=110
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = load_file(tmp_path / "two/export/open_clip_model.safetensors")
    assert_close(two, one)
    pixels = torch.rand(3, 3, 32, 32)
    mine, theirs = (
        load_encoder(f"local-dir:{tmp_path / folder / 'export'}").features(pixels) for folder in ("one", "two")
    )
    torch.testing.assert_close(theirs, mine, atol=1e-5, rtol=0)
    first, second = (
        e["loss"] for folder in ("one", "two") for e in read_events(tmp_path / folder, "step") if e["step"] == 3
    )
    assert first == pytest.approx(second, rel=1e-4)


def test_a_killed_run_goes_on_to_the_same_weights(world: Path, tmp_path: Path) -> None:
    table = PLAN | {"encoder": f"local-dir:{world / 'vit'}", "steps": 60}
    config = write_toml(tmp_path / "plan.toml", table)
    arguments = [sys.executable, "-c", PROGRAM, *command(config, tmp_path / "killed", world)]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "killed/checkpoint.safetensors"
    deadline = time.monotonic() + 60
    while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert checkpoint.exists()
    assert not (tmp_path / "killed/export").exists()
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=110)
    assert done.returncode == 0, done.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = run(plan_from_table(table), world, tmp_path / "whole")
    finally:
        torch.set_num_threads(threads)
    assert_same(load_file(tmp_path / "killed/export/open_clip_model.safetensors"), whole)


def test_several_cpu_ranks_cannot_share_batch_statistics(world: Path, tmp_path: Path) -> None:
    from accelerate import Accelerator

    class TwoRanks:
        """What the check looks at."""

        num_processes, process_index, is_main_process = 2, 0, True
        device = torch.device("cpu")

    accelerator = cast(Accelerator, TwoRanks())
    refused = plan_from_table(PLAN | {"encoder": f"local-dir:{world / 'mobilenet'}"})
    with pytest.raises(PlanError, match="SyncBatchNorm needs CUDA"):
        Finetuning(refused, world, accelerator)
    with pytest.raises(PlanError, match="batch_size 5 is not a multiple of 2 processes"):
        Finetuning(replace(refused, batch_size=5), world, accelerator)
