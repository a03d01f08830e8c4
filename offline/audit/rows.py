"""The figures of an audit as values: what a row of its tables holds, and their JSON in both directions.

Knows no records: `offline.audit.figures` counts them.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import FiniteFloat, NonNegativeInt, TypeAdapter

from offline.audit.record import Check, Setting
from offline.benchmarks.intervals import Accuracy
from offline.errors import DataError, OfflineError, RunError
from perception.verdict import VerdictLabel

FORMAT: Literal["hardlook-audit-figures-1"] = "hardlook-audit-figures-1"
VERSIONS = ("clean", "attacked", "rounded")
"""Of an image: as it is, its worst one as float32 pixels, and that one in 8 bits."""

OPPOSITE = {VerdictLabel.SAFE: VerdictLabel.UNSAFE, VerdictLabel.UNSAFE: VerdictLabel.SAFE}
WRONG_WAY = {VerdictLabel.SAFE: "refused", VerdictLabel.UNSAFE: "let_through"}
"""What the opposite answer is called, by what would be right."""


@dataclass(frozen=True)
class Answers:
    """How often each verdict was given; S/B/U in table III of the paper, where `review` is B.

    Raises:
        DataError: there are no answers.
    """

    safe: NonNegativeInt
    review: NonNegativeInt
    unsafe: NonNegativeInt

    def __post_init__(self) -> None:
        _ = self.shares

    @property
    def total(self) -> int:
        """All answers."""
        return self.safe + self.review + self.unsafe

    @property
    def shares(self) -> dict[VerdictLabel, Accuracy]:
        """By verdict, in the order of table III."""
        order = (VerdictLabel.SAFE, VerdictLabel.REVIEW, VerdictLabel.UNSAFE)
        return {label: Accuracy(getattr(self, label), self.total) for label in order}

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "shares": {str(label): share.as_dict() for label, share in self.shares.items()}}


@dataclass(frozen=True)
class Mean:
    """A mean over queries with its bootstrap 95 % interval.

    Raises:
        DataError: there are no queries, or the interval is upside down.
    """

    value: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat
    total: int

    def __post_init__(self) -> None:
        if self.total < 1 or self.low > self.high:
            raise DataError("mean", f"{self.value} of {self.total} queries in [{self.low}, {self.high}] is none")

    @property
    def interval(self) -> tuple[float, float]:
        """Low and high."""
        return self.low, self.high


@dataclass(frozen=True)
class Row:
    """The figures of one system, setting and kind of images.

    Attributes:
        system: name of a system or combination in the plan.
        combined: it is a combination, whose answer is the more cautious one of two systems.
        setting: as the plan has it; radii of l2 are those at 224 px.
        label: for moderation what is right, `safe` or `unsafe`; else empty, for all labels together.
        set: name of the query set; empty for all sets together.
        total: images.
        clean, robust, rounded: share of images that are right when clean; when clean and when attacked; when clean and
            when attacked, in 8 bits. None where there is only a ranking.
        after: by attack, in their order: right when clean and still so after it and all before it.
        answers: for moderation, by version of the image.
        means: for rankings, by name of the score, then by version.
        updates: made by each attack, over all images; queries for Square. Empty for a combination.
    """

    system: str
    combined: bool
    setting: Setting
    label: str
    set: str
    total: int
    clean: Accuracy | None = None
    robust: Accuracy | None = None
    rounded: Accuracy | None = None
    after: Mapping[str, Accuracy] = field(default_factory=dict)
    answers: Mapping[str, Answers] = field(default_factory=dict)
    means: Mapping[str, Mapping[str, Mean]] = field(default_factory=dict)
    updates: Mapping[str, NonNegativeInt] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that all figures are of the same images.

        Raises:
            DataError: they are not, or the setting is impossible.
            PlanError: the radius is impossible.
        """
        _ = self.setting.threat
        accuracies = [self.clean, self.robust, self.rounded, *self.after.values()]
        totals = {counted.total for counted in (*accuracies, *self.answers.values()) if counted is not None}
        if not totals <= {self.total} or any(set(judged) != set(VERSIONS) for judged in self._by_version):
            raise DataError("audit figures", f"row {self.key} mixes figures of {self.total} and {totals} images")
        if self.answers and self.label not in OPPOSITE:
            raise DataError("audit figures", f"row {self.key} has verdicts, but no label 'safe' or 'unsafe'")

    @property
    def key(self) -> tuple[str, Setting, str, str]:
        """What makes a row unique: system, setting, label, set."""
        return self.system, self.setting, self.label, self.set

    @property
    def wrong_way(self) -> dict[str, Accuracy]:
        """By version, how often the opposite of what is right was answered: let through, or refused."""
        if not self.answers:
            return {}
        opposite = OPPOSITE[VerdictLabel(self.label)]
        return {version: answers.shares[opposite] for version, answers in self.answers.items()}

    @property
    def square_gain(self) -> float | None:
        """Percentage points that Square took off after the gradient attacks; None where it did not run."""
        attacks = list(self.after)
        if len(attacks) < 2 or attacks[-1] != "square":
            return None
        before, after = self.after[attacks[-2]], self.after[attacks[-1]]
        return round(100 * (before.right - after.right) / self.total, 4)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {
            "system": self.system,
            "combined": self.combined,
            "setting": asdict(self.setting),
            "label": self.label,
            "set": self.set,
            "total": self.total,
            "clean": _optional(self.clean),
            "after": _accuracies(self.after),
            "robust": _optional(self.robust),
            "rounded": _optional(self.rounded),
            "square_gain": self.square_gain,
            "answers": {version: answers.as_dict() for version, answers in self.answers.items()},
            "means": {name: {v: asdict(m) for v, m in means.items()} for name, means in self.means.items()},
            "updates": dict(self.updates),
        }
        if self.answers:
            values[WRONG_WAY[VerdictLabel(self.label)]] = _accuracies(self.wrong_way)
        return values

    @property
    def _by_version(self) -> list[Mapping[str, Any]]:
        return [*([self.answers] if self.answers else []), *self.means.values()]


