"""What the bundled robust encoder was asked to keep, by its card, and that the card's figures can be had again."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

import perception
from offline.benchmarks.robustness import RECORDS_NAME, RobustnessPlan, run_robustness
from offline.benchmarks.robustness_records import Accuracy, RecordFile, summarise
from offline.data.archives import data_root

ROOT = Path(perception.__file__).parents[1]
DATA = data_root()
QUERIES = 32


def card(name: str) -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "perception" / name / "card.toml").read_text())["measured"]
    return table


def test_what_the_robust_encoder_was_asked_to_keep() -> None:
    clean, robust = card("bundled/clean"), card("bundled/fare4")
    assert robust["caltech101_1nn"] >= 0.85 * clean["caltech101_1nn"]
    assert robust["tiny_imagenet_zero_shot"] >= clean["tiny_imagenet_zero_shot"] * 2 / 3
    attacked = robust["robustness"]
    assert attacked["linf"] >= attacked["clean"] / 2
    assert clean["robustness"]["linf"] <= 0.05


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not (DATA / "bench").is_dir(), reason="HARDLOOK_DATA has no bench/: figures cannot be re-measured")
@pytest.mark.parametrize("name", ["bundled/clean", "bundled/fare4"])
def test_robustness_figures(name: str, tmp_path: Path) -> None:
    """The first queries of the published run, attacked anew, agree with its figures within their intervals."""
    plan = RobustnessPlan(limit=QUERIES)
    for _ in run_robustness([name], data=DATA, run=tmp_path / "run", plan=plan):
        pass
    (row,) = summarise(RecordFile(tmp_path / "run" / RECORDS_NAME).read())
    found_by_metric: dict[str, Accuracy] = {
        "clean": row.clean,
        **{threat.norm: found for threat, found in row.robust.items()},
    }
    assert found_by_metric.keys() == {"clean", "linf", "l2"}
    for metric, found in found_by_metric.items():
        low, high = found.interval
        slack = 1.0 / QUERIES
        assert low - slack <= card(name)["robustness"][metric] <= high + slack, metric
