"""What a chain shows of tampering, and what it does not, in the database and in its export."""

import base64
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import insert, text

from indexer.catalog import chain
from indexer.catalog.chain import CHANGES, DECISIONS, GENESIS, Draft, Entry, Head, Verification
from indexer.catalog.database import Database
from indexer.catalog.links import MAX_PROBLEMS
from indexer.catalog.tables import embeddings
from indexer.errors import CatalogError
from tests.indexer.catalog.conftest import Append, drafts, drop_triggers

Tamper = Callable[[str], None]


def verify(database: Database, name: str = CHANGES, **options: Any) -> Verification:
    with database.reading() as connection:
        return chain.verify(connection, name, **options)


TAMPERING: dict[str, list[str]] = {
    **{
        f"UPDATE entries SET {column} = 'x' WHERE seq = 4": ["entry 4 is not as it was written"]
        for column in ("time", "kind", "actor", "reason", "request_id", "collection", "subject", "body")
    },
    "UPDATE entries SET chain = 'decisions' WHERE seq = 4": ["entry 4 is missing"],
    "UPDATE entries SET body = '{\"i\": 3}' WHERE seq = 4": ["entry 4 is not as it was written"],
    "UPDATE entries SET body = body || ' ' WHERE seq = 4": ["entry 4 is not as it was written"],
    "UPDATE entries SET body = replace(body, '\"i\":3', '\"i\":3.0')": ["entry 4 is not as it was written"],
    "UPDATE entries SET body = replace(body, '\"i\":3', '\"i\":NaN')": ["entry 4 is not as it was written"],
    'UPDATE entries SET body = replace(body, \'"i":3\', \'"i":0,"i":3\')': ["entry 4 is not as it was written"],
    "UPDATE entries SET prev = hash WHERE seq = 4": [
        "entry 4 does not follow the entry before it",
        "entry 4 is not as it was written",
    ],
    "UPDATE entries SET hash = prev WHERE seq = 4": [
        "entry 4 is not as it was written",
        "entry 5 does not follow the entry before it",
    ],
    "DELETE FROM entries WHERE seq = 4": ["entry 4 is missing"],
    "DELETE FROM entries WHERE seq IN (1, 2)": ["entries 1 to 2 are missing"],
    "DELETE FROM entries WHERE seq = 6": ["the end is said to be entry 6, but the last one is 5"],
    "DELETE FROM entries": ["the end is said to be entry 6, but the last one is 0"],
    "UPDATE chains SET head_seq = 5 WHERE name = 'changes'": ["the end is said to be entry 5, but the last one is 6"],
    "UPDATE chains SET head_hash = 'x'": ["the end is said to have another hash than entry 6 has"],
    "UPDATE chains SET first_prev = 'x'": [
        "the first entry is said to follow another one",
        "entry 1 does not follow the entry before it",
    ],
    "UPDATE chains SET first_seq = 3, first_prev = (SELECT hash FROM entries WHERE seq = 2)": [
        "it begins with entry 3, but is never pruned",
        "entry 1 does not belong where it is, after number 2",
        "entry 2 does not belong where it is, after number 2",
    ],
    "UPDATE entries SET seq = 7 WHERE seq = 6": [
        "entry 6 is missing",
        "entry 7 is not as it was written",
        "the end is said to be entry 6, but the last one is 7",
    ],
}


def test_tampering_is_found(database: Database, append: Append) -> None:
    """Each within a transaction that is undone: this is quicker than a database each."""
    append(CHANGES, 6)
    for statement, problems in TAMPERING.items():
        with database.writing() as connection:
            drop_triggers(connection)
            connection.exec_driver_sql(statement)
            assert list(chain.verify(connection, CHANGES).problems) == problems, statement
            connection.rollback()
    assert verify(database).intact


