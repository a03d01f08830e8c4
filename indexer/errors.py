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
