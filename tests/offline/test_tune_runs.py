"""Whole tunings of tiny encoders on a NIGHTS in which a known rule decides: learning, resuming, kills and bad data."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from offline.errors import DataError, PlanError, RunError
from offline.finetune.tune import Progress, Tuning, tune
from offline.finetune.tune_models import TunedLora
from offline.finetune.tune_plan import TunePlan, plan_from_table
from offline.runs import read_events
from perception import load_encoder
from tests.offline.test_finetune_runs import write_clip
from tests.offline.tune_toys import write_lipsim, write_nights
from tests.perception.adapter_checkpoints import write_tower
from tests.perception.dino_checkpoints import VIT, published_state, write

PLANS: dict[str, dict[str, Any]] = {
    "mlp": {"method": "mlp", "mlp": {"hidden": 32}, "epochs": 12, "batch_size": 16, "lr": 0.01},
    "lora": {"method": "lora", "lora": {"rank": 4, "alpha": 16.0, "dropout": 0.1}, "epochs": 8, "batch_size": 16,
             "lr": 0.03},
    "lipsim-hinge": {"method": "lipsim-hinge", "epochs": 6, "batch_size": 16, "margin": 0.2},
}  # fmt: skip
ENCODERS = {"mlp": "vit", "lora": "vit", "lipsim-hinge": "lipsim"}
RULES = {"mlp": "pattern", "lora": "pattern", "lipsim-hinge": "colour"}  # what the encoder minds too little
SMALL = {"log_every": 1, "checkpoint_every": 2, "chunk": 8}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny encoders, and a NIGHTS."""
    root = tmp_path_factory.mktemp("world")
    for family in ("vit", "mobilenet"):
        write_clip(root / family, family)
    write_tower(root / "convnext", "convnext")
    write(root / "dino", VIT, published_state(VIT))
    write_lipsim(root / "lipsim")
    for rule in ("colour", "pattern"):
        write_nights(root / rule, {"train": 96, "val": 48, "test": 2}, rule)
    return root


@pytest.fixture
def plan(world: Path) -> Callable[..., TunePlan]:
    def make(method: str, family: str = "", **changes: Any) -> TunePlan:
        encoder = f"local-dir:{world / (family or ENCODERS[method])}"
        return plan_from_table({"encoder": encoder, "nights": RULES[method], **PLANS[method], **SMALL, **changes})

    return make


