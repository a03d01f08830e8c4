"""Database: the SQL database of the catalogue, SQLite in a file or PostgreSQL.

Owns connections, transactions, what durable means on each dialect, and the translation of the driver's errors. Knows
nothing of what the tables mean.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from indexer.catalog.schema import migrate
from indexer.durable import exclusive, make_folder, sync_folder
from indexer.errors import CatalogError

WAIT_S = 30.0  # how long a transaction waits for a lock, and a thread for a connection
_CONNECT_TIMEOUT_S = 10
_WAL_LIMIT_BYTES = 64 * 2**20  # what a checkpoint leaves of the write-ahead log
_MAX_REASON_CHARS = 300
_MIGRATING = 0x6861_7264_6C6F_6F6B  # key of the advisory lock on PostgreSQL
_WRITING = "hardlook_writing"
_POSTGRES = ("postgresql", "postgresql+psycopg", "postgres")
_SQLITE = ("sqlite", "sqlite+pysqlite")


class Database:
    """One database, with connections of its own; threads share it.

    A transaction is all or nothing, and durable when `writing` ends without an error: it survives a kill and a power
    cut. One that ends with a CatalogError has not happened, with one exception that no client of a server can avoid:
    where the connection to PostgreSQL is lost during the commit itself, it may have.
    """

    def __init__(self, engine: Engine, where: str, wait_s: float) -> None:
        """Take an engine that is configured; `open` makes one."""
        self._engine = engine
        self._where = where
        self._wait_s = wait_s
        self._closed = False
        self._turn = Lock()
        self._writer, self._reader = engine.execution_options(**{_WRITING: True}), engine
        if self.dialect == "postgresql":
            self._reader = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)

    @classmethod
    def open(cls, url: str, *, wait_s: float = WAIT_S) -> "Database":
        """Open a database, creating the file of SQLite, and bring its tables up to date.

        Any number of threads and processes may do so at once; one of them migrates, the others wait.

        Args:
            url: `sqlite:///PATH`, or `postgresql://user:password@host/database` with the parameters of libpq.
            wait_s: how long a transaction waits for others before it fails.

        Raises:
            CatalogError: another dialect, not reachable, damaged, or made by a newer version of this program.
        """
        parsed = _parse(url)
        where = redacted(parsed)
        try:
            if parsed.drivername in _SQLITE:
                return cls._open_file(parsed, where, wait_s)
            return cls._open_server(parsed, where, wait_s)
        except ModuleNotFoundError as error:
            raise CatalogError(where, f"{error.name} is not installed; install hardlook[postgres]") from error
        except OSError as error:
            raise CatalogError(where, error.strerror or str(error)) from error

    @classmethod
    def _open_file(cls, url: URL, where: str, wait_s: float) -> "Database":
        path = Path(str(url.database))
        make_folder(path.parent)
        with exclusive(path.with_name(f"{path.name}.lock"), wait=True):
            database = cls(_sqlite_engine(url, wait_s), where, wait_s)
            database._prepare()
            sync_folder(path.parent)  # the file's name; SQLite syncs those of its logs
        return database

    @classmethod
    def _open_server(cls, url: URL, where: str, wait_s: float) -> "Database":
        database = cls(_postgres_engine(url, wait_s), where, wait_s)
        database._prepare()
        return database

    def _prepare(self) -> None:
        try:
            with self.writing() as connection:
                if self.dialect == "postgresql":
                    _lock_server(connection, self._where)
                migrate(connection, self._where)
        except BaseException:
            self.close()
            raise

    @property
    def dialect(self) -> str:
        """`sqlite` or `postgresql`."""
        return self._engine.dialect.name

    @property
    def engine(self) -> Engine:
        """For what `reading` and `writing` are not enough for; on SQLite its transactions only read."""
        return self._engine

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that may write: committed at the end of the block, undone by an exception.

        On SQLite there is one at a time, and it begins when the others have ended; on PostgreSQL rows are locked as
        they are used.

        Raises:
            CatalogError: the database refuses: locked for too long, full, read-only, lost, or against its rules.
        """
        with self._refusals(), self._in_turn(), self._writer.begin() as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one moment, whatever others write meanwhile, and cannot write.

        Raises:
            CatalogError: the database refuses, or is lost.
        """
        with self._refusals(), self._reader.begin() as connection:
            yield connection

    def close(self) -> None:
        """Close the connections; those in use, when they are done. Afterwards every transaction is refused."""
        self._closed = True
        self._engine.dispose()

    def __repr__(self) -> str:
        return f"Database({self._where!r})"

    @contextmanager
    def _in_turn(self) -> Iterator[None]:
        """Let writers of this process pass one by one on SQLite, whose own waiting is polling and knows no turns."""
        if self.dialect != "sqlite":
            yield
            return
        if not self._turn.acquire(timeout=self._wait_s):
            raise CatalogError(self._where, f"database is locked: others have been writing for {self._wait_s:g} s")
        try:
            yield
        finally:
            self._turn.release()

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Turn what the driver raises into CatalogError."""
        if self._closed:
            raise CatalogError(self._where, "it is closed")
        try:
            yield
        except PoolTimeout as error:
            raise CatalogError(self._where, "all its connections are in use for too long") from error
        except DBAPIError as error:
            raise CatalogError(self._where, _reason(error, self._engine.url)) from error


