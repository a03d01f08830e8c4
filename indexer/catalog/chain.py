"""The hash-chained log: append, read, verify, export, prune.

Each entry's hash covers its text and the hash before it. So whoever changes, removes, inserts or reorders entries
must write all later hashes anew, and `verify` finds what was not. What a chain alone cannot show is that all of it
from some entry on was rewritten by somebody who can write to the database and knows how hashes are made, or that its
end was cut off and the head set back: for that, note a `Head` or an export elsewhere from time to time and give it to
`verify` as `expected`. It then proves that everything up to the noted entry is as it was. Nor does it prove that what
was written was true, or that the clock was right.

Every function works within the caller's transaction (`Database.writing`, `Database.reading`).
"""

import base64
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, BinaryIO

from sqlalchemy import Connection, Row, delete, insert, select, update

from indexer.catalog.clock import now_text, parse_time, text_of
from indexer.catalog.database import redacted
from indexer.catalog.entry import GENESIS, Draft, Entry, Head
from indexer.catalog.links import Links, Verification
from indexer.catalog.records import canonical_json
from indexer.catalog.tables import chains, embeddings, entries
from indexer.errors import CatalogError, ContentsError

__all__ = [
    "CHANGES",
    "DECISIONS",
    "GENESIS",
    "Draft",
    "Entry",
    "Head",
    "Verification",
    "append",
    "export_jsonl",
    "head",
    "jsonl_lines",
    "prune",
    "read",
    "verify",
    "verify_jsonl",
]

CHANGES = "changes"  # kept for ever: states are replayed from it
DECISIONS = "decisions"
_PAGE = 200  # entries held at a time where all are gone through
_NAMES_A_QUERY = 500  # of embeddings; SQLite has a limit
_MAX_SEQ = 2**63 - 1
_EMBEDDINGS = "embeddings"
_NAME = re.compile("[0-9a-f]{64}")
_DAMAGE = (ContentsError, TypeError, ValueError, RecursionError)  # what parsing a damaged entry raises


def append(connection: Connection, chain: str, drafts: Sequence[Draft], *, time: str | None = None) -> list[Entry]:
    """Add entries at the end of a chain, in the order given; other writers wait until the transaction ends.

    Who appends to both chains in one transaction takes `changes` first, so that two of them do not wait for each
    other.

    Args:
        connection: of `Database.writing`.
        chain: `changes` or `decisions`.
        drafts: any number; it takes three statements.
        time: of all of them, as `clock.text_of` writes it; None for now.

    Raises:
        CatalogError: there is no such chain.
        ContentsError: `time` is written in another way.
    """
    last = _chain(connection, chain, lock=True)
    time = now_text() if time is None else _checked_time(time)
    made: list[Entry] = []
    for draft in drafts:
        prev = made[-1].hash if made else last.head_hash
        made.append(_entry(draft, chain, last.head_seq + len(made) + 1, time, prev))
    if made:
        texts = [{"body": draft.body_json} for draft in drafts]
        connection.execute(insert(entries), [e.to_json() | text for e, text in zip(made, texts, strict=True)])
        end = {"head_seq": made[-1].seq, "head_hash": made[-1].hash}
        connection.execute(update(chains).where(chains.c.name == chain).values(end))
    return made


def read(
    connection: Connection,
    chain: str,
    *,
    after: int = 0,
    before: int | None = None,
    limit: int | None = None,
    collection: str | None = None,
    kinds: Collection[str] | None = None,
    subject: str | None = None,
    newest_first: bool = False,
) -> list[Entry]:
    """Entries of a chain, by number.

    Args:
        connection: in a transaction.
        chain: `changes` or `decisions`.
        after, before: numbers, both exclusive.
        limit: the most that are returned; None for all, which may be many.
        collection, kinds, subject: only entries of these; None for any.
        newest_first: descending numbers.

    Raises:
        CatalogError: an entry cannot be understood: it is damaged.
    """
    query = select(entries).where(entries.c.chain == chain, entries.c.seq > _clamped(after))
    if before is not None:
        query = query.where(entries.c.seq < _clamped(before))
    if collection is not None:
        query = query.where(entries.c.collection == collection)
    if kinds is not None:
        query = query.where(entries.c.kind.in_(sorted(kinds)))
    if subject is not None:
        query = query.where(entries.c.subject == subject)
    query = query.order_by(entries.c.seq.desc() if newest_first else entries.c.seq)
    if limit is not None:
        query = query.limit(_clamped(limit))
    try:
        return [_from_row(row) for row in connection.execute(query)]
    except _DAMAGE as error:
        raise CatalogError(_where(connection), f"an entry of {chain!r} is damaged: {error}") from error


