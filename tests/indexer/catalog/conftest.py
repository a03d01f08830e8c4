"""An open database of either kind, and drafts to put into it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import Connection

from indexer.catalog import chain
from indexer.catalog.chain import Draft, Entry
from indexer.catalog.database import Database
from indexer.catalog.ledger import Catalog
from tests.indexer.catalog.queues import Queue

Append = Callable[..., list[Entry]]


@pytest.fixture
def database(catalog_url: str) -> Iterator[Database]:
    """Open, with empty tables."""
    with closing(Database.open(catalog_url)) as database:
        yield database


@pytest.fixture
def catalog(database: Database, tmp_path: Path) -> Catalog:
    return Catalog(database, tmp_path)


@pytest.fixture
def queue(database: Database) -> Queue:
    return Queue(database)


def drafts(n: int, kind: str = "exemplar.add", collection: str = "pools") -> list[Draft]:
    """n different ones."""
    return [
        Draft(kind, "ann", "why not", f"r{i}", collection, f"x{i}", {"i": i, "ü": [0.1 * i, None, True]})
        for i in range(n)
    ]


@pytest.fixture
def append(database: Database) -> Append:
    """(chain, n or drafts) -> entries, in one transaction."""

    def add(name: str, new: int | Sequence[Draft]) -> list[Entry]:
        with database.writing() as connection:
            return chain.append(connection, name, drafts(new) if isinstance(new, int) else new)

    return add


@pytest.fixture
def tamper(database: Database) -> Callable[[str], None]:
    """Run a statement that the triggers would refuse, as somebody does who owns the database."""

    def run(statement: str) -> None:
        with database.writing() as connection:
            drop_triggers(connection)
            connection.exec_driver_sql(statement)

    return run


def drop_triggers(connection: Connection) -> None:
    """For the rest of the transaction on PostgreSQL, until it is undone on SQLite."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        return
    names = connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'trigger'").scalars().all()
    for name in names:
        connection.exec_driver_sql(f"DROP TRIGGER {name}")
