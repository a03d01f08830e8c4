"""The tutorial is run as a reader runs it, and says what it promises to show."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "docs" / "tutorial.py"


def squeezed(text: str) -> str:
    """With single spaces: the tutorial wraps its lines."""
    return " ".join(text.split())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_tutorial_shows_what_it_says(tmp_path: Path) -> None:
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    scratch.mkdir()
    environment = os.environ | {"TMPDIR": str(scratch), "OMP_NUM_THREADS": "1", "HARDLOOK_ENCODER": "of-another-shell"}
    command = [sys.executable, str(TUTORIAL), "--out", str(out)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    said = squeezed(run.stdout)

    def found(pattern: str) -> list[str]:
        match = re.search(pattern, said)
        assert match, f"{pattern} is not in:\n{run.stdout}"
        return list(match.groups())

    # The attack: the clean encoder takes the cat for the rocket, the robust one does not.
    [_, to_cat, to_rocket] = found(
        r"bundled/(clean): the attacked cat is (\S+) similar to the cat and (\S+) to the rocket"
    )
    assert float(to_cat) < float(to_rocket)
    [_, to_cat, to_rocket] = found(
        r"bundled/(fare4): the attacked cat is (\S+) similar to the cat and (\S+) to the rocket"
    )
    assert float(to_cat) > float(to_rocket)
    # The service: unharmed by the picture that fools the other encoder.
    found(r"the attacked cat that fools bundled/clean: (safe), since")
    # The correction, and back.
    assert found(r"The portrait of an astronaut: (\w+), since") == ["unsafe"]
    assert found(r"another picture of her: (\w+), since") == ["safe"]
    found(r"After going back to version \w{16}: (unsafe) again, with the same evidence.*review\.decide.*is sound\.")
    # The audit: a row for each encoder and label, none of the clean encoder's verdicts left.
    rows = re.findall(r"\| bundled/(\w+) \| linf 4/255, 20 steps \| (\w+) \| (\d+) \| \S+ \S+ \S+ \| (\S+)", said)
    assert [row[:3] for row in rows] == [
        ("clean", "safe", "8"), ("clean", "unsafe", "4"), ("fare4", "safe", "8"), ("fare4", "unsafe", "4")
    ]  # fmt: skip
    assert float(rows[0][3]) < float(rows[2][3])
    assert run.stdout.splitlines()[-1].startswith("tutorial: everything came out as the text says; ")
    # What it leaves behind, and what it does not.
    assert sorted(path.name for path in out.iterdir()) == ["attack.png", "audit.html"]
    with Image.open(out / "attack.png") as sheet:
        assert sheet.width > 3 * 256
    assert "<html" in (out / "audit.html").read_text("utf8")
    assert list(scratch.glob("hardlook-tutorial-*")) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "scratch"]
