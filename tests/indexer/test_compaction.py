import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from indexer.catalog.clock import now
from indexer.catalog.edits import Add, Annotate, Delete, Disable, Enable, Move, Rollback
from indexer.catalog.ledger import EditRequest
from indexer.catalog.records import SUPPRESS
from indexer.catalog.situation import Edit
from indexer.compaction import compact, compacted_contents, stage_compacted
from indexer.contents import POOL_LABELS, Contents, Exemplar
from indexer.errors import EditRefused, InvalidName, UnknownExemplar
from indexer.live.view import View
from indexer.store import SnapshotStore
from tests.indexer.edited import STAMP, edited, same_answers

Make = Callable[..., Contents]
Unit = Callable[..., NDArray[np.float32]]
LABELS = [None, *POOL_LABELS]


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of an empty catalogue, so that not every example has to make one."""
    folder = tmp_path_factory.mktemp("migrated")
    with edited(folder):
        pass
    return (folder / "catalog.sqlite3").read_bytes()


def edit_of(kind: int, at: int, rng: np.random.Generator, unit: Unit) -> Edit:
    """Some edit of one of a few exemplars, half of which are in the base."""
    id, label = f"x{at:03d}", POOL_LABELS[int(rng.integers(3))]
    if kind == 0:
        return Add("pools", Exemplar(id, label), unit(int(rng.integers(1000)), 1)[0], STAMP)
    if kind == 1:
        note = "noted" if rng.integers(2) else ""
        return Add("pools", Exemplar(f"y{at}", label), unit(int(rng.integers(1000)), 1)[0], STAMP, note)
    if kind == 2:
        return Move("pools", id, label)
    if kind == 3:
        return Delete("pools", id)
    if kind == 4:
        return Annotate("pools", id, note="" if rng.integers(2) else "seen", source="elsewhere")
    if kind == 5:
        return Disable("pools", id, until=now() + timedelta(hours=1) if rng.integers(2) else None)
    if kind == 6:
        return Enable("pools", id)
    return Add("pools", Exemplar(f"s{at}", SUPPRESS), unit(at, 1)[0], STAMP, suppresses=(id,), min_similarity=0.3)


@given(
    wanted=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 14)), max_size=14),
    seed=st.integers(0, 2**31),
    based=st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_nothing_that_is_found_changes(
    migrated: bytes, make_contents: Make, unit: Unit, wanted: list[tuple[int, int]], seed: int, based: bool
) -> None:
    rng = np.random.default_rng(seed)
    queries = unit(seed, 4)
    with tempfile.TemporaryDirectory() as folder, edited(Path(folder), migrated=migrated) as pools:
        if based:
            pools.publish(make_contents(n=9))
        else:
            pools.create()
        # Each stands alone: what makes no sense is refused.
        pools.catalog.apply([[EditRequest(edit_of(kind, at, rng, unit), "test")] for kind, at in wanted])
        before, then = pools.view(), now() + timedelta(hours=2)
        before_then = pools.view(then)
        outcome = compact(pools.catalog, before, "test")
        after = pools.view()
        same_answers(before, after, queries, LABELS)
        same_answers(before_then, pools.view(then), queries, LABELS)
        for id in [f"{kind}{n:03d}" for kind in "xy" for n in range(15)] + [f"s{n}" for n in range(15)]:
            assert found(before, id) == found(after, id)
        plain = any(r is None or r.is_plain for r in before.state.records.values())
        assert (outcome.entry is not None) == plain
        if plain:
            assert after.state.base == outcome.state.base != before.version
            assert after.version != before.version
            assert all(r is not None and not r.is_plain for r in after.state.records.values())
        assert compact(pools.catalog, after, "test").entry is None  # nothing is left to do
        assert pools.catalog.replayed("pools") == pools.state


def found(view: View, id: str) -> tuple[object, ...] | None:
    """What is known of an exemplar, active or not."""
    try:
        record = view.record(id)
    except UnknownExemplar:
        return None
    return view.exemplar(id), view.embedding(id).tobytes(), view.is_active(id), record.note if record else ""


def test_what_changes_meanwhile_stays_on_top(tmp_path: Path, make_contents: Make, unit: Unit) -> None:
    rows = unit(5, 4)
    with edited(tmp_path) as pools:
        pools.publish(make_contents(n=6))
        pools.apply(pools.add("a", rows[0]), pools.add("b", rows[1]))
        early = pools.view()
        pools.apply(
            Delete("pools", "a"), Move("pools", "b", "unsafe"), pools.add("c", rows[2]), Delete("pools", "x000")
        )
        before = pools.view()
        compact(pools.catalog, early, "test")
        same_answers(before, pools.view(), rows, LABELS)


def test_a_roll_back_goes_to_before_a_compaction(tmp_path: Path, make_contents: Make, unit: Unit) -> None:
    rows = unit(5, 4)
    with edited(tmp_path) as pools:
        pools.publish(make_contents(n=6))
        pools.apply(pools.add("a", rows[0]))
        before = pools.view()
        compact(pools.catalog, before, "test", "it has grown")
        pools.apply(Delete("pools", "a"))
        pools.apply(Rollback("pools", before.version))
        assert pools.view().version == before.version
        same_answers(before, pools.view(), rows, LABELS)


def test_a_kill_before_the_log_leaves_an_unused_folder(tmp_path: Path, make_contents: Make, unit: Unit) -> None:
    with edited(tmp_path) as pools:
        pools.publish(make_contents(n=6))
        pools.apply(pools.add("a", unit(5, 1)[0]))
        before = pools.view()
        edit = stage_compacted(pools.store, before)
        assert edit is not None
    with edited(tmp_path) as pools:  # as after a restart
        assert pools.view().version == before.version
        assert pools.store.current_version() == before.state.base
        assert pools.store.verify() == ()
        assert edit.base in pools.store.versions()
        assert compact(pools.catalog, pools.view(), "test").state.base == edit.base
        assert [entry.action for entry in pools.store.history()] == ["publish"]


def test_a_base_that_was_published_meanwhile_is_not_undone(tmp_path: Path, make_contents: Make, unit: Unit) -> None:
    with edited(tmp_path) as pools:
        pools.publish(make_contents(n=6))
        pools.apply(pools.add("a", unit(5, 1)[0]))
        early = pools.view()
        pools.publish(make_contents(n=8))
        before = pools.state
        with pytest.raises(EditRefused, match="base has changed"):
            compact(pools.catalog, early, "test")
        assert pools.state == before


def test_the_new_base_depends_on_the_state_alone(tmp_path: Path, unit: Unit) -> None:
    with edited(tmp_path) as pools:
        pools.create()
        rows = unit(0, 2)
        pools.apply(pools.add("a", rows[0]), pools.add("b", rows[1]))
        pools.apply(Disable("pools", "b", until=now() + timedelta(hours=1)))
        later = pools.view(now() + timedelta(hours=2))
        assert [e.id for e in later.active()] == ["a", "b"]
        assert [e.id for e in compacted_contents(later).exemplars] == ["a"]
        assert [e.id for e in compacted_contents(pools.view()).exemplars] == ["a"]


def test_a_staged_version_is_not_current(tmp_path: Path, make_contents: Make) -> None:
    store = SnapshotStore(tmp_path, "pools")
    staged = store.stage(make_contents(n=3))
    assert store.versions() == (staged,)
    assert store.history() == ()
    assert not (tmp_path / "pools" / "CURRENT").exists()
    assert store.load(None, staged).version == staged
    published = store.publish(make_contents(n=6))
    assert store.stage(make_contents(n=3)) == staged
    assert store.current_version() == published
    with pytest.raises(InvalidName):
        store.stage(make_contents("shop"))
