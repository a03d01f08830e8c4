"""Transactions of both databases, what goes wrong with them, and what the errors say."""

import socket
import sqlite3
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import Connection, insert, select, text

from indexer.catalog import chain
from indexer.catalog.chain import CHANGES
from indexer.catalog.database import Database
from indexer.catalog.tables import embeddings
from indexer.errors import CatalogError
from tests.indexer.catalog.conftest import Append, drafts
from tests.postgres_server import PASSWORD, PostgresServer


def put(connection: Connection, name: str, data: bytes = b"") -> None:
    connection.execute(insert(embeddings), {"sha256": name, "dim": 0, "data": data})


def names(database: Database) -> list[str]:
    with database.reading() as connection:
        return list(connection.scalars(select(embeddings.c.sha256).order_by(embeddings.c.sha256)))


# --- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("mysql://root:hunter2@host/x", "only sqlite and postgresql"),
        ("postgresql+psycopg2://u:hunter2@host/x", "only sqlite and postgresql"),
        ("postgresql://u:hunter2@host", "names no database"),
        ("sqlite://", "write sqlite:///PATH"),
        ("sqlite:///:memory:", "write sqlite:///PATH"),
        ("sqlite:///x.sqlite3?mode=ro", "write sqlite:///PATH"),
        ("sqlite://hunter2/x", "write sqlite:///PATH"),
        ("hunter2", "unreadable address"),
        ("postgresql://u:hunter2@host:hunter2/x", "unreadable address"),
    ],
)
def test_addresses_that_are_refused(url: str, match: str) -> None:
    with pytest.raises(CatalogError, match=match) as caught:
        Database.open(url)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_sqlite_makes_folders_and_is_durable(tmp_path: Path) -> None:
    path = tmp_path / "a 100%" / "ü" / "catalog.sqlite3"
    with closing(Database.open(f"sqlite:///{path}")) as database, database.writing() as connection:
        put(connection, "a")
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}
    assert path.is_file()
    assert repr(database) == f"Database('sqlite:///{path}')"


def test_a_relative_path_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with closing(Database.open("sqlite:///catalog.sqlite3")) as database:
        monkeypatch.chdir(tmp_path / "elsewhere")
        with ThreadPoolExecutor(3) as pool:  # connections of their own
            assert list(pool.map(lambda _: names(database), range(3))) == [[], [], []]
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_spellings_of_postgresql(postgres_url: str, scheme: str) -> None:
    url = postgres_url.replace("postgresql", scheme, 1)
    with closing(Database.open(url)) as database:
        assert database.dialect == "postgresql"
        assert repr(database) == "Database('postgresql://hardlook@/catalogue')"


# --- transactions ----------------------------------------------------------------------------------------------------


def test_many_threads_may_start_it(catalog_url: str) -> None:
    barrier = threading.Barrier(6)

    def start(number: int) -> None:
        barrier.wait()
        with closing(Database.open(catalog_url)) as database, database.writing() as connection:
            put(connection, str(number))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(start, range(6)))
    with closing(Database.open(catalog_url)) as database:
        assert names(database) == [str(number) for number in range(6)]


def test_all_or_nothing(database: Database) -> None:
    def fails(connection: Connection, name: str) -> None:
        put(connection, name)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), database.writing() as connection:
        fails(connection, "a")
    assert names(database) == []
    with database.writing() as connection:
        put(connection, "a")
        with pytest.raises(ZeroDivisionError), connection.begin_nested():
            fails(connection, "b")
        put(connection, "c")
    assert names(database) == ["a", "c"]


def test_a_reader_sees_one_moment(database: Database) -> None:
    with database.writing() as connection:
        put(connection, "a")
    with database.reading() as reading:
        count = text("SELECT count(*) FROM embeddings")
        assert reading.scalar(count) == 1
        with database.writing() as connection:
            put(connection, "b")
        assert reading.scalar(count) == 1
    assert names(database) == ["a", "b"]


def test_a_reader_cannot_write(database: Database) -> None:
    with pytest.raises(CatalogError, match=r"read-?only"), database.reading() as connection:
        put(connection, "a")
    with database.writing() as connection:  # of the same pool, perhaps the same connection
        put(connection, "b")
    assert names(database) == ["b"]


def test_more_threads_than_connections(database: Database) -> None:
    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(lambda _: names(database), range(48))) == [[]] * 48


def test_a_lock_is_waited_for_and_not_for_ever(catalog_url: str) -> None:
    with (
        closing(Database.open(catalog_url)) as holder,
        closing(Database.open(catalog_url, wait_s=0.2)) as database,
        holder.writing() as connection,
    ):
        chain.append(connection, CHANGES, drafts(1))
        with pytest.raises(CatalogError, match=r"database is locked|lock timeout"), database.writing() as second:
            chain.append(second, CHANGES, drafts(1))
        assert names(database) == []  # readers wait for nobody


def test_threads_write_in_turns(catalog_url: str) -> None:
    """And one that waits too long is told so, within one process as between two."""
    with closing(Database.open(catalog_url, wait_s=0.2)) as database, database.writing() as connection:
        chain.append(connection, CHANGES, drafts(1))

        def second() -> None:
            with database.writing() as connection:
                chain.append(connection, CHANGES, drafts(1))

        with ThreadPoolExecutor(1) as pool, pytest.raises(CatalogError, match=r"database is locked|lock timeout"):
            pool.submit(second).result()


def test_a_broken_rule_is_one_line(database: Database) -> None:
    data = b"nothing for a log"
    with database.writing() as connection:
        put(connection, "a", data)
    with pytest.raises(CatalogError, match=r"(?i)unique constraint") as caught, database.writing() as connection:
        put(connection, "a", data)
    assert "\n" not in str(caught.value)
    assert data.decode() not in str(caught.value) + str(caught.value.__cause__)


