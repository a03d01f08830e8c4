"""Appending, reading and pruning, by one, by many at once, and by somebody who is killed."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, event

from indexer.catalog import chain
from indexer.catalog.chain import CHANGES, DECISIONS, GENESIS, Draft, Entry, Head, Verification
from indexer.catalog.clock import now_text
from indexer.catalog.database import Database
from indexer.errors import CatalogError, ContentsError
from tests.indexer.catalog.conftest import Append, drafts

REPOSITORY = Path(__file__).parents[3]


def read(database: Database, name: str = CHANGES, **options: Any) -> list[Entry]:
    with database.reading() as connection:
        return chain.read(connection, name, **options)


def verify(database: Database, name: str = CHANGES) -> Verification:
    with database.reading() as connection:
        return chain.verify(connection, name)


# --- append and read -------------------------------------------------------------------------------------------------


def test_entries_are_numbered_and_linked(database: Database, append: Append) -> None:
    before = now_text()
    entries = append(CHANGES, 3) + append(CHANGES, 2)
    assert [entry.seq for entry in entries] == [1, 2, 3, 4, 5]
    assert [entry.prev for entry in entries] == [GENESIS, *(entry.hash for entry in entries[:-1])]
    assert all(entry.hash == entry.computed_hash() for entry in entries)
    assert all(before <= entry.time <= now_text() for entry in entries)
    assert read(database) == entries
    assert verify(database) == Verification(5, Head(5, entries[-1].hash), ())
    with database.reading() as connection:
        assert chain.head(connection, CHANGES) == Head(5, entries[-1].hash)
        assert chain.head(connection, DECISIONS) == Head(0, GENESIS)


def test_what_is_written_is_what_is_read(database: Database, append: Append) -> None:
    """The widest of everything; random bytes of a subject show that PostgreSQL's indexes take it."""
    subject = "".join(chr(0x4E00 + (i * 7919) % 20000) for i in range(666))
    body = {"": ["\\u0000", "\u2028\x85\x01", 1e-320, -0.0, 2**70, 0.1 + 0.2], "😀": {"ğ": None}, "long": "é" * 100_000}
    [entry] = append(CHANGES, [Draft("x", "ä" * 4000, "\n", "\r", "c" * 64, subject, body)])
    [stored] = read(database)
    assert stored == entry
    assert stored.body == body
    assert (stored.actor, stored.reason, stored.request_id, stored.subject) == ("ä" * 4000, "\n", "\r", subject)
    assert verify(database).intact


def test_chains_are_apart(database: Database, append: Append) -> None:
    append(CHANGES, 3)
    [first, *_] = append(DECISIONS, 2)
    assert (first.seq, first.prev) == (1, GENESIS)
    assert verify(database, CHANGES).n == 3
    assert verify(database, DECISIONS).n == 2


def test_no_such_chain(database: Database) -> None:
    for use in (chain.head, chain.verify):
        with pytest.raises(CatalogError, match="there is no chain 'other'"), database.reading() as connection:
            use(connection, "other")
    with pytest.raises(CatalogError, match="there is no chain 'other'"), database.writing() as connection:
        chain.append(connection, "other", [])


def test_a_thousand_entries_take_three_statements(database: Database) -> None:
    statements: list[str] = []
    event.listen(database.engine, "before_cursor_execute", lambda c, k, statement, *rest: statements.append(statement))
    with database.writing() as connection:
        statements.clear()
        assert chain.append(connection, CHANGES, []) == []
        chain.append(connection, CHANGES, drafts(1000))
    verbs = [statement.split()[0] for statement in statements if not statement.startswith(("BEGIN", "COMMIT"))]
    assert verbs == ["SELECT", "SELECT", "INSERT", "UPDATE"]
    assert verify(database).n == 1000


def test_an_undone_transaction_leaves_no_gap(database: Database, append: Append) -> None:
    append(CHANGES, 1)

    def fails(connection: Connection) -> None:
        chain.append(connection, CHANGES, drafts(2))
        raise ZeroDivisionError

    with database.writing() as connection:
        with pytest.raises(ZeroDivisionError), connection.begin_nested():
            fails(connection)
        [entry] = chain.append(connection, CHANGES, drafts(1))
    assert entry.seq == 2
    assert verify(database).intact


def test_time_may_be_given(database: Database) -> None:
    time = "2026-11-21T17:30:00.123456+00:00"
    with database.writing() as connection:
        entries = chain.append(connection, CHANGES, drafts(2), time=time)
    assert [entry.time for entry in entries] == [time, time]
    for wrong in ("2026-11-21T17:30:00+00:00", "2026-11-21T18:30:00.123456+01:00", "2026-11-21T17:30:00", "now"):
        with pytest.raises(ContentsError, match="the time of an entry"), database.writing() as connection:
            chain.append(connection, CHANGES, drafts(1), time=wrong)


