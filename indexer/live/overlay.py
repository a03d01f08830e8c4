"""Overlay: the records of a state at one moment, as far as they differ from the base snapshot, ready to be searched."""

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from indexer.backends.flat import FlatIndex
from indexer.catalog.records import Record
from indexer.contents import POOL_LABELS, Exemplar, Kind
from indexer.errors import ContentsError, InvalidLabel
from indexer.index import unit_rows
from indexer.live.suppression import SuppressItems

Hit = tuple[Exemplar, float]  # and its similarity


class Overlay:
    """Records that lie on top of a base snapshot; immutable.

    Args:
        records: all that are there, disabled ones and suppress items too.
        embeddings: by hash, (d,) float32 of unit L2 norm each; at least those of the records.
        now: the moment; what is disabled then is not searched.
        kind: of the collection.
        dim: d.

    Attributes:
        exemplars: the active ones, ordered by label, then id.
        counts: of them by label.
        suppress_items: the active ones; None where there are none.
        until: the earliest moment at which a disabled record takes part again; None where none will by itself.

    Raises:
        ContentsError: an embedding is missing, of another length, or no unit vector; names the exemplar.
        InvalidLabel: in the moderation collection, an exemplar is in none of the three pools.
    """

    def __init__(
        self,
        records: Sequence[Record],
        embeddings: Mapping[str, NDArray[np.float32]],
        now: datetime,
        kind: Kind,
        dim: int,
    ) -> None:
        for record in records:
            if kind == "pools" and not record.suppresses and record.exemplar.label not in POOL_LABELS:
                raise InvalidLabel(record.exemplar.label, POOL_LABELS, f"exemplar {record.id!r}")
        self._embedding_of = {record.id: _embedding(record, embeddings, dim) for record in records}
        disabled = [record.disabled for record in records if record.disabled and record.disabled.holds(now)]
        self.until = min((entry.until for entry in disabled if entry.until is not None), default=None)
        active = [record for record in records if record.disabled is None or not record.disabled.holds(now)]
        exemplars = [record.exemplar for record in active if not record.suppresses]
        items = [record for record in active if record.suppresses]
        self.exemplars = tuple(sorted(exemplars, key=row_order))
        self.counts: Mapping[str, int] = Counter(exemplar.label for exemplar in self.exemplars)
        starts = accumulate(self.counts.values(), initial=0)  # labels are contiguous and in this order
        self._rows = {label: range(*ends) for label, ends in zip(self.counts, pairwise(starts), strict=True)}
        first = dict.fromkeys([*(exemplar.id for exemplar in self.exemplars), *(item.id for item in items)])
        matrix = self._checked([*first, *(self._embedding_of.keys() - first)], dim)  # all, in an order that can be cut
        self._index = FlatIndex(matrix[: len(self)])
        self.suppress_items = SuppressItems(items, matrix[len(self) : len(first)]) if items else None

    def __len__(self) -> int:
        return len(self.exemplars)

    def embedding(self, id: str) -> NDArray[np.float32]:
        """A copy of the embedding (d,) of a record, active or not; KeyError where there is none of that id."""
        return self._embedding_of[id].copy()

    def embeddings(self, rows: Sequence[int]) -> NDArray[np.float32]:
        """A copy of the embeddings (len(rows), d) at some positions of `exemplars`."""
        return _stacked([self._embedding_of[self.exemplars[row].id] for row in rows], self._index.dim)

    def search(self, queries: NDArray[np.float32], k: int, label: str | None) -> list[list[Hit]]:
        """The k nearest active exemplars, of all or of one label, most similar first, ties by label and id."""
        rows = None if label is None else self._rows.get(label, range(0))
        found = self._index.search(queries, k, rows)
        return [[(self.exemplars[row], similarity) for row, similarity in hits] for hits in found]

    def _checked(self, ids: Sequence[str], dim: int) -> NDArray[np.float32]:
        """The embeddings (len(ids), dim) of some records, all of unit norm."""
        matrix = _stacked([self._embedding_of[id] for id in ids], dim)
        bad = np.flatnonzero(~unit_rows(matrix))
        if bad.size:
            raise ContentsError(f"the embedding of {ids[bad[0]]!r} is not finite and of unit L2 norm")
        return matrix


def row_order(exemplar: Exemplar) -> tuple[str, str]:
    """The order of rows in a snapshot."""
    return exemplar.label, exemplar.id


def _embedding(record: Record, embeddings: Mapping[str, NDArray[np.float32]], dim: int) -> NDArray[np.float32]:
    found = embeddings.get(record.embedding_sha256)
    if found is None:
        raise ContentsError(f"the embedding of {record.id!r} is missing: {record.embedding_sha256}")
    if found.shape != (dim,) or found.dtype != np.float32:
        raise ContentsError(f"the embedding of {record.id!r} is {found.shape} {found.dtype}, expected ({dim},) float32")
    return found


def _stacked(embeddings: Sequence[NDArray[np.float32]], dim: int) -> NDArray[np.float32]:
    return np.stack(embeddings) if embeddings else np.zeros((0, dim), np.float32)
