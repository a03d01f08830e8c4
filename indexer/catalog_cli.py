"""Commands of hardlook-index about the catalogue: its history, the audit log, versions, compaction.

Owns arguments and output. They are mounted by `indexer.cli`; the database's libraries are imported by the commands.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal

from cyclopts import App, Parameter

from indexer.errors import CatalogError, EditRefused, IndexerError

if TYPE_CHECKING:
    from indexer.catalog.chain import Entry, Head, Verification
    from indexer.catalog.ledger import Catalog, EditRequest, Outcome
    from indexer.catalog.state import State

Root = Annotated[Path, Parameter(help="Folder of all collections.")]
Collection = Annotated[str, Parameter(help="Name of the collection; 'pools' is the moderation collection.")]
CatalogUrl = Annotated[
    str,
    Parameter(
        env_var="HARDLOOK_CATALOG",
        help="Database of the catalogue: sqlite:///FILE or postgresql://...; by default catalog.sqlite3 in ROOT.",
    ),
]
Json = Annotated[bool, Parameter(name="--json", negative=(), help="Answer in JSON.")]
Chain = Literal["changes", "decisions"]
_WRONG = 1
_VERSION_KINDS = ("collection.create", "version.base", "version.publish", "version.rollback", "version.compact")
_SHOWN_IDS = 20


def mount(app: App) -> None:
    """Add the commands to those of hardlook-index."""
    app.command(_history, name="history")
    audit = App(name="audit", help="Check, export and prune the audit log.")
    audit.command(_verify, name="verify")
    audit.command(_export, name="export")
    audit.command(_prune, name="prune")
    app.command(audit)
    app.command(_versions, name="versions")
    app.command(_diff, name="diff")
    app.command(_rollback_to, name="rollback-to")
    app.command(_compact, name="compact")


def print_json(value: object) -> None:
    """The answer of a command with --json."""
    print(json.dumps(value, ensure_ascii=False, indent=2))


def applied(catalog: "Catalog", requests: Sequence["EditRequest"]) -> "list[Outcome]":
    """Make edits together; what is refused is raised, and nothing of it is made."""
    [result] = catalog.apply([requests])
    if isinstance(result, Exception):
        raise result
    return result


def _history(
    *,
    root: Root,
    catalog: CatalogUrl = "",
    collection: str | None = None,
    kind: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
    subject: str | None = None,
    chain: Chain = "changes",
    limit: int = 50,
    json: Json = False,
) -> None:
    """List what was changed, when, by whom and why; the latest come last.

    Args:
        collection: Only changes of this one.
        kind: Only entries of these kinds, such as exemplar.add.
        subject: Only entries about this, such as an exemplar's id.
        chain: Changes, or the decisions on images.
        limit: The most entries.
    """
    from indexer.catalog.chain import read
    from indexer.opened import opened_database

    with opened_database(root, catalog) as database, database.reading() as connection:
        entries = read(
            connection, chain, limit=limit, collection=collection, kinds=kind, subject=subject, newest_first=True
        )[::-1]
    if json:
        print_json([entry.to_json() for entry in entries])
        return
    for entry in entries:
        print(_entry_line(entry))


def _verify(
    *,
    root: Root,
    catalog: CatalogUrl = "",
    chain: Chain | None = None,
    head: str | None = None,
    embeddings: Annotated[bool, Parameter(negative=())] = False,
    replay: Annotated[bool, Parameter(negative=())] = False,
    file: Path | None = None,
    json: Json = False,
) -> None:
    """Check that the audit log is as it was written; exits with 1 where anything is wrong.

    Args:
        chain: Only this one.
        head: SEQ:HASH of an entry of CHAIN that was noted elsewhere; the log must still contain it.
        embeddings: Also check the embeddings that entries name.
        replay: Also replay every collection from the empty log, and compare it with what is served.
        file: Check an export in place of the database.
    """
    from indexer.catalog.chain import CHANGES, DECISIONS, verify, verify_jsonl
    from indexer.opened import opened_database

    expected = None if head is None else _head(head, chain)
    found: dict[str, Verification] = {}
    replayed: dict[str, str] = {}
    if file is not None:
        with file.open("rb") as lines:
            found[str(file)] = verify_jsonl(lines, expected=expected)
    else:
        with opened_database(root, catalog) as database:
            for each in (chain,) if chain is not None else (CHANGES, DECISIONS):
                with database.reading() as connection:
                    found[each] = verify(connection, each, expected=expected, with_embeddings=embeddings)
        replayed = _replayed(root, catalog) if replay else {}
    problems = [f"{name}: {problem}" for name, checked in found.items() for problem in checked.problems]
    problems += [f"{name}: {problem}" for name, problem in replayed.items() if problem]
    if json:
        print_json({"chains": {name: asdict(v) for name, v in found.items()}, "replayed": replayed})
    else:
        for name, checked in found.items():
            state = "intact" if checked.intact else f"{len(checked.problems)} problems"
            print(f"{name}: {state}, {checked.n} entries, head {checked.head.seq}:{checked.head.hash}")
        for name, problem in replayed.items():
            print(f"{name}: {'differs from its log' if problem else 'replayed from its log, the same'}")
        for problem in problems:
            print(problem, file=sys.stderr)
    if problems:
        sys.exit(_WRONG)


def _export(
    file: Path,
    *,
    root: Root,
    catalog: CatalogUrl = "",
    chain: Chain = "changes",
    embeddings: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Write the audit log to a new file, a line of JSON for each entry.

    Args:
        file: The file to write.
        chain: Which one.
        embeddings: Also write the embeddings that entries name.
    """
    from indexer.catalog.chain import export_jsonl
    from indexer.opened import opened_database

    with opened_database(root, catalog) as database, database.reading() as connection, _new_file(file) as lines:
        export_jsonl(connection, chain, lines, embeddings)
    print(f"wrote {file}")


