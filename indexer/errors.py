"""Every exception that indexer raises on purpose.

    IndexerError
    ├── InvalidName        a collection name that is not allowed
    ├── InvalidLabel       the label of an exemplar is none of the three pools
    ├── ContentsError      exemplars and embeddings do not fit together
    │   └── DuplicateId    an id occurs twice
    ├── SnapshotError      a snapshot or a store file is absent or damaged
    ├── UnknownCollection  no published collection of that name
    ├── UnknownVersion     the collection has no such version
    ├── UnknownExemplar    the snapshot has no such id
    ├── CatalogError       the catalogue cannot be opened, read or written
    ├── EditError          a change of a collection that is not made; nothing of it is
    │   ├── ExemplarExists an exemplar of that id is there already
    │   └── EditRefused    it makes no sense in the present state
    ├── UnknownReview      the queue has no such item
    ├── ReviewTaken        somebody else has claimed or decided it
    ├── UnknownJob         there is no such job, or it is another caller's
    ├── PoolFileError      a pool file is damaged
    ├── SourceError        a folder, manifest or archive cannot be used at all
    │   └── ManifestError  one line of a CSV manifest is wrong
    └── BuildError         a build cannot start, go on or end

A snapshot made by another encoder is `perception.errors.FingerprintMismatch`.
"""

from collections.abc import Iterable
from pathlib import Path


class IndexerError(Exception):
    """Root of everything that indexer raises on purpose."""


class InvalidName(IndexerError):
    """A collection cannot be called so."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(f"invalid collection name {name!r}: {reason}")


class InvalidLabel(IndexerError):
    """An exemplar of the moderation collection is in none of the three pools."""

    def __init__(self, label: str, allowed: Iterable[str], where: str) -> None:
        self.label, self.allowed, self.where = label, tuple(allowed), where
        super().__init__(f"{where}: label {label!r} is not one of {', '.join(self.allowed)}")


class ContentsError(IndexerError):
    """Exemplars and embeddings do not fit together."""


class DuplicateId(ContentsError):
    """Two exemplars have the same id."""

    def __init__(self, id: str) -> None:
        self.id = id
        super().__init__(f"id {id!r} occurs more than once")


class SnapshotError(IndexerError):
    """A snapshot or a file of the store is absent or damaged."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{path}: {reason}")


class UnknownCollection(IndexerError):
    """There is no published collection of that name."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        self.name, self.known = name, tuple(sorted(known))
        super().__init__(f"unknown collection {name!r}; published: {', '.join(self.known) or 'none'}")


class UnknownVersion(IndexerError):
    """The collection has no such version."""

    def __init__(self, collection: str, version: str, known: Iterable[str]) -> None:
        self.collection, self.version, self.known = collection, version, tuple(known)
        super().__init__(f"{collection!r} has no version {version!r}; it has: {', '.join(self.known) or 'none'}")


class UnknownExemplar(IndexerError):
    """The snapshot has no exemplar of that id."""

    def __init__(self, id: str, snapshot: str) -> None:
        self.id, self.snapshot = id, snapshot
        super().__init__(f"no exemplar {id!r} in {snapshot}")


class CatalogError(IndexerError):
    """The catalogue cannot be opened, read or written; `where` is its address without secrets."""

    def __init__(self, where: str, reason: str) -> None:
        self.where, self.reason = where, reason
        super().__init__(f"catalogue {where}: {reason}")


class EditError(IndexerError):
    """A change of a collection that is not made; nothing of it is."""


class ExemplarExists(EditError):
    """An exemplar of that id is there already."""

    def __init__(self, id: str, collection: str) -> None:
        self.id, self.collection = id, collection
        super().__init__(f"{collection!r} has an exemplar {id!r} already")


class EditRefused(EditError):
    """A change that makes no sense in the present state of the collection."""

    def __init__(self, collection: str, reason: str) -> None:
        self.collection, self.reason = collection, reason
        super().__init__(f"{collection!r}: {reason}")


class UnknownReview(IndexerError):
    """The review queue has no such item."""

    def __init__(self, id: str) -> None:
        self.id = id
        super().__init__(f"no review {id!r}")


class ReviewTaken(IndexerError):
    """An item of the review queue that somebody else has claimed, or that is decided already."""

    def __init__(self, id: str, reason: str) -> None:
        self.id, self.reason = id, reason
        super().__init__(f"review {id!r}: {reason}")


class UnknownJob(IndexerError):
    """There is no such job, or it is another caller's."""

    def __init__(self, id: str) -> None:
        self.id = id
        super().__init__(f"no job {id!r}")


class PoolFileError(IndexerError):
    """A pool file is damaged, or no pool file."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{path}: {reason}")


class SourceError(IndexerError):
    """A source of images cannot be used at all."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{path}: {reason}")


class ManifestError(SourceError):
    """One line of a CSV manifest is wrong; nothing is built from the others, since the list is the operator's word."""

    def __init__(self, path: Path, line: int, reason: str) -> None:
        self.line = line
        super().__init__(path, f"line {line}: {reason}")


class BuildError(IndexerError):
    """A build cannot start, go on or end."""
