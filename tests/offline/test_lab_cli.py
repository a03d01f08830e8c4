"""hardlook-lab: errors that a user can mend are one line and exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest

from offline import cli


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    program = "from offline.cli import main; main()"
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("benchmark", "embedding", "--encoder", "nonsense"), "unknown encoder 'nonsense'"),
        (("benchmark", "embedding", "--encoder", "local-dir:/no/such/folder"), "folder not found"),
        (("pretrain", "no-such-plan.toml", "--run", "r"), "No such file"),
    ],
)
def test_what_a_user_can_mend_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_missing_data_is_named(tmp_path: Path) -> None:
    done = run("benchmark", "embedding", "--encoder", "bundled/clean", "--data", str(tmp_path))
    assert done.returncode == 2
    assert "caltech101_128px.zip" in done.stderr


def test_encoders_lists_the_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    cli.encoders()
    listed = capsys.readouterr().out
    assert "fare4-convnext_base_w" in listed
    assert "bundled/clean" in listed


def test_benign_hits_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.draw_benign_hits(out=tmp_path / "new")
    assert capsys.readouterr().out.count(".png") == 4
    assert len(list((tmp_path / "new").glob("*.png"))) == 4


def test_a_plan_with_a_wrong_key_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text("sed = 0\n")
    done = run("pretrain", str(tmp_path / "plan.toml"), "--run", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "unexpected keyword argument 'sed'" in done.stderr
    assert "Traceback" not in done.stderr
