"""What an audit writes down: one line an image, system and setting, from which every table and picture follows.

Knows no models and no data: whoever has the records can recompute the figures.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from offline.errors import RunError
from offline.jsonlines import JsonLines
from offline.threat import Norm, ThreatModel
from perception.replay import RECORDED_DECIMALS, AttackSetting
from perception.verdict import Neighbor

RECORDS_NAME = "records.jsonl"
CHECKS_NAME = "checks.jsonl"
EXAMPLES_FOLDER = "examples"
DECIMALS = RECORDED_DECIMALS
"""Of recorded similarities, scores, objectives and distances."""


@dataclass(frozen=True, order=True)
class Setting(AttackSetting):
    """How an image was attacked; `eps` is at the encoder's input size."""

    @property
    def threat(self) -> ThreatModel:
        """The threat model."""
        return ThreatModel(self.norm, self.eps)


@dataclass(frozen=True)
class Judgement:
    """What a system says of one version of an image.

    Attributes:
        answer: `safe`, `review` or `unsafe`; a class; `left` or `right`; empty where there is only a ranking.
        correct: whether it is the right one; None where there is only a ranking.
        scores: figures behind it, by name: `margin` (see `Verdict.margin`), `probability`, `logit`, `ap_medium`, ...
        neighbors: the nearest exemplars of each pool, or of the gallery, most similar first; often none.
    """

    answer: str
    correct: bool | None
    scores: Mapping[str, float]
    neighbors: tuple[Neighbor, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Judgement":
        """The opposite of `asdict`; raises TypeError or KeyError for what is none."""
        scores = {str(name): _finite(value) for name, value in values["scores"].items()}
        neighbors = tuple(Neighbor(str(n["id"]), str(n["pool"]), _finite(n["similarity"])) for n in values["neighbors"])
        if not isinstance(values["answer"], str) or values["correct"] not in (True, False, None):
            raise TypeError(f"answer is {values['answer']!r}, correct is {values['correct']!r}")
        return cls(values["answer"], values["correct"], scores, neighbors)


@dataclass(frozen=True)
class Round:
    """How things stood after one attack of the chain; an attack that was not needed any more has no round.

    Attributes:
        attack: `target-set`, `white-box`, `shift`, `apgd-ce`, `apgd-t` or `square`.
        updates: of the image, in this attack (queries for Square), until it fooled or the attack ended.
        objective: the highest objective that this attack reached.
        reached: the attacker's goal has been reached, by this attack.
        answer, correct: of the worst version of the image so far.
        trace: the highest objective after 0, 1, 2, 5, 10, 20, 50, ... updates and at the end, as `(updates,
            objective)`; of attacks with gradients alone.
    """

    attack: str
    updates: int
    objective: float
    reached: bool
    answer: str
    correct: bool | None
    trace: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class AuditRecord:
    """What became of one image under one setting.

    Attributes:
        system: its name in the plan.
        fingerprint: of the system's encoder.
        norm, eps, steps: see `Setting`.
        set: name of the query set.
        id: of the image within the set.
        label: what is right: a pool, a class, `left` or `right`.
        clean: the image as it is.
        attacked: its worst version, as float32 pixels, judged anew in the serving precision.
        rounded: that version after rounding to 8 bits, as in a PNG.
        rounds: the attacks that it went through, in their order; none where the goal was reached without any.
        winner: the attack that made the worst version; `none` where the clean image is as bad.
        distance: norm of the perturbation.
        example: name of the pictures in the folder `examples`; empty where none were kept.
        certified: by form of the certificate, the L2 radius at the encoder's input within which the clean image's
            answer is proven not to change; 0 where it is wrong or nothing is proven. None where the image takes no part
            in certified figures, as under every encoder without a proven Lipschitz constant.
    """

    system: str
    fingerprint: str
    norm: Norm
    eps: float
    steps: int
    set: str
    id: str
    label: str
    clean: Judgement
    attacked: Judgement
    rounded: Judgement
    rounds: tuple[Round, ...]
    winner: str
    distance: float
    example: str = ""
    certified: Mapping[str, float] | None = None

    @property
    def setting(self) -> Setting:
        """How it was attacked."""
        return Setting(self.norm, self.eps, self.steps)

    @property
    def key(self) -> tuple[str, Setting, str, str]:
        """What makes a record unique: system, setting, set, id."""
        return self.system, self.setting, self.set, self.id

    @property
    def robust(self) -> bool | None:
        """Right when clean and right when attacked; None where there is only a ranking."""
        if self.clean.correct is None or self.attacked.correct is None:
            return None
        return self.clean.correct and self.attacked.correct

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "AuditRecord":
        """The opposite of `asdict`; raises TypeError, KeyError or OfflineError for what is none."""
        rounds = tuple(
            Round(**{**r, "trace": tuple((int(at), _finite(v)) for at, v in r["trace"])}) for r in values["rounds"]
        )
        judgements = {name: Judgement.from_dict(values[name]) for name in ("clean", "attacked", "rounded")}
        certified = values.get("certified")
        if certified is not None:
            certified = {str(form): _radius(radius) for form, radius in certified.items()}
        record = cls(**{**values, **judgements, "rounds": rounds, "certified": certified})
        for entry in fields(cls):
            value = getattr(record, entry.name)
            if (entry.type is str and not isinstance(value, str)) or (entry.type is float and _finite(value) is None):
                raise TypeError(f"{entry.name} is {value!r}")
        _ = record.setting.threat
        return record


@dataclass(frozen=True)
class Check:
    """One answer to "is the attack as strong as it should be, or are gradients masked?".

    Attributes:
        system: its name in the plan.
        name: `gradients`, `loss-rises`, `large-eps`, `pgd-not-stronger` or `black-box`.
        passed: whether nothing speaks against the attack.
        sentence: the finding, for a person.
        figures: the numbers behind it, by name.
    """

    system: str
    name: str
    passed: bool
    sentence: str
    figures: Mapping[str, float]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Check":
        """The opposite of `asdict`; raises TypeError for what is none."""
        return cls(**values)


def read_records(run: Path) -> list[AuditRecord]:
    """The records of a run directory, oldest first; one that was written twice counts as last written.

    Raises:
        RunError: there are none, or a line is damaged.
    """
    records = {record.key: record for record in JsonLines(run / RECORDS_NAME).read(AuditRecord.from_dict)}
    if not records:
        raise RunError(f"{run} holds no audit records")
    return list(records.values())


def read_checks(run: Path) -> list[Check]:
    """The checks of a run directory, as `read_records`; none where the run has not come so far."""
    checks = JsonLines(run / CHECKS_NAME).read(Check.from_dict)
    return list({(check.system, check.name): check for check in checks}.values())


def as_line(value: AuditRecord | Check) -> dict[str, Any]:
    """A record or check as JSON values."""
    return asdict(value)


def _radius(value: Any) -> float:
    """The number itself; raises TypeError for what is no radius."""
    if _finite(value) < 0:
        raise TypeError(f"{value!r} is no radius")
    return float(value)


def _finite(value: Any) -> float:
    """The number itself; raises TypeError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{value!r} is no finite number")
    return value
