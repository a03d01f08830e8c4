"""What a finished fine-tuning leaves: the encoder in its family's format, where it comes from, and a picture."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from offline.finetune.plan import FinetunePlan
from offline.runs import RunDirectory, read_events, write_atomically
from perception import load_encoder
from perception.encoders.tower import TowerEncoder

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
PROVENANCE = "training.json"
CURVE = "curve.svg"
SHOWN = ("clean_accuracy", "clean_cosine", "robust_accuracy", "robust_cosine")


def publish(encoder: TowerEncoder, original: TowerEncoder, plan: FinetunePlan, run: RunDirectory) -> str:
    """Write `export/` and the curve; returns the fingerprint of the encoder as it will be loaded.

    Raises:
        CheckpointError: what was written cannot be read back.
    """
    origin = {"original_fingerprint": original.fingerprint}
    loaded = publish_encoder(encoder, run, plan.method, plan.as_dict(), origin, plan.export_dtype)
    draw_curve(run.path, run.path / CURVE)
    return loaded.fingerprint


def publish_encoder(
    encoder: TowerEncoder, run: RunDirectory, method: str, plan: dict[str, Any], origin: dict[str, Any], dtype: str
) -> TowerEncoder:
    """Write `export/` with its provenance, and load it as others will.

    Args:
        origin: what else there is to say of where the weights come from, such as fingerprints.
        dtype: of the exported weights, 'fp32' or 'fp16'.

    Raises:
        CheckpointError: what was written cannot be read back.
    """
    folder = run.path / "export"
    encoder.export(folder, dtype=_DTYPES[dtype])
    loaded = load_encoder(f"local-dir:{folder}")
    provenance: dict[str, Any] = {
        "method": method,
        "plan": plan,
        **origin,
        "fingerprint": loaded.fingerprint,
        "sha256": {p.name: sha256_of(p) for p in sorted(folder.iterdir()) if p.name != PROVENANCE},
    }
    write_atomically(folder / PROVENANCE, (json.dumps(provenance, indent=2, sort_keys=True) + "\n").encode())
    run.log(event="exported", fingerprint=loaded.fingerprint)
    return loaded


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def draw_curve(run: Path, picture: Path, loss_name: str = "adversarial training loss") -> None:
    """Draw loss, learning rate and the held-out evaluations of a run as one SVG.

    A resumed run repeats the steps after its checkpoint; the last line of a step counts.
    """
    from matplotlib.figure import Figure

    steps = {e["step"]: e for e in read_events(run, "step")}
    evaluations = {e["step"]: e for e in read_events(run, "evaluation")}
    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, held_out = figure.subplots(2, 1, sharex=True)
    order = sorted(steps)
    losses.plot(order, [steps[s]["loss"] for s in order], color="tab:blue", linewidth=1)
    losses.set_ylabel(loss_name)
    rates = losses.twinx()
    rates.plot(order, [steps[s]["lr"] for s in order], color="tab:gray", linewidth=0.8, linestyle="--")
    rates.set_ylabel("learning rate (dashed)")
    order = sorted(evaluations)
    styles = {"clean": "tab:green", "robust": "tab:red"}
    names = sorted({name for e in evaluations.values() for name in e} & set(SHOWN))
    for name in names:
        kind, _, figure_name = name.partition("_")
        line = "-" if figure_name == "accuracy" else ":"
        held_out.plot(
            order, [evaluations[s].get(name) for s in order], line, color=styles[kind], marker="o", markersize=3,
            label=name.replace("_", " "),
        )  # fmt: skip
    held_out.set_xlabel("update")
    held_out.set_ylabel("held-out images")
    held_out.set_ylim(-0.02, 1.02)
    if names:
        held_out.legend(loc="best", fontsize="small")
    figure.savefig(picture, metadata={"Date": None})