def test_another_order_is_found(database: Database, append: Append, tamper: Tamper) -> None:
    append(CHANGES, 6)
    for statement in ("seq = 104 WHERE seq = 4", "seq = 4 WHERE seq = 5", "seq = 5 WHERE seq = 104"):
        tamper(f"UPDATE entries SET {statement}")  # numbers are unique at every moment
    assert verify(database).problems == (
        "entry 4 does not follow the entry before it",
        "entry 4 is not as it was written",
        "entry 5 does not follow the entry before it",
        "entry 5 is not as it was written",
        "entry 6 does not follow the entry before it",
    )


def test_left_over_before_the_first(database: Database, append: Append, tamper: Tamper) -> None:
    append(DECISIONS, 4)
    tamper("UPDATE chains SET first_seq = 3, first_prev = (SELECT hash FROM entries WHERE seq = 2)")
    assert verify(database, DECISIONS).problems == (
        "entry 1 does not belong where it is, after number 2",
        "entry 2 does not belong where it is, after number 2",
    )


def test_problems_are_bounded(database: Database, append: Append, tamper: Tamper) -> None:
    append(CHANGES, 300)
    tamper("UPDATE entries SET actor = 'eve'")
    found = verify(database)
    assert len(found.problems) == MAX_PROBLEMS + 1
    assert found.problems[-1] == "no further than this, after 100 problems"


def test_damage_is_no_answer(database: Database, append: Append, tamper: Tamper) -> None:
    append(CHANGES, 3)
    tamper("UPDATE entries SET body = '[]' WHERE seq = 2")
    with pytest.raises(CatalogError, match="an entry of 'changes' is damaged"), database.reading() as connection:
        chain.read(connection, CHANGES)


def test_more_than_a_page(database: Database, append: Append, tamper: Tamper) -> None:
    entries = append(CHANGES, 450)
    assert verify(database) == Verification(450, Head(450, entries[-1].hash), ())
    tamper("DELETE FROM entries WHERE seq = 200")
    assert verify(database).problems == ("entry 200 is missing",)


# --- a head noted elsewhere ------------------------------------------------------------------------------------------


def rewritten(entries: list[Entry], seq: int, actor: str) -> list[Entry]:
    """As somebody would who can write to the database and has read how hashes are made."""
    made = entries[: seq - 1]
    for entry in entries[seq - 1 :]:
        value = entry.to_json() | {"prev": made[-1].hash if made else GENESIS}
        value |= {"actor": actor} if entry.seq == seq else {}
        made.append(Entry.from_json(value | {"hash": Entry.from_json(value).computed_hash()}))
    return made


def test_rewriting_everything_shows_only_against_a_noted_head(
    database: Database, append: Append, tamper: Tamper
) -> None:
    entries = append(CHANGES, 6)
    noted = Head(5, entries[4].hash)
    for entry in rewritten(entries, 3, "eve"):
        tamper(f"UPDATE entries SET actor = '{entry.actor}', prev = '{entry.prev}', hash = '{entry.hash}'"
               f" WHERE seq = {entry.seq}")  # fmt: skip
        tamper(f"UPDATE chains SET head_hash = '{entry.hash}' WHERE name = 'changes'")
    assert verify(database).intact  # this is what a chain cannot see
    assert verify(database, expected=noted).problems == ("entry 5 is not the one that was noted: it was rewritten",)
    assert verify(database, expected=Head(2, entries[1].hash)).intact


def test_cutting_the_end_off_shows_only_against_a_noted_head(
    database: Database, append: Append, tamper: Tamper
) -> None:
    entries = append(CHANGES, 6)
    tamper("DELETE FROM entries WHERE seq > 4")
    tamper(f"UPDATE chains SET head_seq = 4, head_hash = '{entries[3].hash}' WHERE name = 'changes'")
    assert verify(database).intact
    assert verify(database, expected=Head(6, entries[5].hash)).problems == (
        "the noted entry 6 is not there; these go on to 4",
    )


def test_noted_heads_of_a_pruned_chain(database: Database, append: Append) -> None:
    entries = append(DECISIONS, 6)
    with database.writing() as connection:
        chain.prune(connection, DECISIONS, 4)
    assert verify(database, DECISIONS, expected=Head(6, entries[5].hash)).intact
    assert verify(database, DECISIONS, expected=Head(3, entries[2].hash)).intact
    assert not verify(database, DECISIONS, expected=Head(3, entries[3].hash)).intact
    assert not verify(database, DECISIONS, expected=Head(2, entries[1].hash)).intact  # nothing can be said
    assert not verify(database, DECISIONS, expected=Head(0, GENESIS)).intact


