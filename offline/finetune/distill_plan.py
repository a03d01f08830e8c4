"""The plan of a distillation into a LipSim network: everything that decides its result, read from TOML and checked."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from offline.finetune.plan_table import STRICT, Betas, Count, NotNegative, Positive, Rate, Share, Source, plan_of
from perception.encoders.lipsim import LipsimConfig
from perception.preprocess import PreprocessSpec

Geometry = Literal["squash", "shortest", "crop"]


def _student(table: Any) -> Any:
    """`[student]` as a validator."""
    if not isinstance(table, Mapping):
        return table
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    try:
        return LipsimConfig(**values)
    except TypeError as error:
        raise ValueError(str(error).partition("__init__() ")[2] or str(error)) from error


Student = Annotated[LipsimConfig, BeforeValidator(_student)]


@dataclass(frozen=True, config=STRICT)
class DistillPlan:
    """A distillation (methods 8.1, stage 1): a 1-Lipschitz student regresses the embeddings of any encoder.

    Attributes:
        teacher: any name that `load_encoder` takes.
        teacher_precision: in which it answers; 'bf16' is quicker, and moves its embeddings by a few thousandths.
        student: the network, keys of `LipsimConfig`; its `dim` is the teacher's.
        train: sources of training images; TOML `[[train]]`.
        held_out: sources of the in-training evaluation; TOML `[[held_out]]`.
        steps, warmup_steps: updates in all, and of linear warm-up before the cosine.
        batch_size: over all accumulation steps.
        accumulation_steps: parts of a batch. The root of the published loss is taken of each part, so they count: the
            published runs had 16 GPUs of 32 images.
        lr, betas, weight_decay: of Adam.
        objective: 'rmse', the published one, or 'cosine', which leaves the length of the embedding free.
        target_scale: length of the target vectors, 1 in the published recipe. A radius is in proportion to the length
            of the student's embeddings, so a longer target asks for larger ones.
        centre: subtract each target's own mean over its dimensions, as DreamSim's inference does, and normalise anew.
        view_px: side of the view that teacher and student both see, each resized to its own input; 0 for the larger of
            their inputs.
        geometry: of the view: 'shortest' and 'squash' as in `PreprocessSpec`; 'crop' takes the centre without a resize,
            as published.
        resize_mode: of the exported student's preprocessing; published models squash.
        mean: of the exported student's preprocessing; shifting pixels keeps the Lipschitz constant.
        flip: mirror every second image at random.
        views: 2 for the published pair, of which the second is jittered; 1 for the plain one alone.
        jitter: brightness, contrast, saturation, hue.
        jitter_probability, grey_probability: of the second view.
        seed: of weights, orders, flips and jitter.
        log_every, checkpoint_every, eval_every: in updates; eval_every 0 evaluates at the end alone.
        eval_images: of the held-out sources.
        export_dtype: of the exported weights.
    """

    teacher: str
    student: Student
    train: tuple[Source, ...]
    steps: Count
    teacher_precision: Literal["fp32", "bf16"] = "fp32"
    warmup_steps: NotNegative = 2000
    held_out: tuple[Source, ...] = ()
    batch_size: Count = 512
    accumulation_steps: Count = 16
    lr: Positive = 0.01
    betas: Betas = (0.5, 0.9)
    weight_decay: Rate = 0.0
    objective: Literal["rmse", "cosine"] = "rmse"
    target_scale: Positive = 1.0
    centre: bool = False
    view_px: NotNegative = 0
    geometry: Geometry = "crop"
    resize_mode: Literal["squash", "shortest"] = "squash"
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    flip: bool = True
    views: Literal[1, 2] = 2
    jitter: tuple[Rate, Rate, Rate, Rate] = (0.4, 0.4, 0.2, 0.1)
    jitter_probability: Share = 0.8
    grey_probability: Share = 0.2
    seed: NotNegative = 0
    log_every: Count = 10
    checkpoint_every: Count = 200
    eval_every: NotNegative = 0
    eval_images: Count = 256
    export_dtype: Literal["fp32", "fp16"] = "fp32"

    def __post_init__(self) -> None:
        """Refuse what does not fit together."""
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps must not exceed steps {self.steps}, got {self.warmup_steps}")
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of accumulation_steps {self.accumulation_steps}"
            )
        if not self.train:
            raise ValueError("a plan needs at least one [[train]] source")
        shares = [source.per_batch for source in self.train]
        if shares != [0] and (0 in shares or sum(shares) != self.batch_size):
            raise ValueError(
                f"per_batch of the [[train]] sources must add up to batch_size {self.batch_size}: {shares}"
            )
        if self.jitter[3] > 0.5:
            raise ValueError(f"jitter: hue must be in [0, 0.5], got {self.jitter[3]}")

    @property
    def per_batch(self) -> list[int]:
        """Images of a batch by training source."""
        return [source.per_batch or self.batch_size for source in self.train]

    @property
    def preprocess(self) -> PreprocessSpec:
        """The exported student's preprocessing."""
        size = self.student.image_size
        return PreprocessSpec(size, size, self.resize_mode, "bicubic", mean=self.mean, std=(1.0, 1.0, 1.0))

    def as_dict(self) -> dict[str, Any]:
        """As JSON values, for the run directory."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values


def plan_from_table(table: Mapping[str, Any]) -> DistillPlan:
    """Build a plan from a parsed TOML table.

    Raises:
        PlanError: a key is unknown or missing, or a value has the wrong type or is impossible; names all of them.
    """
    return plan_of(DistillPlan, table, "distillation plan")