def test_closed(database: Database) -> None:
    database.close()
    with pytest.raises(CatalogError, match="it is closed"), database.reading():
        pass
    with pytest.raises(CatalogError, match="it is closed"), database.writing():
        pass


def test_appends_need_writing(database: Database, append: Append) -> None:
    append(CHANGES, 1)
    with pytest.raises(CatalogError, match=r"read-?only"), database.reading() as connection:
        chain.append(connection, CHANGES, drafts(1))


# --- SQLite that fails -----------------------------------------------------------------------------------------------


def test_full_disk(tmp_path: Path) -> None:
    with closing(Database.open(f"sqlite:///{tmp_path / 'x.sqlite3'}")) as database:

        def fill(limit_pages: int, name: str) -> None:
            with database.writing() as connection:
                connection.exec_driver_sql(f"PRAGMA max_page_count = {limit_pages}")
                put(connection, name, bytes(1_000_000))

        fill(1_000_000, "a")
        with pytest.raises(CatalogError, match="full"):
            fill(1, "b")  # SQLite takes the present size for it
        fill(1_000_000, "c")
        assert names(database) == ["a", "c"]


def test_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "x.sqlite3"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(CatalogError, match="file is not a database"):
        Database.open(f"sqlite:///{path}")
    assert path.read_bytes() == b"no database" * 1000


def test_path_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", "utf8")
    with pytest.raises(CatalogError, match=r"file/x\.sqlite3: .*(directory|exists)"):
        Database.open(f"sqlite:///{tmp_path / 'file' / 'x.sqlite3'}")
    with pytest.raises(CatalogError, match="unable to open"):
        Database.open(f"sqlite:///{tmp_path}")


def test_foreign_writer_is_waited_for(tmp_path: Path) -> None:
    """Such as the command line of SQLite, in the hands of an operator."""
    path = tmp_path / "x.sqlite3"
    with closing(Database.open(f"sqlite:///{path}", wait_s=0.1)) as database:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(CatalogError, match="database is locked"), database.writing():
                pass
        with database.writing() as connection:
            put(connection, "a")
        assert names(database) == ["a"]


# --- PostgreSQL that fails -------------------------------------------------------------------------------------------


def test_wrong_password_is_not_repeated(postgres_server: PostgresServer) -> None:
    for url in (
        postgres_server.url("postgres", "hunter2"),
        postgres_server.url("postgres").replace(f":{PASSWORD}", "") + "&password=hunter2",
    ):
        with pytest.raises(CatalogError, match="password authentication failed") as caught:
            Database.open(url)
        assert "hunter2" not in str(caught.value) + repr(caught.value) + str(caught.value.__cause__)
        assert "\n" not in str(caught.value)


def test_password_in_what_the_driver_says(postgres_server: PostgresServer) -> None:
    """An address that is misread quotes what it holds; here a database is called as the password is."""
    with pytest.raises(CatalogError, match=r'\*\*\*" does not exist') as caught:
        Database.open(postgres_server.url(PASSWORD))
    assert PASSWORD not in caught.value.reason


def test_server_that_is_not_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"postgresql://u:hunter2@127.0.0.1:{taken.getsockname()[1]}/x"
        with pytest.raises(CatalogError, match=r"postgresql://u@127\.0\.0\.1:\d+/x: .*refused") as caught:
            Database.open(url)
    assert "hunter2" not in str(caught.value)


def test_driver_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(CatalogError, match=r"psycopg is not installed; install hardlook\[postgres\]"):
        Database.open("postgresql://u@127.0.0.1/x")


def test_other_encoding(postgres_server: PostgresServer) -> None:
    postgres_server.execute("CREATE DATABASE latin TEMPLATE template0 ENCODING LATIN1")
    with pytest.raises(CatalogError, match="its encoding is LATIN1, it must be UTF8"):
        Database.open(postgres_server.url("latin"))


def test_durable_whatever_the_servers_default(postgres_server: PostgresServer, postgres_url: str) -> None:
    postgres_server.execute("ALTER ROLE hardlook SET synchronous_commit = off")
    try:
        with closing(Database.open(postgres_url)) as database, database.writing() as connection:
            assert connection.scalar(text("SHOW synchronous_commit")) == "on"
            assert connection.scalar(text("SHOW lock_timeout")) == "30s"
            assert connection.scalar(text("SHOW fsync")) == "on"
    finally:
        postgres_server.execute("ALTER ROLE hardlook RESET synchronous_commit")


def test_server_crashes_between_calls(postgres_server: PostgresServer, postgres_url: str) -> None:
    with closing(Database.open(postgres_url)) as database:
        with database.writing() as connection:
            chain.append(connection, CHANGES, drafts(3))
        postgres_server.stop("immediate")
        postgres_server.start()
        with database.writing() as connection:
            chain.append(connection, CHANGES, drafts(2))
        with database.reading() as connection:
            assert chain.verify(connection, CHANGES).n == 5
            assert chain.verify(connection, CHANGES).intact


def test_server_is_lost_within_a_transaction(postgres_server: PostgresServer, postgres_url: str) -> None:
    with closing(Database.open(postgres_url)) as database:

        def write(name: str, meanwhile: Callable[[], None]) -> None:
            with database.writing() as connection:
                put(connection, name)
                meanwhile()

        with pytest.raises(CatalogError, match="connection"):
            write("a", postgres_server.stop)
        with pytest.raises(CatalogError, match="connection"):
            names(database)
        postgres_server.start()
        assert names(database) == []
        write("b", lambda: None)
        assert names(database) == ["b"]