def test_the_empty_head_is_in_every_whole_chain(database: Database, append: Append) -> None:
    assert verify(database, expected=Head(0, GENESIS)).intact
    append(CHANGES, 1)
    assert verify(database, expected=Head(0, GENESIS)).intact


# --- exports ---------------------------------------------------------------------------------------------------------


def export(database: Database, with_embeddings: bool = False, **options: Any) -> list[bytes]:
    file = io.BytesIO()
    with database.reading() as connection:
        chain.export_jsonl(connection, CHANGES, file, with_embeddings, **options)
    return file.getvalue().splitlines(keepends=True)


def test_export_verifies_by_itself(database: Database, append: Append) -> None:
    entries = append(CHANGES, [*drafts(210), Draft("x", "\u2028\x85", body={"\n": "\r\n"})])
    whole, part = export(database), export(database, after=100, before=200)
    assert [json.loads(line) for line in whole] == [entry.to_json() for entry in entries]
    assert whole == [f"{entry.to_json_line()}\n".encode() for entry in entries]
    assert chain.verify_jsonl(whole) == Verification(211, Head(211, entries[-1].hash), ())
    assert chain.verify_jsonl(line.decode() for line in whole).intact
    assert chain.verify_jsonl(line.replace(b"\n", b"\r\n") for line in whole).intact
    assert chain.verify_jsonl(part) == Verification(99, Head(199, entries[198].hash), ())
    assert chain.verify_jsonl([]) == Verification(0, Head(0, GENESIS), ())
    assert chain.verify_jsonl(whole, expected=Head(50, entries[49].hash)).intact
    assert not chain.verify_jsonl(whole[:-1], expected=Head(211, entries[-1].hash)).intact


def exported(n: int) -> list[bytes]:
    """As an export is, made without a database."""
    lines, prev = [], GENESIS
    for seq, draft in enumerate(drafts(n), 1):
        time = "2026-11-21T17:30:00.123456+00:00"
        entry = Entry(CHANGES, seq, time, draft.kind, draft.actor, "", "", "", draft.subject, draft.body, prev, "")
        prev = entry.computed_hash()
        lines.append(f"{replace(entry, hash=prev).to_json_line()}\n".encode())
    return lines


def test_exports_made_without_a_database() -> None:
    assert chain.verify_jsonl(exported(6)).n == 6
    assert chain.verify_jsonl(exported(6)).intact


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda lines: [*lines[:2], lines[2].replace(b"ann", b"eve"), *lines[3:]], "entry 3 is not as it was written"),
        (lambda lines: [*lines[:2], *lines[3:]], "entry 3 is missing"),
        (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], "entry 2 does not belong where it is"),
        (lambda lines: [*lines, lines[-1]], "entry 6 does not belong where it is"),
        (lambda lines: [*lines[:-1], lines[-1][:40]], "line 6 is no entry"),
        (lambda lines: [b"\xff\n", *lines], "line 1 is no entry"),
        (lambda lines: [b"[]\n", *lines], "line 1 is no entry: it is not a JSON object"),
        (lambda lines: [b"\n", *lines], "line 1 is no entry"),
        (lambda lines: [b"[" * 100_000, *lines], "line 1 is no entry"),
        (lambda lines: [lines[0].replace(b'"0000', b'"1000'), *lines[1:]], "entry 1 does not follow"),
        (lambda lines: [lines[0].replace(b'"actor":"ann"', b'"actor":"eve","actor":"ann"'), *lines[1:]],
         "entry 1: it is not written canonically"),
        (lambda lines: [lines[0].replace(b'"actor"', b'"aa":1,"actor"'), *lines[1:]], "line 1 is no entry: an entry"),
        (lambda lines: [*lines[:3], *(line.replace(b'"changes"', b'"decisions"') for line in lines[3:])],
         "line 4 is of the chain 'decisions', the first of 'changes'"),
        (lambda lines: [lines[0].replace(b'"hash"', b'"embeddings":{"ab":"YWI="},"hash"'), *lines[1:]],
         "entry 1: it has embeddings that its records do not name"),
    ],
)  # fmt: skip
def test_changed_exports(change: Callable[[list[bytes]], list[bytes]], problem: str) -> None:
    problems = chain.verify_jsonl(change(exported(6))).problems
    assert any(text.startswith(problem) for text in problems), problems


