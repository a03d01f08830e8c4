"""Distillation into a LipSim network: losses and views against closed forms, and whole runs on tiny networks."""

import json
import math
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import offline
from offline.data.batches import Batch
from offline.errors import PlanError, RunError
from offline.finetune.distill import Distillation, distill, require_same_features
from offline.finetune.distill_plan import DistillPlan, plan_from_table
from offline.finetune.distill_views import ColourJitter, View, resized
from offline.runs import read_events
from perception import load_encoder
from perception.testing import synthetic_image
from tests.offline.test_finetune_runs import write_clip
from tests.offline.tune_toys import LIPSIM

STUDENT = {"image_size": 32, "channels": 4, "depth": 1, "inner_channels": 2, "pools": [4], "dense_layers": 2,
           "dense_width": 32, "dim": 16, "bias_dim": True}  # fmt: skip
PLAN: dict[str, Any] = {
    "student": STUDENT, "steps": 3, "warmup_steps": 1, "batch_size": 4, "accumulation_steps": 1, "seed": 3,
    "log_every": 1, "checkpoint_every": 1, "eval_images": 3, "geometry": "squash",
    "train": [{"kind": "folder", "path": "train"}], "held_out": [{"kind": "folder", "path": "val"}],
}  # fmt: skip
CONFIGS = sorted((Path(offline.__file__).parent / "configs").glob("distill_*.toml"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher of 16 dimensions, and two folders of images."""
    root = tmp_path_factory.mktemp("world")
    write_clip(root / "vit", "vit")
    for split, count in (("train", 40), ("val", 8)):
        (root / split).mkdir()
        for i in range(count):
            synthetic_image(1000 * len(split) + i, (48, 40)).save(root / split / f"{i}.png")
    return root


@pytest.fixture
def plan(world: Path) -> Callable[..., DistillPlan]:
    def make(**changes: Any) -> DistillPlan:
        return plan_from_table({**PLAN, "teacher": f"local-dir:{world / 'vit'}", **changes})

    return make


def run(plan: DistillPlan, data: Path, folder: Path, **options: Any) -> dict[str, Tensor]:
    """Run to the end and return the exported weights, or nothing where the run stopped early."""
    list(distill(plan, data, folder, cpu=True, **options))
    weights = folder / "export/lipsim.safetensors"
    return load_file(weights) if weights.exists() else {}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_the_published_loss_is_the_root_of_the_mean_square(plan: Callable[..., DistillPlan], world: Path) -> None:
    answer, target = torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.0, 0.0]])
    assert Distillation(plan(held_out=[]), world).loss(answer, target).item() == pytest.approx(2.5)  # sqrt(25 / 4)
    units = torch.eye(2) + 0.0
    turned = torch.tensor([[3.0, 4.0], [0.0, 9.0]])  # cosines .6 and 1
    by_cosine = Distillation(plan(held_out=[], objective="cosine"), world)
    assert by_cosine.loss(turned, units).item() == pytest.approx(0.2)


def test_the_target_is_the_teachers_unit_embedding_centred_and_scaled_on_request(
    plan: Callable[..., DistillPlan], world: Path
) -> None:
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    teacher = load_encoder(f"local-dir:{world / 'vit'}")
    expected = teacher.encode(pixels)
    torch.testing.assert_close(Distillation(plan(held_out=[]), world).target(pixels), expected)
    scaled = Distillation(plan(held_out=[], target_scale=3.0, centre=True), world).target(pixels)
    centred = expected - expected.mean(1, keepdim=True)
    torch.testing.assert_close(scaled, 3 * centred / centred.norm(dim=1, keepdim=True))


def test_updates_are_adam_on_both_views(plan: Callable[..., DistillPlan], world: Path, tmp_path: Path) -> None:
    """A naive twin of the updates with torch's own pieces; parts of the batch have roots of their own."""
    chosen = plan(held_out=[], flip=False, accumulation_steps=2, jitter=[0, 0, 0, 0], grey_probability=1.0)
    weights = run(chosen, world, tmp_path / "run")
    twin = Distillation(chosen, world)
    student, reader = twin.student, twin.reader()
    optimizer = torch.optim.Adam(student.visual.parameters(), lr=1.0, betas=(0.5, 0.9))
    for step, factor in enumerate((1.0, 1.0, 0.5)):
        optimizer.param_groups[0]["lr"] = 0.01 * factor
        pixels, losses = reader.read(step).pixels.float() / 255, []
        grey = (pixels * torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True).expand_as(pixels)
        target = twin.teacher.encode(pixels)
        for view in (pixels, grey):
            for rows in (slice(0, 2), slice(2, 4)):
                difference = student.features(view[rows])[:, :16] - target[rows]
                losses.append(difference.square().mean().sqrt())
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    for name, tensor in student.visual.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-5, rtol=1e-4)


def test_a_student_learns_its_teacher_and_stays_1_lipschitz(
    plan: Callable[..., DistillPlan], world: Path, tmp_path: Path
) -> None:
    longer = plan(steps=60, warmup_steps=5, batch_size=16, eval_every=1, views=1, centre=True)
    run(longer, world, tmp_path / "run")
    held_out = read_events(tmp_path / "run", "evaluation")
    assert held_out[-1]["clean_cosine"] > held_out[0]["clean_cosine"] + 0.2
    assert held_out[-1]["clean_loss"] < 0.9 * min(e["clean_loss"] for e in held_out[:2])
    encoder = load_encoder(f"local-dir:{tmp_path / 'run/export'}")
    assert (encoder.dim, encoder.lipschitz, encoder.preprocess) == (17, 1.0, longer.preprocess)
    generator = torch.Generator().manual_seed(1)
    one, other = torch.rand(2, 64, 3, 32, 32, generator=generator)
    other = one + 0.05 * (other - one)
    for of in (encoder.features, encoder.encode):
        ratios = (of(one) - of(other)).norm(dim=1) / (one - other).flatten(1).norm(dim=1)
        assert float(ratios.max()) <= 1 + 1e-5
    assert (tmp_path / "run/curve.svg").read_text().lstrip().startswith("<?xml")
    provenance = json.loads((tmp_path / "run/export/training.json").read_text())
    assert provenance["fingerprint"] == encoder.fingerprint
    assert provenance["teacher_fingerprint"] == load_encoder(longer.teacher).fingerprint


def test_longer_targets_make_longer_embeddings(plan: Callable[..., DistillPlan], world: Path, tmp_path: Path) -> None:
    norms = []
    for scale in (1.0, 8.0):
        scaled = plan(steps=25, warmup_steps=3, views=1, target_scale=scale)
        run(scaled, world, tmp_path / str(scale))
        norms.append(read_events(tmp_path / str(scale), "evaluation")[-1]["norm"])
    assert norms[1] > 1.5 * norms[0]


@pytest.mark.parametrize("objective", ["rmse", "cosine"])
def test_a_run_in_parts_is_the_run_in_one_to_the_last_bit(
    objective: str, plan: Callable[..., DistillPlan], world: Path, tmp_path: Path
) -> None:
    short = plan(objective=objective, steps=4)
    whole = run(short, world, tmp_path / "whole", workers=1)
    for stop in (1, 3):
        assert run(short, world, tmp_path / "parts", stop_after=stop) == {}
        torch.manual_seed(99)  # another process would not have the same global state
    assert_same(run(short, world, tmp_path / "parts"), whole)
    assert [e["step"] for e in read_events(tmp_path / "parts", "resumed")] == [1, 3]


def test_another_plan_or_teacher_does_not_resume(plan: Callable[..., DistillPlan], world: Path, tmp_path: Path) -> None:
    run(plan(), world, tmp_path / "run", stop_after=1)
    with pytest.raises(RunError, match="another plan"):
        run(plan(seed=4), world, tmp_path / "run")
    checkpoint = tmp_path / "run/checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:50])
    with pytest.raises(RunError, match="damaged checkpoint"):
        run(plan(), world, tmp_path / "run")


def test_dims_that_differ_are_refused(plan: Callable[..., DistillPlan], world: Path) -> None:
    with pytest.raises(PlanError, match=r"student\.dim must be the 16 of local-dir:.*vit, got 15"):
        Distillation(plan(student={**STUDENT, "dim": 15}), world)


def test_a_loss_that_is_not_finite_names_its_update(plan: Callable[..., DistillPlan], world: Path) -> None:
    training = Distillation(plan(held_out=[]), world)
    before = {name: tensor.clone() for name, tensor in training.student.visual.state_dict().items()}
    batch = Batch(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4), ())
    bias = next(p for name, p in training.student.visual.named_parameters() if name == "linear.1.bias")
    with torch.no_grad():
        bias.fill_(math.nan)
    with pytest.raises(RunError, match="update 12: the loss is nan"):
        training.step(11, batch)
    after = training.student.visual.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name != "linear.1.bias")


