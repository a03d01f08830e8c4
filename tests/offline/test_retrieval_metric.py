"""Retrieval metrics: the vector of the methods sheet and the two values it must not give, twins, the ground truth."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offline.benchmarks.retrieval import (
    ClassRankings,
    GroundTruth,
    QueryScores,
    RevisitedQuery,
    average_precision,
    rank,
)
from offline.errors import DataError

RANKING, POSITIVES, JUNK = [7, 3, 5, 1, 9, 2], {1, 2, 3}, {7, 9}


def trapezoids(ranking: Sequence[int], positives: set[int]) -> float:
    """The area under the curve of precision against recall, walked item by item."""
    area, found, recall, precision = 0.0, 0, 0.0, 1.0
    for seen, row in enumerate(ranking, 1):
        found += row in positives
        next_recall, next_precision = found / len(positives), found / seen
        area += (next_recall - recall) * (next_precision + precision) / 2
        recall, precision = next_recall, next_precision
    return area


def test_the_vector() -> None:
    assert average_precision(RANKING, POSITIVES, JUNK) == pytest.approx(0.763889, abs=5e-7)
    # Junk that stays in the ranking, and rectangles instead of trapezoids, are the two usual mistakes.
    assert average_precision(RANKING, POSITIVES) == pytest.approx(0.372222, abs=5e-7)
    ranks = [0, 2, 3]
    rectangles = sum((j + 1) / (r + 1) for j, r in enumerate(ranks)) / 3
    assert rectangles == pytest.approx(0.805556, abs=5e-7)
    assert average_precision(RANKING, POSITIVES, JUNK) != pytest.approx(rectangles, abs=0.04)


@given(st.permutations(range(9)), st.sets(st.integers(0, 8), min_size=1), st.sets(st.integers(0, 8)))
def test_it_is_the_area_under_the_curve_of_the_ranking_without_junk(
    ranking: list[int], positives: set[int], junk: set[int]
) -> None:
    junk -= positives
    found = average_precision(ranking, positives, junk)
    assert found == pytest.approx(trapezoids([row for row in ranking if row not in junk], positives))
    assert found is not None
    assert 0 < found <= 1


def test_first_last_and_absent() -> None:
    assert average_precision([4, 2, 0, 1, 3], {4, 2}) == 1
    assert average_precision([1, 3, 4], {4}) == pytest.approx((0 / 2 + 1 / 3) / 2)
    assert average_precision([1, 4], {4, 8}) == pytest.approx((0 / 1 + 1 / 2) / 2 / 2)  # 8 is never found
    assert average_precision([1, 2], {8}) == 0
    assert average_precision([1, 2], set(), {1}) is None


def test_an_impossible_ranking_is_refused() -> None:
    with pytest.raises(DataError, match="ranked twice"):
        average_precision([1, 2, 1], {1})
    with pytest.raises(DataError, match="row 2 is both"):
        average_precision([1, 2], {1, 2}, {2})


# --- revisited sets --------------------------------------------------------------------------------------------------


def query(easy: set[int], hard: set[int], junk: set[int]) -> RevisitedQuery:
    return RevisitedQuery("q", (0, 0, 1, 1), frozenset(easy), frozenset(hard), frozenset(junk))


def test_each_difficulty_has_its_own_positives_and_junk() -> None:
    q = query({0, 1}, {2}, {3})
    assert [sorted(rows) for rows in q.relevant("easy")] == [[0, 1], [2, 3]]
    assert [sorted(rows) for rows in q.relevant("medium")] == [[0, 1, 2], [3]]
    assert [sorted(rows) for rows in q.relevant("hard")] == [[2], [0, 1, 3]]
    with pytest.raises(DataError, match="'expert'"):
        q.relevant("expert")  # type: ignore[arg-type]


def test_queries_without_positives_are_skipped_and_not_counted_as_zero() -> None:
    truth = GroundTruth(tuple("abcd"), (query({0}, {1}, {2}), query({3}, set(), set())))
    rankings = [[2, 1, 0, 3], [0, 1, 2, 3]]
    easy = truth.average_precisions(rankings, "easy")
    assert list(easy.by_query) == [1.0, (0 / 3 + 1 / 4) / 2]  # 2 and 1 are junk to the first
    hard = truth.average_precisions(rankings, "hard")
    assert hard.by_query == (1.0, None)
    assert (hard.judged, hard.mean) == (1, 1.0)
    medium = truth.average_precisions(rankings, "medium")
    assert medium.mean == pytest.approx((1 + 1 / 8) / 2)


def test_a_mean_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="none of 2 queries"):
        _ = QueryScores((None, None)).mean


@pytest.mark.parametrize("rankings", [[[0, 1, 2]], [[0, 1, 2, 2]], [[0, 1, 2, 4]], [], [[0, 1, 2, 3]] * 2])
def test_rankings_must_be_of_the_whole_database(rankings: list[list[int]]) -> None:
    truth = GroundTruth(tuple("abcd"), (query({0}, {1}, {2}),))
    with pytest.raises(DataError, match="ranking"):
        truth.average_precisions(rankings, "easy")


def layout() -> dict[str, Any]:
    return {
        "imlist": ["a", "b", "c", "d"],
        "qimlist": ["q"],
        "gnd": [{"bbx": [1.5, 2, 30, 40], "easy": [0], "hard": [2, 1], "junk": []}],
    }


def test_ground_truth_is_read(tmp_path: Path) -> None:
    (tmp_path / "gnd.json").write_text(json.dumps(layout()))
    truth = GroundTruth.load(tmp_path / "gnd.json")
    assert truth.images == ("a", "b", "c", "d")
    assert truth.queries == (
        RevisitedQuery("q", (1.5, 2.0, 30.0, 40.0), frozenset({0}), frozenset({1, 2}), frozenset()),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"easy": [4]}, "integers below 4"),
        ({"easy": [-1]}, "integers below 4"),
        ({"easy": [True]}, "integers below 4"),
        ({"easy": [0.0]}, "integers below 4"),
        ({"easy": [2]}, "listed twice"),
        ({"easy": [0, 0]}, "listed twice"),
        ({"easy": None}, "TypeError"),
        ({"bbx": [1, 2, 3]}, "bbx of q"),
        ({"bbx": [3, 2, 1, 4]}, "bbx of q"),
        ({"bbx": [0, 0, float("inf"), 4]}, "bbx of q"),
    ],
)
def test_a_damaged_query_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    table = layout()
    table["gnd"][0] |= change
    (tmp_path / "gnd.json").write_text(json.dumps(table))
    with pytest.raises(DataError, match=message):
        GroundTruth.load(tmp_path / "gnd.json")


@pytest.mark.parametrize(
    "change", [{"imlist": ["a", "a", "c", "d"]}, {"imlist": [1, 2, 3, 4]}, {"qimlist": ["q", "r"]}, {"gnd": None}]
)
def test_a_damaged_table_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "gnd.json").write_text(json.dumps(layout() | change))
    with pytest.raises(DataError, match="no ground truth"):
        GroundTruth.load(tmp_path / "gnd.json")


@pytest.mark.parametrize("content", [b"", b"[]", b"\x80\x04}.", b"{}"])
def test_what_is_no_json_object_is_refused_pickles_included(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "gnd.pkl").write_bytes(content)
    with pytest.raises(DataError, match="no ground truth"):
        GroundTruth.load(tmp_path / "gnd.pkl")
    with pytest.raises(DataError):
        GroundTruth.load(tmp_path / "absent")


# --- rankings and classes --------------------------------------------------------------------------------------------


def test_ranking_is_by_cosine_and_the_first_of_equals_comes_first() -> None:
    gallery = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.6, 0.8]])
    assert rank(gallery[1:2], gallery).tolist() == [[1, 4, 0, 2, 3]]
    # A query never meets itself, though its twin is as similar.
    own = rank(gallery, gallery, exclude_self=True)
    assert own.shape == (5, 4)
    assert own[2].tolist() == [0, 4, 1, 3]
    assert own[0].tolist() == [2, 4, 1, 3]


def test_rankings_of_what_cannot_be_compared_are_refused() -> None:
    with pytest.raises(DataError, match="not finite"):
        rank(torch.tensor([[float("nan"), 0.0]]), torch.eye(2))
    with pytest.raises(DataError, match="do not fit"):
        rank(torch.ones(1, 3), torch.eye(2))
    with pytest.raises(DataError, match="left out"):
        rank(torch.ones(1, 2), torch.eye(2), exclude_self=True)


def test_class_rankings_by_hand() -> None:
    gallery = ["a", "b", "a", "c"]
    scores = ClassRankings(torch.tensor([[2, 1, 3], [0, 3, 2], [1, 0, 3], [0, 1, 2]]), gallery, gallery)
    # The second and the fourth are the only ones of their classes.
    assert scores.precisions_at(1).by_query == (1.0, None, 0.0, None)
    assert scores.precisions_at(2).by_query == (0.5, None, 0.5, None)
    assert scores.precisions_at(2).mean == 0.5
    assert scores.average_precisions().by_query == (1.0, None, 0.25, None)


@given(st.lists(st.sampled_from("abc"), min_size=3, max_size=8), st.integers(0, 1000))
def test_class_rankings_agree_with_the_twin(labels: list[str], seed: int) -> None:
    rows = torch.nn.functional.normalize(
        torch.randn(len(labels), 4, generator=torch.Generator().manual_seed(seed)), dim=1
    )
    rankings = rank(rows, rows, exclude_self=True)
    found = ClassRankings(rankings, labels, labels).average_precisions().by_query
    for i, (score, ranking) in enumerate(zip(found, rankings.tolist(), strict=True)):
        positives = {j for j, label in enumerate(labels) if label == labels[i] and j != i}
        assert score == average_precision(ranking, positives)


def test_class_rankings_must_fit() -> None:
    good = torch.tensor([[0, 1]])
    with pytest.raises(DataError, match="2 query labels"):
        ClassRankings(good, ["a", "b"], ["a", "b"])
    with pytest.raises(DataError, match="0 to 1 are ranked, of 1"):
        ClassRankings(good, ["a"], ["a"])
    with pytest.raises(DataError, match="ranked twice"):
        ClassRankings(torch.tensor([[1, 0, 1]]), ["a"], ["a", "b"])
    for k in (0, 3):
        with pytest.raises(DataError, match=rf"\[1, 2\].*got {k}"):
            ClassRankings(good, ["a"], ["a", "b"]).precisions_at(k)
