"""Collections: what a running process holds, the current snapshot of every published collection.

A reader takes `current` once for a request and works on that; a reload swaps the one reference, so that no request
sees two versions.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from indexer.contents import POOLS
from indexer.errors import UnknownCollection
from indexer.snapshot import Snapshot
from indexer.store import SnapshotStore, collections


@dataclass(frozen=True)
class CollectionsView:
    """One state of all collections, which never changes.

    Attributes:
        snapshots: by collection name, the moderation collection among them.
    """

    snapshots: Mapping[str, Snapshot]

    @property
    def pools(self) -> Snapshot:
        """The moderation collection; UnknownCollection where there is none."""
        return self.get(POOLS)

    @property
    def galleries(self) -> Mapping[str, Snapshot]:
        """All collections but the moderation collection, by name."""
        return MappingProxyType({name: s for name, s in self.snapshots.items() if name != POOLS})

    def get(self, name: str) -> Snapshot:
        """One collection by name.

        Raises:
            UnknownCollection: it is not among those loaded.
        """
        try:
            return self.snapshots[name]
        except KeyError:
            raise UnknownCollection(name, self.snapshots) from None


class Collections:
    """Loads the current snapshots, and picks up newly published ones."""

    def __init__(self, root: Path, encoder_fingerprint: str, *, required: bool, view: CollectionsView) -> None:
        """Use `Collections.open`."""
        self._root, self._encoder_fingerprint, self._required = root, encoder_fingerprint, required
        self._view = view
        self._reloading = threading.Lock()

    @classmethod
    def open(cls, root: Path, encoder_fingerprint: str, *, required: bool = True) -> "Collections":
        """Load the current snapshot of every published collection.

        Args:
            root: folder of the collections.
            encoder_fingerprint: of the encoder that makes the queries.
            required: whether the moderation collection has to be there.

        Raises:
            UnknownCollection: it has to be and is not.
            FingerprintMismatch: a snapshot was made by another encoder; names both.
            SnapshotError, UnknownVersion: a snapshot or the store is damaged.
        """
        return cls(
            root, encoder_fingerprint, required=required, view=_load(root, encoder_fingerprint, required, loaded={})
        )

    @property
    def current(self) -> CollectionsView:
        """The present state; take it once for a request that asks more than one question."""
        return self._view

    @property
    def pools(self) -> Snapshot:
        """See `CollectionsView.pools`."""
        return self._view.pools

    @property
    def galleries(self) -> Mapping[str, Snapshot]:
        """See `CollectionsView.galleries`."""
        return self._view.galleries

    def get(self, name: str) -> Snapshot:
        """See `CollectionsView.get`."""
        return self._view.get(name)

    def reload(self) -> bool:
        """Pick up what was published, rolled back, added or removed since.

        Snapshots that are still current are kept, not read again. Other threads go on with the old state meanwhile.

        Returns:
            Whether anything changed.

        Raises:
            The errors of `open`; the old state stays.
        """
        with self._reloading:
            old = self._view
            new = _load(self._root, self._encoder_fingerprint, self._required, loaded=old.snapshots)
            if {n: s.version for n, s in new.snapshots.items()} == {n: s.version for n, s in old.snapshots.items()}:
                return False
            self._view = new
            return True


def _load(root: Path, encoder_fingerprint: str, required: bool, loaded: Mapping[str, Snapshot]) -> CollectionsView:
    """Load what is current, taking over from `loaded` what has not changed."""
    names = collections(root)
    if required and POOLS not in names:
        raise UnknownCollection(POOLS, names)
    snapshots = {}
    for name in names:
        store = SnapshotStore(root, name)
        version = store.current_version()
        present = loaded.get(name)
        if present is None or present.version != version:
            present = store.load(encoder_fingerprint, version)
        snapshots[name] = present
    return CollectionsView(MappingProxyType(snapshots))
