"""A collection that edits are made to, without a service."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from indexer.catalog.clock import now
from indexer.catalog.database import Database
from indexer.catalog.edits import Add, Create, Rebase
from indexer.catalog.ledger import Catalog, EditRequest, Outcome
from indexer.catalog.situation import Edit
from indexer.catalog.state import Stamp, State
from indexer.contents import Contents, Exemplar
from indexer.live.collection import LiveCollection
from indexer.live.view import View
from indexer.store import SnapshotStore

Embedding = NDArray[np.float32]
STAMP = Stamp("toy/0", "ab" * 32, 12)


@dataclass
class Edited:
    """One collection of a catalogue, and the folder that it is in."""

    catalog: Catalog
    root: Path
    collection: str = "pools"

    @property
    def store(self) -> SnapshotStore:
        return SnapshotStore(self.root, self.collection)

    @property
    def state(self) -> State:
        return self.catalog.state(self.collection)

    def adopt(self) -> None:
        """Take over what was published offline."""
        self.catalog.adopt([Rebase(self.collection, self.store.current_version(), STAMP, len(self.store.history()))])

    def publish(self, contents: Contents) -> None:
        self.store.publish(contents)
        self.adopt()

    def create(self) -> None:
        self.apply(Create(self.collection, STAMP))

    def apply(self, *edits: Edit) -> list[Outcome]:
        """Make edits together; the first refusal is raised."""
        [result] = self.catalog.apply([[EditRequest(edit, "test", "because") for edit in edits]])
        if isinstance(result, Exception):
            raise result
        return result

    def add(self, id: str, embedding: Embedding, label: str = "safe", note: str = "") -> Add:
        return Add(self.collection, Exemplar(id, label), embedding, STAMP, note)

    def view(self, at: datetime | None = None) -> View:
        live = LiveCollection(self.root, self.collection, STAMP.fingerprint, STAMP.name, STAMP.dim)
        made_at = self.state.changed_at if self.state.records else None
        return live.show(self.state, self.catalog.embeddings, at or now(), created_at=made_at)


@contextmanager
def edited(root: Path, collection: str = "pools", migrated: bytes | None = None) -> Iterator[Edited]:
    """A collection below `root` with a catalogue of its own; `migrated` is the file of an empty one."""
    if migrated is not None:
        (root / "catalog.sqlite3").write_bytes(migrated)
    database = Database.open(f"sqlite:///{root}/catalog.sqlite3")
    try:
        yield Edited(Catalog(database, root), root, collection)
    finally:
        database.close()


def same_answers(left: View, right: View, queries: Embedding, labels: Sequence[str | None]) -> None:
    """Fail unless two views answer every search alike."""
    for label in labels:
        for k in (1, 3, 100):
            assert left.search(queries, k, label=label) == right.search(queries, k, label=label)
    assert left.evidence(queries, 3) == right.evidence(queries, 3)
    assert left.counts == right.counts
    assert list(left.active()) == list(right.active())
