"""The run of the training guide: four updates, stopped and gone on with, exported, and pools built with it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "training.md"
END_TO_END = "## A run from end to end"


def typed() -> list[str]:
    """The commands of the first block below that heading."""
    block = re.search(r"```console\n(.*?)```", PAGE.read_text("utf8").partition(END_TO_END)[2], re.DOTALL)
    assert block
    return [line.removeprefix("$ ") for line in block[1].splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_guides_run_goes_from_end_to_end(tmp_path: Path) -> None:
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    environment = {name: value for name, value in os.environ.items() if not name.upper().startswith("HARDLOOK_")}
    environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}", "OMP_NUM_THREADS": "1"}
    commands = typed()
    assert len(commands) >= 6
    run = subprocess.run(
        ["bash", "-e"], input="\n".join(commands), cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    folder = tmp_path / "runs" / "try-fare"
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # Stopped after two updates, gone on with, evaluated twice, exported: as the guide tells how to read it.
    assert [event["event"] for event in events] == [
        "step", "step", "evaluation", "resumed", "step", "step", "evaluation", "exported"
    ]  # fmt: skip
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3, 4]
    for name in ("plan.json", "checkpoint.safetensors", "curve.svg", "export/training.json"):
        assert (folder / name).is_file(), name
        assert f"`{name.partition('/')[2] or name}`" in PAGE.read_text("utf8")
    fingerprint = json.loads((folder / "export" / "training.json").read_text())["fingerprint"]
    [manifest] = (folder / "pools" / "pools" / "versions").glob("*/manifest.json")
    assert fingerprint in manifest.read_text()  # pools carry the fingerprint of the encoder that was trained
    assert "buffer 3, safe 12, unsafe 6" in run.stdout
