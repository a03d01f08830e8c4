"""Adversarial fine-tuning, piece by piece: losses, inner attack, schedule and plan, against closed forms."""

import math
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from offline.errors import PlanError
from offline.finetune.inner import InnerAttack
from offline.finetune.objectives import Fare, Tecoa, combined
from offline.finetune.plan import FinetunePlan, plan_from_table
from offline.finetune.schedule import warmup_cosine
from offline.threat import ThreatModel

TABLE: dict[str, Any] = {
    "encoder": "bundled/clean",
    "method": "fare",
    "steps": 4,
    "warmup_steps": 1,
    "train": [{"kind": "folder", "path": "images"}],
}
EPS = 4 / 255


def test_fare_sums_over_dimensions_and_averages_over_the_batch() -> None:
    original, perturbed = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[4.0, 6.0], [0.0, 1.0]])
    fare = Fare()
    per_image = fare.per_image(perturbed, fare.target(original, torch.tensor([-1, -1])))
    assert per_image.tolist() == [25.0, 1.0]  # 3² + 4², not divided by two dimensions
    assert combined(None, per_image, 0.0).item() == 13.0


def test_tecoa_is_cross_entropy_of_a_hundred_times_the_cosine() -> None:
    tecoa = Tecoa(torch.eye(2))
    features = torch.tensor([[3.0, 4.0], [0.0, 0.02]])  # cosines .6 and .8; 0 and 1, whatever the length
    target = tecoa.target(features, torch.tensor([0, 1]))
    expected = [math.log1p(math.exp(20.0)), math.log1p(math.exp(-100.0))]
    assert tecoa.per_image(features, target).tolist() == pytest.approx(expected, rel=1e-5)