@dataclass(frozen=True)
class CertifiedRow:
    """Certified accuracy of one system and kind of images, by radius; under no attack, but against all.

    Attributes:
        system: its name in the plan.
        form: of the certificate: 'decision' for moderation; for 2AFC 'tighter' and 'published' (methods 8.1).
        label, set: see `Row`.
        total: images that take part.
        clean: share of them that are right when clean.
        points: (eps, share that are right and certified beyond eps), by eps, which is in L2 at the encoder's input.
    """

    system: str
    form: str
    label: str
    set: str
    total: int
    clean: Accuracy
    points: tuple[tuple[FiniteFloat, Accuracy], ...]

    def __post_init__(self) -> None:
        """Check that all figures are of the same images, and fall with the radius.

        Raises:
            DataError: they are not, or do not.
        """
        radii, shares = [eps for eps, _ in self.points], [share for _, share in self.points]
        if {share.total for share in (self.clean, *shares)} != {self.total} or min(radii, default=0.0) < 0:
            raise DataError("audit figures", f"certified accuracies of {self.system!r} are of different images")
        right = [self.clean.right, *(share.right for share in shares)]
        if radii != sorted(set(radii)) or right != sorted(right, reverse=True):
            raise DataError("audit figures", f"certified accuracies of {self.system!r} do not fall with the radius")

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What makes a row unique: system, form, label, set."""
        return self.system, self.form, self.label, self.set

    def at(self, eps: float) -> Accuracy:
        """The certified accuracy at a radius that is among the points; KeyError where it is not."""
        return dict(self.points)[eps]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values: dict[str, Any] = {"system": self.system, "form": self.form, "label": self.label, "set": self.set}
        points = [[eps, share.as_dict()] for eps, share in self.points]
        return values | {"total": self.total, "clean": self.clean.as_dict(), "points": points}


@dataclass(frozen=True)
class Trace:
    """The mean over images of the highest objective that an attack had reached after so many updates.

    Attributes:
        system, setting: as in `Row`.
        attack: its name.
        images: that it attacked.
        points: (updates, objective), by updates; an image that needed no more keeps what it had reached.
    """

    system: str
    setting: Setting
    attack: str
    images: int
    points: tuple[tuple[int, FiniteFloat], ...]


@dataclass(frozen=True)
class Figures:
    """All figures of an audit.

    Attributes:
        task: of the plan.
        rows: in the order of the plan's systems and combinations, then of its settings, then by label and set.
        traces: in the same order, then in that of the attacks.
        checks: for masked gradients.
        certified: of the systems whose encoders have a proven Lipschitz constant.
        format: of the JSON.
    """

    task: str
    rows: tuple[Row, ...]
    traces: tuple[Trace, ...]
    checks: tuple[Check, ...]
    certified: tuple[CertifiedRow, ...] = ()
    format: Literal["hardlook-audit-figures-1"] = FORMAT

    def __post_init__(self) -> None:
        """Check that there are rows, each once.

        Raises:
            DataError: there are none, or one is there twice.
        """
        if not self.rows or len({row.key for row in self.rows}) != len(self.rows):
            raise DataError("audit figures", f"{len(self.rows)} rows: there must be one, and each only once")
        if len({row.key for row in self.certified}) != len(self.certified):
            raise DataError("audit figures", f"of {len(self.certified)} certified rows one is there twice")

    @property
    def updates(self) -> dict[str, int]:
        """What the audit cost: updates by attack, over all systems and settings; queries for Square."""
        spent: dict[str, int] = {}
        for row in self.rows:
            if not row.set:
                for attack, updates in row.updates.items():
                    spent[attack] = spent.get(attack, 0) + updates
        return spent

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, always in the same order."""
        return {
            "format": self.format,
            "task": self.task,
            "rows": [row.as_dict() for row in self.rows],
            "traces": [asdict(trace) for trace in self.traces],
            "checks": [asdict(check) for check in self.checks],
            "updates": self.updates,
            "certified": [row.as_dict() for row in self.certified],
        }

    @classmethod
    def load(cls, path: Path) -> "Figures":
        """Read what `as_dict` gave from a JSON file, such as a run's `report.json`; other keys are passed over.

        Raises:
            RunError: the file cannot be read, or holds no such figures, or impossible ones.
        """
        try:
            content = path.read_bytes()
            if json.loads(content)["format"] != FORMAT:
                raise ValueError(f"format is not {FORMAT!r}")
            return TypeAdapter(cls).validate_json(content, strict=True)
        except (OSError, ValueError, KeyError, TypeError, RecursionError, OfflineError) as error:
            raise RunError(f"{path} holds no figures of an audit: {error}") from error


def _accuracies(values: Mapping[str, Accuracy]) -> dict[str, Any]:
    return {name: accuracy.as_dict() for name, accuracy in values.items()}


def _optional(accuracy: Accuracy | None) -> dict[str, Any] | None:
    return None if accuracy is None else accuracy.as_dict()
