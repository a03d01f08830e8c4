"""Synthetic records and run directories of audits, built by hand."""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from offline.audit.plan import AuditPlan, plan_from_table
from offline.audit.record import CHECKS_NAME, RECORDS_NAME, AuditRecord, Check, Judgement, Round, Setting, as_line
from offline.jsonlines import JsonLines
from offline.runs import RunDirectory
from perception.verdict import Neighbor

SETTING = Setting("linf", 8 / 255, 200)
Outcome = tuple[str, str]


def table(**changes: Any) -> dict[str, Any]:
    """A plan for moderation: two systems, one setting."""
    values: dict[str, Any] = {
        "task": "moderation",
        "system": [{"name": name, "encoder": "toy", "gallery": "pools"} for name in ("plain", "robust")],
        "queries": [{"kind": "demo", "label": label} for label in ("safe", "unsafe")],
        "targets": [{"kind": "demo", "label": label, "name": f"{label} targets"} for label in ("safe", "unsafe")],
        "threat": [{"norm": "linf", "eps": "8/255", "steps": 200}],
    }
    return {name: value for name, value in {**values, **changes}.items() if value is not None}


def plan_for(task: str, **changes: Any) -> AuditPlan:
    """A plan for a task without pools."""
    values = table(task=task, system=[{"name": "plain", "encoder": "toy"}], targets=None, queries=[{"kind": "folder"}])
    return plan_from_table({**values, **changes})


def moderation(**changes: Any) -> AuditPlan:
    return plan_from_table(table(**changes))


def judged(
    answer: str, label: str, scores: Mapping[str, float] | None = None, neighbors: tuple[Neighbor, ...] = ()
) -> Judgement:
    return Judgement(answer, answer == label, scores or {}, neighbors)


def record(
    id: str,
    label: str,
    clean: str,
    rounds: Sequence[Outcome] = (),
    *,
    rounded: str | None = None,
    system: str = "plain",
    setting: Setting = SETTING,
    set: str | None = None,
    updates: int = 10,
    **changes: Any,
) -> AuditRecord:
    """A record whose rounds are (attack, answer of the worst version so far)."""
    last = rounds[-1][1] if rounds else clean
    made = AuditRecord(
        system=system,
        fingerprint=f"of {system}",
        norm=setting.norm,
        eps=setting.eps,
        steps=setting.steps,
        set=label if set is None else set,
        id=id,
        label=label,
        clean=judged(clean, label),
        attacked=judged(last, label),
        rounded=judged(last if rounded is None else rounded, label),
        rounds=tuple(Round(a, updates, 0.5, answer != label, answer, answer == label) for a, answer in rounds),
        winner=rounds[-1][0] if rounds else "none",
        distance=setting.eps if rounds else 0.0,
    )
    return replace(made, **changes)


def check(system: str = "plain", *, passed: bool = True, name: str = "gradients") -> Check:
    return Check(system, name, passed, f"The finding about {name} of {system}.", {"share": 0.25})


def write_run(
    path: Path,
    plan: AuditPlan,
    records: Iterable[AuditRecord],
    checks: Iterable[Check] = (),
    items: Mapping[str, int] | None = None,
) -> Path:
    """A run directory as the audit leaves it."""
    directory = RunDirectory(path, {"audit": plan.as_dict()})
    directory.log(event="session", versions={"torch": "9.9", "python": "3.14"}, device="toy device", threads=2)
    for system, count in (items or {}).items():
        directory.log(event="system", system=system, encoder="toy", fingerprint=f"of {system}", items=count)
    JsonLines(path / RECORDS_NAME).append(as_line(one) for one in records)
    JsonLines(path / CHECKS_NAME).append(as_line(one) for one in checks)
    return path


def png(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(buffer, format="PNG")
    return buffer.getvalue()