# --- embeddings ------------------------------------------------------------------------------------------------------


def with_records(*names: str) -> Draft:
    return Draft("exemplar.add", "ann", body={"records": [{"id": name, "embedding_sha256": name} for name in names]})


@pytest.fixture
def stored(database: Database) -> list[str]:
    """Names of three embeddings that are in the database."""
    data = [bytes([i]) * 8 for i in range(3)]
    names = [hashlib.sha256(item).hexdigest() for item in data]
    with database.writing() as connection:
        rows = [{"sha256": name, "dim": 2, "data": item} for name, item in zip(names, data, strict=True)]
        connection.execute(insert(embeddings), rows)
    return names


def test_embeddings_are_exported_once(database: Database, append: Append, stored: list[str]) -> None:
    a, b, c = stored
    deleted = Draft("exemplar.delete", "ann", body={"records": [{"id": a, "deleted": True}]})
    append(CHANGES, [with_records(a, b, a), deleted, with_records(b, c), Draft("x", "ann", body={"records": "none"})])
    lines = export(database, with_embeddings=True)
    given = [json.loads(line).get("embeddings", {}) for line in lines]
    assert [set(item) for item in given] == [{a, b}, set(), {c}, set()]
    assert base64.b64decode(given[2][c]) == bytes([2]) * 8
    assert chain.verify_jsonl(lines) == verify(database, with_embeddings=True)
    assert chain.verify_jsonl(lines).intact
    assert [json.loads(line).get("embeddings") for line in export(database)] == [None] * 4

    [changed] = chain.verify_jsonl([lines[0].replace(base64.b64encode(bytes(8)), b"AQEBAQEBAQI="), *lines[1:]]).problems
    assert changed == f"entry 1: embedding {a} is not as it was written"
    [unreadable] = chain.verify_jsonl([*lines[:2], lines[2].replace(b"AgI", b"?gI"), *lines[3:]]).problems[:1]
    assert unreadable.startswith("line 3 is no entry")


def test_missing_and_changed_embeddings(database: Database, append: Append, stored: list[str], tamper: Tamper) -> None:
    a, b, _ = stored
    append(CHANGES, [with_records(a, b), with_records("ff" * 32)])
    tamper(f"UPDATE embeddings SET data = (SELECT data FROM embeddings WHERE sha256 = '{b}') WHERE sha256 = '{a}'")
    assert verify(database).intact
    assert verify(database, with_embeddings=True).problems == (
        f"entry 1: embedding {a} is not as it was written",
        f"entry 2: embedding {'ff' * 32} is missing",
    )
    with pytest.raises(CatalogError, match=f"entry 2: embedding {'ff' * 32} is missing"):
        export(database, with_embeddings=True)


def test_many_embeddings_in_one_entry(database: Database, append: Append) -> None:
    data = [i.to_bytes(8, "little") for i in range(1201)]
    names = [hashlib.sha256(item).hexdigest() for item in data]
    with database.writing() as connection:
        statement = text("INSERT INTO embeddings (sha256, dim, data) VALUES (:sha256, 2, :data)")
        connection.execute(statement, [{"sha256": n, "data": d} for n, d in zip(names, data, strict=True)])
    append(CHANGES, [with_records(*names)])
    assert verify(database, with_embeddings=True).intact
    [line] = export(database, with_embeddings=True)
    assert set(json.loads(line)["embeddings"]) == set(names)
    assert chain.verify_jsonl([line]).intact