def test_filters(database: Database, append: Append) -> None:
    append(CHANGES, drafts(3) + drafts(2, "exemplar.move", "cats") + drafts(1, "version.base", "cats"))

    def seqs(**options: Any) -> list[int]:
        return [entry.seq for entry in read(database, **options)]

    assert seqs() == [1, 2, 3, 4, 5, 6]
    assert seqs(after=2, before=5) == [3, 4]
    assert seqs(newest_first=True, limit=2) == [6, 5]
    assert seqs(limit=0) == []
    assert seqs(collection="cats") == [4, 5, 6]
    assert seqs(collection="") == []
    assert seqs(kinds=("exemplar.move", "version.base"), before=6) == [4, 5]
    assert seqs(kinds=()) == []
    assert seqs(subject="x1") == [2, 5]
    assert seqs(subject="x1", collection="pools", kinds={"exemplar.add"}) == [2]
    assert seqs(after=2**200, limit=2**200) == []
    assert seqs(after=-(2**200), before=2**200) == [1, 2, 3, 4, 5, 6]


# --- many at once ----------------------------------------------------------------------------------------------------


def test_eight_threads(database: Database, append: Append) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = [entry for entries in pool.map(lambda _: append(CHANGES, 3), range(24)) for entry in entries]
    assert sorted(entry.seq for entry in made) == list(range(1, 73))
    assert verify(database) == Verification(72, Head(72, max(made, key=lambda entry: entry.seq).hash), ())


@contextmanager
def process(url: str, entries: int) -> Iterator[subprocess.Popen[str]]:
    """Started, and waiting for its first line of input."""
    command = [sys.executable, str(Path(__file__).with_name("appending_process.py")), url, str(entries)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


def go(*children: subprocess.Popen[str]) -> None:
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()


def acknowledged(lines: list[str]) -> dict[int, str]:
    return {int(seq): hash for seq, hash in (line.split() for line in lines if line.endswith("\n"))}


def test_two_processes_from_the_very_first_start(catalog_url: str) -> None:
    with process(catalog_url, 40) as one, process(catalog_url, 40) as other:
        go(one, other)
        outputs = [child.communicate(timeout=60)[0] for child in (one, other)]
        assert [child.returncode for child in (one, other)] == [0, 0]
    said = acknowledged("".join(outputs).splitlines(keepends=True))
    assert sorted(said) == list(range(2, 161, 2))
    with closing(Database.open(catalog_url)) as database:
        assert verify(database) == Verification(160, Head(160, said[160]), ())


def test_kill_9_loses_nothing_acknowledged(catalog_url: str) -> None:
    said: dict[int, str] = {}
    for lines in (1, 20):
        with process(catalog_url, 10**6) as child:
            go(child)
            assert child.stdout is not None
            first = [child.stdout.readline() for _ in range(lines)]
            child.kill()
            said |= acknowledged(first + child.stdout.readlines())
        with closing(Database.open(catalog_url)) as database:
            stored = {entry.seq: entry.hash for entry in read(database)}
            assert said.items() <= stored.items()
            assert verify(database) == Verification(len(stored), Head(len(stored), stored[len(stored)]), ())
            assert len(stored) % 2 == 0  # both of a transaction, or none


# --- prune -----------------------------------------------------------------------------------------------------------


def prune(database: Database, before: int, name: str = DECISIONS) -> int:
    with database.writing() as connection:
        return chain.prune(connection, name, before)


def test_prune(database: Database, append: Append) -> None:
    entries = append(DECISIONS, 6)
    assert prune(database, 4) == 3
    assert prune(database, 4) == 0
    assert prune(database, 2) == 0
    assert read(database, DECISIONS) == entries[3:]
    assert verify(database, DECISIONS) == Verification(3, Head(6, entries[5].hash), ())
    assert prune(database, 7) == 3
    assert verify(database, DECISIONS) == Verification(0, Head(6, entries[5].hash), ())
    [next_entry] = append(DECISIONS, 1)
    assert (next_entry.seq, next_entry.prev) == (7, entries[5].hash)
    assert verify(database, DECISIONS).intact


def test_what_is_not_pruned(database: Database, append: Append) -> None:
    append(CHANGES, 3)
    append(DECISIONS, 3)
    with pytest.raises(CatalogError, match="the chain 'changes' is not pruned"):
        prune(database, 2, CHANGES)
    with pytest.raises(CatalogError, match="cannot prune before 5: the last entry is 3"):
        prune(database, 5)
    assert [verify(database, name).n for name in (CHANGES, DECISIONS)] == [3, 3]
