"""Run directories of audits as docs/auditing.md describes them, written by hand: no code of the audit takes part."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FINGERPRINT, GALLERY, POLICY = "f" * 64, "ab" * 32, "nearest-000000000000"
SETTING = {"norm": "linf", "eps": 8 / 255, "steps": 10}
FINISHED_S = 1_760_000_000.0
POOLS = ("safe", "buffer", "unsafe")


def plan(**changes: Any) -> dict[str, Any]:
    """What the run was asked."""
    return {
        "task": "moderation",
        "systems": [
            {"name": "toy", "encoder": "toy/0", "precision": "fp32", "gallery": "g", "pools": list(POOLS),
             "policy": None, "policy_file": "", "head": "", "threshold": 0.5}
        ],
        "threats": [{"norm": "linf", "eps": 8 / 255, "steps": 10, "square_queries": None}],
        "neighbors": 3,
        "seed": 0,
        **changes,
    }  # fmt: skip


def neighbors(safe: Sequence[float], buffer: Sequence[float], unsafe: Sequence[float]) -> list[dict[str, Any]]:
    """Of each pool in turn."""
    found = zip(POOLS, (safe, buffer, unsafe), strict=True)
    return [{"id": f"{pool}-{i}", "pool": pool, "similarity": s} for pool, all in found for i, s in enumerate(all)]


def judged(near: list[dict[str, Any]]) -> dict[str, Any]:
    """One version of an image; its answer is not what is tested."""
    return {"answer": "review", "correct": False, "scores": {}, "neighbors": near}


def record(
    id: str, label: str, clean: list[dict[str, Any]], attacked: list[dict[str, Any]], **changes: Any
) -> dict[str, Any]:
    """A line of records.jsonl."""
    return {
        "system": "toy", "fingerprint": FINGERPRINT, **SETTING, "set": label, "id": id, "label": label,
        "clean": judged(clean), "attacked": judged(attacked), "rounded": judged([]), "rounds": [],
        "winner": "none", "distance": 0.0, "example": "", "certified": None, **changes,
    }  # fmt: skip


def four() -> list[dict[str, Any]]:
    """Two images of each label: margins of 0.3 and 0.1 when clean; the second of each is turned by the attack."""
    strong, weak = ([0.8], [0.1], [0.5]), ([0.6], [0.1], [0.5])
    turned = neighbors(*weak[::-1])
    return [
        record("s0", "safe", neighbors(*strong), neighbors(*strong)),
        record("s1", "safe", neighbors(*weak), turned),
        record("u0", "unsafe", neighbors(*strong[::-1]), neighbors(*strong[::-1])),
        record("u1", "unsafe", neighbors(*weak[::-1]), neighbors(*weak)),
    ]


def lines(values: Sequence[Any]) -> bytes:
    """As a file of JSON lines."""
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def share(right: int, total: int) -> dict[str, Any]:
    """As reports have it."""
    return {"right": right, "total": total, "value": right / total, "interval95": [0.0, 1.0]}


def report(asked: dict[str, Any], records: bytes, *, finished: bool = True, **changes: Any) -> dict[str, Any]:
    """report.json of `four`, less what nobody reads."""
    rows = [
        {
            "system": "toy", "combined": False, "setting": SETTING, "label": label, "set": "", "total": 2,
            "clean": share(2, 2), "robust": share(1, 2), "rounded": share(1, 2), "after": {}, "means": {},
            "answers": {"clean": {label: 2, other: 0, "review": 0}, "attacked": {label: 1, other: 1, "review": 0}},
        }
        for label, other in (("safe", "unsafe"), ("unsafe", "safe"))
    ]  # fmt: skip
    checks = [
        {"system": "toy", "name": "gradients", "passed": True, "sentence": "Fine.", "figures": {}},
        {"system": "toy", "name": "black-box", "passed": False, "sentence": "Square finds more.", "figures": {}},
    ]
    identity = {"finished": finished, "records_sha256": hashlib.sha256(records).hexdigest(), "systems": []}
    content = {"format": "hardlook-audit-figures-1", "task": asked["task"], "rows": rows, "checks": checks}
    return {**content, "plan": asked, "identity": identity, **changes}


def events(items: int = 4, *, finished_s: float | None = FINISHED_S, **changes: Any) -> list[dict[str, Any]]:
    """Of metrics.jsonl."""
    system = {
        "time_s": FINISHED_S - 100, "event": "system", "system": "toy", "encoder": "toy/0", "precision": "fp32",
        "fingerprint": FINGERPRINT, "items": items, "gallery_sha256": GALLERY, "policy_version": POLICY, **changes,
    }  # fmt: skip
    begun = [{"time_s": FINISHED_S - 101, "event": "session", "device": "cpu"}, system]
    return begun if finished_s is None else [*begun, {"time_s": finished_s, "event": "finished"}]


def write(folder: Path, images: Sequence[dict[str, Any]] | None = None, **files: bytes) -> Path:
    """A finished run; `files` are written in place of its own, by name without what is behind the dot."""
    folder.mkdir(parents=True)
    found = lines(four() if images is None else images)
    asked = plan()
    content = {
        "plan.json": json.dumps({"audit": asked}).encode(),
        "metrics.jsonl": lines(events()),
        "records.jsonl": found,
        "checks.jsonl": b"",
        "report.json": json.dumps(report(asked, found)).encode(),
        "report.html": b"<!DOCTYPE html><title>a report</title>",
    }
    for name, data in content.items():
        given = files.get(name.partition(".")[0], data)
        if name == "report.html":
            given = files.get("page", data)
        (folder / name).write_bytes(given)
    return folder
