"""Catalog: the states of all collections, carried on by edits and kept as a log.

Owns the order of things: the log's lock, what others wrote meanwhile, the edit, the commit. An edit that was answered
is durable; one that failed has changed nothing. Several processes may have the same catalogue open.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, insert, select

from indexer.catalog import chain
from indexer.catalog.chain import Draft, Entry
from indexer.catalog.clock import now, text_of
from indexer.catalog.database import Database
from indexer.catalog.edits import Rebase
from indexer.catalog.records import embedding_bytes, embedding_from
from indexer.catalog.replaying import Replay, save_checkpoint
from indexer.catalog.situation import Base, Change, Edit, Situation
from indexer.catalog.state import State, replay
from indexer.catalog.tables import chains, embeddings, entries
from indexer.errors import CatalogError, ContentsError, IndexerError
from indexer.store import SnapshotStore
from perception.errors import PerceptionError

Chain = Literal["changes", "decisions"]
CHANGES: Chain = "changes"
VERSION_KINDS = ("version.publish", "version.base", "version.rollback", "version.compact")
_NAMED_KINDS = ("version.publish", "version.rollback")  # whose subject is the version that they leave
PUBLISHER = "hardlook-index"  # the actor of what is published offline
_CHECKPOINT_EVERY = 1000  # entries of a collection: what a start has to replay at most
_HASHES_AT_A_TIME = 500  # SQLite's limit of parameters is far above
Refusal = IndexerError | PerceptionError
LoadBase = Callable[[str, str], Base]
Also = Callable[[Connection, Entry | None], None]


@dataclass(frozen=True)
class EditRequest:
    """An edit, and who wants it for what reason.

    Attributes:
        edit: what is to be done.
        actor: who, such as 'key:0a1b2c (moderation team)'.
        reason: why, in the actor's words.
        request_id: of the request that asked for it; empty where none did.
        also: what is written in the same transaction, after the entry; None as its argument where the edit changed
            nothing. Where it raises an IndexerError, the edit and its group are not made either.
    """

    edit: Edit
    actor: str
    reason: str = ""
    request_id: str = ""
    also: Also | None = None


@dataclass(frozen=True)
class Outcome:
    """An edit that was made, or found nothing to do.

    Attributes:
        entry: of the log; None where all was so already.
        state: of the collection, after it.
    """

    entry: Entry | None
    state: State


class Catalog:
    """The collections of one folder, as the log says. Threads may share one.

    Args:
        database: opened by the caller, who closes it.
        root: folder of the snapshots.
        load_base: a snapshot by collection and version; read from disk where None.
    """

    def __init__(self, database: Database, root: Path, load_base: LoadBase | None = None) -> None:
        self.database, self.root = database, root
        self._load_base = load_base or self._read_base
        self._lock = threading.RLock()
        self._states: dict[str, State] = {}
        self._seen = 0
        self._read: tuple[str, str, Base] | None = None  # the base that was read last
        self._open()

    @property
    def states(self) -> Mapping[str, State]:
        """The state of every collection, as of the last `apply` or `follow`."""
        return dict(self._states)

    @property
    def revision(self) -> int:
        """Number of the last entry of the log that is in `states`."""
        return self._seen

    def state(self, collection: str) -> State:
        """The state of a collection, as of the last `apply` or `follow`; an empty one where it does not exist."""
        return self._states.get(collection, State(collection))

    def follow(self) -> set[str]:
        """Take over what was written since, by whomever.

        Returns:
            The collections of which something changed.

        Raises:
            CatalogError: the database cannot be read.
            ContentsError: an entry is damaged.
        """
        with self._lock, self.database.reading() as connection:
            states, seen = self._caught_up(connection)
            return self._show(states, seen)

    def apply(self, groups: Sequence[Sequence[EditRequest]]) -> list[list[Outcome] | Refusal]:
        """Make edits, one after the other, in one transaction.

        A group is made whole or not at all; groups stand alone.

        Returns:
            For each group the outcomes of its edits, or why the first that was refused was, once all is durable.

        Raises:
            CatalogError: nothing of it was written.
        """
        with self._lock:
            with self.database.writing() as connection:
                work = _Transaction(self, connection)
                outcomes = [work.make(group) for group in groups]
                states, seen = work.finish()
            self._show(states, seen)
        return outcomes

    def adopt(self, publications: Sequence[Rebase]) -> None:
        """Stand on what was published offline; errors are those of `apply`, and the first refusal."""
        if not publications:
            return
        requests = [EditRequest(edit, PUBLISHER, "published offline") for edit in publications]
        for outcome in self.apply([[request] for request in requests]):
            if isinstance(outcome, Exception):
                raise outcome

    def state_at(self, collection: str, revision: int, connection: Connection | None = None) -> State:
        """The state of a collection after the entry with that number.

        Raises:
            CatalogError: the database cannot be read.
            ContentsError: an entry is damaged.
        """
        if connection is None:
            with self.database.reading() as reading:
                return self.state_at(collection, revision, reading)
        return Replay(connection, collection).state_at(revision)

    def replayed(self, collection: str) -> State:
        """The present state from an empty one and the log alone, without checkpoints; errors are those of `follow`."""
        with self.database.reading() as connection:
            head = chain.head(connection, CHANGES).seq
            return Replay(connection, collection, checkpoints_too=False).state_at(head)

    def revision_of(self, collection: str, version: str, connection: Connection | None = None) -> int | None:
        """The newest revision at which a collection had a version; None where it never had it."""
        if connection is None:
            with self.database.reading() as reading:
                return self.revision_of(collection, version, reading)
        if not version.isalnum():
            return None
        of_collection = select(entries.c.seq).where(entries.c.chain == CHANGES, entries.c.collection == collection)
        newest = of_collection.order_by(entries.c.seq.desc()).limit(1)
        # Published versions are found by an index; of the states between them, only the text of the entry says it.
        named = newest.where(entries.c.subject == version, entries.c.kind.in_(_NAMED_KINDS))
        found = connection.execute(named).scalar()
        if found is None:
            found = connection.execute(newest.where(entries.c.body.like(f'%"version":"{version}"%'))).scalar()
        return found

    def embeddings(self, hashes: Sequence[str], connection: Connection | None = None) -> dict[str, NDArray[np.float32]]:
        """Embeddings (d,) by the hash of their bytes.

        Raises:
            CatalogError: the database cannot be read.
            ContentsError: one is not there, or damaged.
        """
        if connection is None:
            with self.database.reading() as reading:
                return self.embeddings(hashes, reading)
        found: dict[str, NDArray[np.float32]] = {}
        wanted = sorted(set(hashes))
        for start in range(0, len(wanted), _HASHES_AT_A_TIME):
            some = wanted[start : start + _HASHES_AT_A_TIME]
            rows = connection.execute(select(embeddings).where(embeddings.c.sha256.in_(some)))
            found.update((row.sha256, embedding_from(row.data)) for row in rows)
        for sha256 in wanted:
            if sha256 not in found:
                raise ContentsError(f"the catalogue has no embedding {sha256}")
        return found

    def _open(self) -> None:
        with self.database.reading() as connection:
            names = connection.execute(
                select(entries.c.collection).where(entries.c.chain == CHANGES, entries.c.collection != "").distinct()
            ).scalars()
            head = chain.head(connection, CHANGES).seq
            for name in list(names):
                state = self.state_at(name, head, connection)
                if state.encoder is not None:
                    self._states[name] = state
            self._seen = head

    def _caught_up(self, connection: Connection) -> tuple[dict[str, State], int]:
        """The states at the head of the log, and the head."""
        states, seen = dict(self._states), self._seen
        for entry in chain.read(connection, CHANGES, after=seen):
            if entry.collection:
                states[entry.collection] = self._next(connection, states.get(entry.collection), entry)
            seen = entry.seq
        return states, seen

    def _show(self, states: dict[str, State], seen: int) -> set[str]:
        changed = {name for name, state in states.items() if state is not self._states.get(name)}
        self._states, self._seen = states, seen
        return changed

    def _next(self, connection: Connection, state: State | None, entry: Entry) -> State:
        earlier = Replay(connection, entry.collection).state_at
        return replay(state or State(entry.collection), entry.seq, entry.time, entry.kind, entry.body, earlier)

    def _base_of(self, state: State) -> Base | None:
        return None if state.base is None else self._load_base(state.collection, state.base)

    def _read_base(self, collection: str, version: str) -> Base:
        if self._read is None or self._read[:2] != (collection, version):
            self._read = (collection, version, SnapshotStore(self.root, collection).load(None, version))
        return self._read[2]


class _Transaction:
    """Edits on their way into the log."""

    def __init__(self, catalog: Catalog, connection: Connection) -> None:
        self._catalog, self._connection = catalog, connection
        # Whoever writes holds the chain's row until the end: what is read now stays true.
        connection.execute(select(chains.c.name).where(chains.c.name == CHANGES).with_for_update())
        self._states, self._seen = catalog._caught_up(connection)
        self._at = now()

    def make(self, group: Sequence[EditRequest]) -> list[Outcome] | Refusal:
        """Make the edits of a group, or none of them and say why."""
        before = self._states, self._seen
        try:
            with self._connection.begin_nested():
                return [self._made(request) for request in group]
        except (IndexerError, PerceptionError) as error:
            self._states, self._seen = before
            if isinstance(error, CatalogError):
                raise
            return error

    def finish(self) -> tuple[dict[str, State], int]:
        """The states and the head after all of them."""
        return self._states, self._seen

    def _made(self, request: EditRequest) -> Outcome:
        name = request.edit.collection
        state = self._states.get(name, State(name))
        change = request.edit.change(self._situation(state))
        entry = None
        if change is not None:
            entry, state = self._logged(request, state, change)
        if request.also is not None:
            request.also(self._connection, entry)
        if entry is not None:
            self._states, self._seen = {**self._states, name: state} if name else self._states, entry.seq
        return Outcome(entry, state)

    def _situation(self, state: State) -> Situation:
        catalog, name = self._catalog, state.collection
        return Situation(
            state,
            lambda: catalog._base_of(state),
            lambda version: catalog.revision_of(name, version, self._connection),
            lambda revision: catalog.state_at(name, revision, self._connection),
            self._at,
        )

    def _logged(self, request: EditRequest, state: State, change: Change) -> tuple[Entry, State]:
        """Write an entry and the embeddings that it needs."""
        seq = self._seen + 1
        catalog, connection, name = self._catalog, self._connection, state.collection

        def earlier(revision: int) -> State:
            return catalog.state_at(name, revision, connection)

        time = text_of(self._at)
        after = replay(state, seq, time, change.kind, change.body, earlier)
        body = {**change.body, "version": after.version, "revision": after.revision} if name else change.body
        for sha256, embedding in change.embeddings.items():
            present = connection.execute(select(embeddings.c.dim).where(embeddings.c.sha256 == sha256)).first()
            if present is None:
                data = embedding_bytes(embedding)
                connection.execute(insert(embeddings).values(sha256=sha256, dim=len(embedding), data=data))
        draft = Draft(change.kind, request.actor, request.reason, request.request_id, name, change.subject, dict(body))
        [entry] = chain.append(connection, CHANGES, [draft], time=time)
        if entry.seq != seq:
            raise ContentsError(f"the log is at {entry.seq}, expected {seq}")
        if name and after.revision // _CHECKPOINT_EVERY != state.revision // _CHECKPOINT_EVERY:
            save_checkpoint(connection, after)
        return entry, after
