"""Near-duplicates: retrieval within groups against naive twins, malformed tables, the data at hand, and the command."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from offline import cli
from offline.benchmarks.alignment_tables import group_table, retrieval_table, variant_table
from offline.benchmarks.near_duplicates import ARCHIVES, NearDuplicateBenchmark, read_groups
from offline.benchmarks.retrieval import average_precision
from offline.errors import DataError, DataMissing
from perception.intervals import wilson_interval
from perception.testing import ToyEncoder, encoded, synthetic_image
from tests.offline.alignment_layouts import GROUP_COLUMNS, groups_zip, table_zip

DATA = Path(os.environ.get("HARDLOOK_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_data = pytest.mark.skipif(
    not all((DATA / path).is_file() for path in ARCHIVES), reason="HARDLOOK_DATA has no neardup/"
)
ROWS = [("bridge", "original"), ("bridge", "blur"), ("distractor", "x"), ("bridge", "flip"), ("alone", "one"),
        ("tower", "original"), ("tower", "crop"), ("distractor", "y")]  # fmt: skip


def circle(*degrees: float) -> Tensor:
    """Unit embeddings at these angles."""
    angles = torch.tensor([math.radians(angle) for angle in degrees], dtype=torch.float64)
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_closed_forms_on_a_circle(tmp_path: Path) -> None:
    benchmark = NearDuplicateBenchmark(groups_zip(tmp_path / "groups.zip", ROWS), resamples=50)
    # bridge at 0, 10 and 60, a distractor at 30; tower at 180 and 190; the rest far off.
    found = benchmark.judge("e", circle(0, 10, 30, 60, 100, 180, 190, 270))
    bridge, tower = found.groups
    assert (found.images, found.queries) == (8, 5)
    assert [group.group for group in found.groups] == ["bridge", "tower"]
    # 0 finds 10 (1), 30, 60; 10 finds 0, 30, 60: each of both (1 + (1/2 + 2/3) / 2) / 2. 60 finds 30, 100, 10, 0.
    sixty = ((0 + 1 / 3) / 2 + (1 / 3 + 2 / 4) / 2) / 2
    first = (1 + (1 / 2 + 2 / 3) / 2) / 2
    assert bridge.mean_average_precision == pytest.approx((2 * first + sixty) / 3)
    assert bridge.first_right == 2
    assert bridge.worst_pair == pytest.approx(math.cos(math.radians(60)))
    assert bridge.best_outside == pytest.approx(math.cos(math.radians(20)))
    assert bridge.margin == pytest.approx(bridge.worst_pair - bridge.best_outside)
    assert (tower.mean_average_precision, tower.first_right) == (1.0, 2)
    assert tower.margin > 0
    assert found.mean_average_precision.value == pytest.approx((2 * first + sixty + 2) / 5)
    assert found.recall_at_1.value == 0.8
    assert found.recall_at_1.interval == wilson_interval(4, 5)
    by_name = {(v.group, v.variant): v for v in found.variants}
    assert by_name.keys() == {("bridge", "blur"), ("bridge", "flip"), ("tower", "crop")}
    blur, flip = by_name["bridge", "blur"], by_name["bridge", "flip"]
    assert blur.margin == pytest.approx(math.cos(math.radians(10)) - math.cos(math.radians(30)))
    assert flip.margin == pytest.approx(math.cos(math.radians(60)) - math.cos(math.radians(30)))
    assert (blur.found, flip.found) == (True, False)


@pytest.mark.parametrize("seed", range(4))
def test_random_embeddings_against_one_query_at_a_time(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = [str(name) for name in rng.choice(["a", "b", "c", "distractor"], size=24)]
    rows = [(name, str(number)) for number, name in enumerate(names)]
    embeddings = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(24, 5))), dim=1)
    precisions, first = [], 0
    for query, name in enumerate(names):
        if name == "distractor":
            continue
        order = sorted((i for i in range(24) if i != query), key=lambda i: -float(embeddings[query] @ embeddings[i]))
        precisions.append(average_precision(order, [i for i in order if names[i] == name]))
        first += names[order[0]] == name
    found = NearDuplicateBenchmark(groups_zip(tmp_path / "groups.zip", rows), resamples=50).judge("e", embeddings)
    assert found.mean_average_precision.value == pytest.approx(np.mean([p for p in precisions if p is not None]))
    assert found.recall_at_1.value == pytest.approx(first / len(precisions))
    assert sum(group.queries for group in found.groups) == found.queries == len(precisions)


def test_without_distractors_everything_is_found(tmp_path: Path) -> None:
    rows = [("a", "1"), ("a", "2"), ("a", "3")]
    found = NearDuplicateBenchmark(groups_zip(tmp_path / "groups.zip", rows), resamples=2).judge(
        "e", circle(0, 90, 180)
    )
    assert found.mean_average_precision.value == found.recall_at_1.value == 1.0
    (group,) = found.groups
    assert group.best_outside == -1.0
    assert group.margin == pytest.approx(0.0, abs=1e-9)


def test_equal_pictures_come_first_through_an_encoder(tmp_path: Path) -> None:
    same, other = encoded(synthetic_image(1)), [encoded(synthetic_image(n)) for n in range(2, 6)]
    rows = [("a", "1"), ("distractor", "1"), ("a", "2"), ("distractor", "2")]
    files = {"a/1.png": same, "distractor/1.png": other[0], "a/2.png": same, "distractor/2.png": other[1]}
    found = NearDuplicateBenchmark(groups_zip(tmp_path / "groups.zip", rows, files), resamples=2).run(ToyEncoder())
    assert found.recall_at_1.value == 1.0
    assert found.variants[0].similarity == pytest.approx(1.0, abs=1e-6)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    benchmark = NearDuplicateBenchmark(groups_zip(tmp_path / "groups.zip", ROWS))
    with pytest.raises(DataError, match="7 embeddings of 8 images"):
        benchmark.judge("e", circle(*range(7)))
    with pytest.raises(DataError, match="not finite"):
        benchmark.judge("e", circle(*range(7), math.nan))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("b.png", "", "blur"), "row 3: has no group"),
        (("b.png", "a", " "), "row 3: has no variant"),
        (("b.png", "", ""), "row 3: has no group and no variant"),
        (("a.png", "a", "blur"), r"row 3: names 'a\.png' a second time"),
        (("c.png", "a", "blur"), r"row 3: names 'c\.png', which the archive lacks"),
        (("b.png", "a"), "row 3: .*no gaps"),
        (("b.png", "distractor", "x"), "no group of two or more"),
        (("b.png", "b", "x"), "no group of two or more"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, row: tuple[str, ...], message: str) -> None:
    picture = encoded(synthetic_image(0))
    files = {"a.png": picture, "b.png": picture}
    path = table_zip(tmp_path / "g.zip", "groups.csv", GROUP_COLUMNS[:3], [("a.png", "a", "original"), row], files)
    with pytest.raises(DataError, match=message):
        read_groups(path)


def test_another_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no readable groups\.csv"):
        read_groups(table_zip(tmp_path / "labels.zip", "labels.csv", ("file", "class"), [("a.png", "a")]))
    with pytest.raises(DataError, match="no group of two or more"):
        read_groups(table_zip(tmp_path / "empty.zip", "groups.csv", GROUP_COLUMNS, []))
    with pytest.raises(DataMissing):
        read_groups(tmp_path / "absent.zip")
    files = {f"{group}/{variant}.png": b"no image" for group, variant in ROWS}
    broken = NearDuplicateBenchmark(groups_zip(tmp_path / "broken.zip", ROWS, files))
    with pytest.raises(DataError, match=r"groups\.csv, row 2: bridge/original\.png cannot be read"):
        broken.run(ToyEncoder())


def test_tables_have_one_row_an_encoder_and_mark_what_is_lost(tmp_path: Path) -> None:
    benchmark = NearDuplicateBenchmark(groups_zip(tmp_path / "groups.zip", ROWS), resamples=50)
    angles = (0, 10, 30, 60, 100, 180, 190, 270)
    results = [benchmark.judge(name, circle(*angles)) for name in ("one", "two")]
    assert retrieval_table(results).count("\n") == 2 + 2
    assert group_table(results).count("\n") == 2 + 4
    lines = variant_table(results).splitlines()
    assert lines[0] == "| group | version | one | two |"
    (flip,) = (line for line in lines if "| flip |" in line)
    assert flip.count(" !") == 2
    (blur,) = (line for line in lines if "| blur |" in line)
    assert "!" not in blur


def test_the_command_writes_both_archives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archives = [groups_zip(tmp_path / name, ROWS) for name in ("first.zip", "second.zip")]
    named = [part for path in archives for part in ("--archive", str(path))]
    command = ["benchmark", "near-duplicates", *named, "--encoder", "bundled/clean", "--json", str(tmp_path / "f.json")]
    cli.app(command, result_action="return_value")
    printed = capsys.readouterr().out
    assert "first.zip, by group" in printed
    figures = json.loads((tmp_path / "f.json").read_text())
    assert [row["archive"] for row in figures["rows"]] == ["first.zip", "second.zip"]
    assert figures["rows"][0]["groups"][0]["group"] == "bridge"
    assert {variant["variant"] for variant in figures["rows"][0]["variants"]} == {"blur", "flip", "crop"}


@needs_data
def test_the_data_at_hand_has_the_groups_that_it_is_said_to_have() -> None:
    versions, landmarks = (NearDuplicateBenchmark(DATA / path) for path in ARCHIVES)
    sizes = {name: sum(image.group == name for image in versions.images) for name in ("pdq_bridge", "ukbench00120")}
    assert sizes == {"pdq_bridge": 20, "ukbench00120": 5}
    assert len(versions.images) == 51
    assert versions.images[0].variant == "aaa-orig"
    found = landmarks.judge(
        "e", torch.nn.functional.normalize(torch.ones(18, 2) + torch.arange(36.0).view(18, 2), dim=1)
    )
    assert {group.group: group.queries for group in found.groups} == {
        "sacre_coeur": 10, "london_bridge": 4, "united_states_capitol": 2, "st_pauls_cathedral": 2,
    }  # fmt: skip
