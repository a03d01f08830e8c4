"""Whether a candidate is worse than what was recorded: for teams that put an audit into their CI.

Both runs must have asked the same of systems of the same names; what the systems are made of is what may differ.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offline.audit.certified import RADII
from offline.audit.plan import AuditPlan
from offline.audit.rows import CertifiedRow, Figures, Mean, Row
from offline.audit.tables import RADIUS_NAMES
from offline.benchmarks.intervals import Accuracy
from offline.errors import RunError

# What does not change what is measured; all else has to be equal.
_FREE = {"systems", "batch", "bf16_gradients", "check_images", "examples", "neighbors", "neighbor_images"}


@dataclass(frozen=True)
class Recorded:
    """What a candidate is held against: the figures of an earlier run and its plan."""

    figures: Figures
    plan: Mapping[str, Any]

    @classmethod
    def load(cls, path: Path) -> "Recorded":
        """Read the `report.json` of a run.

        Raises:
            RunError: it cannot be read, or is none.
        """
        figures = Figures.load(path)
        plan = json.loads(path.read_bytes()).get("plan")
        if not isinstance(plan, dict):
            raise RunError(f"{path} does not say by which plan its figures came about")
        return cls(figures, plan)


@dataclass(frozen=True)
class Finding:
    """One figure of the candidate beside the recorded one.

    Attributes:
        what: which.
        worse: by more than the recorded figure's 95 % interval; or it could not be compared.
        sentence: for a person.
    """

    what: str
    worse: bool
    sentence: str

    def __str__(self) -> str:
        return f"{'WORSE' if self.worse else 'ok   '} {self.what}: {self.sentence}"


def compare(plan: AuditPlan, candidate: Figures, recorded: Recorded) -> list[Finding]:
    """Hold every recorded figure against the candidate's.

    What the candidate lacks counts as worse, and so does a check for masked gradients that fails for the candidate
    alone: its figures may be better than it is.

    Raises:
        RunError: the runs did not ask the same.
    """
    asked = plan.as_dict()
    for key in sorted(set(asked) | set(recorded.plan)):
        if key not in _FREE and asked.get(key) != recorded.plan.get(key):
            raise RunError(
                f"the gate was recorded with {key} = {json.dumps(recorded.plan.get(key))[:200]}, the candidate's plan "
                f"has {json.dumps(asked.get(key))[:200]}: they cannot be compared"
            )
    rows = {row.key: row for row in candidate.rows}
    findings = [f for row in recorded.figures.rows for f in _compare_rows(rows.get(row.key), row)]
    certified = {row.key: row for row in candidate.certified}
    findings += [f for row in recorded.figures.certified for f in _compare_certified(certified.get(row.key), row)]
    failed_before = {(check.system, check.name) for check in recorded.figures.checks if not check.passed}
    for check in candidate.checks:
        if not check.passed and (check.system, check.name) not in failed_before:
            findings.append(Finding(f"{check.system}, check {check.name}", True, check.sentence))
    passed_before = {(check.system, check.name) for check in recorded.figures.checks} - failed_before
    for system, name in sorted(passed_before - {(check.system, check.name) for check in candidate.checks}):
        findings.append(Finding(f"{system}, check {name}", True, "was made before, and is not now"))
    return findings


def _compare_rows(candidate: Row | None, recorded: Row) -> Iterator[Finding]:
    parts = (recorded.system, str(recorded.setting), recorded.label, recorded.set)
    of_row = ", ".join(part for part in parts if part)
    if candidate is None:
        yield Finding(of_row, True, "the candidate has no such figures")
        return
    if candidate.total != recorded.total or list(candidate.after) != list(recorded.after):
        yield Finding(
            of_row,
            True,
            f"{candidate.total} images under {', '.join(candidate.after)} cannot be compared with {recorded.total} "
            f"under {', '.join(recorded.after)}",
        )
        return
    for name in ("clean", "robust", "rounded"):
        before = getattr(recorded, name)
        if before is not None:
            yield _judge(f"{of_row}, {name}", getattr(candidate, name), before, more_is_better=True)
    for version, share in recorded.wrong_way.items():
        label = "let through" if recorded.label == "unsafe" else "refused"
        yield _judge(f"{of_row}, {label}, {version}", candidate.wrong_way[version], share, more_is_better=False)
    for score, means in recorded.means.items():
        for version, mean in means.items():
            now = candidate.means.get(score, {}).get(version)
            yield _judge(f"{of_row}, {score}, {version}", now, mean, more_is_better=True)


def _compare_certified(candidate: CertifiedRow | None, recorded: CertifiedRow) -> Iterator[Finding]:
    of_row = ", ".join(part for part in (recorded.system, recorded.label, recorded.set) if part)
    for eps, name in zip(RADII, RADIUS_NAMES, strict=True):
        what = f"{of_row}, certified ({recorded.form}) at l2 {name}"
        now = None if candidate is None or candidate.total != recorded.total else candidate.at(eps)
        yield _judge(what, now, recorded.at(eps), more_is_better=True)


def _judge(what: str, now: Accuracy | Mean | None, before: Accuracy | Mean, *, more_is_better: bool) -> Finding:
    low, high = before.interval
    was = f"{100 * before.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
    if now is None:
        return Finding(what, True, f"was {was}, and was not measured now")
    worse = now.value < low if more_is_better else now.value > high
    return Finding(what, worse, f"{100 * now.value:.1f} %, was {was}")
