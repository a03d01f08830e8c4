"""Deliveries: messages that wait to be sent to webhooks, and what became of them.

Owns their states and who sends one when, so that a message is sent at least once, and by one process at a time.
Knows neither HTTP nor secrets. Functions work within a transaction of the caller.

The first twelve digits of an id are those of the SHA-256 of its hook's name: what waits for a hook is found by its id.
"""

import hashlib
import secrets
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, func, insert, select, update

from indexer.catalog.clock import now, text_of
from indexer.catalog.records import canonical_json
from indexer.catalog.tables import deliveries

_WAITING, _DELIVERED, _GIVEN_UP = "waiting", "delivered", "given-up"
_HOOK_DIGITS = 12
_RANDOM_BYTES = 10
_MAX_ERROR_CHARS = 300
_PURGED_AT_A_TIME = 500


@dataclass(frozen=True)
class Delivery:
    """A message that is to be sent.

    Attributes:
        id: of the message, the same whenever it is sent.
        event: its type.
        body: JSON, as it is sent.
        attempts: how often sending it has begun, this time included.
    """

    id: str
    event: str
    body: str
    attempts: int


def enqueue(connection: Connection, hook: str, event: str, data: dict[str, Any]) -> str:
    """Store a message for a hook, due at once.

    Args:
        connection: of the transaction that makes what the message tells of.
        hook: its name.
        event: type of the message, of at most 32 characters.
        data: what the message says, ready for JSON.

    Returns:
        Its id.
    """
    id, at = _prefix(hook) + secrets.token_hex(_RANDOM_BYTES), text_of(now())
    body = canonical_json({"id": id, "type": event, "timestamp": at, "data": data})
    connection.execute(
        insert(deliveries).values(
            id=id, time=at, event=event, body=body, attempts=0, next_at=at, state=_WAITING, last_error=""
        )
    )
    return id


def is_due(connection: Connection, hook: str) -> bool:
    """Whether a message of a hook is to be sent now."""
    return connection.execute(select(deliveries.c.id).where(*_due(hook, text_of(now()))).limit(1)).first() is not None


def claim(connection: Connection, hook: str, *, limit: int, hold_s: float) -> list[Delivery]:
    """Take messages of a hook that are due, the longest due first.

    Args:
        connection: of a transaction that writes.
        hook: its name.
        limit: the most.
        hold_s: how long nobody else takes them. Whoever sends one and is killed has sent it in vain, or not at all:
            then it is due again.
    """
    at = text_of(now())
    query = select(deliveries).where(*_due(hook, at)).order_by(deliveries.c.next_at, deliveries.c.id).limit(limit)
    claimed = []
    for row in connection.execute(query).all():
        attempts = row.attempts + 1
        taken = connection.execute(
            update(deliveries)
            # Again: another replica may have been quicker.
            .where(deliveries.c.id == row.id, deliveries.c.state == _WAITING, deliveries.c.next_at == row.next_at)
            .values(attempts=attempts, next_at=_in(hold_s))
        )
        if taken.rowcount:
            claimed.append(Delivery(row.id, row.event, row.body, attempts))
    return claimed


def delivered(connection: Connection, id: str) -> None:
    """Note that a message has arrived; its time becomes that of its arrival."""
    _end(connection, id, _DELIVERED, "")


def retry(connection: Connection, id: str, after_s: float, error: str) -> None:
    """Note that a message has not arrived, and when to send it again."""
    _set(connection, id, next_at=_in(after_s), last_error=error[:_MAX_ERROR_CHARS])


def give_up(connection: Connection, id: str, error: str) -> None:
    """Note that a message has not arrived and is not sent again."""
    _end(connection, id, _GIVEN_UP, error)


def give_up_all(connection: Connection, hook: str, error: str) -> int:
    """Give up every message of a hook that waits; how many."""
    ended = connection.execute(
        update(deliveries)
        .where(deliveries.c.state == _WAITING, _of(hook))
        .values(state=_GIVEN_UP, next_at=text_of(now()), last_error=error[:_MAX_ERROR_CHARS])
    )
    return ended.rowcount


def waiting(connection: Connection, hook: str) -> int:
    """How many messages of a hook wait."""
    query = select(func.count()).select_from(deliveries).where(deliveries.c.state == _WAITING, _of(hook))
    return int(connection.execute(query).scalar_one())


def purge(connection: Connection, *, ended_s: float, abandoned_s: float) -> int:
    """Erase some messages that are long over; how many.

    Args:
        connection: of a transaction that writes.
        ended_s: how long those are kept that arrived or were given up.
        abandoned_s: how long those are kept that wait, for a hook that is not there any more.
    """
    ended = deliveries.c.state.in_((_DELIVERED, _GIVEN_UP)) & (deliveries.c.next_at < _in(-ended_s))
    abandoned = (deliveries.c.state == _WAITING) & (deliveries.c.next_at < _in(-abandoned_s))
    query = select(deliveries.c.id).where(ended | abandoned).limit(_PURGED_AT_A_TIME)
    ids = connection.execute(query).scalars().all()
    connection.execute(delete(deliveries).where(deliveries.c.id.in_(ids)))
    return len(ids)


def _due(hook: str, at: str) -> tuple[ColumnElement[bool], ...]:
    return deliveries.c.state == _WAITING, deliveries.c.next_at <= at, _of(hook)


def _of(hook: str) -> ColumnElement[bool]:
    return deliveries.c.id.startswith(_prefix(hook))


def _prefix(hook: str) -> str:
    return hashlib.sha256(hook.encode()).hexdigest()[:_HOOK_DIGITS]


def _end(connection: Connection, id: str, state: str, error: str) -> None:
    _set(connection, id, state=state, next_at=text_of(now()), last_error=error[:_MAX_ERROR_CHARS])


def _set(connection: Connection, id: str, **values: object) -> None:
    """Change a message that waits: one that two processes sent has arrived once one of them says so."""
    connection.execute(update(deliveries).where(deliveries.c.id == id, deliveries.c.state == _WAITING).values(**values))


def _in(seconds: float) -> str:
    return text_of(now() + timedelta(seconds=seconds))