def head(connection: Connection, chain: str) -> Head:
    """The end of a chain; GENESIS where nothing was ever written.

    Raises:
        CatalogError: there is no such chain.
    """
    row = _chain(connection, chain)
    return Head(row.head_seq, row.head_hash)


def verify(
    connection: Connection, chain: str, *, expected: Head | None = None, with_embeddings: bool = False
) -> Verification:
    """Go through a whole chain, in constant memory, and list what is not as it was written.

    Args:
        connection: of `Database.reading`, so that it sees one moment.
        chain: `changes` or `decisions`.
        expected: a head noted earlier, elsewhere: the chain must still contain it.
        with_embeddings: also check that the embeddings that records name are there and intact; reads all of them.

    Raises:
        CatalogError: there is no such chain, or the database cannot be read.
    """
    row = _chain(connection, chain)
    links = Links(Head(row.first_seq - 1, row.first_prev), expected)
    if chain == CHANGES and row.first_seq != 1:
        links.report(f"it begins with entry {row.first_seq}, but is never pruned")
    for page in _pages(connection, chain):
        for item in page:
            try:
                entry = _from_row(item)
                computed = entry.computed_hash() if canonical_json(entry.body) == item.body else None
            except _DAMAGE:
                links.follow(item.seq, item.prev, item.hash, None)
                continue
            links.follow(entry.seq, entry.prev, entry.hash, computed)
            if with_embeddings:
                _check_embeddings(connection, entry, links)
        if links.gave_up:
            return links.found()
    return links.end(Head(row.head_seq, row.head_hash))


def export_jsonl(
    connection: Connection,
    chain: str,
    file: BinaryIO,
    with_embeddings: bool = False,
    *,
    after: int = 0,
    before: int | None = None,
) -> None:
    """Write what `jsonl_lines` gives to a file that is open for bytes. Errors are those of `jsonl_lines`."""
    file.writelines(jsonl_lines(connection, chain, with_embeddings, after=after, before=before))


def jsonl_lines(
    connection: Connection, chain: str, with_embeddings: bool = False, *, after: int = 0, before: int | None = None
) -> Iterator[bytes]:
    """The entries of a chain as lines of UTF-8, each the canonical JSON of one entry, in a few pages of memory.

    With embeddings, an entry has the further field `embeddings`: those that its records are the first in these lines
    to name, base64 of little-endian float32 by sha256. Which were given takes 100 bytes of memory each.

    Args:
        connection: of `Database.reading`, open until the last line is taken.
        chain: `changes` or `decisions`.
        with_embeddings: whether to add them.
        after, before: numbers, both exclusive.

    Raises:
        CatalogError: an entry is damaged, or an embedding is missing.
    """
    given: set[bytes] = set()
    while page := read(connection, chain, after=after, before=before, limit=_PAGE):
        for entry in page:
            value = entry.to_json()
            if with_embeddings:
                names = [name for name in _named(entry) if bytes.fromhex(name) not in given]
                given |= {bytes.fromhex(name) for name in names}
                found = _embeddings(connection, names)
                if missing := [name for name in names if name not in found]:
                    raise CatalogError(_where(connection), f"entry {entry.seq}: embedding {missing[0]} is missing")
                if names:
                    value[_EMBEDDINGS] = {name: base64.b64encode(found[name]).decode() for name in names}
            yield f"{canonical_json(value)}\n".encode()
        after = page[-1].seq


def verify_jsonl(lines: Iterable[str | bytes], *, expected: Head | None = None) -> Verification:
    """Check an export by itself; it may begin with any entry, whose `prev` is then taken at its word.

    That its end was cut off shows only with `expected`, a head that it contained.
    """
    links = Links(None, expected)
    chain: str | None = None
    for number, line in enumerate(lines, 1):
        try:
            entry, problem = _parse_line(line)
            computed = entry.computed_hash()
        except _DAMAGE as error:
            links.report(f"line {number} is no entry: {error}")
        else:
            chain = chain or entry.chain
            if entry.chain != chain:
                links.report(f"line {number} is of the chain {entry.chain!r:.100}, the first of {chain!r:.100}")
            links.follow(entry.seq, entry.prev, entry.hash, computed)
            if problem:
                links.report(f"entry {entry.seq}: {problem}")
        if links.gave_up:
            return links.found()
    return links.end(None)


