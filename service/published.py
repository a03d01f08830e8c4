"""Published: the snapshots that the service answers from, and how new versions are picked up while it runs."""

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path

from indexer.errors import IndexerError, UnknownCollection
from indexer.pools import Collections
from indexer.snapshot import Snapshot
from perception.errors import PerceptionError
from service.errors import NotReady

_log = logging.getLogger("hardlook.published")
_HOW_TO_BUILD = "build pools with 'hardlook-index build' in the folder that HARDLOOK_POOLS names"


class Published:
    """The current snapshot of every collection; empty as long as the folder is absent or holds none.

    Args:
        root: folder of the collections.
        encoder_fingerprint: of the encoder in use.

    Raises:
        FingerprintMismatch: a snapshot was made by another encoder; names both.
        SnapshotError, UnknownVersion: a snapshot is damaged.
    """

    def __init__(self, root: Path, encoder_fingerprint: str) -> None:
        self._root, self._fingerprint = root, encoder_fingerprint
        self._collections: Collections | None = None
        self._last_failure = ""
        self._open()

    def _open(self) -> bool:
        if self._root.is_dir():
            self._collections = Collections.open(self._root, self._fingerprint, required=False)
        return self._collections is not None

    @property
    def snapshots(self) -> Mapping[str, Snapshot]:
        """All collections by name."""
        return self._collections.current.snapshots if self._collections else {}

    def pools(self) -> Snapshot:
        """The snapshot of the moderation pools.

        Raises:
            NotReady: none was published, or it has no exemplar; says how to build one.
        """
        try:
            snapshot = self.get("pools")
        except UnknownCollection as error:
            raise NotReady(f"no pools are published; {_HOW_TO_BUILD}") from error
        if not len(snapshot):
            raise NotReady(f"the published pools are empty; {_HOW_TO_BUILD}")
        return snapshot

    def get(self, name: str) -> Snapshot:
        """A collection by name.

        Raises:
            UnknownCollection: there is none.
        """
        snapshots = self.snapshots
        if name not in snapshots:
            raise UnknownCollection(name, snapshots)
        return snapshots[name]

    def reload(self) -> bool:
        """Pick up what was published since; whether anything changed. What fails leaves the old state."""
        try:
            changed = self._collections.reload() if self._collections else self._open()
        except (IndexerError, PerceptionError) as error:
            if str(error) != self._last_failure:  # once for each failure, not once for each look
                _log.error("published collections not reloaded: %s", error)
            self._last_failure = str(error)
            return False
        self._last_failure = ""
        if changed:
            _log.info("collections loaded: %s", {name: s.version for name, s in self.snapshots.items()})
        return changed

    async def watch(self, every_s: float) -> None:
        """Reload again and again, in a thread; until cancelled, whatever a reload raises."""
        while True:
            await asyncio.sleep(every_s)
            try:
                await asyncio.to_thread(self.reload)
            except Exception:
                _log.exception("a bug")
