"""Run directories: resume, refusal of another plan, damage."""

from pathlib import Path

import pytest
import torch

from offline.errors import RunError
from offline.runs import RunDirectory, adam_tensors, read_events, restore_adam


def test_checkpoints_come_back(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", {"a": 1})
    assert run.load_checkpoint() is None
    run.save_checkpoint({"w": torch.arange(3.0)}, {"step": 2})
    run.save_checkpoint({"w": torch.arange(4.0)}, {"step": 3})
    loaded = RunDirectory(tmp_path / "run", {"a": 1}).load_checkpoint()
    assert loaded is not None
    assert torch.equal(loaded[0]["w"], torch.arange(4.0))
    assert loaded[1] == {"step": 3}


def test_another_plan_is_refused(tmp_path: Path) -> None:
    RunDirectory(tmp_path, {"a": 1})
    with pytest.raises(RunError, match="another plan"):
        RunDirectory(tmp_path, {"a": 2})


def test_a_damaged_checkpoint_is_one_clear_error(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, {})
    run.save_checkpoint({"w": torch.zeros(100)}, {"step": 1})
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(RunError, match="damaged checkpoint"):
        run.load_checkpoint()


def test_a_restored_optimizer_goes_on_as_if_nothing_had_happened() -> None:
    def model_and_optimizer() -> tuple[torch.nn.Linear, torch.optim.AdamW]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def update(model: torch.nn.Linear, optimizer: torch.optim.AdamW, step: int) -> None:
        optimizer.zero_grad()
        model(torch.full((1, 4), float(step))).square().sum().backward()
        optimizer.step()

    whole, whole_optimizer = model_and_optimizer()
    for step in range(4):
        update(whole, whole_optimizer, step)
    first, first_optimizer = model_and_optimizer()
    for step in range(2):
        update(first, first_optimizer, step)
    second, second_optimizer = model_and_optimizer()
    second.load_state_dict(first.state_dict())
    restore_adam(second_optimizer, adam_tensors(first_optimizer))
    for step in range(2, 4):
        update(second, second_optimizer, step)
    assert torch.equal(second.weight, whole.weight)


def test_an_event_that_a_kill_cut_off_gives_way(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, {})
    run.log(event="step", loss=float("nan"))
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"time_s": 1, "eve')
    run.log(event="step", loss=2.0)
    assert [event["loss"] for event in read_events(tmp_path, "step")][1:] == [2.0]
