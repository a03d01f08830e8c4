"""Comparison: the records of two views, as far as they can differ."""

from collections.abc import Iterable

from indexer.catalog.records import Record, embedding_sha256
from indexer.live.view import View
from indexer.snapshot import Snapshot

Records = dict[str, Record]


def records_of(before: View, after: View) -> tuple[Records, Records]:
    """The records of two views by id, without what both have from the same base; for `indexer.catalog.state.diff`.

    Views on the same base differ in their overlays alone, so that a million untouched exemplars need not be looked at.
    """
    one, other = before.state.records.keys(), after.state.records.keys()
    if before.state.base == after.state.base:
        ids = one | other
        return _records(before, ids), _records(after, ids)
    return _records(before, one | _ids(before.base)), _records(after, other | _ids(after.base))


def _ids(base: Snapshot | None) -> set[str]:
    return set() if base is None else {exemplar.id for exemplar in base.exemplars}


def _records(view: View, ids: Iterable[str]) -> Records:
    found: Records = {}
    for id in ids:
        if id in view.state.records:
            record = view.state.records[id]
        else:
            plain = None if view.base is None else view.base.find(id)
            record = None if plain is None else Record(plain[0], embedding_sha256(plain[1]))
        if record is not None:
            found[id] = record
    return found
