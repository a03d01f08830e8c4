"""Figures beside published ones: gaps, flags, the table and JSON."""

import json

import pytest

from offline.benchmarks.intervals import Accuracy
from offline.benchmarks.published import Figure, figure_table, figures_as_json, published_figure
from offline.errors import DataError
from perception.intervals import wilson_interval


def figure(measured: float, published: float | None, *, encoder: str = "e", name: str = "clean") -> Figure:
    return Figure(encoder, "nights", name, measured, 1000, published)


@pytest.mark.parametrize(
    ("measured", "gap", "flagged"),
    [(90.6, 0.0, False), (91.1, 0.5, False), (90.1, -0.5, False), (91.11, 0.51, True), (90.09, -0.51, True)],
)
def test_more_than_half_a_point_to_either_side_is_flagged(measured: float, gap: float, flagged: bool) -> None:
    of = figure(measured, 90.6)
    assert (of.gap, of.flagged) == (gap, flagged)


def test_what_is_not_published_has_no_gap() -> None:
    assert (figure(3.0, None).gap, figure(3.0, None).flagged) == (None, False)


def test_published_figures_come_from_the_card_by_whatever_name() -> None:
    assert published_figure("fare4-convnext_base_w", "nights", "l2_3") == 66.1
    assert published_figure("visual:fare4-convnext_base_w:some/file.pt", "bapps", "clean") == 74.0
    for group, name in (("nights", "other"), ("nothing", "clean"), ("nights", "table")):
        assert published_figure("fare4-convnext_base_w", group, name) is None
    assert published_figure("local-dir:somewhere", "nights", "clean") is None


def test_a_share_brings_its_interval_and_a_mean_brings_none() -> None:
    share = Figure.of_share("fare4-convnext_base_w", "nights", "clean", Accuracy(1653, 1824))
    assert share.measured == pytest.approx(100 * 1653 / 1824)
    assert share.interval == pytest.approx([100 * x for x in wilson_interval(1653, 1824)])
    assert (share.count, share.published, share.flagged) == (1824, 90.6, False)
    mean = Figure.of_mean("fare4-convnext_base_w", "bapps", "clean", 0.7, 36344)
    assert (mean.measured, mean.interval, mean.published, mean.flagged) == (70.0, None, 74.0, True)


def test_the_table_has_one_row_an_encoder_and_a_table_a_group() -> None:
    figures = [
        figure(90.0, 90.6),
        figure(74.5, 74.3, name="linf_4_255"),
        figure(50.0, None, encoder="a|b"),
        Figure.of_share("e", "bapps_cnn", "clean", Accuracy(3, 4)),
    ]
    lines = figure_table(figures).splitlines()
    assert lines[:4] == [
        "| encoder | n | nights clean | nights linf_4_255 |",
        "| --- | --- | --- | --- |",
        "| e | 1000 | 90.00 (90.6) ! | 74.50 (74.3) |",
        "| a\\|b | 1000 | 50.00 (-) | not measured |",
    ]
    assert lines[5:8] == [
        "| encoder | n | bapps_cnn clean |",
        "| --- | --- | --- |",
        "| e | 4 | 75.00 [30.1, 95.4] (-) |",
    ]
    assert "0.5 points" in lines[-1]


def test_json_holds_everything() -> None:
    figures = figures_as_json([figure(90.0, 90.6), Figure.of_share("e", "g", "clean", Accuracy(1, 2))])
    assert json.loads(json.dumps(figures)) == figures
    assert figures[0] == {
        "encoder": "e",
        "group": "nights",
        "name": "clean",
        "measured": 90.0,
        "interval95": None,
        "count": 1000,
        "published": 90.6,
        "gap": -0.6,
        "flagged": True,
    }
    assert figures[1]["interval95"] == [round(100 * x, 4) for x in wilson_interval(1, 2)]


@pytest.mark.parametrize(("measured", "count"), [(float("nan"), 3), (float("inf"), 3), (50.0, 0)])
def test_impossible_figures(measured: float, count: int) -> None:
    with pytest.raises(DataError, match="nights clean"):
        Figure("e", "nights", "clean", measured, count, None)
