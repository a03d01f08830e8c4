"""A review queue over one database, and items for it."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import func, select

from indexer.catalog import reviews
from indexer.catalog.database import Database
from indexer.catalog.reviews import Item, NewItem
from indexer.catalog.tables import embeddings

START = datetime(2026, 11, 21, 12, tzinfo=UTC)
FOR_S = 60.0


def unit(seed: int) -> NDArray[np.float32]:
    row = np.random.default_rng(seed).normal(size=12)
    return (row / np.linalg.norm(row)).astype(np.float32)


def new(number: int = 0, **changes: Any) -> NewItem:
    made = NewItem("verdict", "pools", f"{number:064x}", unit(number), "review", {"n": number}, request_id=f"r{number}")
    return replace(made, **changes)


class Queue:
    """The functions of the module, each in a transaction of its own, with a clock."""

    def __init__(self, database: Database) -> None:
        self.database, self.at = database, START

    def pass_s(self, seconds: float) -> None:
        self.at += timedelta(seconds=seconds)

    def open(self, *items: NewItem, limit: int = 100) -> list[str | None]:
        self.pass_s(1)
        with self.database.writing() as connection:
            return reviews.open_items(connection, items, limit=limit, at=self.at)

    def one(self, item: NewItem) -> str:
        [id] = self.open(item)
        assert id is not None
        return id

    def do(self, step: Callable[..., Item], *arguments: Any) -> Item:
        with self.database.writing() as connection:
            return step(connection, *arguments, at=self.at)

    def get(self, id: str) -> Item:
        with self.database.reading() as connection:
            return reviews.get(connection, id, at=self.at)

    def list(self, **asked: Any) -> list[str]:
        with self.database.reading() as connection:
            return [item.id for item in reviews.list_items(connection, at=self.at, **asked)]

    def embedding(self, id: str) -> NDArray[np.float32]:
        with self.database.reading() as connection:
            return reviews.embedding_of(connection, id)

    def kept(self) -> int:
        with self.database.reading() as connection:
            return connection.execute(select(func.count()).select_from(embeddings)).scalar_one()


def in_state(queue: Queue, state: str, number: int) -> str:
    """An item in a state, which 'ann' has brought it to."""
    id = queue.one(new(number))
    if state in ("claimed", "run out"):
        queue.do(reviews.claim, id, "ann", FOR_S)
    if state == "run out":
        queue.pass_s(FOR_S)
    if state == "decided":
        queue.do(reviews.decide, id, "ann", "safe", "x1")
    if state == "skipped":
        queue.do(reviews.skip, id, "ann")
    return id
