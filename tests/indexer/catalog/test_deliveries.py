"""Messages in the database: what is due, who sends it, and what becomes of it."""

import json
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from sqlalchemy import select

from indexer.catalog import deliveries
from indexer.catalog.clock import parse_time
from indexer.catalog.database import Database
from indexer.catalog.tables import deliveries as table
from indexer.errors import IndexerError

LONG_S = 60.0


def enqueue(database: Database, hook: str = "a", n: int = 1) -> list[str]:
    with database.writing() as connection:
        return [deliveries.enqueue(connection, hook, "job.done", {"n": i, "ü": None}) for i in range(n)]


def claimed(database: Database, hook: str = "a", limit: int = 9, hold_s: float = LONG_S) -> list[str]:
    with database.writing() as connection:
        return [delivery.id for delivery in deliveries.claim(connection, hook, limit=limit, hold_s=hold_s)]


def states(database: Database) -> dict[str, tuple[str, str]]:
    with database.reading() as connection:
        return {row.id: (row.state, row.last_error) for row in connection.execute(select(table))}


def test_the_body_says_what_happened(database: Database) -> None:
    [id] = enqueue(database)
    with database.writing() as connection:
        [delivery] = deliveries.claim(connection, "a", limit=1, hold_s=LONG_S)
    body = json.loads(delivery.body)
    assert (delivery.id, delivery.event, delivery.attempts) == (id, "job.done", 1)
    assert parse_time(body.pop("timestamp"))
    assert body == {"id": id, "type": "job.done", "data": {"n": 0, "ü": None}}


def test_what_is_claimed_is_nobody_elses_until_it_is_due_again(database: Database) -> None:
    [id] = enqueue(database)
    with database.reading() as connection:
        assert deliveries.is_due(connection, "a")
    assert claimed(database, hold_s=-1.0) == [id]  # and its process is killed
    with database.writing() as connection:
        [delivery] = deliveries.claim(connection, "a", limit=9, hold_s=LONG_S)
        assert delivery.attempts == 2
        assert not deliveries.is_due(connection, "a")
    assert claimed(database) == []


def test_hooks_are_apart(database: Database) -> None:
    enqueue(database, "a", 2)
    [other] = enqueue(database, "b")
    assert claimed(database, "b") == [other]
    with database.writing() as connection:
        assert (deliveries.waiting(connection, "a"), deliveries.waiting(connection, "b")) == (2, 1)
        assert deliveries.give_up_all(connection, "a", "gone") == 2
        assert (deliveries.waiting(connection, "a"), deliveries.waiting(connection, "b")) == (0, 1)
    assert claimed(database, "a") == []


def test_what_becomes_of_a_message(database: Database) -> None:
    arrived, late, lost = enqueue(database, n=3)
    assert set(claimed(database)) == {arrived, late, lost}
    with database.writing() as connection:
        deliveries.delivered(connection, arrived)
        deliveries.retry(connection, late, -1.0, "status 500")
        deliveries.give_up(connection, lost, "x" * 1000)
    assert states(database) == {
        arrived: ("delivered", ""),
        late: ("waiting", "status 500"),
        lost: ("given-up", "x" * 300),
    }
    assert claimed(database) == [late]
    with database.writing() as connection:  # two processes sent it, and the other one's arrived
        deliveries.retry(connection, arrived, -1.0, "too late")
        deliveries.give_up(connection, arrived, "too late")
    assert states(database)[arrived] == ("delivered", "")


def test_a_message_is_stored_with_what_it_tells_of_or_not_at_all(database: Database) -> None:
    def refused() -> None:
        with database.writing() as connection:
            deliveries.enqueue(connection, "a", "job.done", {})
            raise IndexerError("refused")

    with pytest.raises(IndexerError, match="refused"):
        refused()
    assert states(database) == {}


def test_several_senders_share_the_messages(database: Database) -> None:
    ids = enqueue(database, n=40)
    together = Barrier(4)

    def take(_: int) -> list[str]:
        together.wait(10)
        mine: list[str] = []
        while found := claimed(database, limit=3):
            mine += found
        return mine

    with ThreadPoolExecutor(4) as threads:
        taken = [id for mine in threads.map(take, range(4)) for id in mine]
    assert sorted(taken) == sorted(ids)


def test_what_is_over_is_purged(database: Database) -> None:
    arrived, waits = enqueue(database, n=2)
    with database.writing() as connection:
        deliveries.delivered(connection, arrived)
        assert deliveries.purge(connection, ended_s=LONG_S, abandoned_s=LONG_S) == 0
        assert deliveries.purge(connection, ended_s=-1.0, abandoned_s=LONG_S) == 1
        assert deliveries.waiting(connection, "a") == 1
        assert deliveries.purge(connection, ended_s=LONG_S, abandoned_s=-1.0) == 1
    assert states(database) == {}
    assert waits not in states(database)
