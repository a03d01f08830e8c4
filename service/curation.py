"""Curation in a running service: long work beside the requests, and pool files that come in.

Owns how much of it there may be at a time. What is looked for is in `indexer.curation`. Knows nothing of HTTP.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from indexer.catalog.clock import now
from indexer.catalog.situation import Edit
from indexer.catalog.state import State
from indexer.live.view import View
from indexer.pool_file import PoolFile
from indexer.pool_import import MOST_EDITS, OnConflict, import_edits, merge
from indexer.store import SnapshotStore
from service.editing import Editor, adopt_with
from service.errors import InvalidParameter, Overloaded
from service.published import Published

T = TypeVar("T")
MAX_COMPARED = 100_000  # exemplars whose near-duplicates are looked for in one request; up to a minute of one core
MAX_CONTRADICTED = 30_000  # the same for contradictions, which take a search of every pool for each
_TOO_MANY = "{n} exemplars would have to be compared, the limit is {limit}: use 'hardlook-index {command}'"


class Desk:
    """A few places for long work; what finds none is refused.

    Args:
        name: of the work, for errors.
        places: how many there are.
    """

    def __init__(self, name: str, places: int = 1) -> None:
        self._name, self._places, self._taken = name, places, 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place.

        Raises:
            Overloaded: there is none.
        """
        self._take()
        try:
            yield
        finally:
            self._taken -= 1

    async def work(self, function: Callable[[], T]) -> T:
        """Call a function in another thread, in a place of its own, which it keeps until it ends.

        A caller who hangs up does not wait for it, but it cannot be stopped: so its place is not given away.

        Raises:
            Overloaded: there is none.
            Exception: of the function.
        """
        self._take()
        running = asyncio.ensure_future(asyncio.to_thread(function))
        running.add_done_callback(self._give_back)
        return await asyncio.shield(running)

    def _take(self) -> None:
        if self._taken >= self._places:
            raise Overloaded(self._name, self._places)
        self._taken += 1

    def _give_back(self, done: "asyncio.Future[T]") -> None:
        self._taken -= 1
        if not done.cancelled():
            done.exception()  # nobody may be left to look at it


class Curation:
    """What one application has for it.

    Attributes:
        search: one place for work that takes all of a core for long.
        files: places for pool files on their way, each of which may need the memory of a collection.
    """

    def __init__(self) -> None:
        self.search, self.files = Desk("curation"), Desk("pool files", 2)


def require_few(view: View, label: str | None, limit: int, command: str) -> None:
    """Refuse what would take too long for a request.

    Raises:
        InvalidParameter: more exemplars than the limit would have to be compared with each other.
    """
    n = len(view) if label is None else view.counts.get(label, 0)
    if n > limit:
        raise InvalidParameter(
            "collection" if label is None else "label", _TOO_MANY.format(n=n, limit=limit, command=command)
        )


async def take_in(
    published: Published,
    editor: Editor,
    name: str,
    pool_file: PoolFile,
    on_conflict: OnConflict,
    *,
    actor: str,
    reason: str,
    request_id: str,
) -> bool:
    """Take the exemplars of a pool file into a collection; on return they are durable and searches see them.

    Returns:
        Whether anything changed.

    Raises:
        FingerprintMismatch, EditRefused, ExemplarExists, InvalidLabel, ContentsError: see `import_edits`.
        CatalogError, SnapshotError, OSError: it cannot be written.
        Overloaded, NotReady: too much waits; the service is shutting down.
    """
    changed = False
    if pool_file.header.n > MOST_EDITS:
        before = _present(published, name)
        contents = await asyncio.to_thread(merge, pool_file, before, on_conflict)
        await asyncio.to_thread(SnapshotStore(published.root, name).publish, contents)
        found = await asyncio.to_thread(published.publications)
        await adopt_with(editor)(found)
        changed = _present(published, name).version != before.version
    edits: list[Edit] = await asyncio.to_thread(import_edits, pool_file, _present(published, name), on_conflict)
    if edits:
        outcomes = await editor.apply(edits, actor=actor, reason=reason, request_id=request_id)
        changed = changed or any(outcome.entry is not None for outcome in outcomes)
    return changed


def file_name(view: View, label: str | None) -> str:
    """What a pool file is called; a label of a gallery can be anything, so only pools are named."""
    part = f"-{label}" if label is not None and view.kind == "pools" else ""
    return f"{view.collection}{part}-{view.version}.pool"


def _present(published: Published, name: str) -> View:
    """The present view of a collection, an empty one where there is none."""
    view = published.snapshots.get(name)
    if view is None:
        view = View(State(name, published.encoder), None, {}, now(), published.encoder)
    return view
