"""An editor over a database of its own, where no collection is served."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from indexer.catalog.database import Database
from indexer.catalog.ledger import Catalog
from indexer.catalog.state import State
from service.editing import Editor


class Nothing:
    """Shows nothing."""

    def show(self) -> None:
        """See `service.editing.Shown`."""

    def shows(self, state: State) -> bool:
        """See `service.editing.Shown`."""
        return True


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[Editor]:
    """An editor of the SQLite database in a folder, which may be open elsewhere too."""
    database = Database.open(f"sqlite:///{folder / 'catalog.sqlite3'}")
    try:
        async with Editor(Catalog(database, folder), Nothing(), 60.0) as editor:
            yield editor
    finally:
        database.close()
