"""Snapshot: one loaded, immutable version of a collection, which answers searches.

Owns the way from row positions to Neighbors, and writing and loading. Knows nothing of which version is current.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from indexer.backends.flat import FlatIndex
from indexer.contents import POOL_LABELS, Contents, Exemplar, Kind
from indexer.durable import sync_folder, write_file
from indexer.errors import InvalidLabel, UnknownExemplar
from indexer.index import VectorIndex
from indexer.manifest import MANIFEST, Manifest, describe, read_contents, read_manifest
from perception.errors import FingerprintMismatch
from perception.gallery import Gallery
from perception.verdict import Neighbor

__all__ = ["Exemplar", "MakeIndex", "Snapshot", "load_snapshot", "write_snapshot"]

MakeIndex = Callable[[NDArray[np.float32]], VectorIndex]  # from (n, d) unit embeddings
PARTIAL_SUFFIX = ".partial"  # of a version folder that is being written; whoever holds the store's lock may delete it


@runtime_checkable
class KeepsEmbeddings(Protocol):
    """An index that can give back what it was made of, so that nobody else has to keep it."""

    def embeddings_at(self, rows: Sequence[int]) -> NDArray[np.float32]:
        """A copy of the embeddings at some row positions, exactly as they were given: (len(rows), d) float32."""


class Snapshot:
    """An immutable, searchable version of a collection; safe to share between threads."""

    def __init__(self, contents: Contents, manifest: Manifest, index: MakeIndex = FlatIndex) -> None:
        """Index contents that fit the manifest, as `load_snapshot` and `Snapshot.of` make sure."""
        self._manifest = manifest
        self._exemplars = contents.exemplars
        self._row_of = {exemplar.id: row for row, exemplar in enumerate(contents.exemplars)}
        self._rows: dict[str, range] = {}
        start = 0
        for label, count in contents.counts.items():  # labels are contiguous and in this order
            self._rows[label] = range(start, start + count)
            start += count
        self._index = index(contents.embeddings)
        # A second copy of the embeddings only where the index has none: there may be gigabytes of them.
        self._embeddings = None if isinstance(self._index, KeepsEmbeddings) else contents.embeddings

    @classmethod
    def of(cls, contents: Contents, index: MakeIndex = FlatIndex) -> "Snapshot":
        """A snapshot in memory alone, of the version that it would have on disk."""
        return cls(contents, describe(contents)[0], index)

    @property
    def artefact(self) -> str:
        """How errors name it."""
        return self._manifest.artefact

    @property
    def version(self) -> str:
        """16 hex digits, a hash of the contents."""
        return self._manifest.version

    @property
    def collection(self) -> str:
        """The collection's name."""
        return self._manifest.collection

    @property
    def kind(self) -> Kind:
        """'pools' for the moderation collection, else 'gallery'."""
        return self._manifest.kind

    @property
    def created_at(self) -> str:
        """When it was written: ISO 8601, UTC."""
        return self._manifest.created_at

    @property
    def encoder_name(self) -> str:
        """The encoder that made the embeddings."""
        return self._manifest.encoder_name

    @property
    def encoder_fingerprint(self) -> str:
        """Fingerprint of that encoder."""
        return self._manifest.encoder_fingerprint

    @property
    def dim(self) -> int:
        """d, the length of an embedding."""
        return self._index.dim

    @property
    def exemplars(self) -> tuple[Exemplar, ...]:
        """All exemplars, ordered by label, then id."""
        return self._exemplars

    @property
    def counts(self) -> dict[str, int]:
        """Exemplars by label; in the moderation collection with empty pools."""
        return {label: len(rows) for label, rows in self._rows.items()}

    def __len__(self) -> int:
        return len(self._exemplars)

    def exemplar(self, id: str) -> Exemplar:
        """Look up one exemplar.

        Raises:
            UnknownExemplar: there is none of that id.
        """
        return self._exemplars[self._row(id)]

    def embedding(self, id: str) -> NDArray[np.float32]:
        """A copy of the embedding of one exemplar: (d,). Errors are those of `exemplar`."""
        embedding: NDArray[np.float32] = self.embeddings([self._row(id)])[0]
        return embedding

    def find(self, id: str) -> tuple[Exemplar, NDArray[np.float32]] | None:
        """An exemplar and a copy of its embedding (d,); None where there is none of that id."""
        row = self.row_of(id)
        return None if row is None else (self._exemplars[row], self.embeddings([row])[0])

    def row_of(self, id: str) -> int | None:
        """The position in `exemplars` of an id; None where there is none of it."""
        return self._row_of.get(id)

    def rows(self, label: str | None = None) -> range:
        """The positions in `exemplars` of a label, which are contiguous; all positions where None.

        Raises:
            InvalidLabel: the moderation collection is asked for another label than the three pools.
        """
        if label is None:
            return range(len(self))
        if self.kind == "pools" and label not in POOL_LABELS:
            raise InvalidLabel(label, POOL_LABELS, f"search in {self.artefact}")
        return self._rows.get(label, range(0))

    def embeddings(self, rows: Sequence[int]) -> NDArray[np.float32]:
        """A copy of the embeddings at some positions of `exemplars`: (len(rows), d)."""
        if isinstance(self._index, KeepsEmbeddings):
            return self._index.embeddings_at(rows)
        assert self._embeddings is not None  # kept for such an index
        return self._embeddings[np.asarray(rows, np.int64)]

    def search(self, queries: NDArray[np.float32], k: int, *, label: str | None = None) -> list[list[Neighbor]]:
        """The k nearest exemplars, of all or of one label.

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
        return [[self._neighbor(*hit) for hit in hits] for hits in self.search_rows(queries, k, label=label)]

    def search_rows(
        self, queries: NDArray[np.float32], k: int, *, label: str | None = None
    ) -> list[list[tuple[int, float]]]:
        """As `search`, with positions in `exemplars` and similarities in place of neighbours."""
        return self._index.search(queries, k, None if label is None else self.rows(label))

    def search_each(self, queries: NDArray[np.float32], k: int) -> list[list[Neighbor]]:
        """The k nearest exemplars of each pool, which is what `DecisionPolicy.decide` has to see.

        A gallery counts as one pool. Arguments and errors are those of `search`.

        Returns:
            For each query the neighbours pool by pool (safe, buffer, unsafe), within a pool most similar first.
        """
        if self.kind == "gallery":
            return self.search(queries, k)
        by_pool = [self.search(queries, k, label=label) for label in POOL_LABELS]
        return [[neighbor for found in pools for neighbor in found] for pools in zip(*by_pool, strict=True)]

    def contents(self) -> Contents:
        """A copy of all that is in it, to build the next version from."""
        manifest = self._manifest
        return Contents(
            manifest.collection,
            manifest.encoder_name,
            manifest.encoder_fingerprint,
            self._exemplars,
            self.embeddings(range(len(self))),
        )

    def to_gallery(self) -> Gallery:
        """The same as a perception Gallery, for offline work."""
        return self.contents().to_gallery()

    def _row(self, id: str) -> int:
        try:
            return self._row_of[id]
        except KeyError:
            raise UnknownExemplar(id, self.artefact) from None

    def _neighbor(self, row: int, similarity: float) -> Neighbor:
        exemplar = self._exemplars[row]
        return Neighbor(exemplar.id, exemplar.label if self.kind == "pools" else self.collection, similarity)


def write_snapshot(contents: Contents, folder: Path, created_at: str | None = None) -> Path:
    """Write contents as `folder/<version>/`; the name appears only when all is on disk.

    Args:
        contents: what to write.
        folder: an existing folder that holds versions.
        created_at: ISO 8601, UTC; now where None.

    Returns:
        The snapshot's folder; where the same version is there already, that one, after a check.

    Raises:
        SnapshotError: the same version is there, but damaged.
        OSError: the disk is full or read-only; nothing is left behind.
    """
    manifest, files = describe(contents, created_at)
    target = folder / manifest.version
    if target.exists():
        read_contents(target, read_manifest(target))
        return target
    partial = folder / f".{manifest.version}.{uuid4().hex}{PARTIAL_SUFFIX}"
    partial.mkdir()
    try:
        for name, data in {**files, MANIFEST: manifest.to_bytes()}.items():
            write_file(partial / name, data)
        sync_folder(partial)
        partial.rename(target)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(folder)
    return target


def load_snapshot(folder: Path, encoder_fingerprint: str | None, index: MakeIndex = FlatIndex) -> Snapshot:
    """Load a snapshot, after checking everything in it.

    Args:
        folder: `.../<version>/`.
        encoder_fingerprint: of the encoder that makes the queries; None to load without queries in mind.
        index: makes what is searched.

    Raises:
        FingerprintMismatch: another encoder made it; names both.
        SnapshotError: absent or damaged.
    """
    manifest = read_manifest(folder)
    if encoder_fingerprint is not None and encoder_fingerprint != manifest.encoder_fingerprint:
        raise FingerprintMismatch(manifest.artefact, encoder_fingerprint, manifest.encoder_fingerprint)
    return Snapshot(read_contents(folder, manifest), manifest, index)
