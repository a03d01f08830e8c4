"""Snapshot: one loaded, immutable version of a collection, which answers searches.

Owns the way from row positions to Neighbors, and writing and loading. Knows nothing of which version is current.
"""

import shutil
from pathlib import Path
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from indexer.backends.flat import FlatIndex
from indexer.contents import POOL_LABELS, Contents, Exemplar, Kind
from indexer.durable import sync_folder, write_file
from indexer.errors import InvalidLabel, UnknownExemplar
from indexer.manifest import MANIFEST, Manifest, describe, read_contents, read_manifest
from perception.errors import FingerprintMismatch
from perception.gallery import Gallery
from perception.verdict import Neighbor

__all__ = ["Exemplar", "Snapshot", "load_snapshot", "write_snapshot"]

PARTIAL_SUFFIX = ".partial"  # of a version folder that is being written; whoever holds the store's lock may delete it


class Snapshot:
    """An immutable, searchable version of a collection; safe to share between threads."""

    def __init__(self, contents: Contents, manifest: Manifest) -> None:
        """Index contents that fit the manifest, as `load_snapshot` and `Snapshot.of` make sure."""
        self._manifest = manifest
        self._exemplars = contents.exemplars
        self._row_of = {exemplar.id: row for row, exemplar in enumerate(contents.exemplars)}
        self._rows: dict[str, range] = {}
        start = 0
        for label, count in contents.counts.items():  # labels are contiguous and in this order
            self._rows[label] = range(start, start + count)
            start += count
        self._index = FlatIndex(contents.embeddings)

    @classmethod
    def of(cls, contents: Contents) -> "Snapshot":
        """A snapshot in memory alone, of the version that it would have on disk."""
        return cls(contents, describe(contents)[0])

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
        try:
            return self._exemplars[self._row_of[id]]
        except KeyError:
            raise UnknownExemplar(id, self._manifest.artefact) from None

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
        rows = None if label is None else self._rows.get(label, range(0))
        if self.kind == "pools" and label is not None and label not in POOL_LABELS:
            raise InvalidLabel(label, POOL_LABELS, f"search in {self._manifest.artefact}")
        return [[self._neighbor(*hit) for hit in hits] for hits in self._index.search(queries, k, rows)]

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
            self._index.copy_embeddings(),
        )

    def to_gallery(self) -> Gallery:
        """The same as a perception Gallery, for offline work."""
        return self.contents().to_gallery()

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


def load_snapshot(folder: Path, encoder_fingerprint: str | None) -> Snapshot:
    """Load a snapshot, after checking everything in it.

    Args:
        folder: `.../<version>/`.
        encoder_fingerprint: of the encoder that makes the queries; None to load without queries in mind.

    Raises:
        FingerprintMismatch: another encoder made it; names both.
        SnapshotError: absent or damaged.
    """
    manifest = read_manifest(folder)
    if encoder_fingerprint is not None and encoder_fingerprint != manifest.encoder_fingerprint:
        raise FingerprintMismatch(manifest.artefact, encoder_fingerprint, manifest.encoder_fingerprint)
    return Snapshot(read_contents(folder, manifest), manifest)
