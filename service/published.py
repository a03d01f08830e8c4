"""Published: the views that the service answers from, and how they follow the catalogue and the folder of snapshots.

Owns which state of which collection is shown. Without a catalogue, the states are those that were published offline.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from indexer.backends.flat import FlatIndex
from indexer.catalog.clock import now
from indexer.catalog.edits import Rebase
from indexer.catalog.ledger import Catalog
from indexer.catalog.situation import Base
from indexer.catalog.state import Stamp, State
from indexer.errors import IndexerError, UnknownCollection
from indexer.live.collection import LiveCollection
from indexer.live.view import View
from indexer.snapshot import MakeIndex
from indexer.store import SnapshotStore, collections
from perception.errors import PerceptionError
from service.errors import NotReady

Views = Mapping[str, View]
Adopt = Callable[[Sequence[Rebase]], Awaitable[object]]
_NOTHING: Views = MappingProxyType({})
_log = logging.getLogger("hardlook.published")
_HOW_TO_BUILD = "build pools with 'hardlook-index build' in the folder that HARDLOOK_POOLS names"


class Published:
    """The present view of every collection; none as long as the folder is absent or empty and nothing was added.

    Args:
        root: folder of the collections.
        encoder: in use.
        index: makes what is searched of a snapshot.
    """

    def __init__(self, root: Path, encoder: Stamp, index: MakeIndex = FlatIndex) -> None:
        self.root, self.encoder = root, encoder
        self._index = index
        self._catalog: Catalog | None = None
        self._live: dict[str, LiveCollection] = {}
        self._views = _NOTHING
        self._last_failure = ""

    def open(self, catalog: Catalog | None) -> None:
        """Show what is there.

        Args:
            catalog: whose states are shown; None for what was published offline alone.

        Raises:
            FingerprintMismatch: a collection was made by another encoder; names both.
            SnapshotError, UnknownVersion: a snapshot is damaged.
            CatalogError: the catalogue cannot be read or written.
        """
        self._catalog = catalog
        if catalog is not None:
            catalog.adopt(self.publications())
        self.show()

    @property
    def snapshots(self) -> Views:
        """All collections by name."""
        return self._views

    def pools(self) -> View:
        """The moderation pools.

        Raises:
            NotReady: there are none, or no exemplar is in them; says how to build some.
        """
        view = self._views.get("pools")
        if view is None:
            raise NotReady(f"no pools are published; {_HOW_TO_BUILD}")
        if not len(view):
            raise NotReady(f"the published pools are empty; {_HOW_TO_BUILD}")
        return view

    def get(self, name: str) -> View:
        """A collection by name.

        Raises:
            UnknownCollection: there is none.
        """
        views = self._views
        if name not in views:
            raise UnknownCollection(name, views)
        return views[name]

    def base(self, collection: str, version: str) -> Base:
        """The snapshot that a state stands on, from memory where it is there. Errors are those of `open`."""
        return self._collection(collection).base(version)

    def view_of(self, state: State) -> View:
        """A view of any state, which is not shown. Errors are those of `open`."""
        return self._collection(state.collection).view_of(state, self._embeddings, now())

    def publications(self) -> list[Rebase]:
        """What was published offline and is not in the catalogue yet; its snapshots are loaded.

        Raises:
            FingerprintMismatch: another encoder made one; names both.
            SnapshotError, UnknownVersion: one is damaged.
        """
        found = []
        for name in collections(self.root) if self.root.is_dir() else ():
            version, history = SnapshotStore(self.root, name).publication()
            state = State(name) if self._catalog is None else self._catalog.state(name)
            if history > state.history:
                self.base(name, version)  # loaded before anybody waits for it
                found.append(Rebase(name, version, self.encoder, history))
        return found

    def show(self) -> bool:
        """Show the present states, as they are now; whether anything changed.

        Raises:
            Exception: those of `open`, of the first collection that cannot be shown: it keeps its view, and the others
                are shown all the same.
        """
        at, old = now(), self._views
        views: dict[str, View] = {}
        failures: list[Exception] = []
        for name, state in self._states().items():
            view = old.get(name)
            if view is None or view.state is not state or (view.until is not None and view.until <= at):
                made_at = state.changed_at if state.records else None
                try:
                    view = self._collection(name).show(state, self._embeddings, at, created_at=made_at)
                except (IndexerError, PerceptionError) as error:
                    failures.append(error)
            if view is not None:
                views[name] = view
        changed = views != old
        if changed:
            self._views = MappingProxyType(views)
        if failures:
            raise failures[0]
        return changed

    def shows(self, state: State) -> bool:
        """Whether searches see a state, or a later one of the same collection."""
        view = self._views.get(state.collection)
        return view is not None and view.revision >= state.revision

    def _states(self) -> Mapping[str, State]:
        if self._catalog is not None:
            return self._catalog.states
        present: dict[str, State] = {}
        for name in collections(self.root) if self.root.is_dir() else ():
            version = SnapshotStore(self.root, name).current_version()
            view = self._views.get(name)
            same = view is not None and view.state.base == version
            present[name] = view.state if view is not None and same else State(name, self.encoder, version)
        return present

    def _collection(self, name: str) -> LiveCollection:
        if name not in self._live:
            encoder = self.encoder
            self._live[name] = LiveCollection(
                self.root, name, encoder.fingerprint, encoder.name, encoder.dim, self._index
            )
        return self._live[name]

    def _embeddings(self, hashes: Sequence[str]) -> Mapping[str, NDArray[np.float32]]:
        return {} if self._catalog is None else self._catalog.embeddings(hashes)

    async def watch(self, every_s: float, adopt: Adopt | None) -> None:
        """Pick up what is published offline, again and again; until cancelled, whatever goes wrong.

        Args:
            every_s: how often.
            adopt: puts it into the catalogue; None where there is none.
        """
        while True:
            await asyncio.sleep(every_s)
            try:
                await self.pick_up(adopt)
            except Exception:
                _log.exception("a bug")

    async def pick_up(self, adopt: Adopt | None) -> bool:
        """Pick up what was published offline since; whether anything changed. What fails leaves the old views.

        Args:
            adopt: as of `watch`.
        """
        try:
            if adopt is None:
                changed = await asyncio.to_thread(self.show)
            else:
                found = await asyncio.to_thread(self.publications)
                changed = bool(found)
                if found:
                    await adopt(found)
        except (IndexerError, PerceptionError) as error:
            if str(error) != self._last_failure:  # once for each failure, not once for each look
                _log.error("published collections not reloaded: %s", error)
            self._last_failure = str(error)
            return False
        self._last_failure = ""
        if changed:
            _log.info("collections loaded: %s", {name: view.version for name, view in self._views.items()})
        return changed
