"""What an audit asks: every number that decides the result, read from TOML and checked before anything is loaded."""

import json
from collections.abc import Mapping
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from offline.audit.record import Setting
from offline.errors import PlanError
from offline.threat import Norm, parse_eps, scaled_l2_eps
from perception.counterattack import CounterattackSettings
from perception.verdict import DecisionPolicy

Task = Literal["moderation", "retrieval", "two-afc", "odd-one-out", "zero-shot"]
AttackName = Literal["target-set", "white-box", "shift", "two-afc", "odd-one-out", "apgd-ce", "apgd-t"]


def _radius(value: Any) -> Any:
    """`parse_eps` as a validator."""
    try:
        return parse_eps(value) if isinstance(value, str | int | float) else value
    except PlanError as error:
        raise ValueError(str(error)) from error


Eps = Annotated[float, BeforeValidator(_radius)]
Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(min_length=1, max_length=80, pattern=r"^[\w .,/()+-]+$")]

ATTACKS: dict[str, tuple[AttackName, ...]] = {
    "moderation": ("target-set", "white-box"),
    "retrieval": ("shift",),
    "two-afc": ("two-afc",),
    "odd-one-out": ("odd-one-out",),
    "zero-shot": ("apgd-ce", "apgd-t"),
}
"""The attacks of each task, in the order in which they are tried unless the plan says otherwise."""

_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, config=_STRICT)
class PolicyPlan:
    """The parameters of `perception.verdict.DecisionPolicy`; as there."""

    rule: Literal["nearest", "vote"] = "nearest"
    k: int = 5
    min_similarity: float = -1.0
    min_margin: float = 0.0
    min_margin_unsafe: float = 0.0


@dataclass(frozen=True, config=_STRICT)
class DefensePlan:
    """What a system does to an image before it encodes it; TOML `[system.defense]` below its `[[system]]`.

    Attributes:
        kind: 'ttc', see `perception.counterattack`.
        attacker: 'unaware' goes along the gradients of the encoder without the defence; 'adaptive' knows everything but
            the seed of the noise (`offline.attacks.adaptive`).
        eot: draws of noise that the adaptive attacker averages over at each look.
        original: name of the encoder that computes tau: the one that the system's was fine-tuned from; '' for its own.
        eps, steps, step_size, beta, threshold: see `CounterattackSettings`.
        seed: of the noise; no attacker uses it.
    """

    kind: Literal["ttc"]
    attacker: Literal["unaware", "adaptive"] = "adaptive"
    eot: Count = 2
    original: str = ""
    eps: Eps = 4 / 255
    steps: Count = 2
    step_size: Eps = 1 / 255
    beta: float = 2.0
    threshold: float = 0.2
    seed: NotNegative = 0

    def __post_init__(self) -> None:
        """Refuse impossible parameters."""
        _ = self.settings

    @property
    def settings(self) -> CounterattackSettings:
        """The parameters of the counterattack."""
        return CounterattackSettings(self.eps, self.steps, self.step_size, self.beta, self.threshold)


@dataclass(frozen=True, config=_STRICT)
class SystemPlan:
    """Something that answers: an encoder, and for moderation what turns embeddings into verdicts.

    Attributes:
        name: in records and tables.
        encoder: any name that `load_encoder` takes.
        precision: in which it serves, and in which verdicts are re-checked.
        gallery: export of a snapshot of the pools (`hardlook-index export`), relative to the plan's folder.
        pools: those that take part; without 'buffer' it is the binary variant.
        policy: how neighbours become a verdict.
        policy_file: a calibrated policy in place of `policy`, relative to the plan's folder.
        head: a detector head in place of pools, relative to the data folder.
        threshold: of the head's probability.
        defense: what it does to an image before it encodes it.
    """

    name: Name
    encoder: str
    precision: Literal["fp32", "bf16"] = "fp32"
    gallery: str = ""
    pools: tuple[Literal["safe", "buffer", "unsafe"], ...] = ("safe", "buffer", "unsafe")
    policy: PolicyPlan | None = None
    policy_file: str = ""
    head: str = ""
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    defense: DefensePlan | None = None

    def __post_init__(self) -> None:
        """Refuse an impossible policy, and two deciders at once."""
        if self.policy is not None and self.policy_file:
            raise ValueError("give policy or policy_file, not both")
        if self.head and (self.gallery or self.policy is not None or self.policy_file):
            raise ValueError("a system with a head has no gallery and no policy")
        if not {"safe", "unsafe"} <= set(self.pools) or len(set(self.pools)) != len(self.pools):
            raise ValueError(f"pools must hold 'safe' and 'unsafe', each pool once, got {self.pools}")
        _ = self.decision_policy

    @property
    def decision_policy(self) -> DecisionPolicy:
        """The policy of the plan; where there is a `policy_file`, that one counts."""
        return DecisionPolicy(**(asdict(self.policy) if self.policy is not None else {}))


