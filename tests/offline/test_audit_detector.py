"""A detector head, pools without a buffer, and the OR of the two, audited together (methods 6.7, table IV)."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from offline.audit.figures import summarise
from offline.audit.plan import plan_from_table
from offline.audit.record import AuditRecord, read_records
from offline.audit.run import run_audit
from perception.encoder import encode_images
from perception.errors import CheckpointError
from perception.gallery import Gallery
from perception.heads import load_head
from perception.testing import ToyEncoder

DIM = 512
LAION = Path(os.environ.get("HARDLOOK_DATA", "../shared/data")) / "weights" / "laion_nsfw_head_vitb32.npz"
COLORS = {"safe": (70, 130, 70), "unsafe": (170, 90, 90)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for part, count in (("queries", 4), ("targets", 2), ("pools", 6)):
        for label, color in COLORS.items():
            folder = root / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = (np.array(color) + rng.normal(0, 25, (16, 16, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{part}{i}.png")
    encoder = ToyEncoder(dim=DIM)
    names = sorted(str(p.relative_to(root / "pools")) for p in (root / "pools").rglob("*.png"))
    embeddings = encode_images(encoder, [root / "pools" / name for name in names])
    labels = tuple(name.split("/")[0] for name in names)
    Gallery(tuple(names), labels, embeddings.numpy(), encoder.fingerprint).save(root / "pools.safetensors")
    # A linear head in the published layout, along the difference of the two kinds.
    unsafe = torch.tensor([label == "unsafe" for label in labels])
    direction = embeddings[unsafe].mean(0) - embeddings[~unsafe].mean(0)
    bias = -(embeddings @ direction).mean()
    content: dict[str, Any] = {
        "norm.mean": np.zeros(DIM, np.float32),
        "norm.variance": np.ones(DIM, np.float32),
        "linear_1.weight": 50 * direction[None].numpy(),
        "linear_1.bias": 50 * bias[None].numpy(),
    }
    np.savez(root / "head.npz", **content)
    return root


def audit(data: Path, run: Path, monkeypatch: pytest.MonkeyPatch, head: str, eps: Any = 0.1) -> list[AuditRecord]:
    monkeypatch.setattr("perception.catalogue.load_encoder", lambda *_, **__: ToyEncoder(dim=DIM))
    kinds = {part: [{"kind": "folder", "path": f"{part}/{x}", "label": x} for x in COLORS] for part in
             ("queries", "targets")}  # fmt: skip
    table = {
        "task": "moderation",
        "square_queries": 10,
        "check_images": 2,
        "system": [
            {"name": "detector", "encoder": "toy", "head": head},
            {"name": "pools", "encoder": "toy", "gallery": "pools.safetensors", "pools": ["safe", "unsafe"]},
        ],
        "combination": [{"name": "either", "systems": ["detector", "pools"]}],
        **kinds,
        "threat": [{"norm": "linf", "eps": eps, "steps": 5}],
    }
    plan = plan_from_table(table)
    list(run_audit(plan, data=data, folder=data, run=run))
    records = read_records(run)
    figures = summarise(plan, records, [])
    by_key = {(r.system, r.id, r.label): r for r in records}
    for row in figures.rows:
        if row.system == "either":
            # OR by hand: unsafe is detected if either still says so, safe is right if both do.
            expected = 0
            pairs = [(by_key["detector", i, row.label], by_key["pools", i, row.label])
                     for (system, i, label) in by_key if system == "pools" and label == row.label]  # fmt: skip
            for pair in pairs:
                clean, robust = (
                    [j.answer for j in side] for side in zip(*((r.clean, r.attacked) for r in pair), strict=True)
                )
                either = any if row.label == "unsafe" else all
                expected += either(a == row.label for a in clean) and either(a == row.label for a in robust)
            assert row.robust is not None
            assert row.robust.right == expected
    assert {row.system for row in figures.rows} == {"detector", "pools", "either"}
    return records


def test_table_4_in_small(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = audit(data, tmp_path, monkeypatch, "head.npz", eps=0.5)
    head, encoder = load_head(data / "head.npz"), ToyEncoder(dim=DIM)
    detector = [r for r in records if r.system == "detector"]
    for record in detector:
        [embedding] = encode_images(encoder, [data / "queries" / record.label / record.id])
        probability = float(head.probabilities(embedding[None])[0])
        assert record.clean.scores["probability"] == pytest.approx(probability, abs=1e-5)
        assert record.clean.answer == ("unsafe" if probability >= 0.5 else "safe")
    assert sum(r.clean.correct is True for r in detector) > len(detector) / 2
    # The head is linear and known: nothing withstands the attack along its logit.
    assert not any(r.robust for r in detector)


@pytest.mark.skipif(not LAION.is_file(), reason=f"needs {LAION.name} of HARDLOOK_DATA")
def test_a_published_head_is_attacked_along_its_logit(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LAION's B/32 head on embeddings of the same length; what it says of them means nothing, how it falls does."""
    records = audit(data, tmp_path, monkeypatch, str(LAION.resolve()))
    moved = [r for r in records if r.system == "detector" and r.rounds]
    assert moved
    for record in moved:
        before, after = record.clean.scores["probability"], record.attacked.scores["probability"]
        assert (after >= before) if record.label == "safe" else (after <= before)


def test_a_head_of_another_length_is_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with np.load(data / "head.npz") as arrays:
        content: dict[str, Any] = dict(arrays)
    content["linear_1.weight"] = content["linear_1.weight"][:, :8]
    content["norm.mean"], content["norm.variance"] = content["norm.mean"][:8], content["norm.variance"][:8]
    np.savez(data / "short.npz", **content)
    with pytest.raises(CheckpointError, match="8 values"):
        audit(data, tmp_path, monkeypatch, "short.npz")
