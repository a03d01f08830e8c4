"""FolderSource: every file below a folder, labelled by its sub-folder."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from indexer.contents import POOL_LABELS, Kind
from indexer.errors import InvalidLabel, SourceError
from indexer.sources.item import Skipped, SourceItem, as_text, read_regular_file, stamp_of
from perception.image import ImageLimits


class FolderSource:
    """Walks a folder in name order.

    The id is the path relative to the folder, with '/'. The label is the first sub-folder for the pools (`safe/`,
    `buffer/`, `unsafe/`), the whole sub-folder for a gallery. Every regular file is offered: what is no image ends up
    in the report. Links to files within the folder are followed; all others, and links to folders, are skipped.
    """

    def __init__(self, root: Path, kind: Kind, max_bytes: int = ImageLimits.max_bytes) -> None:
        """Open a folder.

        Args:
            root: the folder.
            kind: of the collection that is built.
            max_bytes: larger files are skipped unread.

        Raises:
            SourceError: not a folder, or not readable.
            InvalidLabel: for the pools, a sub-folder is none of the three. A misspelt pool must not silently be empty.
        """
        self._root, self._kind, self._max_bytes = root, kind, max_bytes
        self._real_root = os.path.realpath(root)
        try:
            with os.scandir(root) as entries:
                folders = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        except OSError as error:
            raise SourceError(root, f"cannot be listed: {error.strerror}") from error
        for name in folders:
            if kind == "pools" and name not in POOL_LABELS:
                raise InvalidLabel(name, POOL_LABELS, f"sub-folder of {root}")

    @property
    def identity(self) -> str:
        """See `Source.identity`."""
        return f"folder {as_text(self._real_root)}"

    def count(self) -> int:
        """See `Source.count`; walks the folder."""
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[SourceItem | Skipped]:
        """See `Source.__iter__`."""
        # A stack, not recursion: a hostile tree can be deeper than Python's stack.
        pending: list[os.DirEntry[str]] = []
        try:
            pending += _in_reverse(self._root)
        except OSError as error:
            raise SourceError(self._root, f"cannot be listed: {error.strerror}") from error
        while pending:
            entry = pending.pop()
            name = as_text(os.path.relpath(entry.path, self._root)).replace(os.sep, "/")
            try:
                if entry.is_dir(follow_symlinks=False):
                    pending += _in_reverse(Path(entry.path))
                    continue
                self._check_type(entry)
            except OSError as error:
                yield Skipped.because(name, name, error)
                continue
            folder, _, _ = name.rpartition("/")
            label = folder.partition("/")[0] if self._kind == "pools" else folder
            if self._kind == "pools" and not label:
                yield Skipped(name, name, InvalidLabel.__name__, "the file is in no pool's folder")
                continue
            path = Path(entry.path)
            read = partial(read_regular_file, path, self._max_bytes)
            yield SourceItem(name, label, name, {}, stamp_of(path), read)

    def _check_type(self, entry: os.DirEntry[str]) -> None:
        """Raise OSError for what is no regular file, nor a link to one within the folder."""
        if entry.is_symlink():
            target = os.path.realpath(entry.path, strict=True)
            if os.path.commonpath((target, self._real_root)) != self._real_root:
                raise OSError("symbolic link out of the folder")
            if entry.is_dir():
                raise OSError("symbolic link to a folder")
        if not entry.is_file():
            raise OSError("not a regular file")


def _in_reverse(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name, reverse=True)
