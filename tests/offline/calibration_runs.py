"""Run directories of moderation audits that were never made: random similarities in place of images."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from offline.audit.plan import plan_from_table
from offline.audit.record import AuditRecord, Judgement, Setting, as_line
from offline.runs import RunDirectory
from perception.verdict import DecisionPolicy, Neighbor

WEAK, STRONG = Setting("linf", 4 / 255, 10), Setting("linf", 8 / 255, 10)
GALLERY = "ab" * 32
POOLS = ("safe", "buffer", "unsafe")


def neighbors(similarities: Sequence[Sequence[float]]) -> tuple[Neighbor, ...]:
    """Of each pool in turn, with six decimals as in records."""
    return tuple(
        Neighbor(f"{pool}-{i}", pool, round(float(s), 6))
        for pool, of_pool in zip(POOLS, similarities, strict=True)
        for i, s in enumerate(of_pool)
    )


def record(
    id: str,
    label: str,
    clean: Sequence[Sequence[float]],
    attacked: Sequence[Sequence[float]],
    setting: Setting = STRONG,
) -> AuditRecord:
    judged = []
    for similarities in (clean, attacked):
        verdict = DecisionPolicy().decide(neighbors(similarities))
        judged.append(Judgement(verdict.label, verdict.label == label, {}, verdict.neighbors))
    return AuditRecord(
        "fare", "an encoder", setting.norm, setting.eps, setting.steps, f"{label} ones", id, label,
        judged[0], judged[1], replace(judged[1], neighbors=()), (), "white-box", 0.1,
    )  # fmt: skip


def random_records(
    rng: np.random.Generator, count: int, per_pool: int, strength: float, setting: Setting = STRONG
) -> list[AuditRecord]:
    """Images of both labels, near their own pool; attacked ones are moved towards the other."""
    records = []
    for i in range(count):
        label = ("safe", "unsafe")[i % 2]
        towards = np.array([1.0, 0.0, -1.0])[:, None] * (1 if label == "safe" else -1)
        clean = rng.normal(0.5, 0.08, (3, per_pool)) + 0.08 * towards
        attacked = clean - strength * towards * rng.uniform(0, 0.2, (3, 1))
        records.append(record(f"image-{i}", label, clean.clip(-1, 1).tolist(), attacked.clip(-1, 1).tolist(), setting))
    return records


def write_run(
    folder: Path, records: Sequence[AuditRecord], *, system: dict[str, Any] | None = None, **plan: Any
) -> Path:
    """A run directory as the audit leaves it."""
    table = {
        "task": "moderation",
        "system": [{"name": "fare", "encoder": "bundled/fare4", "gallery": "g", **(system or {})},
                   {"name": "head", "encoder": "bundled/fare4", "head": "h"}],
        "queries": [{"kind": "demo", "label": "safe"}, {"kind": "demo", "label": "unsafe"}],
        "threat": [{"norm": "linf", "eps": ["4/255", "8/255"], "steps": 10}],
        "attacks": ["white-box"],
        "neighbors": 3,
        **plan,
    }  # fmt: skip
    planned = plan_from_table(table)
    directory = RunDirectory(folder, {"audit": planned.as_dict()})
    settings = {r.setting for r in records}
    directory.log(
        event="system", system="fare", encoder="bundled/fare4", fingerprint="an encoder", gallery_sha256=GALLERY,
        policy_version=planned.systems[0].decision_policy.version, items=len(records) // max(1, len(settings)),
    )  # fmt: skip
    (folder / "records.jsonl").write_text("".join(json.dumps(as_line(r)) + "\n" for r in records))
    return folder
