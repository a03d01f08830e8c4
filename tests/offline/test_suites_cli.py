"""The suites on the command line: their options, table, notes and JSON."""

import json
from pathlib import Path
from typing import Any

import pytest

from offline.cli import app
from offline.errors import PlanError
from tests.offline import two_afc_layouts
from tests.offline.published_layouts import night_rows
from tests.offline.suite_toys import MAKERS, toys

__all__ = ["toys"]
SUITES = ("nights", "steps", "bapps", "zero-shot", "imagenet", "nsfw", "detector", "dangerous-objects")
PUBLISHED = "fare4-convnext_base_w"


def run(*tokens: str) -> Any:
    return app(["benchmark", *tokens], exit_on_error=False, print_error=False, result_action="return_value")


def test_a_table_with_published_figures_and_flags(
    tmp_path: Path, toys: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MAKERS, PUBLISHED, MAKERS["toy/b"])
    two_afc_layouts.nights(tmp_path / "nights", night_rows(6))
    file = tmp_path / "figures.json"
    tokens = ("--encoder", PUBLISHED, "--encoder", "toy/a", "--data", str(tmp_path), "--json", str(file))
    run("nights", *tokens, "--run", str(tmp_path / "run"), "--steps", "2")
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith(f"| {PUBLISHED} | 6 |"))
    assert "(90.6) !" in row
    assert "(74.3) !" in row
    assert "| toy/a | 6 |" in printed
    assert "Not the published protocol, so that differences from it mean little: steps 2." in printed
    content = json.loads(file.read_text())
    assert (content["suite"], content["departures"]) == ("nights", "steps 2")
    first = content["figures"][0]
    assert (first["encoder"], first["group"], first["name"], first["published"]) == (PUBLISHED, "nights", "clean", 90.6)
    assert first["flagged"] is (abs(first["measured"] - 90.6) > 0.5)
    run("nights", *tokens, "--clean-only")
    printed = capsys.readouterr().out
    assert "linf" not in printed
    assert "Not the published" not in printed
    with pytest.raises(PlanError, match="give --run DIR, or --clean-only"):
        run("nights", *tokens)


@pytest.mark.parametrize("suite", SUITES)
def test_all_suites_take_the_same_options(suite: str) -> None:
    tokens = ["benchmark", suite, "--encoder", "a", "--encoder", "b", "--folder", "f", "--run", "r", "--clean-only"]
    tokens += ["--limit", "3", "--steps", "4", "--square", "5", "--batch", "6", "--seed", "7", "--device", "cuda"]
    tokens += ["--threads", "1", "--data", "d", "--json", "j.json"]
    _, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
    request = bound.arguments["options"].request(suite)
    assert (request.encoders, request.folder, request.run) == (("a", "b"), Path("f"), Path("r"))
    assert (request.limit, request.steps, request.square_queries, request.batch, request.seed) == (3, 4, 5, 6, 7)
    assert (request.clean_only, request.device) == (True, "cuda")
    assert request.departures == "limit 3, steps 4, square 5, seed 7"


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (("--encoder", "a", "--encoder", "a", "--clean-only"), "each once"),
        (("--encoder", "a", "--clean-only", "--limit", "-1"), "0 or more"),
        (("--encoder", "a", "--clean-only", "--batch", "0"), "1 or more"),
    ],
)
def test_impossible_requests(tokens: tuple[str, ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        run("nights", *tokens)


def test_names_of_encoders_that_no_plan_could_have(tmp_path: Path) -> None:
    from offline.benchmarks.suites import SuiteRequest

    names = ("visual:card:/a/b.pt", "visual?card?/a/b.pt", "hf-hub:" + "x" * 100)
    systems = SuiteRequest(names, tmp_path, clean_only=True).systems
    assert [system.encoder for system in systems] == list(names)
    assert len({system.name for system in systems}) == 3
    assert all(len(system.name) <= 80 for system in systems)
