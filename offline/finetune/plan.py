"""The plan of an adversarial fine-tuning: everything that decides its result, read from TOML and checked.

Unknown, missing and impossible values are refused with their names before anything is loaded.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from offline.errors import PlanError
from offline.threat import ThreatModel, parse_eps

METHODS = ("fare", "tecoa")
PRECISIONS = ("fp32", "bf16")
DTYPES = ("fp32", "fp16")
EVALUATION = ("eval_images", "eval_attack_steps")


@dataclass(frozen=True)
class SourcePlan:
    """One source of images.

    Attributes:
        kind: 'folder', 'tar', 'labelled-zip' or 'mosaic'; see `offline.data.labelled`.
        path: relative to the data folder, or absolute; several for sharded or split sources.
        where: keeps the rows of a labelled zip whose columns have these values.
        class_names: 'imagenet', or a JSON file of `{class: [names]}` relative to the data folder; '' for its own names.
        per_batch: images of each global batch that come from here; 0 lets a single source fill the batch.
    """

    kind: str
    path: tuple[str, ...]
    where: dict[str, str] = field(default_factory=dict)
    class_names: str = ""
    per_batch: int = 0


@dataclass(frozen=True)
class FinetunePlan:
    """An adversarial fine-tuning (methods section 3). Radii and step sizes are in [0, 1] pixel units.

    Attributes:
        encoder: the original encoder, by any name that `load_encoder` takes.
        method: 'fare' or 'tecoa'.
        train: sources of training images.
        held_out: sources of the in-training evaluation.
        steps, warmup_steps: updates in all, and of linear warm-up.
        batch_size: global, over all processes and accumulation steps.
        lr, weight_decay, betas: of AdamW on all visual parameters.
        norm, eps, attack_steps, attack_step_size, attack_momentum: of the inner PGD.
        eps_warmup_steps: updates over which radius and step size grow from 0; the published recipe has none.
        clean_weight: w of `w * clean + (1 - w) * adversarial`.
        template: TeCoA's prompt.
        image_size_px: 0 for the encoder's own input size.
        flip: mirror every second image at random; the published recipe does not.
        freeze_batch_norm: BatchNorm layers keep their statistics during updates.
        precision: 'bf16' computes under autocast; weights and optimiser stay fp32.
        accumulation_steps: micro-batches of one update.
        ema_decay: of the exported weights' moving average; 0 for none.
        attack_chunk: images attacked at a time, 0 for all: speed alone.
        log_every, checkpoint_every, eval_every: in updates; eval_every 0 evaluates at the end alone.
        eval_images, eval_attack_steps: of the in-training evaluation by APGD.
        export_dtype: of the exported weights.
    """

    encoder: str
    method: str
    train: tuple[SourcePlan, ...]
    steps: int
    warmup_steps: int
    held_out: tuple[SourcePlan, ...] = ()
    seed: int = 0
    batch_size: int = 128
    lr: float = 1e-5
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    norm: str = "linf"
    eps: float = 4 / 255
    attack_steps: int = 10
    attack_step_size: float = 1 / 255
    attack_momentum: float = 0.9
    eps_warmup_steps: int = 0
    clean_weight: float = 0.0
    template: str = "This is a photo of a {}"
    image_size_px: int = 0
    flip: bool = False
    freeze_batch_norm: bool = False
    precision: str = "fp32"
    accumulation_steps: int = 1
    ema_decay: float = 0.0
    attack_chunk: int = 0
    log_every: int = 10
    checkpoint_every: int = 200
    eval_every: int = 0
    eval_images: int = 128
    eval_attack_steps: int = 50
    export_dtype: str = "fp32"

    def __post_init__(self) -> None:
        """Refuse what cannot be run.

        Raises:
            PlanError: names the key, its value and what it may be.
        """
        _one_of("method", self.method, METHODS)
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("export_dtype", self.export_dtype, DTYPES)
        for name in ("steps", "batch_size", "accumulation_steps", "log_every", "checkpoint_every", *EVALUATION):
            _at_least(name, getattr(self, name), 1)
        for name in (
            "seed",
            "warmup_steps",
            "eps_warmup_steps",
            "attack_steps",
            "attack_chunk",
            "eval_every",
            "image_size_px",
        ):
            _at_least(name, getattr(self, name), 0)
        for name in ("lr", "weight_decay", "attack_step_size", "attack_momentum"):
            _at_least(name, getattr(self, name), 0.0)
        for name in ("clean_weight", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise PlanError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.warmup_steps > self.steps:
            raise PlanError(f"warmup_steps must not exceed steps {self.steps}, got {self.warmup_steps}")
        if self.batch_size % self.accumulation_steps:
            raise PlanError(
                f"batch_size {self.batch_size} is not a multiple of accumulation_steps {self.accumulation_steps}"
            )
        if self.template.count("{}") != 1:
            raise PlanError(f"template must hold {{}} once, got {self.template!r}")
        _ = self.threat
        self._check_sources()

    def _check_sources(self) -> None:
        if not self.train:
            raise PlanError("a plan needs at least one [[train]] source")
        shares = [source.per_batch for source in self.train]
        if shares != [0] and (0 in shares or sum(shares) != self.batch_size):
            raise PlanError(f"per_batch of the [[train]] sources must add up to batch_size {self.batch_size}: {shares}")

    @property
    def threat(self) -> ThreatModel:
        """The ball of the inner attack."""
        return ThreatModel(self.norm, self.eps)  # type: ignore[arg-type]  # checks the norm itself

    @property
    def per_batch(self) -> list[int]:
        """Images of a global batch by training source."""
        return [source.per_batch or self.batch_size for source in self.train]

    def as_dict(self) -> dict[str, Any]:
        """As JSON values, for the run directory."""
        return asdict(self)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise PlanError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise PlanError(f"{name} must be at least {least}, got {value}")


def plan_from_table(table: Mapping[str, Any]) -> FinetunePlan:
    """Build a plan from a parsed TOML table; eps and attack_step_size may be written '4/255'.

    Raises:
        PlanError: a key is unknown or missing, or a value has the wrong type or is impossible.
    """
    values = dict(table)
    try:
        for name in ("eps", "attack_step_size"):
            if name in values:
                values[name] = parse_eps(values[name])
        for name in ("train", "held_out"):
            values[name] = tuple(source_from_table(entry) for entry in values.get(name, ()))
        if "betas" in values:
            first, second = (float(beta) for beta in values["betas"])
            values["betas"] = (first, second)
        for entry in fields(FinetunePlan):
            if entry.type in (int, float, str, bool) and entry.name in values:
                values[entry.name] = _typed(entry.name, values[entry.name], entry.type)
        return FinetunePlan(**values)
    except (TypeError, ValueError) as error:
        raise PlanError(f"fine-tuning plan: {error}") from error


def source_from_table(entry: Any) -> SourcePlan:
    """Build a source from a parsed `[[train]]` or `[[held_out]]`.

    Raises:
        PlanError: a value has the wrong type or is impossible.
        TypeError: a key is unknown or missing.
    """
    if not isinstance(entry, Mapping):
        raise PlanError(f"a source must be a table with kind and path, got {entry!r}")
    path, where = entry.get("path", ()), entry.get("where", {})
    paths = (path,) if isinstance(path, str) else tuple(path)
    if not paths or not all(isinstance(part, str) for part in paths):
        raise PlanError(f"a source's path must be one or several strings, got {path!r}")
    if not isinstance(where, Mapping) or not all(isinstance(value, str) for value in where.values()):
        raise PlanError(f"a source's where must be a table of strings, got {where!r}")
    source = SourcePlan(**{**entry, "path": paths, "where": dict(where)})
    for name, kind in (("kind", str), ("class_names", str), ("per_batch", int)):
        _typed(name, getattr(source, name), kind)
    _at_least("per_batch", source.per_batch, 0)
    return source


def _typed(name: str, value: Any, kind: type) -> Any:
    """The value as `kind`; an int may stand for a float, nothing else is converted."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise PlanError(f"{name} must be {kind.__name__}, got {value!r}")
    return value
