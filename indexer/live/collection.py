"""LiveCollection: what a running process holds of one collection, the present view.

A reader takes `view` once for a request and works on that; showing a state swaps the one reference, so that no request
sees two states.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from indexer.backends.flat import FlatIndex
from indexer.catalog.state import Stamp, State
from indexer.errors import InvalidName
from indexer.live.view import View
from indexer.snapshot import MakeIndex, Snapshot
from indexer.store import SnapshotStore

Embeddings = Mapping[str, NDArray[np.float32]]


class LiveCollection:
    """One collection, as the states of the log come in.

    Args:
        root: folder of the collections.
        collection: its name.
        encoder_fingerprint, encoder_name, dim: of the encoder that makes the queries.
        index: makes what is searched of a base snapshot.
        bases_kept: how many base snapshots stay in memory, the present one among them; with two, a roll back to the
            state before the last change of base reads nothing.

    Raises:
        InvalidName: a collection cannot be called so.
        ValueError: `bases_kept` is below 1.
    """

    def __init__(
        self,
        root: Path,
        collection: str,
        encoder_fingerprint: str,
        encoder_name: str,
        dim: int,
        index: MakeIndex = FlatIndex,
        *,
        bases_kept: int = 2,
    ) -> None:
        if bases_kept < 1:
            raise ValueError(f"bases_kept must be at least 1, got {bases_kept}")
        self._store = SnapshotStore(root, collection)
        self._encoder, self._index, self._bases_kept = Stamp(encoder_name, encoder_fingerprint, dim), index, bases_kept
        self._showing = threading.Lock()  # held by the one thread that replaces the two below
        self._embeddings: Embeddings = {}  # what the records of `_view` have
        self._view: View | None = None
        self._loading = threading.Lock()  # held while a base is read, which takes long: nothing else waits for it
        self._keeping = threading.Lock()  # guards `_bases`
        self._bases: OrderedDict[str, Snapshot] = OrderedDict()  # the one used last comes last

    @property
    def view(self) -> View | None:
        """The present view; None until a state was shown."""
        return self._view

    def show(
        self,
        state: State,
        embeddings: Callable[[Sequence[str]], Embeddings],
        now: datetime,
        *,
        created_at: str | None = None,
    ) -> View:
        """Make a state the present one, as it is at `now`.

        Other threads go on with the old view meanwhile; calls wait for each other, and the last one counts. Also to be
        called with the same state when its view's `until` has come.

        Args:
            state: of this collection.
            embeddings: finds embeddings (d,) by hash; asked only for those that no record of the present view has.
            now: the moment at which disabled records are looked at.
            created_at: see `View`; by default that of the present view where it has the same version.

        Returns:
            The new view.

        Raises:
            InvalidName: the state is of another collection.
            FingerprintMismatch: its base, or the state itself, is of another encoder; names both.
            UnknownCollection, UnknownVersion, SnapshotError: its base is absent or damaged.
            ContentsError, InvalidLabel: see `View`.
            Exception: what `embeddings` raises. After any of them the old view stays.
        """
        with self._showing:
            if created_at is None and self._view is not None and self._view.version == state.version:
                created_at = self._view.created_at
            in_use = self._gathered(state, embeddings)
            view = self._made(state, in_use, now, created_at)
            self._embeddings, self._view = in_use, view
            return view

    def view_of(
        self,
        state: State,
        embeddings: Callable[[Sequence[str]], Embeddings],
        now: datetime,
        *,
        created_at: str | None = None,
    ) -> View:
        """A view of any state of this collection, which is not shown. Arguments and errors are those of `show`."""
        return self._made(state, self._gathered(state, embeddings), now, created_at)

    def base(self, version: str) -> Snapshot:
        """A base snapshot, from memory where it is there; else it is read, and kept.

        Raises:
            FingerprintMismatch, UnknownCollection, UnknownVersion, SnapshotError: see `SnapshotStore.load`.
        """
        found = self._kept(version)
        if found is not None:
            return found
        with self._loading:
            found = self._kept(version)  # another thread may have read it meanwhile
            if found is None:
                self._make_room()
                found = self._store.load(self._encoder.fingerprint, version, self._index)
                with self._keeping:
                    self._bases[version] = found
            return found

    def _gathered(self, state: State, embeddings: Callable[[Sequence[str]], Embeddings]) -> Embeddings:
        """The embeddings of a state's records by hash; those that cannot be found are left out."""
        known = self._embeddings
        hashes = {record.embedding_sha256 for record in state.records.values() if record is not None}
        missing = sorted(hashes - known.keys())
        found = {**known, **(embeddings(missing) if missing else {})}
        return {sha256: found[sha256] for sha256 in hashes & found.keys()}

    def _made(self, state: State, embeddings: Embeddings, now: datetime, created_at: str | None) -> View:
        if state.collection != self._store.collection:
            raise InvalidName(state.collection, f"this is the live collection {self._store.collection!r}")
        base = None if state.base is None else self.base(state.base)
        return View(state, base, embeddings, now, self._encoder, created_at)

    def _kept(self, version: str) -> Snapshot | None:
        """A base that is in memory; that of the present view is, whether there was room to keep it or not."""
        with self._keeping:
            present = None if self._view is None else self._view.base
            if present is not None and present.version == version:
                return present
            if version in self._bases:
                self._bases.move_to_end(version)
            return self._bases.get(version)

    def _make_room(self) -> None:
        """Forget bases before the next one needs the memory, that of the present view last."""
        with self._keeping:
            present = None if self._view is None else self._view.base
            if present is not None and present.version in self._bases:
                self._bases.move_to_end(present.version)
            while len(self._bases) >= self._bases_kept:
                self._bases.popitem(last=False)
