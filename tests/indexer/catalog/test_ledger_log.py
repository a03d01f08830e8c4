"""The log alone gives every state that ever was, whoever wrote it, and states are told apart."""

import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from indexer.catalog.database import Database
from indexer.catalog.edits import (
    Create,
    Delete,
    Disable,
    Enable,
    Move,
    Rollback,
)
from indexer.catalog.ledger import Catalog
from indexer.catalog.records import Disabled, Record, embedding_sha256
from indexer.catalog.situation import Edit
from indexer.catalog.state import State, diff, replay
from indexer.contents import Exemplar
from indexer.errors import (
    CatalogError,
    ContentsError,
    EditRefused,
    ExemplarExists,
    UnknownExemplar,
)
from tests.indexer.catalog.ledgers import POOLS, STAMP, add, make, unit

EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from("abcd"), st.sampled_from(POOLS)),
        st.tuples(st.just("move"), st.sampled_from("abcd"), st.sampled_from(POOLS)),
        st.tuples(st.just("delete"), st.sampled_from("abcd")),
        st.tuples(st.just("disable"), st.sampled_from("abcd")),
        st.tuples(st.just("enable"), st.sampled_from("abcd")),
        st.tuples(st.just("back"), st.integers(1, 12)),
    ),
    max_size=14,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=EDITS)
def test_the_log_alone_gives_every_state_that_ever_was(tmp_path_factory: pytest.TempPathFactory, steps: list) -> None:  # type: ignore[type-arg]
    """The naive twin is a dictionary that is copied at each step."""
    root = tmp_path_factory.mktemp("ledger")
    with closing(Database.open(f"sqlite:///{root}/c.sqlite3")) as database:
        catalog = Catalog(database, root)
        make(catalog, Create("pools", STAMP))
        twin: dict[str, tuple[str, bool]] = {}
        # By revision: the twin and the state.
        history: dict[int, tuple[dict[str, tuple[str, bool]], State]] = {1: ({}, catalog.state("pools"))}
        for kind, *rest in steps:
            edit, after = _step(kind, rest, twin, history)
            try:
                [outcome] = make(catalog, edit)
            except (EditRefused, UnknownExemplar, ExemplarExists):
                assert catalog.state("pools") is history[max(history)][1]
                continue
            state = outcome.state
            twin = twin if outcome.entry is None else after
            history[state.revision] = (dict(twin), state)
            assert visible(state) == twin
        for revision, (_, state) in history.items():
            assert catalog.state_at("pools", revision) == state
        assert catalog.replayed("pools") == catalog.state("pools") == Catalog(database, root).state("pools")


def visible(state: State) -> dict[str, tuple[str, bool]]:
    return {
        id: (record.exemplar.label, record.disabled is not None)
        for id, record in state.records.items()
        if record is not None
    }


def _step(
    kind: str,
    rest: list,  # type: ignore[type-arg]
    twin: dict[str, tuple[str, bool]],
    history: dict[int, tuple[dict[str, tuple[str, bool]], State]],
) -> tuple[Edit, dict[str, tuple[str, bool]]]:
    if kind == "back":
        return Rollback("pools", rest[0]), history.get(rest[0], ({}, None))[0]
    id = rest[0]
    label, disabled = twin.get(id, ("", False))
    if kind == "add":
        return add(id, rest[1], seed=len(history)), {**twin, id: (rest[1], False)}
    if kind == "move":
        return Move("pools", id, rest[1]), {**twin, id: (rest[1], disabled)}
    if kind == "delete":
        return Delete("pools", id), {other: value for other, value in twin.items() if other != id}
    wanted: Callable[[str, str], Edit] = Disable if kind == "disable" else Enable
    return wanted("pools", id), {**twin, id: (label, kind == "disable")}


