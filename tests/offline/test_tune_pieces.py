"""Tuning on NIGHTS, piece by piece: hinge, triangle, plan, order and targets, against closed forms."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offline
from offline.errors import DataError, PlanError
from offline.finetune.objectives import TwoAfcHinge
from offline.finetune.schedule import triangular
from offline.finetune.tune_models import checked_targets
from offline.finetune.tune_plan import LoraPlan, plan_from_table
from offline.finetune.two_afc_batches import TripletOrder
from perception import list_encoders

CONFIGS = sorted((Path(offline.__file__).parent / "configs").glob("tune_*.toml"))


def hinge(left: float, right: float, label: int, margin: float = 0.05) -> float:
    distances = torch.tensor([left]), torch.tensor([right])
    return TwoAfcHinge(margin).of_distances(*distances, torch.tensor([label == 1])).item()


@pytest.mark.parametrize(
    ("left", "right", "label", "expected"), [(0.30, 0.20, 1, 0.0), (0.30, 0.20, 0, 0.15), (0.30, 0.28, 1, 0.03)]
)
def test_the_vectors_of_methods_4(left: float, right: float, label: int, expected: float) -> None:
    assert hinge(left, right, label) == pytest.approx(expected, abs=1e-7)


def unit(degrees: float) -> Tensor:
    angle = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angle.cos(), angle.sin()])


def test_distances_are_one_minus_the_cosine_whatever_the_length() -> None:
    reference = torch.stack([3 * unit(0), 0.1 * unit(0)])
    left, right = torch.stack([unit(90), unit(60)]), torch.stack([5 * unit(60), unit(90)])
    prefers_right = torch.tensor([True, True])
    # Distances 1 and .5: won by .5 in the first triplet, lost by .5 in the second.
    assert TwoAfcHinge(0.6)(reference, left, right, prefers_right).item() == pytest.approx((0.1 + 1.1) / 2, abs=1e-6)
    assert TwoAfcHinge(0.6, "sum")(reference, left, right, prefers_right).item() == pytest.approx(1.2, abs=1e-6)
    assert TwoAfcHinge(0.05)(reference[:1], left[:1], right[:1], prefers_right[:1]).item() == 0


def test_the_hinge_refuses_what_is_no_preference() -> None:
    distances = torch.tensor([0.1, 0.2])
    with pytest.raises(DataError, match="int64"):
        TwoAfcHinge().of_distances(distances, distances, torch.tensor([0, 1]))
    with pytest.raises(DataError, match=r"\(1,\)"):
        TwoAfcHinge().of_distances(distances, distances, torch.tensor([True]))
    for margin in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(PlanError, match="margin must be finite and above 0"):
            TwoAfcHinge(margin)
    with pytest.raises(PlanError, match="'mean' or 'sum', got 'max'"):
        TwoAfcHinge(0.05, "max")  # type: ignore[arg-type]


def test_the_triangle_has_the_published_corners() -> None:
    steps = {0: 0.0, 100: 0.5, 200: 1.0, 300: 0.525, 400: 0.05, 450: 0.025, 500: 0.0}
    assert {step: triangular(step, 500) for step in steps} == pytest.approx(steps)


MLP: dict[str, Any] = {"encoder": "bundled/fare4", "method": "mlp"}
LORA = MLP | {"method": "lora"}


def test_a_plan_that_says_little_is_the_published_recipe() -> None:
    mlp, lora = plan_from_table(MLP), plan_from_table(LORA)
    lipsim = plan_from_table(MLP | {"method": "lipsim-hinge"})
    assert mlp.mlp is not None
    assert (mlp.epochs, mlp.batch_size, mlp.mlp.hidden, mlp.lora) == (20, 512, 512, None)
    assert (lora.epochs, lora.batch_size, lora.lora) == (8, 32, LoraPlan(16, 0.5, 0.3, ()))
    for plan in (mlp, lora):
        assert (plan.lr, plan.betas, plan.weight_decay, plan.margin) == (3e-4, (0.5, 0.999), 0.0, 0.05)
        assert (plan.seed, plan.reduction) == (1234, "mean")
    assert (lipsim.epochs, lipsim.batch_size, lipsim.lr, lipsim.margin, lipsim.reduction) == (1, 32, 0.01, 0.5, "sum")
    assert plan_from_table(MLP | {"epochs": 3, "mlp": {"hidden": 64}}).as_dict()["mlp"] == {"hidden": 64}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"method": "mlp"}, "encoder: Field required"),
        ({"encoder": "bundled/fare4"}, "method: Field required"),
        (MLP | {"sed": 1}, "sed: Unexpected keyword argument, got 1"),
        (MLP | {"method": "prompt"}, "method: .*'mlp', 'lora' or 'lipsim-hinge', got 'prompt'"),
        (MLP | {"method": 3}, "method"),
        (MLP | {"epochs": 0}, "epochs: .*greater than or equal to 1, got 0"),
        (MLP | {"batch_size": 2.5}, "batch_size: .*integer, got 2.5"),
        (MLP | {"lr": 0}, "lr: .*greater than 0, got 0"),
        (MLP | {"lr": float("nan")}, "lr: .*finite"),
        (MLP | {"margin": -0.05}, "margin: .*greater than 0, got -0.05"),
        (MLP | {"betas": [0.5]}, "betas"),
        (MLP | {"betas": [0.5, 1.0]}, "betas.1: .*less than 1, got 1.0"),
        (MLP | {"seed": -1}, "seed"),
        (MLP | {"nights": 5}, "nights: .*string, got 5"),
        (MLP | {"mlp": {"width": 3}}, "mlp.width: Unexpected keyword argument"),
        (MLP | {"mlp": {"hidden": 0}}, "mlp.hidden: .*got 0"),
        (MLP | {"lora": {}}, r"method 'mlp' has no use for \[lora\]"),
        (LORA | {"mlp": {}}, r"method 'lora' has no use for \[mlp\]"),
        (LORA | {"lora": {"rank": 0}}, "lora.rank"),
        (LORA | {"lora": {"dropout": 1.0}}, "lora.dropout"),
        (LORA | {"lora": {"targets": ["out_proj"]}}, "plain Linears such as 'qkv', got 'out_proj': PEFT is wrong"),
        (LORA | {"lora": {"targets": ["all-linear"]}}, "got 'all-linear': PEFT is wrong"),
        (LORA | {"lora": {"targets": ["qkv", "attn.out_proj"]}}, r"got 'attn\.out_proj'"),
        (LORA | {"lora": {"targets": "qkv"}}, "lora.targets"),
        (LORA | {"export_dtype": "bf16"}, "export_dtype"),
    ],
)
def test_what_a_plan_cannot_mean_is_refused_by_name(table: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_from_table(table)


def test_an_epoch_shows_every_triplet_once_and_each_epoch_in_another_order() -> None:
    order = TripletOrder(10, 4, 3)
    assert order.steps_per_epoch == 3
    epochs = [[order.rows(3 * epoch + step) for step in range(3)] for epoch in range(2)]
    assert [[len(rows) for rows in epoch] for epoch in epochs] == [[4, 4, 2]] * 2
    flat = [[row for rows in epoch for row in rows] for epoch in epochs]
    assert all(sorted(rows) == list(range(10)) for rows in flat)
    assert flat[0] != flat[1]
    assert order.rows(4) == TripletOrder(10, 4, 3).rows(4) != TripletOrder(10, 4, 4).rows(4)
    assert TripletOrder(8, 4, 0).steps_per_epoch == 2


class Block(nn.Module):
    """One plain Linear and one attention that PEFT is wrong on."""

    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.qkv, self.conv = nn.Linear(4, 12), nn.Conv2d(3, 3, 1)
        if attention:
            self.attn = nn.MultiheadAttention(4, 1)


def test_targets_are_plain_linears_and_attention_modules_are_refused() -> None:
    tower = nn.Sequential(Block(False), Block(False))
    assert checked_targets(tower, LoraPlan(targets=("qkv",))) == ["qkv"]
    assert checked_targets(tower, LoraPlan(targets=("1.qkv",))) == ["1.qkv"]
    with pytest.raises(PlanError, match="'conv' names Conv2d"):
        checked_targets(tower, LoraPlan(targets=("qkv", "conv")))
    with pytest.raises(PlanError, match="'kv' names nothing"):
        checked_targets(tower, LoraPlan(targets=("kv",)))
    with pytest.raises(PlanError, match=r"not trained on nn\.MultiheadAttention"):
        checked_targets(nn.Sequential(Block(True)), LoraPlan(targets=("qkv",)))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_ready_configs_are_the_published_recipe_with_command_cost_and_figures(config: Path) -> None:
    text = config.read_text("utf8")
    plan = plan_from_table(tomllib.loads(text))
    assert plan.encoder in list_encoders() or plan.method == "lipsim-hinge"
    for word in (f"tune offline/configs/{config.name}", "needs:", "cost:", "expected"):
        assert word in text, word
    recipe = plan_from_table({"encoder": plan.encoder, "method": plan.method})
    assert (plan.batch_size, plan.lr, plan.betas) == (recipe.batch_size, recipe.lr, recipe.betas)


def test_there_are_configs_for_every_method() -> None:
    methods = {plan_from_table(tomllib.loads(config.read_text("utf8"))).method for config in CONFIGS}
    assert methods == {"mlp", "lora", "lipsim-hinge"}