def test_logits_are_fp32_under_autocast() -> None:
    tecoa = Tecoa(torch.eye(2))
    features = torch.tensor([[0.6001, 0.79993]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = tecoa.logits(features)
    assert torch.equal(under, tecoa.logits(features))
    assert under.dtype == torch.float32


def test_tecoa_refuses_images_without_a_class() -> None:
    with pytest.raises(PlanError, match="class for every image"):
        Tecoa(torch.eye(2)).target(torch.ones(2, 2), torch.tensor([0, -1]))


def test_the_clean_loss_is_weighed_against_the_adversarial_one() -> None:
    assert combined(torch.tensor([2.0, 4.0]), torch.tensor([10.0, 30.0]), 0.25).item() == pytest.approx(15.75)


def test_the_schedule_is_called_before_the_update() -> None:
    """The vector of methods 3.3: base 1e-5, 1,400 of 20,000 updates of warm-up."""
    rates = {step: 1e-5 * warmup_cosine(step, 20_000, 1400) for step in (0, 1, 1399, 1400, 10_700, 20_000)}
    assert rates[0] == pytest.approx(1e-5 / 1400)  # the reference runs its first update at the full 1e-5
    assert rates[1] == pytest.approx(1.4286e-8, rel=1e-4)
    assert rates[1399] == rates[1400] == pytest.approx(1e-5)
    assert rates[10_700] == pytest.approx(5e-6)
    assert rates[20_000] == pytest.approx(0, abs=1e-20)


def linear(weight: Tensor) -> Any:
    """A one-layer linear encoder: (b, 3, h, w) -> (b, d)."""
    return lambda pixels: pixels.flatten(1) @ weight.T


def attack_linear(norm: str, weight: Tensor, eps: float, steps: int, step_size: float) -> Tensor:
    """FARE's inner attack on a linear encoder: the perturbation of each of four images, flat."""
    generator = torch.Generator().manual_seed(1)
    pixels = 0.3 + 0.4 * torch.rand(4, 3, 4, 4, generator=generator)
    attack = InnerAttack(ThreatModel(norm, eps), steps, step_size)  # type: ignore[arg-type]
    encoder, fare = linear(weight), Fare()
    start = attack.start_of(pixels, [5, 6, 7, 8])
    perturbed = attack(encoder, fare.per_image, pixels, encoder(pixels), start)
    return (perturbed - pixels).flatten(1)


def test_linf_attack_reaches_the_optimum_of_a_linear_encoder() -> None:
    weight = torch.randn(1, 48, generator=torch.Generator().manual_seed(0))
    delta = attack_linear("linf", weight, EPS, 10, 1 / 255)
    # max |w . delta| over the box is eps |w|_1, at one of two opposite corners.
    best = (EPS * weight.abs().sum()) ** 2
    torch.testing.assert_close((delta @ weight.T).square().squeeze(1), best.expand(4), rtol=1e-5, atol=0)
    corners = torch.sign(delta) * torch.sign(weight)
    assert bool((corners == corners[:, :1]).all())


def test_l2_attack_reaches_the_optimum_of_a_linear_encoder() -> None:
    weight = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    delta = attack_linear("l2", weight, 0.2, 300, 0.05)
    # max |W delta|² over the ball is (eps sigma_max)².
    best = (0.2 * torch.linalg.matrix_norm(weight, 2)) ** 2
    torch.testing.assert_close((delta @ weight.T).square().sum(1), best.expand(4), rtol=1e-4, atol=0)


def test_tecoa_attack_reaches_the_optimum_of_a_linear_encoder() -> None:
    """Two opposite directions of the plane: the loss grows as the cosine to the true class falls."""
    weight = torch.zeros(2, 48)
    weight[0] = 1.0
    weight[1] = 0.5
    tecoa = Tecoa(torch.eye(2))
    pixels = torch.full((2, 3, 4, 4), 0.5)
    attack = InnerAttack(ThreatModel("linf", EPS), 10, 1 / 255)

    def shifted(x: Tensor) -> Tensor:
        return cast(Tensor, linear(weight)(x)) - torch.tensor([24.0, 11.0])  # (0, 1) when clean

    target = tecoa.target(torch.ones(2, 2), torch.tensor([1, 1]))
    perturbed = attack(shifted, tecoa.per_image, pixels, target, attack.start_of(pixels, [1, 2]))
    # Feature (t, 1 + t / 2) with t = sum(delta) in [-48 eps, 48 eps]: the cosine to class 1 minus that to class 0 is
    # smallest where t is largest.
    t = torch.full((2,), 48 * EPS)
    worst = tecoa.per_image(torch.stack([t, 1 + t / 2], dim=1), target)
    torch.testing.assert_close(tecoa.per_image(shifted(perturbed), target), worst, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_momentum_buffer_follows_the_published_update(norm: str) -> None:
    """A naive twin of methods 3.2 on one image, step by step."""
    weight = torch.randn(5, 48, generator=torch.Generator().manual_seed(3))
    encoder, threat = linear(weight), ThreatModel(norm, 0.1)  # type: ignore[arg-type]
    pixels = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(4))
    attack = InnerAttack(threat, 6, 0.03)
    start, target = attack.start_of(pixels, [9]), encoder(pixels)
    x, v = (pixels + start).clone(), torch.zeros_like(pixels)
    for _ in range(6):
        gradient = (2 * (encoder(x) - target) @ weight).view_as(pixels)
        if norm == "linf":
            v = torch.sign(0.9 * v + torch.sign(gradient))
            x = (pixels + (x + 0.03 * v - pixels).clamp(-0.1, 0.1)).clamp(0, 1)
        else:
            v = 0.9 * v + gradient / gradient.norm()
            v = v / v.norm()
            delta = x + 0.03 * v - pixels
            x = (pixels + delta * min(1.0, 0.1 / float(delta.norm()))).clamp(0, 1)
    torch.testing.assert_close(attack(encoder, Fare().per_image, pixels, target, start), x, atol=1e-6, rtol=0)


def test_chunks_do_not_change_an_attack_and_starts_follow_the_image() -> None:
    weight = torch.randn(5, 48, generator=torch.Generator().manual_seed(3))
    encoder, threat = linear(weight), ThreatModel("linf", EPS)
    pixels = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(4))
    whole = InnerAttack(threat, 3, 1 / 255)
    starts = whole.start_of(pixels, [1, 2, 3, 4, 5])
    assert torch.equal(starts[3:4], whole.start_of(pixels[3:4], [4]))
    assert bool((starts.abs() <= EPS).all())
    assert starts.abs().max() > 0.9 * EPS
    expected = whole(encoder, Fare().per_image, pixels, encoder(pixels), starts)
    in_twos = replace(whole, chunk=2)(encoder, Fare().per_image, pixels, encoder(pixels), starts)
    torch.testing.assert_close(in_twos, expected, atol=1e-6, rtol=0)


def test_a_plan_reads_fractions_and_fills_in_the_published_recipe() -> None:
    plan = plan_from_table(TABLE | {"eps": "2/255", "lr": 1})
    assert plan.eps == pytest.approx(2 / 255)
    assert (plan.lr, plan.batch_size, plan.attack_steps, plan.clean_weight, plan.seed) == (1.0, 128, 10, 0.0, 0)
    assert plan.train[0].path == ("images",)
    assert plan.per_batch == [128]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sed": 1}, "sed"),
        ({"method": "trades"}, "method must be one of fare, tecoa, got 'trades'"),
        ({"norm": "l1"}, "l1"),
        ({"eps": "four"}, "four"),
        ({"eps": -0.1}, "-0.1"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 2.5}, "steps must be int, got 2.5"),
        ({"lr": float("nan")}, "lr must be at least 0.0, got nan"),
        ({"warmup_steps": 9}, "warmup_steps must not exceed steps 4, got 9"),
        ({"clean_weight": 1.5}, r"clean_weight must be in \[0, 1\], got 1.5"),
        ({"accumulation_steps": 3}, "not a multiple of accumulation_steps 3"),
        ({"template": "a photo"}, "template"),
        ({"train": []}, "at least one"),
        ({"train": [{"kind": "folder", "path": "a", "per_batch": 5}]}, "add up to batch_size 128"),
        ({"train": [{"kind": "folder", "path": "a"}, {"kind": "folder", "path": "b"}]}, "add up to batch_size 128"),
        ({"train": [{"kind": "folder", "path": "a", "file": "a"}]}, "file"),
        ({"train": [{"kind": "folder"}]}, "path must be one or several strings"),
        ({"train": [{"kind": "folder", "path": [3]}]}, r"path must be one or several strings, got \[3\]"),
        ({"train": ["images"]}, "must be a table with kind and path, got 'images'"),
        ({"train": 5}, "fine-tuning plan"),
        ({"train": [{"kind": "labelled-zip", "path": "a", "where": 3}]}, "where must be a table of strings, got 3"),
        ({"train": [{"kind": 3, "path": "a"}]}, "kind must be str, got 3"),
        ({"train": [{"kind": "folder", "path": "a", "per_batch": -1}]}, "per_batch must be at least 0, got -1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"betas": [0.9]}, "fine-tuning plan"),
        ({"flip": 1}, "flip must be bool, got 1"),
    ],
)
def test_what_a_plan_cannot_mean_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_from_table(TABLE | change)