def _prune(*, root: Root, before: datetime, export: Path, reason: str = "", catalog: CatalogUrl = "") -> None:
    """Remove old decisions from the audit log, once they are exported and the export is checked.

    Changes are never removed. The prune itself is logged as one.

    Args:
        before: Decisions from before this time are removed; in UTC where it names no zone.
        export: The file to write them to first.
        reason: Why; kept in the audit log.
    """
    from indexer.catalog import chain
    from indexer.catalog.edits import Note
    from indexer.catalog.ledger import EditRequest
    from indexer.opened import actor, opened_catalog

    with opened_catalog(root, catalog) as opened:
        with opened.database.reading() as connection:
            first = _first_from(connection, before if before.tzinfo else before.replace(tzinfo=UTC))
            oldest = chain.read(connection, chain.DECISIONS, before=first, limit=1)
            if not oldest:
                print("nothing is that old")
                return
            with _new_file(export) as lines:
                chain.export_jsonl(connection, chain.DECISIONS, lines, before=first)
        with export.open("rb") as written:
            checked = chain.verify_jsonl(written)
        if not checked.intact or checked.head.seq != first - 1:
            raise CatalogError(str(export), f"what was exported is not sound: {', '.join(checked.problems)}")
        body = {"before": first, "entries": checked.n, "head": asdict(checked.head)}
        note = Note("", "audit.prune", chain.DECISIONS, body)

        def prune(connection: Any, entry: object) -> None:
            chain.prune(connection, chain.DECISIONS, first)

        applied(opened, [EditRequest(note, actor(), reason, also=prune)])
    print(f"removed {checked.n} decisions up to {checked.head.seq}:{checked.head.hash}; they are in {export}")


def _versions(*, root: Root, collection: Collection, catalog: CatalogUrl = "", json: Json = False) -> None:
    """List what was published, gone back to and compacted; any revision between can be gone back to as well."""
    from indexer.catalog.chain import CHANGES, read
    from indexer.opened import opened_catalog
    from indexer.store import SnapshotStore

    with opened_catalog(root, catalog) as opened:
        state = opened.state(collection)
        with opened.database.reading() as connection:
            entries = read(connection, CHANGES, collection=collection, kinds=_VERSION_KINDS)
    known = {entry.body.get("version") for entry in entries} | {entry.body.get("base") for entry in entries}
    others = [version for version in SnapshotStore(root, collection).versions() if version not in known]
    if json:
        listed = [{"seq": e.seq, "time": e.time, "kind": e.kind, "actor": e.actor, **e.body} for e in entries]
        present = {"version": state.version, "revision": state.revision}
        print_json({"collection": collection, "present": present, "versions": listed, "only_on_disk": others})
        return
    for entry in entries:
        name = str(entry.body.get("name", ""))
        print(
            "  ".join(filter(None, (entry.body["version"], str(entry.seq), entry.time, entry.kind, entry.actor, name)))
        )
    for version in others:
        print(f"{version}  on disk only")
    print(f"present: {state.version} at revision {state.revision}")


def _diff(
    before: str, after: str, *, root: Root, collection: Collection, catalog: CatalogUrl = "", json: Json = False
) -> None:
    """Say what is different between two versions.

    Args:
        before, after: Versions, revisions, or 'present'.
    """
    from indexer.catalog.state import diff
    from indexer.live.comparison import records_of
    from indexer.opened import opened_catalog, views_of

    with opened_catalog(root, catalog) as opened:
        old, new = views_of(root, opened, [_state(opened, collection, which) for which in (before, after)])
        found = diff(*records_of(old, new))
    if json:
        print_json(asdict(found))
        return
    kinds: Mapping[str, Sequence[str]] = {
        "added": found.added,
        "removed": found.removed,
        "moved": [f"{id} ({was} to {now})" for id, was, now in found.moved],
        "changed": found.changed,
    }
    for kind, ids in kinds.items():
        further = f" and {len(ids) - _SHOWN_IDS} more" if len(ids) > _SHOWN_IDS else ""
        print(f"{kind} {len(ids)}: {', '.join(ids[:_SHOWN_IDS])}{further}" if ids else f"{kind} 0")


