"""`hardlook-lab invert image` and `invert table` from end to end, and what a user can mend in one line."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from offline.cli import app
from offline.errors import OfflineError
from perception.errors import UnknownEncoder
from tests.offline.inversion_toys import write_images


def lab(*arguments: str) -> None:
    app(["invert", *arguments], result_action="return_value", exit_on_error=False, print_error=False)


@pytest.mark.slow
def test_images_are_inverted_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = write_images(tmp_path / "images", ["a.png", "b.png"])
    run = tmp_path / "run"
    names = [word for name in ("bundled/clean", "bundled/fare4") for word in ("--encoder", name)]
    images = [word for path in paths for word in ("--image", str(path))]
    asked = [*names, *images, "--seed", "3", "--steps", "3", "--run", str(run), "--json", str(tmp_path / "found.json")]
    lab("image", *asked)
    words = capsys.readouterr().out
    assert "bundled/fare4" in words
    assert "l2 radius 57.14 at its own size" in words
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == json.loads((run / "results.json").read_text())
    assert found["optimiser"]["steps"] == 3
    for record in found["reconstructions"]:
        assert record["similarity"] >= record["start_similarity"]
        folder = run / "reconstructions" / record["encoder"].replace("/", "-")
        assert (folder / f"{record['target']}-3.png").is_file()
    assert (run / "grid.png").is_file()
    assert (run / "preview.png").is_file()

    # 'bundled/lipsim' takes pictures of another size, and has no text tower.
    judges = ["--evaluate", "bundled/fare4", "--evaluate", "bundled/lipsim", "--resamples", "20"]
    out = ["--csv", str(tmp_path / "table.csv"), "--json", str(tmp_path / "table.json")]
    lab("table", "--run", str(run), *judges, *out)
    words = capsys.readouterr().out
    assert "| reconstructed by | bundled/fare4 | bundled/lipsim |" in words
    table = json.loads((tmp_path / "table.json").read_text())
    own = [record["similarity"] for record in found["reconstructions"] if record["encoder"] == "bundled/fare4"]
    cells = {(cell["generator"], cell["evaluator"]): cell["value"] for cell in table["cells"]}
    assert len(cells) == 4
    assert cells["bundled/fare4", "bundled/fare4"] == pytest.approx(sum(own) / 2, abs=1e-4)
    assert len(list(csv.reader((tmp_path / "table.csv").read_text().splitlines()))) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", "0"), "steps must be at least 1, got 0"),
        (("--radius", "0"), "radius must be positive and finite, got 0.0"),
        (("--radius", "nan"), "radius must be positive and finite, got nan"),
        (("--radius", "inf"), "radius must be positive and finite, got inf"),
        (("--empty-seed",), "seeds must be one or several different ones"),
        (("--seed", "1", "--seed", "1"), "seeds must be one or several different ones"),
        (("--seed", "-1"), "a seed must not be negative, got -1"),
        (("--batch-size", "0"), "batch must be at least 1, got 0"),
        (("--empty-image",), "an inversion needs at least one target"),
        (("--encoder", "bundled/clean"), "encoders must be one or several different ones"),
        (("--optimiser", "multi-view", "--radius", "3"), "multi-view optimiser has no radius"),
        (("--image", "absent.png"), r"absent\.png: there is no such image file"),
        (("--image", "absent.png", "--folder", "."), "give --image or --folder, not both"),
    ],
)
def test_what_makes_no_sense_is_said_at_once(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(OfflineError, match=message):
        lab("image", "--encoder", "bundled/clean", "--run", str(tmp_path / "run"), *arguments)
    assert not (tmp_path / "run").exists()


def test_no_encoder_works_before_all_are_known(tmp_path: Path) -> None:
    (path,) = write_images(tmp_path, ["a.png"])
    with pytest.raises(UnknownEncoder):
        lab(
            *("image", "--encoder", "bundled/clean", "--encoder", "nonsense"),
            *("--image", str(path), "--run", str(tmp_path / "run")),
        )
    assert not (tmp_path / "run").exists()


def test_an_unknown_optimiser_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["invert", "image", "--encoder", "bundled/clean", "--run", str(tmp_path), "--optimiser", "sgd"]
    with pytest.raises(SystemExit) as caught:
        app(arguments)
    assert caught.value.code != 0
    assert "apgd" in "".join(capsys.readouterr())


def test_a_broken_image_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff not an image")
    words = ["invert", "image", "--encoder", "bundled/clean", "--image", str(tmp_path / "broken.jpg"), "--run"]
    program = [sys.executable, "-c", "from offline.cli import main; main()", *words, str(tmp_path / "run")]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "broken.jpg: cannot be read as an image" in done.stderr


def test_a_table_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(OfflineError, match="is no run directory of `invert image`"):
        lab("table", "--run", str(tmp_path))