def run(plan: TunePlan, data: Path, folder: Path, **options: Any) -> dict[str, Tensor]:
    """Run to the end and return all exported tensors, or nothing where the run stopped early."""
    list(tune(plan, data, folder, cpu=True, **options))
    weights = sorted(folder.glob("export/*.safetensors")) + sorted(folder.glob("adapter/*.safetensors"))
    return {f"{path.name}/{k}": v for path in weights for k, v in load_file(path).items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("method", list(PLANS))
def test_tuning_learns_the_rule_and_keeps_the_best_epoch(
    method: str, plan: Callable[..., TunePlan], world: Path, tmp_path: Path
) -> None:
    chosen = plan(method)
    before = Tuning(chosen, world)
    list(before.encode(tmp_path / "before"))
    _, untuned = before.validate()
    run(chosen, world, tmp_path / "run")
    epochs = read_events(tmp_path / "run", "evaluation")
    (tuned,) = read_events(tmp_path / "run", "tuned")
    assert [e["epoch"] for e in epochs] == list(range(chosen.epochs))
    assert tuned["loss"] == min(e["clean_loss"] for e in epochs) == epochs[tuned["epoch"]]["clean_loss"]
    assert tuned["accuracy"] >= max(0.8, untuned + 0.15), (untuned, epochs)
    names = {f"local-dir:{tmp_path / 'run/export'}", tuned["encoder"]}
    for name in names:
        encoder = load_encoder(name)
        assert encoder.fingerprint != before.encoder.fingerprint
        assert encoder.preprocess.resize_mode == "squash"
        assert measured(encoder, before) == pytest.approx(tuned["accuracy"], abs=1 / 48)
    provenance = json.loads((tmp_path / "run/export/training.json").read_text())
    assert provenance["best"]["epoch"] == tuned["epoch"]
    assert provenance["original_fingerprint"] == before.encoder.fingerprint
    assert (tmp_path / "run/curve.svg").read_text().lstrip().startswith("<?xml")


def measured(encoder: Any, nights: Tuning) -> float:
    """Accuracy on the validation split by a loop of its own."""
    images, right = nights.images["val"], 0
    for row, triplet in enumerate(images.triplets):
        pixels = images.read([row]).images[0].float() / 255
        reference, left, second = encoder.encode(pixels)
        right += int((reference @ second > reference @ left).item() == triplet.prefers_right)
    return right / len(images)


@pytest.mark.parametrize("method", list(PLANS))
def test_a_run_in_parts_is_the_run_in_one_to_the_last_bit(
    method: str, plan: Callable[..., TunePlan], world: Path, tmp_path: Path
) -> None:
    short = plan(method, epochs=2, train_limit=40, val_limit=10)  # 3 updates an epoch, of 16, 16 and 8 triplets
    whole = run(short, world, tmp_path / "whole")
    for stop in (1, 3, 5):
        assert run(short, world, tmp_path / "parts", stop_after=stop) == {}
        torch.manual_seed(99)  # another process would not have the same global state
    assert_same(run(short, world, tmp_path / "parts"), whole)
    assert [e["step"] for e in read_events(tmp_path / "parts", "resumed")] == [1, 3, 5]
    # A run that has ended is published again, and stays what it is.
    assert_same(run(short, world, tmp_path / "parts"), whole)


def test_worker_processes_read_the_same_triplets(plan: Callable[..., TunePlan], world: Path, tmp_path: Path) -> None:
    short = plan("lipsim-hinge", epochs=1, train_limit=24, val_limit=4)
    assert_same(run(short, world, tmp_path / "two", workers=2), run(short, world, tmp_path / "none"))


@pytest.mark.parametrize("family", ["dino", "convnext"])
def test_lora_changes_the_linears_that_published_adapters_change(
    family: str, plan: Callable[..., TunePlan], world: Path, tmp_path: Path
) -> None:
    short = plan("lora", family, epochs=1, train_limit=16, val_limit=4)
    run(short, world, tmp_path / "run")
    adapted = {name.split(".lora_")[0] for name in load_file(tmp_path / "run/adapter/adapter_model.safetensors")}
    ends = {"dino": ("qkv",), "convnext": ("fc1", "fc2")}[family]
    assert adapted
    assert {name.rpartition(".")[2] for name in adapted} == set(ends)
    original, tuned = load_encoder(short.encoder), load_encoder(f"local-dir:{tmp_path / 'run/export'}")
    theirs = original.visual.state_dict()
    changed = {name for name, tensor in tuned.visual.state_dict().items() if not torch.equal(tensor, theirs[name])}
    assert len(changed) == len(adapted)
    assert all(name.removesuffix(".weight").endswith(ends) for name in changed)


def test_only_the_adapters_dropout_is_on_in_an_update(plan: Callable[..., TunePlan], world: Path) -> None:
    tuned = TunedLora(plan("lora", "convnext"), load_encoder(f"local-dir:{world / 'convnext'}"))
    tuned.train(True)
    learning = {name for name, module in tuned.network.named_modules() if module.training}
    assert learning
    assert all("lora_dropout" in name for name in learning)
    tuned.train(False)
    assert not any(module.training for module in tuned.network.modules())


def test_what_cannot_be_tuned_is_refused(plan: Callable[..., TunePlan], world: Path) -> None:
    with pytest.raises(PlanError, match="plain Linears named qkv"):
        Tuning(plan("lora", "mobilenet"), world)
    with pytest.raises(PlanError, match="Lipschitz constant"):
        Tuning(plan("lipsim-hinge", "vit"), world)
    with pytest.raises(PlanError, match="'qvk' names nothing"):
        Tuning(plan("lora", lora={"targets": ["qvk"]}), world)


def test_features_are_computed_once_and_are_of_their_encoder(
    plan: Callable[..., TunePlan], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = plan("mlp", epochs=1, train_limit=20, val_limit=4)
    run(short, world, tmp_path / "run", stop_after=1)
    with monkeypatch.context() as patch:
        patch.setattr("offline.finetune.two_afc_features.FeatureCache._encode", None)  # would be called for nothing
        run(short, world, tmp_path / "run")
    files = sorted(path.name for path in (tmp_path / "run").glob("features-*"))
    assert files == ["features-train-0000.safetensors", "features-val-0000.safetensors"]
    other = plan("mlp", "dino", epochs=1, train_limit=20, val_limit=4)
    (tmp_path / "other").mkdir()
    os.replace(tmp_path / "run" / files[0], tmp_path / "other" / files[0])
    with pytest.raises(RunError, match="of another encoder, other preprocessing or other triplets"):
        run(other, world, tmp_path / "other")
    (tmp_path / "run" / files[0]).write_bytes(b"nothing")
    with pytest.raises(RunError, match="damaged features"):
        run(short, world, tmp_path / "run")


def test_another_plan_encoder_or_table_does_not_resume(
    plan: Callable[..., TunePlan], world: Path, tmp_path: Path
) -> None:
    short = plan("mlp", epochs=2, train_limit=16, val_limit=4)
    run(short, world, tmp_path / "run", stop_after=1)
    with pytest.raises(RunError, match="another plan"):
        run(plan("mlp", epochs=3, train_limit=16, val_limit=4), world, tmp_path / "run")
    write_nights(tmp_path / "moved/pattern", {"train": 20, "val": 4}, seed=7)
    with pytest.raises(RunError, match="another plan"):
        run(short, tmp_path / "moved", tmp_path / "run")
    checkpoint = tmp_path / "run/checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    with pytest.raises(RunError, match="damaged checkpoint"):
        run(short, world, tmp_path / "run")


def rewrite(folder: Path, old: str, new: str) -> None:
    table = folder / "nights/data.csv"
    content = table.read_text()
    assert old in content
    table.write_text(content.replace(old, new))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: os.replace(folder / "nights", folder / "n"), r"data\.csv is not there; expected .*NIGHTS"),
        (lambda folder: rewrite(folder, ",val", ",test"), "no triplet of the split 'val' with at least 6 votes"),
        (lambda folder: rewrite(folder, ",train", ",test"), "no triplet of the split 'train'"),
        (lambda folder: rewrite(folder, "0,1,8,", "0,2,8,"), "is no triplet"),
        (lambda folder: (folder / "nights/ref/000/003.png").unlink(), "1 of 12 files are missing"),
    ],
)
def test_what_is_no_nights_is_named(
    damage: Callable[[Path], object], message: str, plan: Callable[..., TunePlan], tmp_path: Path
) -> None:
    write_nights(tmp_path / "nights", {"train": 4, "val": 4})
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        run(plan("mlp", nights="nights"), tmp_path, tmp_path / "run")


