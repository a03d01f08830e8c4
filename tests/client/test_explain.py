"""Both clients and the command line ask why."""

import json
from pathlib import Path
from typing import Any

import pytest

from service.client import HardlookClient, ImageUnreadable, NotFound
from service.client.cli import main
from service.wire_explain import AttributionItem, CellItem
from tests.client.conftest import Connect
from tests.client.scripted import response, scripted


@pytest.mark.parametrize("form", ["bytes", "path", "pair"])
def test_one_image_in_every_form(connect: Connect, own: str, images: dict[str, Path], form: str) -> None:
    path = images["unsafe"]
    sent: dict[str, tuple[Any, str]] = {
        "bytes": (path.read_bytes(), "0"), "path": (path, "unsafe.png"), "pair": (("an id", path), "an id"),
    }  # fmt: skip
    given, id = sent[form]
    answer = connect(own).explain(given)
    assert (answer.result.id, answer.result.verdict) == (id, "unsafe")
    assert len(answer.attributions) == 2
    assert answer.attributions[0].exemplar == "unsafe-0"
    assert answer.attributions[0].similarity == pytest.approx(1.0, abs=1e-5)


def test_every_parameter_arrives(connect: Connect, own: str, images: dict[str, Path]) -> None:
    client = connect(own)
    answer = client.explain(images["safe"], ["buffer-1", "unsafe-2"], k=1)
    assert [found.exemplar for found in answer.attributions] == ["buffer-1", "unsafe-2"]
    assert len(answer.result.neighbors) == 3
    assert client.explain(images["safe"], attribute=False).attributions == []
    with pytest.raises(NotFound):
        client.explain(images["safe"], ["nobody"])


def test_bad_arguments_are_not_sent(connect: Connect, own: str, images: dict[str, Path], tmp_path: Path) -> None:
    client = connect(own)
    with pytest.raises(ValueError, match="at most 2"):
        client.explain(images["safe"], ["a", "b", "c"])
    with pytest.raises(TypeError, match="an image is bytes"):
        client.explain([images["safe"], images["unsafe"]])  # type: ignore[arg-type]
    with pytest.raises(ImageUnreadable):
        client.explain(tmp_path / "nothing.png")


def test_it_is_asked_again_when_all_places_are_taken(connect: Connect, own: str, images: dict[str, Path]) -> None:
    right = connect(own).explain(images["safe"], attribute=False).model_dump_json().encode()
    full = {"type": "urn:hardlook:problem:overloaded", "title": "t", "status": 503, "detail": "d",
            "instance": "i", "request_id": "r"}  # fmt: skip
    refusal = response(503, json.dumps(full).encode(), "application/problem+json")
    with scripted(explain=[refusal, response(200, right)]) as server:
        assert connect(server.url).explain(images["safe"]).result.verdict == "safe"
        assert len(server.received) == 2


def run(capsys: pytest.CaptureFixture[str], *tokens: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["explain", *tokens])
    return int(ended.value.code or 0), capsys.readouterr().out


def test_the_command_prints_for_a_person(own: str, images: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, str(images["unsafe"]), "--url", own)
    lines = text.splitlines()
    assert (code, lines[0]) == (0, "unsafe.png  unsafe")
    assert any(line.startswith("pool  unsafe  1.0000  unsafe-0") for line in lines)
    assert any(line.startswith("-  margin ") or "less similar than" in line for line in lines)
    maps = [line for line in lines if len(line.split(" ")) == 16 and set(line) <= set("#+.-= ")]
    assert len(maps) == 2 * 16
    assert any("row " in line and "of 16" in line for line in lines)


def test_the_command_prints_json(own: str, images: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (str(images["safe"]), "--url", own, "--json", "--against", "buffer-0", "--against", "buffer-1")
    code, text = run(capsys, *arguments)
    answer = json.loads(text)
    assert code == 0
    assert [found["exemplar"] for found in answer["attributions"]] == ["buffer-0", "buffer-1"]
    code, text = run(capsys, *arguments[:4], "--decision-only")
    assert json.loads(text)["attributions"] == []


def test_the_map_has_the_sign_and_the_strength_of_each_cell(capsys: pytest.CaptureFixture[str]) -> None:
    from service.client.commands.explain import _print_attribution

    item = AttributionItem(
        exemplar="a", label="safe", source="", judged_similarity=None, similarity=0.5, baseline_similarity=0.1,
        grid=[[1.0, 0.2], [0.0, -0.5]], completeness_error=0.0, steps=8,
        supporting=[CellItem(row=1, column=1, value=1.0, text="row 1, column 1 of 2")], opposing=[],
    )  # fmt: skip
    _print_attribution(item)
    assert capsys.readouterr().out.splitlines()[-2:] == ["# +", ". ="]


def test_both_clients_have_it_described() -> None:
    with HardlookClient("http://127.0.0.1:9") as client:
        assert "Ask why an image has its verdict" in (client.explain.__doc__ or "")
