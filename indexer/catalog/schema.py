"""Bring the tables of a database to the form that this version of the program knows.

Owns how alembic is called; the steps themselves are in `migrations/versions`.
"""

from pathlib import Path
from threading import Lock

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from indexer.errors import CatalogError

_SCRIPTS = Path(__file__).with_name("migrations")
_alembic = Lock()  # alembic keeps the migration that runs in globals of its own


def migrate(connection: Connection, where: str) -> None:
    """Take the missing steps, within the caller's transaction, whose lock keeps other processes out.

    Args:
        connection: in a transaction that may write.
        where: the database, for messages.

    Raises:
        CatalogError: a newer version of the program has migrated it.
    """
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    config.attributes["connection"] = connection
    steps = ScriptDirectory.from_config(config)
    present = MigrationContext.configure(connection).get_current_heads()
    unknown = set(present) - {step.revision for step in steps.walk_revisions()}
    if unknown:
        known = ", ".join(steps.get_heads())
        raise CatalogError(
            where, f"its schema {', '.join(sorted(unknown))} is newer than this program, which knows {known}"
        )
    if set(present) != set(steps.get_heads()):
        with _alembic:
            command.upgrade(config, "head")
