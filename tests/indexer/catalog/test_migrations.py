"""What migrations make is what the tables say, and the database itself refuses to forget."""

from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import select, text

from indexer.catalog import chain
from indexer.catalog.chain import CHANGES, DECISIONS, GENESIS
from indexer.catalog.database import Database
from indexer.catalog.tables import chains, metadata
from indexer.errors import CatalogError
from tests.indexer.catalog.conftest import Append, drafts


def test_migrations_make_the_tables(database: Database) -> None:
    with database.reading() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_both_chains_begin_empty(database: Database) -> None:
    with database.reading() as connection:
        rows = connection.execute(select(chains).order_by(chains.c.name)).all()
    assert rows == [(name, 0, GENESIS, 1, GENESIS) for name in (CHANGES, DECISIONS)]


def test_opening_again_changes_nothing(catalog_url: str) -> None:
    with closing(Database.open(catalog_url)) as database, database.writing() as connection:
        written = chain.append(connection, CHANGES, [chain.Draft("service.start", "system")])
    with closing(Database.open(catalog_url)) as database, database.reading() as connection:
        assert chain.read(connection, CHANGES) == written
        assert connection.scalars(text("SELECT version_num FROM alembic_version")).all() == ["0001"]


def test_newer_schema_is_refused(catalog_url: str) -> None:
    with closing(Database.open(catalog_url)) as database, database.writing() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(CatalogError, match=r"its schema 9999 is newer than this program, which knows 0001$"):
        Database.open(catalog_url)


def test_migration_that_fails_leaves_nothing(catalog_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step breaks: the tables before it must not stay, or the next start would trip over them."""
    from alembic.operations import Operations

    execute = Operations.execute

    def breaks(self: Operations, statement: str) -> None:
        execute(self, "nonsense" if "chains_no_return" in statement else statement)

    monkeypatch.setattr(Operations, "execute", breaks)
    with pytest.raises(CatalogError, match="nonsense"):
        Database.open(catalog_url)
    monkeypatch.undo()
    with closing(Database.open(catalog_url)) as database, database.reading() as connection:
        assert chain.verify(connection, CHANGES).intact


REFUSED = (
    "UPDATE entries SET reason = 'nothing'",
    "DELETE FROM entries WHERE seq = 2",
    "DELETE FROM entries",
    "INSERT INTO entries SELECT chain, 2, time, kind, 'eve', reason, request_id, collection, subject, body, prev, hash"
    " FROM entries WHERE seq = 1",
    "UPDATE embeddings SET dim = 3",
    "DELETE FROM chains",
    "UPDATE chains SET head_seq = 1 WHERE name = 'changes'",
)


def test_the_database_itself_refuses(database: Database, append: Append) -> None:
    append(CHANGES, 3)
    with database.writing() as connection:
        insert = text("INSERT INTO embeddings (sha256, dim, data) VALUES (:sha256, 2, :data)")
        connection.execute(insert, {"sha256": "ab" * 32, "data": b"12345678"})
    for statement in REFUSED:
        refused = pytest.raises(CatalogError, match=r"refused|(?i:unique constraint)")
        with refused, database.writing() as connection:
            connection.exec_driver_sql(statement)
    with database.reading() as connection:
        assert chain.verify(connection, CHANGES).n == 3
        assert chain.verify(connection, CHANGES).intact


def test_sqlite_replaces_no_entry(tmp_path: Path) -> None:
    with closing(Database.open(f"sqlite:///{tmp_path / 'catalog.sqlite3'}")) as database:
        with database.writing() as connection:
            chain.append(connection, CHANGES, drafts(2))
        with pytest.raises(CatalogError, match="REPLACE refused"), database.writing() as connection:
            connection.exec_driver_sql("INSERT OR REPLACE INTO entries SELECT * FROM entries WHERE seq = 1")


@pytest.mark.parametrize("table", ["entries", "chains"])
def test_postgres_truncates_nothing(postgres_url: str, table: str) -> None:
    refused = pytest.raises(CatalogError, match="append-only")
    with closing(Database.open(postgres_url)) as database, refused, database.writing() as connection:
        connection.exec_driver_sql(f"TRUNCATE {table}")


def test_pruned_entries_may_be_deleted(database: Database, append: Append) -> None:
    append(DECISIONS, 4)
    with database.writing() as connection:
        connection.exec_driver_sql("UPDATE chains SET first_seq = 3 WHERE name = 'decisions'")
        assert connection.exec_driver_sql("DELETE FROM entries WHERE seq < 3").rowcount == 2
    with pytest.raises(CatalogError, match="DELETE refused"), database.writing() as connection:
        connection.exec_driver_sql("DELETE FROM entries WHERE seq = 3")
