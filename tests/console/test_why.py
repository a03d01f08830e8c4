"""The arithmetic of verdicts and the shapes of heat maps, in closed form."""

import random
from typing import Any

import pytest

from perception.verdict import DecisionPolicy, Neighbor, PoolLabel
from service.console.cleaning import deletable, similarity_of
from service.console.heat_map import heat_map
from service.console.places import exemplar_place
from service.console.why import frame_to_add, neighbors_to_show, why
from service.errors import InvalidParameter
from service.wire import ClassifyItem, DecidingFrame, Image, NeighborItem, Policy
from service.wire_curation import DuplicateGroup, DuplicateItem


def policy(**changes: object) -> Policy:
    own = {"rule": "nearest", "k": 5, "min_similarity": -1.0, "min_margin": 0.0, "min_margin_unsafe": 0.0, **changes}
    return Policy.model_validate({"version": "v", "name": None, "sha256": None, "audited_gallery": None, **own})


def near(id: str, pool: str, similarity: float) -> NeighborItem:
    return NeighborItem(id=id, pool=pool, label=pool, similarity=similarity, source="", metadata={})


def item(neighbors: list[NeighborItem], decided: DecisionPolicy, **changes: object) -> ClassifyItem:
    verdict = decided.decide([Neighbor(each.id, each.pool, each.similarity) for each in neighbors])
    plain = ClassifyItem(
        id="0",
        verdict=verdict.label,
        pool=verdict.pool,
        margin=verdict.margin,
        reason=verdict.reason,
        frame=DecidingFrame(index=0, background=None, frames_examined=1),
        image=Image(format="PNG", width_px=1, height_px=1, frames_in_file=1),
        neighbors=sorted(neighbors, key=lambda each: -each.similarity),
        flip_rate_at_eps=None,
    )
    return plain.model_copy(update=changes)


NEIGHBORS = [near("s1", "safe", 0.8), near("u1", "unsafe", 0.5), near("s2", "safe", 0.45), near("b1", "buffer", 0.2)]


def test_winner_runner_up_and_distances() -> None:
    rule: dict[str, Any] = {"min_similarity": 0.6, "min_margin": 0.35, "min_margin_unsafe": 0.1}
    found = why(item(NEIGHBORS, DecisionPolicy(**rule)), policy(**rule))
    assert found.winner is not None
    assert found.runner_up is not None
    assert (found.winner.id, found.runner_up.id) == ("s1", "u1")
    assert found.lead == pytest.approx(0.3)
    assert [each.id for each in found.best] == ["s1", "u1", "b1"]
    assert [each.met for each in found.thresholds] == [True, False, None]
    assert found.thresholds[0].distance == pytest.approx(0.2)
    assert found.thresholds[1].distance == pytest.approx(-0.05)
    assert found.thresholds[2].distance is None
    assert found.votes == ()


@pytest.mark.parametrize("seed", range(20))
def test_a_verdict_is_review_where_a_threshold_is_not_met(seed: int) -> None:
    rng = random.Random(seed)
    neighbors = [near(f"{pool}-{i}", pool, rng.uniform(-1, 1)) for pool in PoolLabel for i in range(3)]
    rule: dict[str, Any] = {
        "min_similarity": rng.uniform(0, 0.9),
        "min_margin": rng.random(),
        "min_margin_unsafe": rng.random(),
    }
    judged = item(neighbors, DecisionPolicy(**rule))
    found = why(judged, policy(**rule))
    failed = any(each.met is False for each in found.thresholds)
    assert failed or judged.pool is PoolLabel.BUFFER or judged.verdict != "review"
    assert not failed or judged.verdict == "review"
    assert found.lead == pytest.approx(judged.margin)


def test_votes_are_counted_among_the_nearest() -> None:
    neighbors = [near("s1", "safe", 0.9), near("u1", "unsafe", 0.8), near("u2", "unsafe", 0.7), near("s2", "safe", 0.1)]
    found = why(item(neighbors, DecisionPolicy("vote", 3)), policy(rule="vote", k=3))
    assert found.votes == (("unsafe", 2), ("safe", 1))
    assert found.winner is not None
    assert found.winner.id == "u1"
    assert found.lead == pytest.approx(-0.1)
    assert found.thresholds[2].met is None, "0 asks for nothing, not even of a negative margin"