@dataclass(frozen=True, config=_STRICT)
class CombinationPlan:
    """Two systems of which either suffices to call an image unsafe (methods 6.7), each attacked for itself."""

    name: Name
    systems: tuple[str, str]


@dataclass(frozen=True, config=_STRICT)
class ImagesPlan:
    """A set of images.

    Attributes:
        name: in records and tables; by default the label, else the kind.
        kind: 'folder', 'tar', 'labelled-zip' or 'mosaic' (see `offline.data.labelled`); 'demo' for the images of the
            demo task that are not in the demo pools, 'demo-exemplars' for the unsafe ones that are; for two-afc
            'nights' or 'bapps'; for odd-one-out 'things' or 'things-dreamsim'.
        path: relative to the data folder, or absolute; several for sharded or split sets.
        where: keeps the rows of a labelled zip whose columns have these values.
        class_names: 'imagenet', or a JSON file of `{class: [names]}` relative to the data folder; '' for its own names.
        label: for moderation what is right, 'safe' or 'unsafe'.
        limit: the first so many of a seeded shuffle; 0 for all, in which case there is no shuffle. Of BAPPS and THINGS
            the first so many as they come.
        leave_one_out: each image is judged by the pools without its own exemplars: those of its id, or of its id and a
            view after '#'. Without it an image that is an exemplar is refused.
    """

    kind: str
    path: tuple[str, ...] | str = ()
    where: dict[str, str] = field(default_factory=dict)
    class_names: str = ""
    label: Literal["", "safe", "unsafe"] = ""
    name: str = ""
    limit: NotNegative = 0
    leave_one_out: bool = False

    @property
    def paths(self) -> tuple[str, ...]:
        """All paths."""
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def set_name(self) -> str:
        """The name in records."""
        return self.name or self.label or self.kind


@dataclass(frozen=True, config=_STRICT)
class ThreatPlan:
    """One threat model or a sweep: every radius with every number of steps.

    Attributes:
        norm: 'linf' or 'l2'.
        eps: radius or radii in [0, 1] pixel units, such as '8/255'; for l2 at 224 px, scaled with the side of the
            encoder's input.
        steps: updates of a gradient attack, or several such numbers.
        square_queries: instead of the plan's; 0 for no Square run under this threat.
    """

    norm: Norm
    eps: Eps | tuple[Eps, ...]
    steps: Count | tuple[Count, ...]
    square_queries: NotNegative | None = None

    def settings(self, size_px: int) -> tuple[Setting, ...]:
        """All combinations for an encoder that takes images of this size, by radius, then by steps."""
        radii = self.eps if isinstance(self.eps, tuple) else (self.eps,)
        counts = self.steps if isinstance(self.steps, tuple) else (self.steps,)
        scaled = [scaled_l2_eps(eps, size_px) if self.norm == "l2" else eps for eps in radii]
        return tuple(Setting(self.norm, eps, steps) for eps in scaled for steps in counts)


