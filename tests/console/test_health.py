"""Health as a page: what serves for everybody, what waits and was counted for those who may read metrics."""

import re

import pytest

from perception.testing import encoded, synthetic_image
from service.console.labels import labels_in_words
from service.console.pages.health import Figures
from service.telemetry import Metrics
from tests.console.conftest import Console, StartConsole

PATH = "/console/health"
PNG = encoded(synthetic_image(4244))
HEADING = re.compile(r"<h2[^>]*>(.*?)</h2>")


def test_everybody_sees_what_serves(start_console: StartConsole) -> None:
    console = start_console(policy_min_margin=0.125, policy_min_margin_unsafe=0.25, policy_min_similarity=0.5)
    pools = console.client.get("/pools", headers={"X-API-Key": console.key("classify")}).json()
    text = console.visitor("classify").page(PATH)
    assert "ready" in text
    for value in (pools["model"]["name"], pools["model"]["fingerprint"], pools["policy"]["version"], "fp32", "cpu"):
        assert value in text
    for threshold in ("+0.1250", "+0.2500", "+0.5000"):
        assert threshold in text
    assert pools["collections"][0]["version"] in text
    assert "buffer 3, safe 3, unsafe 3, 9 in all" in text


def test_who_only_classifies_sees_no_more(console: Console) -> None:
    text = console.visitor("classify").page(PATH)
    assert HEADING.findall(text) == ["Model", "Policy"]
    assert "How full it is" not in text
    assert "sqlite" not in text


@pytest.mark.parametrize(
    ("scope", "more"),
    [
        ("review", ["Catalogue", "Pictures", "Review queue"]),
        ("pools:write", ["Catalogue", "Pictures", "Shadows"]),
    ],
)
def test_other_scopes_see_what_is_theirs(console: Console, scope: str, more: list[str]) -> None:
    assert HEADING.findall(console.visitor(scope).page(PATH)) == ["Model", "Policy", *more]  # type: ignore[arg-type]


def test_figures_are_those_of_the_metrics(start_console: StartConsole) -> None:
    console = start_console(max_queue=77, max_requests=33, max_jobs=5)
    key = console.key("classify", "metrics")
    for _ in range(3):
        headers = {"X-API-Key": key}
        assert console.client.post("/classify", headers=headers, files={"a": ("a.png", PNG)}).status_code == 200
    [verdict, n] = re.findall(
        r'hardlook_verdicts_total\{pool="[a-z]+",verdict="([a-z]+)"\} ([0-9.]+)',
        console.client.get("/metrics", headers={"X-API-Key": key}).text,
    )[0]
    text = console.visitor("metrics").page(PATH)
    assert f"<dt>{verdict}</dt><dd>{int(float(n))}</dd>" in text
    rows = re.findall(r'<th scope="row">([^<]+)</th><td class="number">(\d+)</td><td class="number">([^<]+)</td>', text)
    limits = {name: limit for name, _, limit in rows}
    assert limits["Frames for the encoder"] == "77"
    assert limits["Requests in progress"] == "33"
    assert limits["Jobs that wait or run"] == "5"
    assert limits["Verdicts, to be recorded"] == "10000"


def test_the_refresh_takes_the_part_that_it_replaces(console: Console) -> None:
    text = console.visitor("classify").page(PATH)
    [part] = re.findall(r'<div id="health"[^>]*>', text)
    assert 'hx-get="/console/health"' in part
    assert 'hx-trigger="every 5s"' in part
    assert 'hx-select="#health"' in part
    assert "data-quiet" in part
    assert '<a class="button quiet" href="/console/health">Refresh</a>' in text


def test_looking_costs_no_image_of_the_rate_limit(start_console: StartConsole) -> None:
    console = start_console(rate_limit="2/minute")
    visitor = console.visitor("admin")
    for _ in range(5):
        visitor.page(PATH)


def test_without_a_catalogue_it_is_said(start_console: StartConsole) -> None:
    text = start_console(catalog="off").visitor("admin").page(PATH)
    assert "Turned off: nothing can be changed here" in text
    assert "Verdicts, to be recorded" not in text


def test_figures_add_up_what_a_label_has() -> None:
    metrics = Metrics()
    for pool in ("safe", "unsafe", "unsafe"):
        metrics.verdict("unsafe", pool, 0.1)
    metrics.watch_queue("encoder", lambda: 3, 7)
    figures = Figures(metrics)
    assert figures.by("hardlook_verdicts_total", "verdict") == {"unsafe": 3}
    assert figures.by("hardlook_queue_depth", "queue") == {"encoder": 3}
    assert figures.by("hardlook_queue_limit", "queue") == {"encoder": 7}
    assert figures.one("hardlook_images_judged_total") == 3
    assert figures.one("nothing") is None


def test_many_labels_are_cut() -> None:
    assert labels_in_words({}) == "0 in all"
    assert labels_in_words({"a": 1, "b": 2}) == "a 1, b 2, 3 in all"
    many = labels_in_words({f"l{number}": 1 for number in range(40)})
    assert many.endswith("l11 1, and 28 more labels, 40 in all")
