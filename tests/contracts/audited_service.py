"""A service over toy pools, and real audits of it: what `hardlook-lab audit` leaves of the pools that are served."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from indexer.store import SnapshotStore
from offline.audit.plan import AuditPlan, plan_from_table
from offline.audit.report import write_report
from offline.audit.run import run_audit
from perception.testing import ToyEncoder
from service.testing import publish, toy_pools

LABELS = ("safe", "unsafe")
EXPORT = "pools.safetensors"


def build_house(root: Path, encoder: ToyEncoder) -> Path:
    """pools/ with published pools, queries/ and targets/ of noisy versions of them, and the export of the pools."""
    publish(root / "pools", encoder, toy_pools(per_pool=4))
    rng = np.random.default_rng(5)
    for part, count in (("queries", 8), ("targets", 3)):
        for label in LABELS:
            folder = root / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.asarray(toy_pools(per_pool=4)[label][i % 4].convert("RGB"), dtype=np.float64)
                noisy = (pixels + rng.normal(0, 60, pixels.shape)).clip(0, 255).astype(np.uint8)
                Image.fromarray(noisy).save(folder / f"{part}-{i}.png")
    export(root)
    return root


def export(root: Path) -> None:
    """As `hardlook-index export` does."""
    SnapshotStore(root / "pools", "pools").load(None).to_gallery().save(root / EXPORT)


def table(**changes: Any) -> dict[str, Any]:
    """A plan for an audit of the house that takes a second."""
    return {
        "task": "moderation",
        "attacks": ["white-box"],
        "square_queries": 4,
        "check_images": 2,
        "batch": 8,
        "neighbors": 3,
        "system": [{"name": "toy", "encoder": "toy/0", "gallery": EXPORT}],
        "queries": [{"kind": "folder", "path": f"queries/{label}", "label": label} for label in LABELS],
        "threat": [{"norm": "linf", "eps": ["1/255", 0.2], "steps": 5}],
        **changes,
    }


def plan(**changes: Any) -> AuditPlan:
    """The same as a plan."""
    return plan_from_table(table(**changes))


def audit(root: Path, run: Path, *, batches: int | None = None, **changes: Any) -> Path:
    """Run an audit with its report; `load_encoder` has to know toys. Only the first batches where that is said."""
    steps = run_audit(plan(**changes), data=root, folder=root, run=run)
    if batches is not None:
        for _ in zip(range(1 + batches), steps, strict=False):
            pass
        return run
    list(steps)
    write_report(run)
    return run
