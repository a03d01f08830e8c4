"""Import of a pool file into a collection: small ones as edits, large ones as a new base snapshot.

Owns what counts as a conflict. An exemplar of the file conflicts with one of the collection that has the same id but
another image, label, source, metadata or note. A note where there was none is added, and is no conflict.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from indexer.catalog.edits import Add, Annotate, Create, Delete, Move, Note
from indexer.catalog.records import Record
from indexer.catalog.situation import Edit, require_label
from indexer.catalog.state import Stamp
from indexer.contents import Contents, Exemplar
from indexer.errors import EditRefused, ExemplarExists, UnknownExemplar
from indexer.live.view import View
from indexer.pool_file import PoolFile
from perception.errors import FingerprintMismatch

MOST_EDITS = 2000  # exemplars of a file from which it becomes a snapshot: each edit is an entry of the log for ever
OnConflict = Literal["skip", "refuse", "replace"]


@dataclass(frozen=True, eq=False)
class _Incoming:
    """One exemplar of a file."""

    exemplar: Exemplar
    embedding: NDArray[np.float32]
    note: str


@dataclass(frozen=True, eq=False)
class _Present:
    """What the collection has under the same id; `record` is None for what is in the base alone."""

    exemplar: Exemplar
    record: Record | None

    @property
    def note(self) -> str:
        """Of an operator."""
        return "" if self.record is None else self.record.note


def import_edits(pool_file: PoolFile, view: View, on_conflict: OnConflict) -> list[Edit]:
    """The edits that bring a file's exemplars into a collection, to be made together; none where all is so already.

    Args:
        pool_file: of the same encoder.
        view: the present state of the collection, which may be of another name than the file's; at revision 0 it is
            created.
        on_conflict: leave the present exemplar, refuse the whole file, or take the file's. A replaced exemplar stays
            disabled where it was.

    Raises:
        FingerprintMismatch: the file is of another encoder; names both.
        EditRefused: the file is of a gallery and the collection is the moderation collection, or the other way round.
        InvalidLabel: a label cannot be in the collection.
        ExemplarExists: a conflict, which is refused.
    """
    _require_fit(pool_file, view)
    stamp = Stamp(view.encoder_name, view.encoder_fingerprint, view.dim)
    edits: list[Edit] = []
    for incoming in _incoming(pool_file):
        present = _present(view, incoming.exemplar.id)
        if present is None:
            edits.append(Add(view.collection, incoming.exemplar, incoming.embedding, stamp, incoming.note))
        elif not _conflict(incoming, present, view):
            if incoming.note and not present.note:
                edits.append(Annotate(view.collection, incoming.exemplar.id, note=incoming.note))
        elif _takes_the_files(on_conflict, incoming, view):
            edits += _replacing(incoming, present, view, stamp)
    if not edits:
        return []
    header = pool_file.header
    said = {"collection": header.collection, "version": header.version, "revision": header.revision}
    about = {"sha256": header.sha256, "exemplars": header.n, "of": said, "on_conflict": on_conflict}
    created = [] if view.revision else [Create(view.collection, stamp)]
    return [*created, Note(view.collection, "pool.import", header.sha256, about), *edits]


def merge(pool_file: PoolFile, view: View, on_conflict: OnConflict) -> Contents:
    """A new base snapshot of a collection with a file's exemplars in it, to be published.

    What the overlay of the present state has, or has deleted, stays on top of a base whatever that says. So such
    exemplars, and all notes, are left out here: when the snapshot is published and the view is one of it,
    `import_edits` gives the few edits that are left. Arguments and errors are those of `import_edits`.
    """
    _require_fit(pool_file, view)
    contents = view.contents()
    rows = {exemplar.id: row for row, exemplar in enumerate(contents.exemplars)}
    exemplars = list(contents.exemplars)
    replaced: dict[int, int] = {}
    added: list[int] = []
    for position, incoming in enumerate(_incoming(pool_file)):
        id = incoming.exemplar.id
        present = _present(view, id)
        conflict = present is not None and _conflict(incoming, present, view)
        if conflict and not _takes_the_files(on_conflict, incoming, view):
            continue
        if id in view.state.records or (present is not None and not conflict):
            continue
        if id in rows:
            replaced[rows[id]] = position
        else:
            added.append(position)
    embeddings = np.concatenate([contents.embeddings, pool_file.contents.embeddings[added]])
    for row, position in replaced.items():
        exemplars[row] = pool_file.contents.exemplars[position]
        embeddings[row] = pool_file.contents.embeddings[position]
    exemplars += [pool_file.contents.exemplars[position] for position in added]
    return Contents.arrange(
        contents.collection, contents.encoder_name, contents.encoder_fingerprint, exemplars, embeddings
    )


def _require_fit(pool_file: PoolFile, view: View) -> None:
    header = pool_file.header
    if header.encoder_fingerprint != view.encoder_fingerprint:
        artefact = f"the pool file of {header.collection!r}"
        raise FingerprintMismatch(artefact, view.encoder_fingerprint, header.encoder_fingerprint)
    if header.kind != view.kind:
        kinds = {"pools": "the moderation collection", "gallery": "a gallery"}
        raise EditRefused(view.collection, f"it is {kinds[view.kind]}, and the file is of {kinds[header.kind]}")
    for label, n in pool_file.contents.counts.items():
        if n:
            require_label(view.collection, label)


def _incoming(pool_file: PoolFile) -> Iterator[_Incoming]:
    contents = pool_file.contents
    for exemplar, embedding in zip(contents.exemplars, contents.embeddings, strict=True):
        yield _Incoming(exemplar, embedding, pool_file.notes.get(exemplar.id, ""))


def _present(view: View, id: str) -> _Present | None:
    try:
        return _Present(view.exemplar(id), view.record(id))
    except UnknownExemplar:
        return None


def _conflict(incoming: _Incoming, present: _Present, view: View) -> bool:
    if incoming.exemplar != present.exemplar or not _same_image(incoming, view):
        return True
    return bool(incoming.note and present.note and incoming.note != present.note)


def _same_image(incoming: _Incoming, view: View) -> bool:
    """By the hashes of the files where both are known: an embedding differs in its last bits from batch to batch."""
    id, sha256 = incoming.exemplar.id, view.exemplar(incoming.exemplar.id).sha256
    if sha256 and incoming.exemplar.sha256:
        return sha256 == incoming.exemplar.sha256
    return np.array_equal(incoming.embedding, view.embedding(id))


def _takes_the_files(on_conflict: OnConflict, incoming: _Incoming, view: View) -> bool:
    if on_conflict == "refuse":
        raise ExemplarExists(incoming.exemplar.id, view.collection)
    return on_conflict == "replace"


def _replacing(incoming: _Incoming, present: _Present, view: View, stamp: Stamp) -> Iterator[Edit]:
    """Make what is present what the file says; a new image takes the place of the old one."""
    collection, exemplar = view.collection, incoming.exemplar
    note = incoming.note or present.note
    if not _same_image(incoming, view) or exemplar.sha256 != present.exemplar.sha256:
        disabled = None if present.record is None else present.record.disabled
        yield Delete(collection, exemplar.id)
        yield Add(collection, exemplar, incoming.embedding, stamp, note, disabled)
        return
    if exemplar.label != present.exemplar.label:
        yield Move(collection, exemplar.id, exemplar.label)
    moved = replace(present.exemplar, label=exemplar.label)
    if moved != exemplar or note != present.note:
        metadata: Mapping[str, str] = dict(exemplar.metadata)
        yield Annotate(collection, exemplar.id, note=note, source=exemplar.source, metadata=metadata)
