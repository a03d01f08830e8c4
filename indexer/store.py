"""SnapshotStore: the versions of one collection on disk, and which of them is current.

    <root>/<collection>/
        versions/<version>/   snapshots, never changed once they have their name
        CURRENT               the version that is served; replacing it is the moment of publication
        history.jsonl         one line a publication or rollback, oldest first
        .lock                 held by whoever publishes

A line of history is written before CURRENT is replaced: a kill between the two leaves a line of an attempt. CURRENT
alone says what is served. Readers take no lock.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from indexer.backends.flat import FlatIndex
from indexer.contents import Contents, Kind, collection_kind
from indexer.durable import exclusive, make_folder, replace_file
from indexer.errors import InvalidName, SnapshotError, UnknownCollection, UnknownVersion
from indexer.manifest import Manifest, read_contents, read_manifest
from indexer.snapshot import PARTIAL_SUFFIX, MakeIndex, Snapshot, load_snapshot, write_snapshot

_VERSION = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class HistoryEntry:
    """One publication or rollback.

    Attributes:
        time: ISO 8601, UTC.
        action: what was done.
        version: what became current.
        previous: what was current before; None at the first publication.
    """

    time: str
    action: Literal["publish", "rollback"]
    version: str
    previous: str | None


_HISTORY_ADAPTER = TypeAdapter(HistoryEntry)


class SnapshotStore:
    """Publishes, rolls back and loads the snapshots of one collection."""

    def __init__(self, root: Path, collection: str) -> None:
        """Open a collection below `root`; nothing is created before the first publication.

        Raises:
            InvalidName: the collection cannot be called so.
        """
        self.kind: Kind = collection_kind(collection)
        self.root, self.collection = root, collection
        self._folder = root / collection
        self._versions = self._folder / "versions"
        self._current = self._folder / "CURRENT"
        self._history = self._folder / "history.jsonl"

    def publish(self, snapshot: Contents | Path) -> str:
        """Make contents, or a snapshot folder made elsewhere, the current version.

        A kill at any moment leaves the old version current, or the new one. Publishing what is current already
        changes nothing.

        Returns:
            The version.

        Raises:
            SnapshotError: the folder or the store is damaged.
            InvalidName: the snapshot is of another collection.
        """
        created_at: str | None = None
        if isinstance(snapshot, Path):
            manifest = read_manifest(snapshot)
            contents, created_at = read_contents(snapshot, manifest), manifest.created_at
        else:
            contents = snapshot
        if contents.collection != self.collection:
            raise InvalidName(contents.collection, f"this is the store of {self.collection!r}")
        with self._writing():
            version = write_snapshot(contents, self._versions, created_at).name
            self._switch("publish", version)
        return version

    def stage(self, contents: Contents) -> str:
        """Write contents as a version without making it current; errors are those of `publish`.

        Returns:
            The version, which is durable and of no effect until something refers to it.
        """
        if contents.collection != self.collection:
            raise InvalidName(contents.collection, f"this is the store of {self.collection!r}")
        with self._writing():
            return write_snapshot(contents, self._versions).name

    def rollback(self, to: str | None = None) -> str:
        """Make an earlier version current again.

        Args:
            to: the version; None for the one that was current when the current one was published. So a version that
                was itself rolled back is never what a rollback without an argument returns to.

        Returns:
            The version.

        Raises:
            UnknownCollection: nothing was ever published.
            UnknownVersion: there is no such version, or none before the current one.
            SnapshotError: the version to return to is damaged; the current one stays.
        """
        self.current_version()  # without a publication there is no folder to lock
        with exclusive(self._folder / ".lock", wait=True):
            if to is None:
                current = self.current_version()
                published = [e for e in self.history() if e.action == "publish" and e.version == current]
                to = published[-1].previous if published else None
                if to is None:
                    raise UnknownVersion(self.collection, f"before {current}", self.versions())
            folder = self._folder_of(to)
            read_contents(folder, read_manifest(folder))
            self._switch("rollback", to)
        return to

    def current_version(self) -> str:
        """The version that is served.

        Raises:
            UnknownCollection: nothing was ever published.
            SnapshotError: the file that names it is damaged.
        """
        try:
            text = self._current.read_bytes().decode("ascii", "replace")
        except FileNotFoundError:
            known = collections(self.root) if self.root.is_dir() else {}
            raise UnknownCollection(self.collection, known) from None
        except OSError as error:
            raise SnapshotError(self._current, f"cannot be read: {error.strerror}") from error
        version = text.removesuffix("\n")
        if not _VERSION.fullmatch(version):
            raise SnapshotError(self._current, f"is damaged: {text[:40]!r} names no version")
        return version

    def versions(self) -> tuple[str, ...]:
        """All versions on disk, in the order in which they were first published."""
        if not self._versions.is_dir():
            return ()
        present = {path.name for path in self._versions.iterdir() if _VERSION.fullmatch(path.name)}
        published = dict.fromkeys(entry.version for entry in self.history() if entry.version in present)
        return (*published, *sorted(present - set(published)))

    def history(self) -> tuple[HistoryEntry, ...]:
        """Publications and rollbacks, oldest first.

        Raises:
            SnapshotError: the file is damaged.
        """
        entries = []
        for number, line in enumerate(self._history_bytes().splitlines(keepends=True), start=1):
            try:
                entries.append(_HISTORY_ADAPTER.validate_json(line, strict=True))
            except ValidationError as error:
                raise SnapshotError(self._history, f"line {number} is damaged") from error
        return tuple(entries)

    def publication(self) -> tuple[str, int]:
        """The version that is served, and the number of its line of history; 0 where it has none.

        A line is written before its version becomes current, so that a line beyond that number is no publication yet.

        Raises:
            UnknownCollection: nothing was ever published.
            SnapshotError: the store is damaged.
        """
        version = self.current_version()
        lines = [number for number, entry in enumerate(self.history(), start=1) if entry.version == version]
        return version, lines[-1] if lines else 0

    def manifest(self, version: str | None = None) -> Manifest:
        """The manifest of a version, the current one where None. Errors are those of `load`."""
        return read_manifest(self._folder_of(version or self.current_version()))

    def load(
        self, encoder_fingerprint: str | None, version: str | None = None, index: MakeIndex = FlatIndex
    ) -> Snapshot:
        """Load a version, the current one where None; `index` makes what is searched.

        Raises:
            UnknownCollection, UnknownVersion: there is none.
            FingerprintMismatch: another encoder made it than the one given.
            SnapshotError: it is damaged.
        """
        folder = self._folder_of(version or self.current_version())
        snapshot = load_snapshot(folder, encoder_fingerprint, index)
        if snapshot.collection != self.collection:
            raise SnapshotError(folder, f"is a snapshot of {snapshot.collection!r}, not of {self.collection!r}")
        return snapshot

    def verify(self, version: str | None = None) -> tuple[str, ...]:
        """Check every byte of a version, or of all versions, CURRENT and the history where None.

        Returns:
            One sentence for each problem; empty where all is sound.

        Raises:
            UnknownCollection, UnknownVersion: there is nothing to check.
        """
        if version is not None:
            return self._problems(self._folder_of(version))
        problems: list[str] = []
        try:
            versions = self.versions()
        except SnapshotError as error:
            problems.append(str(error))
            versions = tuple(sorted(p.name for p in self._versions.iterdir() if _VERSION.fullmatch(p.name)))
        try:
            current = self.current_version()
            if current not in versions:
                problems.append(f"{self._current}: names version {current}, which is not there")
        except SnapshotError as error:
            problems.append(str(error))
        for present in versions:
            problems += self._problems(self._versions / present)
        return tuple(problems)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the lock, with folders made and what a killed writer has left swept away."""
        make_folder(self._versions)
        with exclusive(self._folder / ".lock", wait=True):
            for abandoned in self._versions.glob(f".*{PARTIAL_SUFFIX}"):
                shutil.rmtree(abandoned)
            yield

    def _problems(self, folder: Path) -> tuple[str, ...]:
        try:
            manifest = read_manifest(folder)
            read_contents(folder, manifest)
        except SnapshotError as error:
            return (str(error),)
        if manifest.collection != self.collection:
            return (f"{folder}: is a snapshot of {manifest.collection!r}, not of {self.collection!r}",)
        return ()

    def _folder_of(self, version: str) -> Path:
        folder = self._versions / version
        if not _VERSION.fullmatch(version) or not folder.is_dir():
            raise UnknownVersion(self.collection, version, self.versions())
        return folder

    def _switch(self, action: Literal["publish", "rollback"], version: str) -> None:
        """Record what is about to happen, then make it happen. The lock is held."""
        previous = self.current_version() if self._current.exists() else None
        if version == previous:
            return
        self.history()  # a damaged history is reported, not carried on
        entry = HistoryEntry(datetime.now(UTC).isoformat(timespec="seconds"), action, version, previous)
        line = json.dumps(asdict(entry), sort_keys=True) + "\n"
        replace_file(self._history, self._history_bytes() + line.encode())
        replace_file(self._current, f"{version}\n".encode())

    def _history_bytes(self) -> bytes:
        try:
            return self._history.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise SnapshotError(self._history, f"cannot be read: {error.strerror}") from error


def collections(root: Path) -> dict[str, Kind]:
    """The published collections below `root`: name -> kind.

    Raises:
        SnapshotError: `root` cannot be listed.
    """
    found: dict[str, Kind] = {}
    try:
        names = sorted(path.name for path in root.iterdir() if (path / "CURRENT").is_file())
    except OSError as error:
        raise SnapshotError(root, f"cannot be listed: {error.strerror}") from error
    for name in names:
        try:
            found[name] = collection_kind(name)
        except InvalidName:  # a folder of something else: nothing below `root` but collections is ours to judge
            continue
    return found
