"""From an audit on the command line to its report, a calibrated policy, the audit of that policy, and the gate."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from offline import cli
from offline.errors import PlanError, RunError
from perception.encoder import encode_images
from perception.errors import GalleryError
from perception.gallery import Gallery
from perception.policy_file import CalibratedPolicy
from perception.testing import ToyEncoder

COLORS = {"safe": (80, 130, 80), "buffer": (128, 128, 90), "unsafe": (150, 95, 95)}
PLAN = """
task = "moderation"
attacks = ["white-box"]
square_queries = {square}
check_images = 3
examples = 1
neighbor_images = "pools"

[[system]]
name = "toy"
encoder = "toy/0"
gallery = "{gallery}"
{system}

[[queries]]
kind = "folder"
path = "queries/safe"
label = "safe"

[[queries]]
kind = "folder"
path = "queries/unsafe"
label = "unsafe"

[[threat]]
norm = "linf"
eps = "{eps}"
steps = 8
"""


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images, pools, and `load_encoder` that knows toys alone."""
    monkeypatch.setattr("perception.catalogue.load_encoder", lambda *_, **__: ToyEncoder())
    rng = np.random.default_rng(3)
    for part, labels, count in (("queries", ("safe", "unsafe"), 12), ("pools", tuple(COLORS), 8)):
        for label in labels:
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.array(COLORS[label]) + rng.normal(0, 20, (16, 16, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{part}{i}.png")
    names = sorted(str(p.relative_to(tmp_path / "pools")) for p in (tmp_path / "pools").rglob("*.png"))
    embeddings = encode_images(ToyEncoder(), [tmp_path / "pools" / name for name in names]).numpy()
    labels = tuple(name.split("/")[0] for name in names)
    Gallery(tuple(names), labels, embeddings, ToyEncoder().fingerprint).save(tmp_path / "pools.safetensors")
    return tmp_path


def audit(
    house: Path,
    name: str,
    *,
    system: str = "",
    eps: str = "1/255",
    square: int = 5,
    gallery: str = "pools.safetensors",
    **options: Any,
) -> Path:
    """Run `hardlook-lab audit`; returns the run directory."""
    config = house / f"{name}.toml"
    config.write_text(PLAN.format(system=system, eps=eps, square=square, gallery=gallery))
    cli.audit(config, run=house / name, data=house, **options)
    return house / name


def test_an_audit_leaves_a_report_that_needs_nothing_else(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = audit(house, "run", json_file=house / "figures.json")
    printed = capsys.readouterr().out
    assert "| toy | linf 1/255, 8 steps | unsafe | 12 |" in printed
    assert str(run / "report.html") in printed
    page = (run / "report.html").read_bytes()
    assert json.loads((house / "figures.json").read_text())["rows"]
    assert list((run / "examples" / "neighbors").glob("*.png")), "pictures of neighbours come from the pools' folder"
    for part in ("queries", "pools"):
        (house / part).rename(house / f"{part} are gone")
    cli.report(run)
    assert (run / "report.html").read_bytes() == page


def test_a_candidate_goes_through_the_gate_or_not(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gate = audit(house, "recorded") / "report.json"
    with pytest.raises(SystemExit) as passed:
        audit(house, "same", gate=gate)
    assert not passed.value.code
    capsys.readouterr()
    # All that is safe is moved out of the way: what is unsafe has nothing to be mistaken for, what is safe is refused.
    gallery = Gallery.load(house / "pools.safetensors")
    embeddings = gallery.embeddings.copy()
    embeddings[[label == "safe" for label in gallery.labels]] *= -1
    Gallery(gallery.ids, gallery.labels, embeddings, gallery.encoder_fingerprint).save(house / "pools.safetensors")
    with pytest.raises(SystemExit) as failed:
        audit(house, "worse", gate=gate)
    assert failed.value.code == 1
    assert "WORSE toy, linf 1/255, 8 steps, safe, clean" in capsys.readouterr().out
    with pytest.raises(RunError, match="cannot be compared"):
        audit(house, "other", eps="2/255", gate=gate)
    with pytest.raises(RunError, match="holds no figures"):
        audit(house, "late", gate=house / "pools.safetensors")
    assert not (house / "late").exists(), "a gate that cannot be read is found before the work, not after"


def test_what_cannot_be_run_leaves_no_directory_that_no_other_plan_may_use(house: Path) -> None:
    (house / "bad.toml").write_text("task = [")
    with pytest.raises(PlanError, match=r"bad\.toml is no TOML"):
        cli.audit(house / "bad.toml", run=house / "run", data=house)
    with pytest.raises(GalleryError, match=r"elsewhere\.safetensors"):
        audit(house, "run", gallery="elsewhere.safetensors")
    audit(house, "run")


def test_a_policy_is_calibrated_loaded_and_audited_again(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    never_content = "policy = { min_margin = 2.0, min_margin_unsafe = 2.0 }"
    run = audit(house, "run", system=never_content, square=0)
    policy = house / "policy.json"
    targets: dict[str, Any] = {"max_false_negative": 0.1, "max_false_positive": 0.1}
    with pytest.raises(PlanError, match="together"):
        cli.calibrate(run, system="toy", out=policy, norm="linf", **targets)
    cli.calibrate(run, system="toy", out=policy, norm="linf", eps="1/255", steps=8, **targets)
    assert "unsafe called safe" in capsys.readouterr().out
    calibrated = CalibratedPolicy.load(policy)
    assert calibrated.encoder_fingerprint == ToyEncoder().fingerprint
    assert calibrated.rates.clean.false_negative.value <= 0.1
    again = audit(house, "again", system='policy_file = "policy.json"')
    system = next(line for line in (again / "metrics.jsonl").read_text().splitlines() if '"system"' in line)
    assert json.loads(system)["policy_version"] == calibrated.policy.version
