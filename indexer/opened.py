"""What command lines open: the catalogue of a folder of collections, and the present view of one of them.

Owns where the catalogue is, and what is present where a folder has none, or a publication that nobody has put into the
catalogue yet. Reading changes nothing: no catalogue is made by it.
"""

import getpass
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from indexer.catalog import CATALOG_FILE
from indexer.catalog.clock import now
from indexer.catalog.database import Database
from indexer.catalog.edits import Rebase
from indexer.catalog.ledger import Catalog
from indexer.catalog.state import Stamp, State
from indexer.errors import CatalogError, UnknownCollection
from indexer.live.collection import LiveCollection
from indexer.live.view import View
from indexer.store import SnapshotStore, collections

_SQLITE = "sqlite:///"


def actor() -> str:
    """Who uses the command line, as the log names it."""
    try:
        return f"hardlook-index ({getpass.getuser()})"
    except (OSError, KeyError, ImportError):  # a container's user need not have a name
        return "hardlook-index"


@contextmanager
def opened_database(root: Path, url: str, *, create: bool = False) -> Iterator[Database]:
    """The database of a catalogue.

    Args:
        root: folder of the collections.
        url: as `Database.open` takes it; empty for SQLite's file in `root`.
        create: whether a file that is not there is made.

    Raises:
        CatalogError: it cannot be opened, or there is none.
    """
    address = url or f"{_SQLITE}{root / CATALOG_FILE}"
    if not create and _is_absent(address):
        raise CatalogError(address, "there is none; the service makes it when it starts, and 'import-pool' does")
    with closing(Database.open(address)) as database:
        yield database


@contextmanager
def opened_catalog(root: Path, url: str, *, create: bool = False) -> Iterator[Catalog]:
    """A catalogue. Arguments and errors are those of `opened_database`.

    Raises:
        ContentsError: the log is damaged.
    """
    with opened_database(root, url, create=create) as database:
        yield Catalog(database, root)


@contextmanager
def opened_view(root: Path, url: str, collection: str) -> Iterator[View]:
    """The present view of a collection, whether there is a catalogue or not; errors are those of `present_view`."""
    address = url or f"{_SQLITE}{root / CATALOG_FILE}"
    if _is_absent(address):
        yield present_view(root, None, collection)
        return
    with opened_catalog(root, url) as catalog:
        yield present_view(root, catalog, collection)


def present_view(root: Path, catalog: Catalog | None, collection: str) -> View:
    """What a service that starts now would show of a collection.

    Raises:
        InvalidName, UnknownCollection: there is none of that name.
        SnapshotError, UnknownVersion, FingerprintMismatch: it cannot be loaded.
        CatalogError, ContentsError: the catalogue cannot be read.
    """
    store = SnapshotStore(root, collection)
    state = State(collection) if catalog is None else catalog.state(collection)
    published = (root / collection).is_dir() and collection in collections(root)
    version, history = store.publication() if published else ("", 0)
    if history > state.history:
        manifest = store.manifest(version)
        stamp = Stamp(manifest.encoder_name, manifest.encoder_fingerprint, manifest.dim)
        state = replace(state, base=version, encoder=stamp, history=history)
    if state.encoder is None:
        known = {*(collections(root) if root.is_dir() else ()), *(catalog.states if catalog is not None else ())}
        raise UnknownCollection(collection, known)
    return view_of(root, catalog, state)


def view_of(root: Path, catalog: Catalog | None, state: State) -> View:
    """A view of any state of a collection that exists. Errors are those of `present_view`."""
    [view] = views_of(root, catalog, [state])
    return view


def views_of(root: Path, catalog: Catalog | None, states: Sequence[State]) -> list[View]:
    """Views of states of one collection, which share what they have in common. Errors are those of `present_view`."""

    def embeddings(hashes: Sequence[str]) -> Mapping[str, NDArray[np.float32]]:
        return {} if catalog is None else catalog.embeddings(hashes)

    views: list[View] = []
    lives: dict[Stamp, LiveCollection] = {}
    for state in states:
        if state.encoder is None:
            raise UnknownCollection(state.collection, ())
        encoder = state.encoder
        if encoder not in lives:
            lives[encoder] = LiveCollection(root, state.collection, encoder.fingerprint, encoder.name, encoder.dim)
        made_at = state.changed_at if state.records and state.changed_at else None
        views.append(lives[encoder].show(state, embeddings, now(), created_at=made_at))
    return views


def adopt(root: Path, catalog: Catalog, collection: str) -> None:
    """Put into the catalogue what was published offline, as a service does; errors are those of `Catalog.adopt`."""
    store = SnapshotStore(root, collection)
    publications = len(store.history())
    if publications > catalog.state(collection).history:
        manifest = store.manifest()
        stamp = Stamp(manifest.encoder_name, manifest.encoder_fingerprint, manifest.dim)
        catalog.adopt([Rebase(collection, manifest.version, stamp, publications)])


def _is_absent(address: str) -> bool:
    return address.startswith(_SQLITE) and not Path(address.removeprefix(_SQLITE)).exists()