def test_an_export_that_is_not_what_was_trained_is_refused(plan: Callable[..., DistillPlan], world: Path) -> None:
    one, other = (Distillation(plan(held_out=[], seed=seed), world).result() for seed in (1, 2))
    require_same_features(one, one, 0.0)
    with pytest.raises(RunError, match="the export differs from what was trained"):
        require_same_features(one, other, 1e-2)


def test_unreadable_images_are_replaced_and_counted(plan: Callable[..., DistillPlan], tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for i in range(3):
        synthetic_image(i, (40, 40)).save(tmp_path / f"train/{i}.png")
    (tmp_path / "train/bad.png").write_bytes(b"\x89PNG nothing")
    assert run(plan(held_out=[]), tmp_path, tmp_path / "run")
    assert {Path(e["id"]).name for e in read_events(tmp_path / "run", "unreadable")} == {"bad.png"}


def test_a_view_is_the_centre_without_a_resize_or_a_resize() -> None:
    image = Image.fromarray(np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3))
    pixels = np.asarray(image).transpose(2, 0, 1)
    assert np.array_equal(View(4, "crop").apply(image), pixels[:, 1:5, 2:6])
    around = View(10, "crop").apply(image)
    assert np.array_equal(around[:, 2:8, 1:9], pixels)
    assert around.sum() == pixels.sum()  # black around it
    squashed, shortest = (View(6, geometry).apply(image) for geometry in ("squash", "shortest"))
    assert np.array_equal(shortest, pixels[:, :, 1:7])
    assert squashed.shape == (3, 6, 6)
    flat = torch.full((1, 3, 8, 8), 0.25)
    torch.testing.assert_close(resized(flat, 4), torch.full((1, 3, 4, 4), 0.25))