def test_two_processes_agree(database: Database, catalog: Catalog, tmp_path: Path) -> None:
    """Two catalogues over one database stand for two processes: neither knows of the other but by the log."""
    make(catalog, Create("pools", STAMP))
    other = Catalog(database, tmp_path)
    failures: list[BaseException] = []

    def write(mine: Catalog, prefix: str) -> None:
        try:
            for number in range(25):
                make(mine, add(f"{prefix}{number}"), Move("pools", f"{prefix}{number}", "unsafe"))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=pair) for pair in ((catalog, "x"), (other, "y"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    catalog.follow()
    other.follow()
    assert catalog.state("pools") == other.state("pools") == catalog.replayed("pools")
    assert len(visible(catalog.state("pools"))) == 50
    assert not other.follow()


def test_a_checkpoint_spares_the_start_most_of_the_log(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("indexer.catalog.ledger._CHECKPOINT_EVERY", 5)
    make(catalog, Create("pools", STAMP), *(add(f"e{n}", note="é", disabled=Disabled("operator")) for n in range(12)))
    reopened = Catalog(catalog.database, catalog.root)
    assert reopened.state("pools") == catalog.state("pools") == catalog.replayed("pools")
    assert reopened.state_at("pools", 7) == catalog.state_at("pools", 7)
    assert len(reopened.state_at("pools", 7).records) == 6


def test_equal_states_have_equal_versions_and_others_have_others() -> None:
    empty = State("pools", STAMP)
    record = Record(Exemplar("a", "safe"), embedding_sha256(unit(1)))
    one = empty.with_records({"a": record}, 1)
    assert one.version == empty.with_records({"a": None}, 1).with_records({"a": record}, 2).version
    versions = [
        empty.version,
        one.version,
        empty.with_records({"a": replace(record, note="n")}, 1).version,
        empty.with_records({"a": None}, 1).version,
        replace(one, base="0123456789abcdef").version,
        replace(one, collection="other").version,
        replace(one, encoder=replace(STAMP, fingerprint="other")).version,
    ]
    assert len(set(versions)) == len(versions)
    assert State.from_json(one.to_json()) == one


def test_a_damaged_entry_is_named() -> None:
    with pytest.raises(ContentsError, match=r"entry 7 .*exemplar.add"):
        replay(State("pools"), 7, "", "exemplar.add", {"records": [{"id": "a"}]}, lambda revision: State("pools"))


def test_an_embedding_that_is_not_there_is_an_error(catalog: Catalog) -> None:
    with pytest.raises(ContentsError, match="f" * 64):
        catalog.embeddings(["f" * 64])


def test_diff_names_what_moved_and_what_else_changed() -> None:
    def record(id: str, label: str, note: str = "") -> Record:
        return Record(Exemplar(id, label), "0" * 64, note)

    before = {id: record(id, "safe") for id in "abcd"}
    after = {
        "a": record("a", "safe"),
        "b": record("b", "unsafe"),
        "c": record("c", "safe", "n"),
        "e": record("e", "safe"),
    }
    found = diff(before, after)
    assert (found.added, found.removed, found.moved, found.changed) == (
        ("e",),
        ("d",),
        (("b", "safe", "unsafe"),),
        ("c",),
    )


def test_a_database_that_fails_leaves_the_states_as_they_were(tmp_path: Path) -> None:
    with closing(Database.open(f"sqlite:///{tmp_path}/c.sqlite3")) as database:
        catalog = Catalog(database, tmp_path)
        make(catalog, Create("pools", STAMP), add("a"))
        before = catalog.state("pools")
        with database.writing() as connection:
            connection.exec_driver_sql("ALTER TABLE embeddings RENAME TO elsewhere")
        with pytest.raises(CatalogError):
            make(catalog, add("b"))
        assert catalog.state("pools") is before
        with database.writing() as connection:
            connection.exec_driver_sql("ALTER TABLE elsewhere RENAME TO embeddings")
        make(catalog, add("b"))
        assert catalog.replayed("pools") == catalog.state("pools")


def test_replaying_takes_a_step_for_each_entry_however_often_it_went_back(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making each state anew that an entry goes back to would take twice as long with each such entry."""
    make(catalog, Create("pools", STAMP))
    for number in range(30):
        make(catalog, add(f"e{number}"))
        revision = catalog.state("pools").revision
        make(catalog, add(f"f{number}"), Rollback("pools", revision))
    steps = 0

    def counted(*arguments: Any) -> State:
        nonlocal steps
        steps += 1
        return replay(*arguments)

    monkeypatch.setattr("indexer.catalog.replaying.replay", counted)
    assert catalog.replayed("pools") == catalog.state("pools")
    assert steps == 1 + 3 * 30