@dataclass(frozen=True, config=_STRICT)
class AuditPlan:
    """An audit.

    Attributes:
        task: what is asked of the systems.
        systems: who is asked; TOML `[[system]]`.
        threats: TOML `[[threat]]`.
        queries: images that are attacked; TOML `[[queries]]`. A `ground_truth` brings its own.
        combinations: for moderation, systems in pairs; TOML `[[combination]]`.
        targets: for moderation, images of either label that the grey-box attacker knows (Eq. 5); they are taken out of
            the queries. TOML `[[targets]]`; `limit` is 16 in the paper.
        gallery: for retrieval, the images that are searched; TOML `[[gallery]]`. Positives are of a query's class.
        ground_truth: for retrieval, a revisited set in place of classes, as published (.pkl) or in JSON; see
            `offline.benchmarks.retrieval`.
        image_folder: its images, `<name>.jpg`, relative to the data folder.
        crop_queries: crop its queries to their boxes, as the official protocol does.
        templates: for zero-shot, prompts with one {}.
        attacks: in this order, each on the images whose goal has not been reached; default: see `ATTACKS`.
        restarts: of each gradient attack.
        square_queries: of the Square attack on what survives.
        check_images: on which the masking checks are made, for each system.
        seed: of shuffles and random starts.
        batch: images attacked together; starts are drawn by batch.
        bf16_gradients: attack along gradients in bfloat16; verdicts are in the system's own precision all the same.
        neighbors: of each pool that are recorded; calibration of a vote needs as many as its k.
        examples: images of each set and system under the first setting of which pictures are kept in the run directory.
        neighbor_images: where pictures of the neighbours come from: 'demo', or the folder that the pools were built
            from, relative to the data folder; '' for none.
    """

    task: Task
    systems: tuple[SystemPlan, ...]
    threats: tuple[ThreatPlan, ...]
    queries: tuple[ImagesPlan, ...] = ()
    combinations: tuple[CombinationPlan, ...] = ()
    targets: tuple[ImagesPlan, ...] = ()
    gallery: tuple[ImagesPlan, ...] = ()
    ground_truth: str = ""
    image_folder: str = ""
    crop_queries: bool = True
    templates: tuple[str, ...] = ("a photo of a {}",)
    attacks: tuple[AttackName, ...] = ()
    restarts: Count = 1
    square_queries: NotNegative = 5000
    check_images: Count = 32
    seed: NotNegative = 0
    batch: Count = 64
    bf16_gradients: bool = False
    neighbors: Count = 5
    examples: NotNegative = 0
    neighbor_images: str = ""

    def __post_init__(self) -> None:
        """Refuse what does not fit together."""
        names = [system.name for system in self.systems]
        everyone = [*names, *(combination.name for combination in self.combinations)]
        if not (self.systems and self.threats and (self.queries or self.ground_truth)):
            raise ValueError("an audit needs at least one [[system]], one [[queries]] and one [[threat]]")
        if len(set(everyone)) != len(everyone):
            raise ValueError(f"names of systems and combinations must differ, got {everyone}")
        for combination in self.combinations:
            if not set(combination.systems) <= set(names) or len(set(combination.systems)) < 2:
                raise ValueError(f"combination {combination.name!r} needs two of the systems {names}")
        if self.bf16_gradients and any(system.defense is not None for system in self.systems):
            raise ValueError("bf16_gradients are not for systems with a defense, whose own gradients they would blur")
        sets = [images.set_name for images in self.queries]
        if len(set(sets)) != len(sets):
            raise ValueError(f"sets of queries must have different names, got {sets}")
        unknown = set(self.attacks) - set(ATTACKS[self.task])
        if unknown or len(set(self.attacks)) != len(self.attacks):
            raise ValueError(f"attacks of task {self.task!r} are {ATTACKS[self.task]}, each once, got {self.attacks}")
        if not all(template.count("{}") == 1 for template in self.templates) or not self.templates:
            raise ValueError(f"templates must hold {{}} once each, got {self.templates}")
        if self.task == "moderation":
            self._check_moderation()

    def _check_moderation(self) -> None:
        for system in self.systems:
            if not (system.gallery or system.head):
                raise ValueError(f"system {system.name!r} needs a gallery or a head")
        if not all(images.label for images in (*self.queries, *self.targets)):
            raise ValueError("label of [[queries]] and [[targets]] must be 'safe' or 'unsafe' for moderation")
        wanted = {"unsafe" if images.label == "safe" else "safe" for images in self.queries}
        if "target-set" in self.chain and not wanted <= {images.label for images in self.targets}:
            raise ValueError(f"attack 'target-set' needs [[targets]] with the labels {sorted(wanted)}")

    @property
    def chain(self) -> tuple[str, ...]:
        """The gradient attacks in their order."""
        return self.attacks or ATTACKS[self.task]

    def as_dict(self) -> dict[str, Any]:
        """As JSON values, for the run directory."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        for system in values["systems"]:
            if system["defense"] is None:  # plans from before there were any are the same plans
                del system["defense"]
        return values


_KEYS = {"systems": "system", "threats": "threat", "combinations": "combination"}


def plan_from_table(table: Mapping[str, Any]) -> AuditPlan:
    """Build a plan from a parsed TOML table, where lists have the names of one of their entries (`[[system]]`).

    Raises:
        PlanError: a key is unknown or missing, or a value has the wrong type or is impossible; names all of them.
    """
    values = dict(table)
    for plural, singular in _KEYS.items():
        if plural in values:
            raise PlanError(f"audit plan: unknown key {plural!r}; write [[{singular}]]")
        if singular in values:
            values[plural] = values.pop(singular)
    try:
        return TypeAdapter(AuditPlan).validate_json(json.dumps(values))
    except ValidationError as error:
        reasons = []
        for part in error.errors(include_url=False):
            at = ".".join(str(key) for key in part["loc"])
            reasons.append(f"{at}: {part['msg'].removeprefix('Value error, ')}" if at else part["msg"])
        raise PlanError("audit plan: " + "; ".join(reasons)) from error
    except (TypeError, ValueError) as error:
        raise PlanError(f"audit plan: {error}") from error


def plan_of_run(run: Path) -> AuditPlan:
    """The plan that a run directory was made with.

    Raises:
        PlanError: there is none, or it is damaged.
    """
    try:
        content = json.loads((run / "plan.json").read_bytes())
        return TypeAdapter(AuditPlan).validate_json(json.dumps(content["audit"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PlanError(f"{run} holds no audit plan: {error!r}") from error
