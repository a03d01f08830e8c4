"""Entry: one line of a hash-chained log, and Draft: what is to become one.

Owns the canonical text that hashes are made of, and the limits of what may be written. Knows no database.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from indexer.catalog.records import canonical_json
from indexer.errors import ContentsError

GENESIS = "0" * 64  # the hash before the first entry
MAX_BODY_BYTES = 16 * 2**20
MAX_BODY_DEPTH = 64
MAX_KIND_CHARS = 32
MAX_COLLECTION_CHARS = 64
MAX_TEXT_CHARS = 4000  # of actor, reason and request_id
MAX_SUBJECT_BYTES = 2000  # it is in an index, and PostgreSQL's take 2,704 bytes a row
_KIND = re.compile(r"[a-z][a-z0-9-]*(\.[a-z][a-z0-9-]*)?")


@dataclass(frozen=True)
class Head:
    """The end of a chain: noted elsewhere, it tells later whether the chain was rewritten.

    Attributes:
        seq: number of the last entry, 0 where there is none.
        hash: of that entry.
    """

    seq: int
    hash: str


@dataclass(frozen=True)
class Draft:
    """An entry before it has a number, a time and a hash.

    Attributes:
        kind: such as `exemplar.add`: lower case, at most one dot, up to 32 characters.
        actor: who does it, up to 4,000 characters, as `reason` and `request_id`.
        reason: why, for a person.
        request_id: of the request that caused it.
        collection: it concerns, up to 64 characters; empty for none.
        subject: what it concerns, such as an exemplar's id, up to 2,000 bytes.
        body: the rest, of JSON's types, up to 16 MiB as text; kept as it was when the draft was made.

    Raises:
        ContentsError: a limit is passed, or a text is not Unicode or contains NUL, which PostgreSQL cannot store.
    """

    kind: str
    actor: str
    reason: str = ""
    request_id: str = ""
    collection: str = ""
    subject: str = ""
    body: Mapping[str, Any] = field(default_factory=dict, hash=False)
    body_json: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.kind) > MAX_KIND_CHARS or not _KIND.fullmatch(self.kind):
            raise ContentsError(f"the kind of an entry cannot be {self.kind[:100]!r}")
        limits = {
            "actor": MAX_TEXT_CHARS,
            "reason": MAX_TEXT_CHARS,
            "request_id": MAX_TEXT_CHARS,
            "collection": MAX_COLLECTION_CHARS,
        }
        for name, limit in limits.items():
            text = getattr(self, name)
            _check_text(text, name)
            if len(text) > limit:
                raise ContentsError(f"{name} has {len(text)} characters, the limit is {limit}")
        if (size := _check_text(self.subject, "subject")) > MAX_SUBJECT_BYTES:
            raise ContentsError(f"subject has {size} bytes, the limit is {MAX_SUBJECT_BYTES}")
        object.__setattr__(self, "body_json", _body_json(self.body))


@dataclass(frozen=True)
class Entry:
    """One entry of a chain.

    Attributes:
        chain: `changes` or `decisions`.
        seq: number within the chain, from 1, without gaps.
        time: when it was written, UTC, ISO 8601 with microseconds. The order is that of `seq`: clocks may go back.
        kind, actor, reason, request_id, collection, subject, body: as in its `Draft`.
        prev: hash of the entry before it.
        hash: of `prev` and everything else.
    """

    chain: str
    seq: int
    time: str
    kind: str
    actor: str
    reason: str
    request_id: str
    collection: str
    subject: str
    body: Mapping[str, Any] = field(hash=False)
    prev: str
    hash: str

    def to_json(self) -> dict[str, Any]:
        """Its twelve values by name; the inverse of `from_json`."""
        return {name: getattr(self, name) for name in ENTRY_FIELDS}

    def to_json_line(self) -> str:
        """Its canonical JSON, without a line break."""
        return canonical_json(self.to_json())

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Entry":
        """Read what `to_json` made; whether it is intact, `computed_hash` tells.

        Raises:
            ContentsError: it has other names or types.
        """
        if value.keys() != set(ENTRY_FIELDS):
            raise ContentsError("an entry has other fields than these: " + ", ".join(ENTRY_FIELDS))
        for name, kind in _TYPES.items():
            if type(value[name]) is not kind:
                raise ContentsError(f"{name} of an entry must be {kind.__name__}, got {type(value[name]).__name__}")
        return cls(**value)

    def computed_hash(self) -> str:
        """sha256 of `prev`, a line break, and the canonical JSON of everything but `prev` and `hash`; 64 hex digits.

        Raises:
            ValueError, RecursionError: the body has no canonical JSON; nothing of the kind was ever written.
        """
        value = self.to_json()
        del value["prev"], value["hash"]
        return hashlib.sha256(f"{self.prev}\n{canonical_json(value)}".encode()).hexdigest()


ENTRY_FIELDS = tuple(item.name for item in fields(Entry))
_TYPES: dict[str, type] = dict.fromkeys(ENTRY_FIELDS, str) | {"seq": int, "body": dict}


def _check_text(text: object, where: str) -> int:
    """Check that both databases store a text and give it back; its size in bytes."""
    if type(text) is not str:  # of subclasses, such as enumerations, drivers store what they like
        raise ContentsError(f"{where} must be text, got {type(text).__name__}")
    if "\0" in text:
        raise ContentsError(f"{where} contains NUL")
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise ContentsError(f"{where} is not Unicode: {error.reason}") from None


def _body_json(body: Mapping[str, Any]) -> str:
    if type(body) is not dict:
        raise ContentsError(f"the body of an entry must be a dict, got {type(body).__name__}")
    _check_value(body, MAX_BODY_DEPTH)
    try:
        text = canonical_json(body)
        size = len(text.encode())
        json.loads(text)  # refuses integers of thousands of digits, which nobody could read again
    except (TypeError, ValueError) as error:
        raise ContentsError(f"the body of an entry is not JSON: {error}") from error
    if size > MAX_BODY_BYTES:
        raise ContentsError(f"the body of an entry has {size} bytes, the limit is {MAX_BODY_BYTES}")
    return text


def _check_value(value: object, depth: int) -> None:
    """Refuse what JSON would change on the way, such as keys that are numbers, and what databases do not take."""
    if not depth:
        raise ContentsError(f"the body of an entry is nested deeper than {MAX_BODY_DEPTH} levels")
    if isinstance(value, str):
        if "\0" in value:
            raise ContentsError("the body of an entry contains NUL")
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str) or "\0" in key:
                raise ContentsError(f"the body of an entry has a key that is not text without NUL: {key!r:.100}")
            _check_value(item, depth - 1)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_value(item, depth - 1)