def test_a_plan_without_a_key_names_it() -> None:
    with pytest.raises(PlanError, match="encoder"):
        plan_from_table({k: v for k, v in TABLE.items() if k != "encoder"})


OTHER_PLANS = ("audit_", "pretrain_", "tune_", "distill_")
CONFIGS = sorted(path for path in Path("offline/configs").glob("*.toml") if not path.name.startswith(OTHER_PLANS))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_ready_configs_are_plans_with_command_hardware_cost_and_figures(config: Path) -> None:
    text = config.read_text()
    plan = plan_from_table(tomllib.loads(text))
    assert isinstance(plan, FinetunePlan)
    assert plan.eps == EPS
    for word in (f"finetune offline/configs/{config.name}", "hardware:", "cost:", "expected"):
        assert word in text, word


@pytest.mark.parametrize("config", [c for c in CONFIGS if "finetune" not in c.name], ids=lambda path: path.stem)
def test_the_papers_runs_are_the_published_recipe(config: Path) -> None:
    plan = plan_from_table(tomllib.loads(config.read_text()))
    assert (plan.steps, plan.warmup_steps, plan.batch_size, plan.lr, plan.weight_decay) == (
        20_000,
        1400,
        128,
        1e-5,
        1e-4,
    )
    assert (plan.attack_steps, plan.attack_step_size, plan.norm) == (10, 1 / 255, "linf")
    assert (plan.precision, plan.ema_decay, plan.flip, plan.freeze_batch_norm) == ("fp32", 0.0, False, False)