def prune(connection: Connection, chain: str, before_seq: int) -> int:
    """Remove the entries before a number from the chain `decisions`; what stays still verifies. Returns how many.

    Args:
        connection: of `Database.writing`.
        chain: `decisions`; `changes` is refused, since states are replayed from it.
        before_seq: number of the first entry that stays, at most one more than that of the last entry.

    Raises:
        CatalogError: another chain, or `before_seq` is beyond its end.
    """
    if chain != DECISIONS:
        raise CatalogError(_where(connection), f"the chain {chain!r} is not pruned, only {DECISIONS!r} is")
    row = _chain(connection, chain, lock=True)
    if before_seq > row.head_seq + 1:
        raise CatalogError(_where(connection), f"cannot prune before {before_seq}: the last entry is {row.head_seq}")
    if before_seq <= row.first_seq:
        return 0
    mine = entries.c.chain == chain
    prev = connection.scalar(select(entries.c.hash).where(mine, entries.c.seq == before_seq - 1))
    if prev is None:
        raise CatalogError(_where(connection), f"entry {before_seq - 1} of {chain!r} is missing; verify it first")
    connection.execute(update(chains).where(chains.c.name == chain).values(first_seq=before_seq, first_prev=prev))
    return connection.execute(delete(entries).where(mine, entries.c.seq < before_seq)).rowcount


def _chain(connection: Connection, chain: str, *, lock: bool = False) -> Row[Any]:
    query = select(chains).where(chains.c.name == chain)
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise CatalogError(_where(connection), f"there is no chain {chain!r}")
    return row


def _where(connection: Connection) -> str:
    return redacted(connection.engine.url)


def _clamped(number: int) -> int:
    return max(-_MAX_SEQ, min(number, _MAX_SEQ))


def _checked_time(time: str) -> str:
    try:
        written = text_of(parse_time(time))
    except ValueError as error:
        raise ContentsError(f"the time of an entry: {error}") from None
    if written != time:
        raise ContentsError(f"the time of an entry must be written as {written!r}, got {time!r}")
    return time


def _entry(draft: Draft, chain: str, seq: int, time: str, prev: str) -> Entry:
    body = json.loads(draft.body_json)  # as a reader will see it: tuples have become lists
    texts = (draft.kind, draft.actor, draft.reason, draft.request_id, draft.collection, draft.subject)
    unsigned = Entry(chain, seq, time, *texts, body, prev, "")
    return replace(unsigned, hash=unsigned.computed_hash())


def _from_row(row: Row[Any]) -> Entry:
    return Entry.from_json({**row._mapping, "body": json.loads(row.body)})


def _pages(connection: Connection, chain: str) -> Iterator[Sequence[Row[Any]]]:
    """All rows of a chain as they are in the table, whatever their numbers."""
    query = select(entries).where(entries.c.chain == chain).order_by(entries.c.seq).limit(_PAGE)
    page = connection.execute(query).all()
    while page:
        yield page
        page = connection.execute(query.where(entries.c.seq > page[-1].seq)).all()


def _named(entry: Entry) -> list[str]:
    """The embeddings that the records of an entry name, each once."""
    records = entry.body.get("records")
    items = [item for item in records if isinstance(item, dict)] if isinstance(records, list) else []
    names = [item.get("embedding_sha256") for item in items]
    return list(dict.fromkeys(name for name in names if isinstance(name, str) and _NAME.fullmatch(name)))


def _embeddings(connection: Connection, names: Sequence[str]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for start in range(0, len(names), _NAMES_A_QUERY):
        wanted = embeddings.c.sha256.in_(names[start : start + _NAMES_A_QUERY])
        rows = connection.execute(select(embeddings.c.sha256, embeddings.c.data).where(wanted))
        found |= {row.sha256: bytes(row.data) for row in rows}
    return found


def _check_embeddings(connection: Connection, entry: Entry, links: Links) -> None:
    names = _named(entry)
    found = _embeddings(connection, names)
    for name in names:
        if name not in found:
            links.report(f"entry {entry.seq}: embedding {name} is missing")
        elif hashlib.sha256(found[name]).hexdigest() != name:
            links.report(f"entry {entry.seq}: embedding {name} is not as it was written")


def _parse_line(line: str | bytes) -> tuple[Entry, str]:
    """The entry of a line, and what is wrong with the line apart from hashes and links; '' for nothing."""
    text = (line.decode() if isinstance(line, bytes) else line).rstrip("\r\n")
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ContentsError("it is not a JSON object")
    if canonical_json(value) != text:  # the same name twice, for one: readers would not agree on what it says
        return Entry.from_json({k: v for k, v in value.items() if k != _EMBEDDINGS}), "it is not written canonically"
    given = value.pop(_EMBEDDINGS, {})
    entry = Entry.from_json(value)
    if not isinstance(given, dict) or not given.keys() <= set(_named(entry)):
        return entry, "it has embeddings that its records do not name"
    for name, data in given.items():
        if hashlib.sha256(base64.b64decode(data, validate=True)).hexdigest() != name:
            return entry, f"embedding {name} is not as it was written"
    return entry, ""