def test_an_image_that_cannot_be_read_ends_the_run_with_its_name(plan: Callable[..., TunePlan], tmp_path: Path) -> None:
    write_nights(tmp_path / "nights", {"train": 4, "val": 4})
    (tmp_path / "nights/ref/000/002.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(RunError, match=r"ref/000/002\.png"):
        run(plan("mlp", nights="nights"), tmp_path, tmp_path / "run")
    with pytest.raises(RunError, match=r"ref/000/002\.png"):
        run(plan("lipsim-hinge", nights="nights"), tmp_path, tmp_path / "lipsim", workers=1)


def test_a_loss_that_is_not_finite_names_its_update(plan: Callable[..., TunePlan], world: Path, tmp_path: Path) -> None:
    wild = plan("mlp", lr=1e38, epochs=3, train_limit=32, val_limit=4)
    with pytest.raises(RunError, match="update 2: the loss is nan"):
        run(wild, world, tmp_path / "run")
    training = Tuning(plan("lipsim-hinge"), world)
    with torch.no_grad():
        next(iter(training.parameters.values())).fill_(float("nan"))
    batch = training.images["train"].read([0, 1])
    with pytest.raises(RunError, match="update 8: the loss is nan"):
        training.step(7, batch)


PROGRAM = "from offline.cli import main; main()"


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights_from_the_command_line(world: Path, tmp_path: Path) -> None:
    config = tmp_path / "plan.toml"
    table = {"encoder": f"local-dir:{world / 'lipsim'}", "nights": "colour", "checkpoint_every": 1}
    table |= {"method": "lipsim-hinge", "epochs": 4, "batch_size": 8, "margin": 0.2}
    config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items()))
    arguments = [sys.executable, "-c", PROGRAM, "tune", str(config), "--data", str(world), "--cpu", "--threads", "1"]
    killed = [*arguments, "--run", str(tmp_path / "killed")]
    process = subprocess.Popen(killed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint, deadline = tmp_path / "killed/checkpoint.safetensors", time.monotonic() + 60
    while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert checkpoint.exists()
    assert not (tmp_path / "killed/export").exists()
    done = subprocess.run(killed, capture_output=True, text=True, check=False, timeout=110)
    assert done.returncode == 0, done.stderr
    assert "(0-based) has the least validation loss" in done.stdout
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = run(plan_from_table(table), world, tmp_path / "whole")
    finally:
        torch.set_num_threads(threads)
    resumed = load_file(tmp_path / "killed/export/lipsim.safetensors")
    assert_same({f"lipsim.safetensors/{name}": tensor for name, tensor in resumed.items()}, whole)


def test_progress_counts_encoded_triplets_and_updates(
    plan: Callable[..., TunePlan], world: Path, tmp_path: Path
) -> None:
    short = plan("mlp", epochs=1, train_limit=32, val_limit=4)
    seen: list[Progress] = list(tune(short, world, tmp_path / "run", cpu=True))
    assert [(now.part, now.done, now.total) for now in seen] == [
        ("encode train", 32, 32),
        ("encode val", 4, 4),
        ("tune", 1, 2),
        ("tune", 2, 2),
    ]
    assert "best validation accuracy" in seen[-1].text


def test_a_checkpoint_of_another_network_is_refused(plan: Callable[..., TunePlan], world: Path, tmp_path: Path) -> None:
    short = plan("lipsim-hinge", epochs=2, train_limit=16, val_limit=4)
    run(short, world, tmp_path / "run", stop_after=1)
    path = tmp_path / "run/checkpoint.safetensors"
    state = {name: tensor for name, tensor in load_file(path).items() if name != "weights.linear.1.bias"}
    save_file(state, path, metadata={"state": json.dumps({"step": 1, "best": None})})
    with pytest.raises(RunError, match="the checkpoint does not fit"):
        run(short, world, tmp_path / "run")
