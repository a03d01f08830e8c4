"""Replay: earlier states of a collection, from the log.

Entries that go back name an earlier state. Each state that an entry names is made once and kept: making it anew at
every mention would take twice as long with each entry of that kind.
"""

import json

from sqlalchemy import Connection, insert, select

from indexer.catalog import chain
from indexer.catalog.chain import Entry
from indexer.catalog.records import canonical_json
from indexer.catalog.state import State, replay
from indexer.catalog.tables import checkpoints

_PAGE = 1000  # entries that are read at a time
_GOING_BACK = {"version.rollback": "to_revision", "version.compact": "at_revision"}  # kind: member with the revision


class Replay:
    """Earlier states of one collection, as of one transaction.

    Args:
        connection: of that transaction.
        collection: its name.
        checkpoints_too: whether to begin at checkpoints; else at the first entry.
    """

    def __init__(self, connection: Connection, collection: str, *, checkpoints_too: bool = True) -> None:
        self._connection, self._collection, self._checkpoints_too = connection, collection, checkpoints_too
        self._made: dict[int, State] = {}

    def state_at(self, revision: int) -> State:
        """The state after the entry with that number.

        Raises:
            CatalogError: the database cannot be read.
            ContentsError: an entry is damaged.
        """
        if revision not in self._made:
            self._made[revision] = self._walk(revision)
        return self._made[revision]

    def _walk(self, revision: int) -> State:
        """From the nearest state that is known, entry by entry; states that later entries name are kept on the way."""
        state = self._nearest(revision)
        wanted = sorted(self._named(state.revision, revision), reverse=True)
        for entry in self._entries(state.revision, revision):
            while wanted and wanted[-1] < entry.seq:
                self._made.setdefault(wanted.pop(), state)
            state = replay(state, entry.seq, entry.time, entry.kind, entry.body, self.state_at)
        return state

    def _named(self, after: int, revision: int) -> set[int]:
        """Which revisions in a stretch of the log entries of that stretch go back to."""
        named = (entry.body.get(_GOING_BACK[entry.kind]) for entry in self._entries(after, revision, *_GOING_BACK))
        return {number for number in named if isinstance(number, int) and number >= after}

    def _entries(self, after: int, revision: int, *kinds: str) -> "list[Entry]":
        found: list[Entry] = []
        while True:
            page = chain.read(
                self._connection,
                chain.CHANGES,
                after=after,
                before=revision + 1,
                limit=_PAGE,
                collection=self._collection,
                kinds=kinds or None,
            )
            found += page
            if len(page) < _PAGE:
                return found
            after = page[-1].seq

    def _nearest(self, revision: int) -> State:
        """The newest state up to a revision that is there already: made before, a checkpoint, or the empty one."""
        made = max((known for known in self._made if known <= revision), default=None)
        state = State(self._collection) if made is None else self._made[made]
        if not self._checkpoints_too:
            return state
        query = (
            select(checkpoints.c.state)
            .where(
                checkpoints.c.collection == self._collection,
                checkpoints.c.revision <= revision,
                checkpoints.c.revision > state.revision,
            )
            .order_by(checkpoints.c.revision.desc())
            .limit(1)
        )
        text = self._connection.execute(query).scalar()
        return state if text is None else State.from_json(json.loads(text))


def save_checkpoint(connection: Connection, state: State) -> None:
    """Keep a state to begin with, so that a start need not replay the whole log."""
    values = {"collection": state.collection, "revision": state.revision, "state": canonical_json(state.to_json())}
    connection.execute(insert(checkpoints).values(**values))
