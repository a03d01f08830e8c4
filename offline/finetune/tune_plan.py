"""The plan of a tuning on two-alternative forced choices: everything that decides its result, read from TOML.

What a method does not use is refused, not ignored; what a plan leaves out is the published recipe of its method.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from offline.finetune.plan_table import STRICT, Betas, Count, Momentum, NotNegative, Positive, Rate, plan_of

Method = Literal["mlp", "lora", "lipsim-hinge"]

RECIPES: dict[str, dict[str, Any]] = {
    "mlp": {"epochs": 20, "batch_size": 512, "mlp": {}},
    "lora": {"epochs": 8, "batch_size": 32, "lora": {}},
    "lipsim-hinge": {"epochs": 1, "batch_size": 32, "lr": 0.01, "betas": [0.5, 0.9], "margin": 0.5},
}
"""What a plan of each method means where it says nothing (methods 4; 8.1, stage 2, with the betas of stage 1)."""

# PEFT gets these wrong on nn.MultiheadAttention, which is converted before training; 'all-linear' takes what is there.
_REFUSED_TARGETS = ("all-linear", "out_proj", "in_proj_weight", "in_proj")


@dataclass(frozen=True, config=STRICT)
class MlpPlan:
    """The head `fc2(relu(fc1(e))) + e` on un-normalised embeddings.

    Attributes:
        hidden: width between the layers.
    """

    hidden: Count = 512


@dataclass(frozen=True, config=STRICT)
class LoraPlan:
    """Low-rank changes of plain Linears, scaled by alpha / rank.

    Attributes:
        rank, alpha, dropout: DreamSim's of June 2023, which the paper used.
        targets: names of the Linears, or ends of names; () for what published adapters have, `qkv` of ViTs and
            `mlp.fc1`, `mlp.fc2` of ConvNeXts.
    """

    rank: Count = 16
    alpha: Positive = 0.5
    dropout: Momentum = 0.3
    targets: tuple[Annotated[str, Field(min_length=1)], ...] = ()

    def __post_init__(self) -> None:
        """Refuse the parts of nn.MultiheadAttention."""
        for target in self.targets:
            if target.rpartition(".")[2] in _REFUSED_TARGETS:
                raise ValueError(
                    f"targets must name plain Linears such as 'qkv', got {target!r}: PEFT is wrong on the parts of "
                    "nn.MultiheadAttention"
                )


@dataclass(frozen=True, config=STRICT)
class TunePlan:
    """A tuning on NIGHTS (methods 4 and 8.1): the model of the least validation loss is kept.

    Attributes:
        encoder: any name that `load_encoder` takes.
        method: 'mlp' and 'lora' leave the encoder's weights as they are; 'lipsim-hinge' trains all of a LipSim's.
        epochs, batch_size: the last batch of an epoch is shorter where it has to be.
        nights: folder of the data set, relative to the data folder.
        lr, betas, weight_decay: of Adam; the rate is constant, for 'lipsim-hinge' a triangle's peak.
        margin: of the hinge on `1 - cosine`; a batch's mean, for 'lipsim-hinge' its sum.
        mlp, lora: of their method; TOML `[mlp]`, `[lora]`.
        train_limit, val_limit: the first so many triplets of a seeded shuffle; 0 for all.
        seed: of weights, dropout and orders.
        chunk: triplets that are encoded at a time where nothing is trained: speed alone.
        log_every, checkpoint_every: in updates.
        export_dtype: of the exported weights.
    """

    encoder: str
    method: Method
    epochs: Count
    batch_size: Count
    nights: str = "nights"
    lr: Positive = 3e-4
    betas: Betas = (0.5, 0.999)
    weight_decay: Rate = 0.0
    margin: Positive = 0.05
    mlp: MlpPlan | None = None
    lora: LoraPlan | None = None
    train_limit: NotNegative = 0
    val_limit: NotNegative = 0
    seed: NotNegative = 1234
    chunk: Count = 32
    log_every: Count = 10
    checkpoint_every: Count = 100
    export_dtype: Literal["fp32", "fp16"] = "fp32"

    def __post_init__(self) -> None:
        """Refuse what the method does not use."""
        for name, table in (("mlp", self.mlp), ("lora", self.lora)):
            if table is not None and self.method != name:
                raise ValueError(f"method {self.method!r} has no use for [{name}]")
            if table is None and self.method == name:
                raise ValueError(f"method {self.method!r} needs [{name}]")

    @property
    def reduction(self) -> Literal["mean", "sum"]:
        """Of a batch's losses."""
        return "sum" if self.method == "lipsim-hinge" else "mean"

    def as_dict(self) -> dict[str, Any]:
        """As JSON values, for the run directory."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values


def plan_from_table(table: Mapping[str, Any]) -> TunePlan:
    """Build a plan from a parsed TOML table; keys that it leaves out are those of the method's `RECIPES`.

    Raises:
        PlanError: a key is unknown or missing, or a value has the wrong type or is impossible; names all of them.
    """
    method = table.get("method")
    recipe = RECIPES.get(method, {}) if isinstance(method, str) else {}
    return plan_of(TunePlan, {**recipe, **table}, "tuning plan")
