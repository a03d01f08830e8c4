"""The threshold explorer without scripts: what the form says, what came of it, and what to do with it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from perception.verdict import DecisionPolicy
from service.console.tradeoff import HEIGHT, WIDTH, tradeoff
from service.testing import publish, toy_pools, toy_settings
from service.wire_audits import CurvePoint, RatesItem, ShareItem, TriedPolicy
from tests.api.conftest import ToyClip, served
from tests.console.conftest import Console, StartConsole, Visitor
from tests.console.test_audits import audited, words
from tests.service.audit_folders import FINISHED_S
from tests.service.key_files import key_of

PAGE = "/console/thresholds"


@pytest.fixture(scope="module")
def visitor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visitor]:
    """Somebody who may see the page, where there is one audit, of what is deployed."""
    folder = tmp_path_factory.mktemp("console")
    publish(folder, ToyClip(), toy_pools())
    audited(folder)
    key_of(folder, "metrics")
    settings = toy_settings(folder, keys_file=folder / "keys.json", audits=folder / "audits")
    with served(settings, ToyClip()) as client:
        yield Console(client, folder).visitor("pools:write")


def row(text: str, name: str) -> list[str]:
    """Shares of a row of the table of rates: deployed clean, attacked, tried clean, attacked."""
    [line] = re.findall(rf'<th scope="row">{name}</th>(.*?)</tr>', text, re.S)
    return re.findall(r"(\d+\.\d %) <span", line)


def values(text: str) -> dict[str, str]:
    """Of the number fields."""
    found = re.findall(r'<input type="number" id="(\w+)"[^>]* value="([^"]*)"', text)
    return dict(found)


def test_it_begins_with_what_is_deployed(visitor: Visitor) -> None:
    text = visitor.page(PAGE)
    assert values(text) == {"k": "5", "min_margin": "0", "min_margin_unsafe": "0", "min_similarity": "-1"}
    assert 'value="mine/toy" selected' in text
    assert "is of what is deployed" in words(text)
    assert row(text, "unsafe called safe") == ["0.0 %", "50.0 %"] * 2
    assert "These are the defaults" in words(text)


def test_another_policy_is_tried_beside_it(visitor: Visitor) -> None:
    text = visitor.page(PAGE, min_margin="0.2", min_margin_unsafe="0.15")
    assert values(text)["min_margin"] == "0.2"
    assert row(text, "unsafe called safe") == ["0.0 %", "50.0 %", "0.0 %", "0.0 %"]
    assert row(text, "safe to review") == ["0.0 %", "0.0 %", "50.0 %", "50.0 %"]
    said = words(text)
    assert DecisionPolicy(min_margin=0.2, min_margin_unsafe=0.15).version in said
    assert "HARDLOOK_POLICY_MIN_MARGIN=0.2 HARDLOOK_POLICY_MIN_MARGIN_UNSAFE=0.15" in said
    assert "HARDLOOK_POLICY_K" not in said
    command = "hardlook-lab calibrate mine --system toy --out policy.json --max-false-negative 0 --max-false-positive 0"
    assert command in said
    assert "rates of any other policy" in said.lower()


def test_a_vote_names_its_voters(visitor: Visitor) -> None:
    said = words(visitor.page(PAGE, rule="vote", k="3"))
    assert "HARDLOOK_POLICY_RULE=vote HARDLOOK_POLICY_K=3" in said


def test_the_chart_has_words_and_no_colours(visitor: Visitor) -> None:
    text = visitor.page(PAGE, min_margin="0.2")
    [svg] = re.findall(r"<svg.*?</svg>", text, re.S)
    assert 'role="img" aria-labelledby="chart-title chart-text"' in svg
    assert "Without a margin 0.0 % of the clean images are left to a person" in words(svg)
    assert "stroke-dasharray" in svg
    assert set(re.findall(r'(?:fill|stroke)="([^"]*)"', svg)) == {"none", "currentColor"}
    assert " style=" not in svg
    assert len(re.findall(r'<th scope="row" class="number">', text)) == 33


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"min_margin": "much"}, "Least margin for safe: 'much' is no number."),
        ({"min_margin": "nan"}, "must be from 0 to 2"),
        ({"min_margin": "-0.1"}, "must be from 0 to 2"),
        ({"min_similarity": "1e9"}, "must be from -1 to 1"),
        ({"k": "2.5"}, "Voters (k): '2.5' is no number."),
        ({"rule": "vote", "k": "4"}, "the audit has recorded 3 neighbours of each pool"),
        ({"rule": "<b>"}, "The rule must be nearest or vote"),
        ({"setting": "linf,0.5,10"}, "was not audited"),
        ({"setting": "x"}, "The attack is none of those that can be chosen."),
        ({"audit": "other/toy"}, "other"),
        ({"audit": "mine/other"}, "no system 'other'"),
        ({"audit": "mine"}, "This cannot be tried"),
        ({"audit": "../mine/toy"}, "This cannot be tried"),
    ],
)
def test_what_cannot_be_tried_is_said_beside_the_form(visitor: Visitor, query: dict[str, str], said: str) -> None:
    response = visitor.get(PAGE, **query)
    assert response.status_code == 400
    assert 'role="alert"' in response.text
    assert said in words(response.text)
    assert "<b>" not in response.text
    assert values(response.text).items() >= {n: v for n, v in query.items() if n in values(response.text)}.items()


def test_an_audit_of_something_else_is_a_warning(start_console: StartConsole, tmp_path: Path) -> None:
    audited(tmp_path, "old", gallery_sha256="ab" * 32, finished_s=FINISHED_S - 5)
    audited(tmp_path, "older", fingerprint="e" * 64, finished_s=FINISHED_S - 9)
    text = start_console(audits=tmp_path / "audits").visitor("pools:write").page(PAGE)
    assert 'value="old/toy" selected' in text
    assert "is not of what is deployed. The pools are others" in words(text).replace("  ", " ")
    assert "older/toy" in text


def test_without_an_audit_there_is_nothing_to_try(start_console: StartConsole, tmp_path: Path) -> None:
    visitor = start_console().visitor("pools:write")
    assert "There is no audit to try thresholds on" in visitor.page(PAGE)
    assert "HARDLOOK_AUDITS names no folder" in words(visitor.page(PAGE)).replace(" names", " names")


def share(value: float) -> ShareItem:
    return ShareItem(count=round(100 * value), total=100, value=value, interval95=(0.0, 1.0))


def rates(negative: float, review: float) -> RatesItem:
    return RatesItem(
        false_negative=share(negative),
        false_positive=share(0),
        review_unsafe=share(review),
        review_safe=share(review),
    )


def test_the_corners_of_the_chart() -> None:
    points = [CurvePoint(min_margin=m, clean=rates(0, m), attacked=rates(1 - m, m)) for m in (0.0, 0.5, 1.0)]
    parameters: dict[str, Any] = {"k": 1, "min_similarity": -1, "min_margin": 0, "min_margin_unsafe": 0}
    tried = TriedPolicy(version="v", rule="nearest", clean=rates(0, 1), attacked=rates(0, 1), **parameters)
    chart = tradeoff(points, [("tried", tried)])
    left, top, right, bottom = chart.frame
    assert 0 < left < right < WIDTH
    assert 0 < top < bottom < HEIGHT
    corners = [(spot.x, spot.y) for spot in chart.attacked]
    assert corners == [(left, top), ((left + right) / 2, (top + bottom) / 2), (right, bottom)]
    assert {spot.y for spot in chart.clean} == {bottom}
    [mark] = chart.marked
    assert (mark.x, mark.y, mark.label) == (right, bottom, "tried")
    assert chart.line(chart.clean[:2]) == f"{left:.1f},{bottom:.1f} {(left + right) / 2:.1f},{bottom:.1f}"