def test_nothing_is_made_up_of_a_coarse_answer() -> None:
    full = item(NEIGHBORS, DecisionPolicy())
    coarse = full.model_copy(update={"detail": "coarse", "pool": None, "margin": None, "neighbors": []})
    found = why(coarse, policy())
    assert (found.best, found.winner, found.runner_up, found.lead) == ((), None, None, None)
    assert all(each.met is None for each in found.thresholds)


def test_as_many_neighbours_are_asked_for_as_decide() -> None:
    assert neighbors_to_show(policy(), 100) == 3
    assert neighbors_to_show(policy(rule="vote", k=9), 100) == 9
    assert neighbors_to_show(policy(rule="vote", k=9), 7) == 7


@pytest.mark.parametrize(
    ("index", "background", "examined", "in_file", "position"),
    [(0, None, 1, 1, 0), (2, None, 4, 4, 2), (9, None, 8, 100, 0), (0, "white", 2, 1, 0), (1, "black", 6, 3, 3)],
)
def test_the_deciding_frame_is_found_again(
    index: int, background: str | None, examined: int, in_file: int, position: int
) -> None:
    frame = DecidingFrame.model_validate({"index": index, "background": background, "frames_examined": examined})
    image = Image(format="GIF", width_px=1, height_px=1, frames_in_file=in_file)
    assert frame_to_add(item(NEIGHBORS, DecisionPolicy(), frame=frame, image=image)) == position


def test_a_heat_map_keeps_sums_and_marks_the_strongest() -> None:
    found = heat_map([[0.4, -0.1, 0.0], [0.2, 0.01, -0.3], [0.1, 0.05, -0.02]])
    assert found.total_added == pytest.approx(0.76)
    assert found.total_taken == pytest.approx(-0.42)
    assert [(cell.mark, cell.row, cell.column) for cell in found.added] == [("1", 0, 0), ("2", 1, 0), ("3", 2, 0)]
    assert [(cell.mark, cell.row, cell.column) for cell in found.taken] == [("a", 1, 2), ("b", 0, 1), ("c", 2, 2)]
    assert found.added[0].place == "row 1, column 1 (upper left)"
    assert found.taken[0].place == "row 2, column 3 (middle right)"
    assert found.added[0].opacity == pytest.approx(0.8)
    assert found.added[1].opacity == pytest.approx(0.4)
    assert {(cell.row, cell.column) for cell in found.cells}.isdisjoint({(0, 2), (1, 1)}), "too faint to be drawn"


def test_a_heat_map_of_nothing_is_empty() -> None:
    found = heat_map([[0.0, 0.0], [0.0, 0.0]])
    assert (found.cells, found.added, found.taken, found.total_added) == ((), (), (), 0)


@pytest.mark.parametrize("grid", [[], [[0.1, 0.2]], [[0.1], [0.2]]])
def test_a_heat_map_is_square(grid: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="as many rows"):
        heat_map(grid)


def group(*ids: str) -> DuplicateGroup:
    return DuplicateGroup(
        size=len(ids),
        members=[
            DuplicateItem(
                id=id, label="safe", sha256="", source="", similarity=1.0, same_file=True, suggestion="delete"
            )
            for id in ids
        ],
    )


def test_copies_are_offered_as_far_as_a_form_reaches() -> None:
    assert deletable([group("a", "b", "c"), group("d", "e")]) == {
        (0, 1): "copy-0-1",
        (0, 2): "copy-0-2",
        (1, 1): "copy-1-1",
    }
    assert len(deletable([group(*(f"{i}" for i in range(100)))])) == 55
    assert len(deletable([group("a", "b")] * 100)) == 28
    assert len(deletable([group(*("猫" * 256 for _ in range(30)))])) == 40_000 // (256 * 9 + 16) - 1


@pytest.mark.parametrize("text", ["x", "nan", "inf", "0.79", "1.01", "-1"])
def test_a_similarity_of_no_duplicates_is_refused(text: str) -> None:
    with pytest.raises(InvalidParameter):
        similarity_of(text)
    assert similarity_of(" ") == 0.95


@pytest.mark.parametrize(("id", "end"), [("a/b", "/a%2Fb"), (".", "?id=."), ("..", "?id=.."), ("a\nb", "?id=a%0Ab")])
def test_every_id_has_a_place(id: str, end: str) -> None:
    assert exemplar_place("pools", id) == f"/console/pools/pools{end}"
