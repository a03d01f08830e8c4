"""Compaction: a new base snapshot for a collection whose overlay has grown, with the same exemplars in it.

The snapshot is written first, as a version that nothing refers to; then one entry of the log says that the collection
stands on it. A kill in between leaves an unused folder, which the next compaction of the same state takes over.
"""

import numpy as np

from indexer.catalog.edits import Compact
from indexer.catalog.ledger import Catalog, EditRequest, Outcome
from indexer.contents import Contents
from indexer.live.view import View
from indexer.store import SnapshotStore


def compact(catalog: Catalog, view: View, actor: str, reason: str = "") -> Outcome:
    """Put a collection onto a new base snapshot; what searches find stays the same, and the version changes.

    Changes that others make meanwhile stay on top.

    Args:
        catalog: of the collection.
        view: the present state of the collection, or one of a little earlier.
        actor: who does it.
        reason: why.

    Returns:
        What was done; an outcome without an entry where there was nothing to do.

    Raises:
        EditRefused: its base has changed meanwhile.
        SnapshotError, OSError: the snapshot cannot be written.
        CatalogError: the catalogue cannot be written.
    """
    edit = stage_compacted(SnapshotStore(catalog.root, view.collection), view)
    if edit is None:
        return Outcome(None, view.state)
    [result] = catalog.apply([[EditRequest(edit, actor, reason)]])
    if isinstance(result, Exception):
        raise result
    return result[0]


def stage_compacted(store: SnapshotStore, view: View) -> Compact | None:
    """Write the new base snapshot of a collection.

    Returns:
        The edit that puts the collection onto it; None where the overlay has nothing that a snapshot can hold.
    """
    if not any(record is None or record.is_plain for record in view.state.records.values()):
        return None
    return Compact(view.collection, store.stage(compacted_contents(view)), view.revision)


def compacted_contents(view: View) -> Contents:
    """All that a snapshot can hold of a state: the base that is left, and plain records.

    Records with a note, disabled ones and suppress items stay in the overlay. The result depends on the state alone,
    not on the time at which the view was made.
    """
    contents = view.contents()
    records = view.state.records
    rows = [
        row
        for row, exemplar in enumerate(contents.exemplars)
        if (record := records.get(exemplar.id)) is None or record.is_plain
    ]
    if len(rows) == len(contents.exemplars):
        return contents
    kept = tuple(contents.exemplars[row] for row in rows)
    embeddings = contents.embeddings[np.array(rows, np.int64)]
    return Contents(contents.collection, contents.encoder_name, contents.encoder_fingerprint, kept, embeddings)