def _rollback_to(version: str, *, root: Root, collection: Collection, reason: str, catalog: CatalogUrl = "") -> None:
    """Make an earlier state the present one, with all that was changed at run time.

    Args:
        version: Any version that the collection ever had, or a revision.
        reason: Why; kept in the audit log.
    """
    from indexer.catalog.edits import Rollback
    from indexer.catalog.ledger import EditRequest
    from indexer.opened import actor, opened_catalog

    with opened_catalog(root, catalog) as opened:
        [outcome] = applied(opened, [EditRequest(Rollback(collection, _version(version)), actor(), reason)])
    done = "rolled back" if outcome.entry is not None else "nothing to do:"
    print(f"{done} {collection} to {outcome.state.version}")


def _compact(*, root: Root, collection: Collection, reason: str = "", catalog: CatalogUrl = "") -> None:
    """Put what was changed at run time into a new snapshot; what searches find stays the same.

    Args:
        reason: Why; kept in the audit log.
    """
    from indexer.compaction import compact
    from indexer.opened import actor, adopt, opened_catalog, present_view

    with opened_catalog(root, catalog) as opened:
        adopt(root, opened, collection)
        before = present_view(root, opened, collection)
        outcome = compact(opened, before, actor(), reason)
    if outcome.entry is None:
        print(f"nothing to do: {collection} {before.version}")
        return
    was, now = len(before.state.records), len(outcome.state.records)
    print(f"compacted {collection} to {outcome.state.version}: {was} changed records, now {now}")


def _entry_line(entry: "Entry") -> str:
    reason = f"  {entry.reason!r}" if entry.reason else ""
    collection = entry.collection or "-"
    return f"{entry.seq}  {entry.time}  {entry.kind}  {entry.actor}  {collection}  {entry.subject or '-'}{reason}"


def _head(text: str, chain: str | None) -> "Head":
    """SEQ:HASH, as `audit verify` prints it."""
    from indexer.catalog.chain import Head

    seq, _, hash = text.partition(":")
    if not seq.isdecimal() or len(hash) != 64:
        raise IndexerError(f"--head: expected SEQ:HASH as 'audit verify' prints it, got {text[:80]!r}")
    if chain is None:
        raise IndexerError("--head: say of which --chain it is")
    return Head(int(seq), hash)


def _replayed(root: Path, url: str) -> dict[str, str]:
    """For each collection what is wrong with it, an empty text for nothing."""
    from indexer.opened import opened_catalog

    found = {}
    with opened_catalog(root, url) as catalog:
        for name in sorted(catalog.states):
            try:
                again = catalog.replayed(name)
                state = catalog.state_at(name, again.revision)  # a service may go on meanwhile
            except IndexerError as error:
                found[name] = str(error)
            else:
                found[name] = "" if again == state else f"its log makes {again.version}, it is {state.version}"
    return found


def _first_from(connection: Any, before: datetime) -> int:
    """Number of the first decision that is not older than a time, or the one that will be next."""
    from sqlalchemy import func, select

    from indexer.catalog.chain import DECISIONS, head
    from indexer.catalog.clock import text_of
    from indexer.catalog.tables import entries

    query = select(func.min(entries.c.seq)).where(entries.c.chain == DECISIONS, entries.c.time >= text_of(before))
    first: int | None = connection.execute(query).scalar()
    return head(connection, DECISIONS).seq + 1 if first is None else first


def _version(text: str) -> str | int:
    """A version, or a revision: versions have 16 hexadecimal digits."""
    return int(text) if text.isdecimal() and len(text) < 16 else text


def _state(catalog: "Catalog", collection: str, which: str) -> "State":
    """A state by version, revision or 'present'."""
    present = catalog.state(collection)
    version = _version(which)
    if version in ("present", present.version):
        return present
    revision = version if isinstance(version, int) else catalog.revision_of(collection, version)
    if revision is None or not 0 < revision <= present.revision:
        raise EditRefused(collection, f"it never had the version {which!r}")
    return catalog.state_at(collection, revision)


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears, complete and on disk, at the end of the block; one that is there is never replaced."""
    import os

    from indexer.durable import sync_folder

    if path.exists():
        raise FileExistsError(f"{path} is there already")
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