def redacted(url: URL) -> str:
    """An address for messages: without password, and without parameters, which may hold one too."""
    if url.drivername in _SQLITE:
        return f"sqlite:///{url.database}"
    shown = URL.create("postgresql", url.username, None, url.host, url.port, url.database)
    return shown.render_as_string()


def _parse(url: str) -> URL:
    """Check an address and write it out in full; nothing of it is repeated in messages before it is understood."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise CatalogError("(unreadable address)", "write sqlite:///PATH or postgresql://USER@HOST/NAME") from None
    if parsed.drivername in _POSTGRES:
        if not parsed.database:
            raise CatalogError(redacted(parsed), "the address names no database")
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in _SQLITE:
        raise CatalogError(f"{parsed.drivername}://", "only sqlite and postgresql are supported")
    if not parsed.database or parsed.database == ":memory:" or parsed.host or parsed.query:
        raise CatalogError("sqlite://", "write sqlite:///PATH, a file without parameters")
    return URL.create("sqlite+pysqlite", database=str(Path(parsed.database).absolute()))


def _sqlite_engine(url: URL, wait_s: float) -> Engine:
    # An error's parameters would put embeddings and bodies into logs.
    engine = create_engine(url, connect_args={"timeout": wait_s}, pool_timeout=wait_s, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, record: object) -> None:
        connection.isolation_level = None  # transactions begin where `begin` below says so, not where sqlite3 guesses
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise sqlite3.OperationalError(f"no write-ahead log there, the journal's mode stays {mode!r}")
        connection.execute("PRAGMA synchronous = FULL")  # in this mode anything less loses commits in a power cut
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA secure_delete = ON")  # images of jobs are erased, not only forgotten
        connection.execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT_BYTES}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writing = connection.get_execution_options().get(_WRITING, False)
        connection.exec_driver_sql(f"PRAGMA query_only = {int(not writing)}")
        # A deferred transaction that has read could not begin to write once another one has written.
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN DEFERRED")

    return engine


def _postgres_engine(url: URL, wait_s: float) -> Engine:
    network: dict[str, Any] = {
        "application_name": "hardlook",
        "connect_timeout": _CONNECT_TIMEOUT_S,
        # A server that vanishes without a word is noticed within the time that a lock would be waited for.
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": int(1000 * wait_s),
    }
    engine = create_engine(
        url,
        connect_args={name: value for name, value in network.items() if name not in url.query},
        isolation_level="READ COMMITTED",  # whatever the server's default: a lock is followed by fresh reads
        pool_pre_ping=True,
        pool_timeout=wait_s,
        hide_parameters=True,
    )

    @event.listens_for(engine, "connect")
    def configure(connection: Any, record: object) -> None:
        connection.execute(
            "SELECT set_config('lock_timeout', %s, false), CASE WHEN current_setting('synchronous_commit') = 'off'"
            " THEN set_config('synchronous_commit', 'on', false) END",
            [str(int(1000 * wait_s))],
        )
        connection.commit()

    return engine


def _lock_server(connection: Connection, where: str) -> None:
    """Wait until no other process migrates; the lock ends with the transaction."""
    encoding = connection.scalar(text("SHOW server_encoding"))
    if encoding != "UTF8":
        raise CatalogError(where, f"its encoding is {encoding}, it must be UTF8")
    connection.execute(text("SET LOCAL lock_timeout = 0"))  # a migration may take long
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATING})


def _reason(error: DBAPIError, url: URL) -> str:
    """What the driver says, in one line and without secrets."""
    lines = [line.strip() for line in str(error.orig).splitlines()]
    reason = next(filter(None, lines), type(error.orig).__name__)
    for secret in (url.password, url.query.get("password"), url.query.get("sslpassword")):
        if isinstance(secret, str) and secret:
            reason = reason.replace(secret, "***")
    return reason[:_MAX_REASON_CHARS]
