"""Edits: what may be done to a collection while it is served, and what each does to its state.

An edit looks at the present state and says what it changes, as an entry of the log; nothing is written here. What
makes no sense is refused with an `EditError` that says why, and changes nothing.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any

from indexer.catalog.clock import text_of
from indexer.catalog.records import Disabled, DisabledBy, Record, embedding_sha256
from indexer.catalog.situation import (
    Change,
    Edit,
    Embedding,
    Situation,
    require_encoder,
    require_label,
    same_thing,
)
from indexer.catalog.state import Stamp, record_json
from indexer.contents import Exemplar, collection_kind
from indexer.errors import ContentsError, EditRefused, ExemplarExists


@dataclass(frozen=True)
class Create(Edit):
    """Make an empty collection."""

    collection: str
    encoder: Stamp

    def change(self, situation: Situation) -> Change | None:
        """See `Edit.change`."""
        collection_kind(self.collection)
        if situation.state.encoder is not None:
            require_encoder(self.encoder, situation)
            return None
        return Change("collection.create", self.collection, {"encoder": asdict(self.encoder)})


@dataclass(frozen=True, eq=False)
class Add(Edit):
    """Add an exemplar, or a suppress item.

    Attributes:
        exemplar: of a new id.
        embedding: (d,) float32 of unit L2 norm.
        encoder: that made it.
        note, disabled, suppresses, min_similarity: see `Record`.
    """

    collection: str
    exemplar: Exemplar
    embedding: Embedding
    encoder: Stamp
    note: str = ""
    disabled: Disabled | None = None
    suppresses: tuple[str, ...] = ()
    min_similarity: float | None = None

    def change(self, situation: Situation) -> Change | None:
        """See `Edit.change`."""
        require_encoder(self.encoder, situation)
        if self.embedding.shape != (self.encoder.dim,):
            raise ContentsError(f"an embedding must be ({self.encoder.dim},), got {self.embedding.shape}")
        sha256 = embedding_sha256(self.embedding)
        record = Record(self.exemplar, sha256, self.note, self.disabled, self.suppresses, self.min_similarity)
        record.require_sizes()
        if not self.suppresses:
            require_label(self.collection, self.exemplar.label)
        for id in self.suppresses:
            situation.existing(id)
        present = situation.record(record.id)
        if present is not None and same_thing(present, record):
            return None
        if present is not None:
            raise ExemplarExists(record.id, self.collection)
        kind = "exemplar.suppress" if self.suppresses else "exemplar.add"
        return Change(kind, record.id, {"records": [record.to_json()]}, {sha256: self.embedding})


@dataclass(frozen=True)
class Move(Edit):
    """Give an exemplar another label: in the moderation collection, put it into another pool."""

    collection: str
    id: str
    label: str

    def change(self, situation: Situation) -> Change | None:
        """See `Edit.change`."""
        record, embeddings = situation.existing(self.id)
        require_label(self.collection, self.label)
        if record.suppresses:
            raise EditRefused(self.collection, f"{self.id!r} is a suppress item and lies in no pool")
        if record.exemplar.label == self.label:
            return None
        moved = replace(record, exemplar=replace(record.exemplar, label=self.label))
        body = {"records": [moved.to_json()], "from": record.exemplar.label, "to": self.label}
        return Change("exemplar.move", self.id, body, embeddings)


@dataclass(frozen=True)
class Disable(Edit):
    """Take an exemplar out of searches, for a time or until somebody enables it."""

    collection: str
    id: str
    until: datetime | None = None
    by: DisabledBy = "operator"

    def change(self, situation: Situation) -> Change | None:
        """See `Edit.change`."""
        if self.until is not None and self.until <= situation.at:
            raise EditRefused(self.collection, f"disable {self.id!r} until {text_of(self.until)}: that is in the past")
        record, embeddings = situation.existing(self.id)
        disabled = Disabled(self.by, self.until)
        if record.disabled == disabled:
            return None
        kind = "exemplar.disable" if self.by == "operator" else "exemplar.quarantine"
        return Change(kind, self.id, {"records": [replace(record, disabled=disabled).to_json()]}, embeddings)


@dataclass(frozen=True)
class Enable(Edit):
    """Let an exemplar take part in searches again."""

    collection: str
    id: str

    def change(self, situation: Situation) -> Change | None:
        """See `Edit.change`."""
        record, embeddings = situation.existing(self.id)
        if record.disabled is None:
            return None
        kind = "exemplar.enable" if record.disabled.by == "operator" else "exemplar.release"
        return Change(kind, self.id, {"records": [replace(record, disabled=None).to_json()]}, embeddings)


@dataclass(frozen=True)
class Annotate(Edit):
    """Change what is known of an exemplar; what is None stays as it is."""

    collection: str
    id: str
    note: str | None = None
    source: str | None = None
    metadata: Mapping[str, str] | None = None

    def change(self, situation: Situation) -> Change | None:
        """See `Edit.change`."""
        record, embeddings = situation.existing(self.id)
        exemplar = record.exemplar
        if self.source is not None:
            exemplar = replace(exemplar, source=self.source)
        if self.metadata is not None:
            exemplar = replace(exemplar, metadata=dict(self.metadata))
        annotated = replace(record, exemplar=exemplar, note=record.note if self.note is None else self.note)
        annotated.require_sizes()
        if annotated == record:
            return None
        return Change("exemplar.annotate", self.id, {"records": [annotated.to_json()]}, embeddings)


@dataclass(frozen=True)
class Delete(Edit):
    """Remove an exemplar; a version from before still has it."""

    collection: str
    id: str

    def change(self, situation: Situation) -> Change | None:
        """See `Edit.change`."""
        situation.existing(self.id)
        return Change("exemplar.delete", self.id, {"records": [record_json(self.id, None)]})


@dataclass(frozen=True)
class Publish(Edit):
    """Give the present state a name, to come back to."""

    collection: str
    name: str

    def change(self, situation: Situation) -> Change | None:
        """See `Edit.change`."""
        situation.encoder()
        return Change("version.publish", situation.state.version, {"name": self.name})


@dataclass(frozen=True)
class Rollback(Edit):
    """Make an earlier state the present one.

    Attributes:
        to: a version that the collection once had, published or not, or a revision.
    """

    collection: str
    to: str | int

    def change(self, situation: Situation) -> Change | None:
        """See `Edit.change`."""
        situation.encoder()
        revision = self.to if isinstance(self.to, int) else situation.revision_of(self.to)
        if revision is None or not 0 < revision <= situation.state.revision:
            raise EditRefused(self.collection, f"it never had the {_version_or_revision(self.to)}")
        earlier = situation.state_at(revision)
        if earlier.encoder is None:
            raise EditRefused(self.collection, f"it did not exist at revision {revision}")
        if earlier.encoder.fingerprint != situation.encoder().fingerprint:  # one encoder may go by several names
            raise EditRefused(self.collection, f"the {_version_or_revision(self.to)} is of another encoder")
        if earlier.version == situation.state.version:
            return None
        body = {"from_version": situation.state.version, "to_version": earlier.version, "to_revision": revision}
        return Change("version.rollback", earlier.version, body)


@dataclass(frozen=True)
class Rebase(Edit):
    """Stand on a snapshot that was published offline; changes made since the service runs stay on top.

    Attributes:
        base: version of the snapshot.
        encoder: that made it.
        history: lines of the store's history, including the one that says so.
    """

    collection: str
    base: str
    encoder: Stamp
    history: int

    def change(self, situation: Situation) -> Change | None:
        """See `Edit.change`."""
        state = situation.state
        if self.history <= state.history:
            return None
        body = {"base": self.base, "encoder": asdict(self.encoder), "history": self.history, "from_base": state.base}
        if state.records and state.encoder is not None:
            require_encoder(self.encoder, situation)
        return Change("version.base", self.base, body)


@dataclass(frozen=True)
class Compact(Edit):
    """Stand on a snapshot that holds what an earlier state was; nothing that is found changes.

    Attributes:
        base: version of the snapshot, which is on disk.
        at_revision: of that state.
    """

    collection: str
    base: str
    at_revision: int

    def change(self, situation: Situation) -> Change | None:
        """See `Edit.change`."""
        situation.encoder()
        state = situation.state
        if not 0 < self.at_revision <= state.revision:
            raise EditRefused(self.collection, f"revision {self.at_revision} is not an earlier one")
        if situation.state_at(self.at_revision).base != state.base:
            raise EditRefused(self.collection, f"its base has changed since revision {self.at_revision}")
        body = {"base": self.base, "at_revision": self.at_revision, "from_base": state.base}
        return Change("version.compact", self.base, body)


@dataclass(frozen=True)
class Note(Edit):
    """Put something into the log that changes no exemplar: who did what, and why."""

    collection: str
    kind: str
    subject: str
    body: Mapping[str, Any] = field(default_factory=dict)

    def change(self, situation: Situation) -> Change | None:
        """See `Edit.change`."""
        if "records" in self.body or self.kind.startswith(("exemplar.", "version.", "collection.")):
            raise ValueError(f"{self.kind} is not a note: it changes a collection")
        return Change(self.kind, self.subject, self.body)


def _version_or_revision(to: str | int) -> str:
    return f"revision {to}" if isinstance(to, int) else f"version {to!r}"