def test_jitter_is_a_function_of_the_seed_and_keeps_to_its_strengths() -> None:
    pixels = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    jitter = ColourJitter((0.4, 0.4, 0.2, 0.1), 1.0, 0.0)
    once = jitter(pixels, range(6))
    assert torch.equal(once, jitter(pixels, range(6)))
    assert torch.equal(once[3:4], jitter(pixels[3:4], [3]))  # whatever else is in the batch
    assert not torch.equal(once, jitter(pixels, range(6, 12)))
    assert bool(((once >= 0) & (once <= 1)).all())
    assert torch.equal(ColourJitter((0.4, 0.4, 0.2, 0.1), 0.0, 0.0)(pixels, range(6)), pixels)
    grey = ColourJitter((0.0, 0.0, 0.0, 0.0), 0.0, 1.0)(pixels, range(6))
    torch.testing.assert_close(grey[:, 0], grey[:, 2])
    # Brightness alone: one factor in [.6, 1.4] for the whole image.
    dark = 0.5 * pixels
    factors = ColourJitter((0.4, 0.0, 0.0, 0.0), 1.0, 0.0)(dark, range(6)) / dark
    spread = factors.flatten(1)
    assert float((spread.amax(1) - spread.amin(1)).max()) < 1e-3
    assert 0.6 <= float(spread.min()) < 1 < float(spread.max()) <= 1.4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sed": 1}, "sed: Unexpected keyword argument"),
        ({"steps": 0}, "steps: .*got 0"),
        ({"warmup_steps": 9}, "warmup_steps must not exceed steps 3, got 9"),
        ({"lr": math.nan}, "lr: .*finite"),
        ({"target_scale": 0}, "target_scale: .*greater than 0"),
        ({"objective": "l1"}, "objective: .*'rmse' or 'cosine', got 'l1'"),
        ({"views": 3}, "views: .*got 3"),
        ({"geometry": "stretch"}, "geometry"),
        ({"betas": [0.5, 1.0]}, "betas.1: .*less than 1"),
        ({"jitter": [0.4, 0.4, 0.2, 0.6]}, r"hue must be in \[0, 0.5\], got 0.6"),
        ({"grey_probability": 1.5}, "grey_probability"),
        ({"accumulation_steps": 3}, "batch_size 4 is not a multiple of accumulation_steps 3"),
        ({"train": []}, "at least one"),
        ({"train": [{"kind": "folder"}]}, "train.0: a source's path must be"),
        ({"train": [{"kind": "folder", "path": "a", "per_batch": 3}]}, "add up to batch_size 4"),
        ({"student": {**STUDENT, "dept": 3}}, "student: .*dept"),
        ({"student": {**STUDENT, "depth": "3"}}, "student: depth must be a positive integer"),
        ({"student": {**STUDENT, "pools": [3]}}, "student: image_size=32 is no multiple of 3"),
        ({"student": 3}, "student"),
        ({"teacher": 3}, "teacher: .*string, got 3"),
    ],
)
def test_what_a_plan_cannot_mean_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_from_table({"teacher": "bundled/fare4", **PLAN, **change})


def test_a_plan_that_says_little_is_the_published_recipe() -> None:
    plan = plan_from_table({"teacher": "t", "student": {}, "train": PLAN["train"], "steps": 100_000})
    assert (plan.student.dim, plan.student.bias_dim, plan.objective, plan.target_scale) == (1792, False, "rmse", 1.0)
    assert (plan.lr, plan.betas, plan.weight_decay, plan.warmup_steps) == (0.01, (0.5, 0.9), 0.0, 2000)
    assert (plan.batch_size, plan.accumulation_steps, plan.views, plan.flip) == (512, 16, 2, True)
    assert (plan.jitter, plan.jitter_probability, plan.grey_probability) == ((0.4, 0.4, 0.2, 0.1), 0.8, 0.2)
    assert (plan.geometry, plan.preprocess.resize_mode, plan.preprocess.std) == ("crop", "squash", (1.0, 1.0, 1.0))
    assert LIPSIM.bias_dim


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_ready_configs_are_plans_with_command_cost_and_figures(config: Path) -> None:
    text = config.read_text("utf8")
    assert isinstance(plan_from_table(tomllib.loads(text)), DistillPlan)
    for word in (f"distill offline/configs/{config.name}", "cost:", "expected"):
        assert word in text, word


def test_there_are_ready_configs() -> None:
    assert {config.stem for config in CONFIGS} >= {"distill_bundled_lipsim", "distill_lipsim"}
