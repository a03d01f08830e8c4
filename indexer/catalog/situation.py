"""Situation: what an edit finds, and the change that it makes of it. Nothing is written here."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from indexer.catalog.records import SUPPRESS, Record, embedding_sha256
from indexer.catalog.state import Stamp, State
from indexer.contents import POOL_LABELS, Exemplar, collection_kind
from indexer.errors import EditRefused, InvalidLabel, UnknownExemplar
from perception.errors import FingerprintMismatch

Embedding = NDArray[np.float32]


class Base(Protocol):
    """The snapshot on disk that a state stands on, as far as edits need it."""

    def find(self, id: str) -> tuple[Exemplar, Embedding] | None:
        """An exemplar and its embedding (d,); None where there is none of that id."""


@dataclass(frozen=True)
class Situation:
    """What an edit finds.

    Attributes:
        state: of its collection.
        base: loads the snapshot that the state stands on; None where it has none.
        revision_of: the revision at which the collection had a version, None where it never had it.
        state_at: the collection's state at an earlier revision.
        at: the time of the edit.
    """

    state: State
    base: Callable[[], Base | None]
    revision_of: "RevisionOf"
    state_at: "StateAt"
    at: datetime

    def record(self, id: str) -> Record | None:
        """A record by id, one of the base too; None where there is none."""
        if id in self.state.records:
            return self.state.records[id]
        found = self._in_base(id)
        return None if found is None else Record(found[0], embedding_sha256(found[1]))

    def existing(self, id: str) -> tuple[Record, dict[str, Embedding]]:
        """A record, and its embedding where the catalogue may not have it yet.

        Raises:
            UnknownExemplar: there is none of that id.
        """
        record = self.record(id)
        if record is None:
            raise UnknownExemplar(id, f"{self.state.collection} {self.state.version}")
        if id in self.state.records:
            return record, {}
        found = self._in_base(id)
        assert found is not None  # `record` found it there
        return record, {record.embedding_sha256: found[1]}

    def _in_base(self, id: str) -> tuple[Exemplar, Embedding] | None:
        base = self.base()
        return None if base is None else base.find(id)

    def encoder(self) -> Stamp:
        """Of the collection's embeddings; EditRefused where the collection does not exist."""
        if self.state.encoder is None:
            raise EditRefused(self.state.collection, "there is no such collection; create it first")
        return self.state.encoder


class RevisionOf(Protocol):
    """See `Situation.revision_of`."""

    def __call__(self, version: str, /) -> int | None:
        """The newest revision with that version."""


class StateAt(Protocol):
    """See `Situation.state_at`."""

    def __call__(self, revision: int, /) -> State:
        """The state after the entry of that number."""


@dataclass(frozen=True)
class Change:
    """What an edit does, as an entry of the log.

    Attributes:
        kind: of the entry.
        subject: what it is about: the id of an exemplar, or a version.
        body: of the entry; `records` are after-images.
        embeddings: by hash, what the catalogue has to keep.
    """

    kind: str
    subject: str
    body: Mapping[str, Any] = field(default_factory=dict)
    embeddings: Mapping[str, Embedding] = field(default_factory=dict)


class Edit(ABC):
    """One thing that is done to one collection."""

    collection: str

    @abstractmethod
    def change(self, situation: Situation) -> Change | None:
        """What it changes; None where all is as it says already, so that asking twice is asking once.

        Raises:
            EditError, ContentsError, InvalidLabel, UnknownExemplar, FingerprintMismatch: it cannot be done.
        """


def require_encoder(encoder: Stamp, situation: Situation) -> None:
    """Refuse what another encoder made.

    Raises:
        EditRefused: there is no such collection.
        FingerprintMismatch: names both fingerprints.
    """
    present = situation.encoder()
    if present.fingerprint != encoder.fingerprint:
        raise FingerprintMismatch(
            f"collection {situation.state.collection!r}", encoder.fingerprint, present.fingerprint
        )


def require_label(collection: str, label: str) -> None:
    """Refuse what no exemplar of a collection can be labelled.

    Raises:
        InvalidLabel: in the moderation collection, any but the three pools; elsewhere that of suppress items.
    """
    if collection_kind(collection) == "pools" and label not in POOL_LABELS:
        raise InvalidLabel(label, POOL_LABELS, collection)
    if label == SUPPRESS:
        raise EditRefused(collection, f"the label {SUPPRESS!r} is for suppress items")


def same_thing(present: Record, record: Record) -> bool:
    """Whether adding a record again asks for what is there.

    The embedding of one image differs in its last bits from batch to batch, so the hash of the file stands for it.
    """
    same_image = bool(record.exemplar.sha256)  # equal exemplars have equal hashes
    return replace(present, embedding_sha256="") == replace(record, embedding_sha256="") and (
        same_image or present.embedding_sha256 == record.embedding_sha256
    )
