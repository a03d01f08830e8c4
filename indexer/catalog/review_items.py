"""The items of the review queue: what they are made of, their ids, and how rows become items."""

import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, Row, and_, or_

from indexer.catalog.clock import parse_time, text_of
from indexer.catalog.tables import reviews
from indexer.errors import UnknownReview

Embedding = NDArray[np.float32]
Origin = Literal["verdict", "false-positive", "false-negative", "flood", "retroactive"]
State = Literal["open", "claimed", "decided", "skipped"]
Choice = Literal["safe", "buffer", "unsafe", "dismiss"]
STATES: tuple[State, ...] = get_args(State)
ORIGINS: tuple[Origin, ...] = get_args(Origin)
_ID = re.compile(r"[0-9a-f]{32}")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LAST_US = (datetime.max.replace(tzinfo=UTC) - _EPOCH) // timedelta(microseconds=1)


@dataclass(frozen=True, eq=False)
class NewItem:
    """What somebody should look at.

    Attributes:
        origin: why.
        collection: that it was compared with.
        image_sha256: of the image file.
        embedding: (d,) float32 of unit L2 norm.
        verdict: that was answered.
        evidence: that it was answered from, of JSON's types.
        comment: of whoever reports it.
        request_id: of the request that it is about.
        reporter: 'key:<id>', 'anonymous', or the name of a program.
    """

    origin: Origin
    collection: str
    image_sha256: str
    embedding: Embedding
    verdict: str
    evidence: Mapping[str, Any]
    comment: str = ""
    request_id: str = ""
    reporter: str = ""


@dataclass(frozen=True)
class Item:
    """One item of the queue, as it is at the moment of asking: a claim that has run out is none.

    Attributes:
        id: 32 hex digits that sort by time.
        time: when it was opened.
        origin, collection, image_sha256, verdict, evidence, comment, request_id, reporter: see `NewItem`.
        state: where it is in its life.
        claimed_by, claimed_until: who has it, and until when.
        decided_by, decided_at, decision, exemplar_id: who decided it when, as what, and which exemplar came of it.
        seen: how often the image came while the item was there.
    """

    id: str
    time: datetime
    origin: Origin
    state: State
    collection: str
    image_sha256: str
    verdict: str
    evidence: Mapping[str, Any]
    comment: str
    request_id: str
    reporter: str
    claimed_by: str | None
    claimed_until: datetime | None
    decided_by: str | None
    decided_at: datetime | None
    decision: Choice | None
    exemplar_id: str | None
    seen: int


def new_id(time: datetime) -> str:
    """An id that nobody else makes; ids sort by time."""
    return f"{(time - _EPOCH) // timedelta(microseconds=1):016x}{secrets.token_hex(8)}"


def is_id(text: str) -> bool:
    """Whether it could be an id; what could not is not looked for, since not every text can be."""
    return _ID.fullmatch(text) is not None


def time_of(id: str) -> datetime:
    """When an item was opened, by its id; UnknownReview where it cannot be one."""
    microseconds = int(id[:16], 16) if _ID.fullmatch(id) else _LAST_US + 1
    if microseconds > _LAST_US:
        raise UnknownReview(id)
    return _EPOCH + timedelta(microseconds=microseconds)


def embedding_name(id: str, data: bytes) -> str:
    """Of the embedding of one item alone: that of an exemplar with the same bytes has another, and is never removed."""
    return hashlib.sha256(f"review {id}\n".encode() + data).hexdigest()


def is_in(state: State, at: datetime) -> ColumnElement[bool]:
    """Of rows: whether the item is in a state at a moment."""
    run_out = reviews.c.claimed_until <= text_of(at)
    if state == "open":
        return or_(reviews.c.state == "open", and_(reviews.c.state == "claimed", run_out))
    if state == "claimed":
        return and_(reviews.c.state == "claimed", reviews.c.claimed_until > text_of(at))
    return reviews.c.state == state


def item_of(row: Row[Any], at: datetime) -> Item:
    """A row as it is at a moment."""
    until = None if row.claimed_until is None else parse_time(row.claimed_until)
    run_out = row.state == "claimed" and until is not None and until <= at
    return Item(
        id=row.id,
        time=parse_time(row.time),
        origin=row.origin,
        state="open" if run_out else row.state,
        collection=row.collection,
        image_sha256=row.image_sha256,
        verdict=row.verdict,
        evidence=json.loads(row.evidence),
        comment=row.comment,
        request_id=row.request_id,
        reporter=row.reporter,
        claimed_by=None if run_out else row.claimed_by,
        claimed_until=None if run_out else until,
        decided_by=row.decided_by,
        decided_at=None if row.decided_at is None else parse_time(row.decided_at),
        decision=row.decision,
        exemplar_id=row.exemplar_id,
        seen=row.seen,
    )
