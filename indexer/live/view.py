"""View: one state of a collection at one moment, which answers searches as a snapshot of the same contents would.

Owns how the base snapshot and the overlay of changed records become one answer. Knows nothing of the log, of databases
or of which state is the present one.
"""

import heapq
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import cached_property
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from indexer.catalog.clock import text_of
from indexer.catalog.records import SUPPRESS, Record
from indexer.catalog.state import Stamp, State
from indexer.contents import POOL_LABELS, Contents, Exemplar, collection_kind
from indexer.errors import ContentsError, InvalidLabel, UnknownExemplar
from indexer.index import check_search
from indexer.live.overlay import Hit, Overlay, row_order
from indexer.live.suppression import Evidence, Suppressed
from indexer.snapshot import Snapshot
from perception.certified_decision import Gates
from perception.errors import FingerprintMismatch
from perception.gallery import Gallery
from perception.verdict import Neighbor

__all__ = ["Evidence", "Suppressed", "View"]

_SPARE = 16  # hidden rows that the first search allows for
_WIDEN = 4  # factor by which a search is widened in which hidden rows took too many places
_CHUNK_ROWS = 65_536  # bounds what is copied at a time


class View:
    """An immutable, searchable state of a collection; safe to share between threads.

    Making one takes time and memory in proportion to the records that differ from the base, not to the base.

    Args:
        state: base version and the records that differ from it.
        base: the snapshot of that version; None where the state has none.
        embeddings: by hash, (d,) float32 each, at least those of the state's records; not to be changed afterwards.
        now: the moment at which disabled records are looked at.
        encoder: that makes the queries.
        created_at: of the version, ISO 8601; by default that of the base where nothing differs from it, else `now`.

    Attributes:
        state, base, now, created_at: as given.
        revision: number of the last entry of the log that made the state.
        version: 16 hex digits.
        collection: its name.
        kind: 'pools' for the moderation collection, else 'gallery'.
        encoder_name, encoder_fingerprint, dim: of the embeddings.
        until: the earliest moment at which a disabled record takes part again, and the view is out of date; None where
            none will by itself.

    Raises:
        FingerprintMismatch: the base or the state is of another encoder.
        ContentsError: the base is not that of the state, or an embedding is missing, of another length or no unit
            vector; names the exemplar.
        InvalidLabel: in the moderation collection, a record is in none of the three pools.
    """

    def __init__(
        self,
        state: State,
        base: Snapshot | None,
        embeddings: Mapping[str, NDArray[np.float32]],
        now: datetime,
        encoder: Stamp,
        created_at: str | None = None,
    ) -> None:
        self.state, self.base, self.now = state, base, now
        self.version, self.revision, self.collection = state.version, state.revision, state.collection
        self.kind = collection_kind(state.collection)
        self._check_base(encoder)
        self.encoder_name, self.encoder_fingerprint, self.dim = encoder.name, encoder.fingerprint, encoder.dim
        if base is not None:
            self.encoder_name = base.encoder_name
        untouched = base.created_at if base is not None and base.version == self.version else None
        self.created_at = created_at or untouched or text_of(now)
        records = [record for record in state.records.values() if record is not None]
        self._overlay = Overlay(records, embeddings, now, self.kind, self.dim)
        self.until = self._overlay.until
        rows = [] if base is None else [base.row_of(id) for id in state.records]
        self._hidden = frozenset(row for row in rows if row is not None)
        self._hidden_of: dict[str, int] = {}
        for row in self._hidden:
            assert base is not None  # else nothing is hidden
            label = base.exemplars[row].label
            self._hidden_of[label] = self._hidden_of.get(label, 0) + 1

    @property
    def artefact(self) -> str:
        """How errors name it."""
        return f"snapshot {self.collection}/{self.version}"

    @property
    def counts(self) -> dict[str, int]:
        """Active exemplars by label, in the order of rows; in the moderation collection with empty pools."""
        counts = dict.fromkeys(POOL_LABELS, 0) if self.kind == "pools" else {}
        counts |= self.base.counts if self.base is not None else {}
        for label, hidden in self._hidden_of.items():
            counts[label] -= hidden
        for label, n in self._overlay.counts.items():
            counts[label] = counts.get(label, 0) + n
        return {label: counts[label] for label in sorted(counts) if counts[label] or self.kind == "pools"}

    def __len__(self) -> int:
        return len(self.base or ()) - len(self._hidden) + len(self._overlay)

    def exemplar(self, id: str) -> Exemplar:
        """Look up what is there, disabled exemplars and suppress items too.

        Raises:
            UnknownExemplar: there is none of that id, or it is deleted.
        """
        record = self._record(id)
        if record is not None:
            return record.exemplar
        assert self.base is not None  # else `_record` has raised
        return self.base.exemplar(id)

    def record(self, id: str) -> Record | None:
        """The record of what is there; None for an exemplar of the base that nobody has changed.

        Raises:
            UnknownExemplar: there is none of that id, or it is deleted.
        """
        return self._record(id)

    def embedding(self, id: str) -> NDArray[np.float32]:
        """A copy of the embedding (d,) of what `exemplar` finds. Errors are those of `exemplar`."""
        if self._record(id) is not None:
            return self._overlay.embedding(id)
        assert self.base is not None  # else `_record` has raised
        return self.base.embedding(id)

    def is_active(self, id: str) -> bool:
        """Whether searches can find it. Errors are those of `exemplar`."""
        record = self._record(id)
        return record is None or self._takes_part(record)

    def active(self) -> Iterator[Exemplar]:
        """All that searches can find, ordered by label, then id."""
        base = () if self.base is None else self.base.exemplars
        kept = (exemplar for row, exemplar in enumerate(base) if row not in self._hidden)
        return heapq.merge(kept, self._overlay.exemplars, key=row_order)

    def page(self, after: str, limit: int, *, label: str | None = None, inactive: bool = False) -> list[Exemplar]:
        """A part of what is there, in the order of ids, so that a list goes on where it was however much has changed.

        Takes time in proportion to the labels and the overlay, not to the base.

        Args:
            after: begin behind this id, whether it is there or not; the empty string to begin at the first.
            limit: how many at most; fewer come back only at the end.
            label: only of this label; 'suppress' for suppress items, which are `inactive` too.
            inactive: also what searches never find: disabled exemplars and suppress items.

        Raises:
            ValueError: `limit` is below 1.
            InvalidLabel: the moderation collection is asked for a label that nothing in it can have.
        """
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        if label != SUPPRESS:
            self._check_label(label)
        sources: list[Iterator[Exemplar]] = []
        if self.base is not None:
            labels = self.base.counts if label is None else self.base.counts.keys() & {label}
            sources = [self._base_after(self.base, each, after) for each in labels]
        changed = self._records_by_id
        start = bisect_right(changed, after, key=lambda record: record.id)
        sources.append(
            changed[at].exemplar
            for at in range(start, len(changed))
            if (label is None or changed[at].exemplar.label == label) and (inactive or self._takes_part(changed[at]))
        )
        return list(islice(heapq.merge(*sources, key=lambda exemplar: exemplar.id), limit))

    def search(self, queries: NDArray[np.float32], k: int, *, label: str | None = None) -> list[list[Neighbor]]:
        """The k nearest active exemplars, of all or of one label.

        Args:
            queries: (b, d) float32 of unit L2 norm.
            k: how many; fewer come back where there are fewer.
            label: search only exemplars of this label; in a gallery one that nothing carries finds nothing.

        Returns:
            For each query its neighbours, most similar first, ties by label and id.

        Raises:
            ValueError: see `VectorIndex.search`.
            InvalidLabel: the moderation collection is asked for another label than the three pools.
        """
        self._check_label(label)
        check_search(queries, k, None, (len(self), self.dim))
        found = self._search_base(queries, k, label)
        if len(self._overlay):
            for hits, changed in zip(found, self._overlay.search(queries, k, label), strict=True):
                hits += changed
                hits.sort(key=lambda hit: (-hit[1], *row_order(hit[0])))
                del hits[k:]
        return [[self._neighbor(*hit) for hit in hits] for hits in found]

    def search_each(self, queries: NDArray[np.float32], k: int) -> list[list[Neighbor]]:
        """The k nearest active exemplars of each pool, which is what `DecisionPolicy.decide` has to see.

        A gallery counts as one pool. Arguments and errors are those of `search`.

        Returns:
            For each query the neighbours pool by pool (safe, buffer, unsafe), within a pool most similar first.
        """
        by_pool = [self.search(queries, k, label=label) for label in self._pools]
        return [[neighbor for found in pools for neighbor in found] for pools in zip(*by_pool, strict=True)]

    def evidence(self, queries: NDArray[np.float32], k: int) -> list[Evidence]:
        """As `search_each`, without what active suppress items take away; the next of the same pool take its place.

        An item takes the exemplars that it names away from queries whose cosine to it is at least its
        `min_similarity`. Arguments and errors are those of `search`.
        """
        found = [Evidence(tuple(neighbors)) for neighbors in self.search_each(queries, k)]
        if self._overlay.suppress_items is None:
            return found
        matches = self._overlay.suppress_items.matches(queries)
        return [
            self._without(matched, queries[row : row + 1], k)
            if any(neighbor.id in matched for neighbor in evidence.neighbors)
            else evidence
            for row, (evidence, matched) in enumerate(zip(found, matches, strict=True))
        ]

    @property
    def gates(self) -> Gates | None:
        """What of a query decides which exemplars are its `evidence`; None where it does not matter."""
        items = self._overlay.suppress_items
        return None if items is None else items.gates

    def contents(self) -> Contents:
        """A copy of all that searches can find, to make a snapshot of."""
        base = 0 if self.base is None else len(self.base)
        kept = np.setdiff1d(np.arange(base), np.fromiter(self._hidden, np.int64, len(self._hidden)), assume_unique=True)
        exemplars = [self.base.exemplars[row] for row in kept] if self.base is not None else []
        exemplars += self._overlay.exemplars
        order = np.array(sorted(range(len(exemplars)), key=lambda at: row_order(exemplars[at])), np.int64)
        embeddings = np.empty((len(exemplars), self.dim), np.float32)
        for start in range(0, len(order), _CHUNK_ROWS):
            chunk = order[start : start + _CHUNK_ROWS]
            part, of_base = embeddings[start : start + _CHUNK_ROWS], chunk < len(kept)
            if self.base is not None:
                part[of_base] = self.base.embeddings(kept[chunk[of_base]].tolist())
            part[~of_base] = self._overlay.embeddings((chunk[~of_base] - len(kept)).tolist())
        arranged = tuple(exemplars[at] for at in order)
        return Contents(self.collection, self.encoder_name, self.encoder_fingerprint, arranged, embeddings)

    def to_gallery(self) -> Gallery:
        """The same as a perception Gallery, for offline work."""
        return self.contents().to_gallery()

    @property
    def _pools(self) -> tuple[str | None, ...]:
        """What a verdict searches, one after the other."""
        return (None,) if self.kind == "gallery" else POOL_LABELS

    @cached_property
    def _records_by_id(self) -> list[Record]:
        return sorted((record for record in self.state.records.values() if record is not None), key=lambda r: r.id)

    def _check_base(self, encoder: Stamp) -> None:
        """Refuse what does not belong together."""
        base, stamp = self.base, self.state.encoder
        if stamp is not None and stamp.fingerprint != encoder.fingerprint:
            raise FingerprintMismatch(f"collection {self.collection!r}", encoder.fingerprint, stamp.fingerprint)
        if base is None:
            if self.state.base is not None:
                raise ContentsError(f"{self.collection!r} stands on version {self.state.base}, which is not given")
            return
        if base.encoder_fingerprint != encoder.fingerprint:
            raise FingerprintMismatch(base.artefact, encoder.fingerprint, base.encoder_fingerprint)
        if (base.collection, base.version) != (self.collection, self.state.base):
            raise ContentsError(f"{self.collection!r} stands on version {self.state.base}, not on {base.artefact}")
        if base.dim != encoder.dim:
            raise ContentsError(f"embeddings of {base.artefact} have length {base.dim}, the encoder's {encoder.dim}")

    def _check_label(self, label: str | None) -> None:
        if self.kind == "pools" and label is not None and label not in POOL_LABELS:
            raise InvalidLabel(label, POOL_LABELS, f"search in {self.artefact}")

    def _record(self, id: str) -> Record | None:
        record = self.state.records.get(id)
        if record is None and (id in self.state.records or self.base is None or self.base.row_of(id) is None):
            raise UnknownExemplar(id, self.artefact)
        return record

    def _takes_part(self, record: Record) -> bool:
        return not record.suppresses and (record.disabled is None or not record.disabled.holds(self.now))

    def _base_after(self, base: Snapshot, label: str, after: str) -> Iterator[Exemplar]:
        """What is left of one label of the base behind an id: within a label rows are in the order of ids."""
        rows = base.rows(label)
        start = bisect_right(base.exemplars, after, rows.start, rows.stop, key=lambda exemplar: exemplar.id)
        return (base.exemplars[row] for row in range(start, rows.stop) if row not in self._hidden)

    def _search_base(self, queries: NDArray[np.float32], k: int, label: str | None) -> list[list[Hit]]:
        """The k nearest exemplars of the base that are not hidden.

        More are searched for than are wanted, and ever more for the queries near which too many are hidden, until k
        are left or the base has no more: whatever its index is, a hidden row takes no place.
        """
        if self.base is None:
            return [[] for _ in queries]
        n = len(self.base.rows(label))
        hidden = len(self._hidden) if label is None else self._hidden_of.get(label, 0)
        found: list[list[Hit]] = [[] for _ in queries]
        wanting, ask = list(range(len(queries))), k + min(hidden, _SPARE)
        while wanting:
            for at, hits in zip(wanting, self.base.search_rows(queries[wanting], ask, label=label), strict=True):
                kept = [(row, similarity) for row, similarity in hits if row not in self._hidden][:k]
                found[at] = [(self.base.exemplars[row], similarity) for row, similarity in kept]
            wanting = [at for at in wanting if len(found[at]) < k] if hidden and ask < n else []
            ask = min(_WIDEN * ask, n)
        return found

    def _without(self, matched: Mapping[str, Suppressed], query: NDArray[np.float32], k: int) -> Evidence:
        """Evidence for one query (1, d) of which suppress items match: pool by pool, so far as k are left."""
        neighbors: list[Neighbor] = []
        suppressed: list[Suppressed] = []
        for pool in self._pools:
            ask, most = k + _SPARE, k + len(matched)
            while True:
                [hits] = self.search(query, min(ask, most), label=pool)
                left = [at for at, hit in enumerate(hits) if hit.id not in matched][:k]
                if len(left) == k or ask >= most:
                    break
                ask *= _WIDEN
            looked_at = left[-1] if len(left) == k else len(hits)
            neighbors += [hits[at] for at in left]
            suppressed += [matched[hit.id] for hit in hits[:looked_at] if hit.id in matched]
        return Evidence(tuple(neighbors), tuple(suppressed))

    def _neighbor(self, exemplar: Exemplar, similarity: float) -> Neighbor:
        return Neighbor(exemplar.id, exemplar.label if self.kind == "pools" else self.collection, similarity)
