"""State: what a collection is at one point of the log, and how an entry of the log makes the next one.

A state is an immutable base snapshot on disk and the records that differ from it. It is a function of the log alone:
no clock, no database and no search here.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

from indexer.catalog.records import Record, digest_of
from indexer.errors import ContentsError

_MODULUS = 2**256  # of the sum of digests
_VERSION_CHARS = 16
Records = Mapping[str, Record | None]
StateAt = Callable[[int], "State"]


@dataclass(frozen=True)
class Stamp:
    """Which encoder the embeddings of a collection are from.

    Attributes:
        name: for a person.
        fingerprint: of the encoder.
        dim: d, the length of an embedding.
    """

    name: str
    fingerprint: str
    dim: int


@dataclass(frozen=True)
class State:
    """One collection at one point of the log.

    Attributes:
        collection: its name.
        encoder: of its embeddings; None before it exists.
        base: version of the snapshot on disk that it stands on; None where it has none.
        history: how many lines of the store's history, publications made offline, are taken over.
        records: by id, what differs from the base; None hides an exemplar of the base.
        revision: number of the last entry that made it, 0 before the first.
        changed_at: time of that entry, ISO 8601; empty before the first.
        digest: sum of the digests of `records` modulo 2^256, which is cheap to carry on.
    """

    collection: str
    encoder: Stamp | None = None
    base: str | None = None
    history: int = 0
    records: Records = field(default_factory=lambda: MappingProxyType({}))
    revision: int = 0
    changed_at: str = ""
    digest: int = 0

    @cached_property
    def version(self) -> str:
        """16 hex digits: equal ones have the same base and the same records, and answer alike at the same time.

        That of the base where nothing differs from it.
        """
        if not self.records and self.base is not None:
            return self.base
        fingerprint = self.encoder.fingerprint if self.encoder else ""
        text = f"{self.collection}\n{fingerprint}\n{self.base or ''}\n{self.digest:064x}"
        return hashlib.sha256(text.encode()).hexdigest()[:_VERSION_CHARS]

    def with_records(self, changed: Records, revision: int, changed_at: str = "") -> "State":
        """The state after some records have changed."""
        records = {**self.records, **changed}
        digest = self.digest + sum(
            record_digest(id, record) - (record_digest(id, self.records[id]) if id in self.records else 0)
            for id, record in changed.items()
        )
        return replace(
            self,
            records=MappingProxyType(records),
            revision=revision,
            changed_at=changed_at,
            digest=digest % _MODULUS,
        )

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint; the inverse of `from_json`."""
        return {
            "collection": self.collection,
            "encoder": self.encoder and asdict(self.encoder),
            "base": self.base,
            "history": self.history,
            "revision": self.revision,
            "changed_at": self.changed_at,
            "records": [record_json(id, record) for id, record in self.records.items()],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "State":
        """Read what `to_json` made."""
        encoder = value["encoder"] and Stamp(**value["encoder"])
        state = cls(value["collection"], encoder, value["base"], value["history"])
        return state.with_records(records_from(value["records"]), value["revision"], value["changed_at"])


def record_json(id: str, record: Record | None) -> dict[str, Any]:
    """A record, or its absence, as in the log."""
    return {"id": id, "deleted": True} if record is None else record.to_json()


def record_digest(id: str, record: Record | None) -> int:
    """sha256 of a record, or of its absence, as a number."""
    return digest_of(record_json(id, record))


def records_from(values: Iterable[Mapping[str, Any]]) -> dict[str, Record | None]:
    """Records, and absences, from the log."""
    return {value["id"]: None if value.get("deleted") else Record.from_json(value) for value in values}


def replay(state: State, seq: int, time: str, kind: str, body: Mapping[str, Any], state_at: StateAt) -> State:
    """The state after one entry of the log about its collection.

    Args:
        state: before it.
        seq, time, kind, body: of the entry.
        state_at: the state of the same collection after an earlier entry.

    Raises:
        ContentsError: the entry is not one that this program writes.
    """
    made: dict[str, Any] = {"revision": seq, "changed_at": time}
    try:
        if "records" in body:
            return state.with_records(records_from(body["records"]), seq, time)
        if kind == "collection.create":
            return replace(state, encoder=Stamp(**body["encoder"]), **made)
        if kind == "version.base":
            encoder = Stamp(**body["encoder"])
            return replace(state, encoder=encoder, base=body["base"], history=body["history"], **made)
        if kind == "version.rollback":
            return replace(state_at(body["to_revision"]), history=state.history, **made)
        if kind == "version.compact":
            return replace(compacted(state, state_at(body["at_revision"]), body["base"]), **made)
    except (KeyError, TypeError, ValueError, ContentsError) as error:
        raise ContentsError(f"entry {seq} of the log ({kind}) cannot be replayed: {error!r}") from error
    return state


def compacted(state: State, absorbed: State, base: str) -> State:
    """The state on a new base snapshot that was made from an earlier state; what changed since stays on top.

    Args:
        state: the present one.
        absorbed: the earlier one, whose plain records are in the new base.
        base: version of the new base.
    """
    missing = object()
    kept = {
        id: record
        for id, record in state.records.items()
        if record != absorbed.records.get(id, missing) or not (record is None or record.is_plain)
    }
    empty = State(state.collection, state.encoder, base, state.history)
    return empty.with_records(kept, state.revision, state.changed_at)


@dataclass(frozen=True)
class Diff:
    """What it takes to get from one state to another, in ids.

    Attributes:
        added, removed: exemplars that only the later, or only the earlier, has.
        moved: id and the labels before and after.
        changed: of the same label, but something else differs.
    """

    added: tuple[str, ...]
    removed: tuple[str, ...]
    moved: tuple[tuple[str, str, str], ...]
    changed: tuple[str, ...]


def diff(before: Mapping[str, Record], after: Mapping[str, Record]) -> Diff:
    """Compare all records of two states, by id; disabled ones count as there."""
    common = sorted(before.keys() & after.keys())
    labels = [(id, before[id].exemplar.label, after[id].exemplar.label) for id in common]
    return Diff(
        added=tuple(sorted(after.keys() - before.keys())),
        removed=tuple(sorted(before.keys() - after.keys())),
        moved=tuple((id, old, new) for id, old, new in labels if old != new),
        changed=tuple(id for id, old, new in labels if old == new and before[id] != after[id]),
    )
