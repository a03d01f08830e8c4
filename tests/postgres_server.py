"""A private PostgreSQL for tests, from the binaries of a system package; a plug-in of tests/conftest.py.

`catalog_url` runs a test on both databases; `postgres_url` is for a test of PostgreSQL alone. Both give an empty
database of the test's own. Where there is no PostgreSQL such tests are skipped, with the reason.
"""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PASSWORD = "s3cret-of-the-tests"
_ADMIN = "hardlook"
_PORT = 5432  # part of the socket's name: nothing listens on a network


@dataclass(frozen=True)
class PostgresServer:
    """A cluster in a folder of its own, which listens on a socket there."""

    folder: Path
    binaries: Path
    user: str | None

    def run(self, program: str, *arguments: object) -> None:
        """Run one of PostgreSQL's programs, as somebody who is not root: the server refuses root."""
        log = self.folder / "programs.log"
        # Into a file: a server that was started keeps what its starter's output went to open.
        with log.open("ab") as output:
            done = subprocess.run(
                [self.binaries / program, *map(str, arguments)],
                cwd=self.folder,
                user=self.user,
                extra_groups=[] if self.user else None,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=60,
                check=False,
            )
        if done.returncode:
            raise RuntimeError(f"{program} failed: {log.read_text('utf8', 'replace')[-2000:]}")

    def create(self) -> None:
        """Make the cluster and start it."""
        secret = self.folder / "password"
        secret.write_text(PASSWORD, "utf8")
        options = ("--auth=scram-sha-256", f"--pwfile={secret}", f"--username={_ADMIN}")
        data = f"--pgdata={self.folder / 'data'}"
        self.run("initdb", data, *options, "--encoding=UTF8", "--locale=C", "--no-sync")
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        sockets = f"-c listen_addresses='' -c unix_socket_directories='{self.folder}' -p {_PORT}"
        options = f"{sockets} -c fsync=on -c recovery_init_sync_method=syncfs"  # after a crash, not file by file
        log = self.folder / "server.log"
        self.run(
            "pg_ctl", "start", "--wait", f"--pgdata={self.folder / 'data'}", f"--log={log}", f"--options={options}"
        )

    def stop(self, mode: str = "fast") -> None:
        """Stop it, and wait until it is gone; `immediate` is what a crash leaves."""
        self.run("pg_ctl", "stop", "--wait", f"--pgdata={self.folder / 'data'}", f"--mode={mode}")

    def url(self, database: str, password: str = PASSWORD) -> str:
        """The address of one of its databases."""
        return f"postgresql://{_ADMIN}:{password}@/{database}?host={self.folder}&port={_PORT}"

    def execute(self, statement: str, database: str = "postgres") -> list[Any]:
        """One statement as administrator, outside of transactions; the rows it gives."""
        import psycopg

        with psycopg.connect(self.url(database), autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []


def _binaries() -> Path | None:
    found = shutil.which("initdb")
    packaged = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    return Path(found).resolve().parent if found else packaged[-1].parent if packaged else None


def _unprivileged() -> str | None:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    return None


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A running server; one for each process of a parallel run."""
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    binaries = _binaries()
    if binaries is None:
        pytest.skip("PostgreSQL's server is not installed")
    user = _unprivileged() if os.geteuid() == 0 else None
    if os.geteuid() == 0 and user is None:
        pytest.skip("PostgreSQL does not run as root, and there is no other user")
    # Not below pytest's own folder, which nobody else may enter.
    with tempfile.TemporaryDirectory(prefix="hardlook-pg-", ignore_cleanup_errors=True) as folder:
        if user is not None:
            shutil.chown(folder, user)
        server = PostgresServer(Path(folder), binaries, user)
        try:
            server.create()
        except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"PostgreSQL cannot be started: {error}")
        try:
            yield server
        finally:
            server.stop("immediate")


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The address of an empty PostgreSQL database: the same one for each test, emptied after it, which is quicker."""
    name = "catalogue"
    if not postgres_server.execute(f"SELECT 1 FROM pg_database WHERE datname = '{name}'"):
        postgres_server.execute(f"CREATE DATABASE {name}")
    yield postgres_server.url(name)
    postgres_server.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
    postgres_server.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public", name)


@pytest.fixture(params=["sqlite", "postgresql"])
def catalog_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty database, first on SQLite, then on PostgreSQL."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'catalog.sqlite3'}"
    url: Any = request.getfixturevalue("postgres_url")
    return str(url)
