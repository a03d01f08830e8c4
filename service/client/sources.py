"""Which images a command line means: files, folders and lists, as a stream that nothing unreadable can stop."""

import csv
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import BufferedIOBase
from pathlib import Path

from service.client.errors import ImageUnreadable
from service.client.images import URL_SCHEMES, Url

_MAX_LINE_BYTES = 64 * 1024
_STDIN = "-"


@dataclass(frozen=True)
class Found:
    """One image, or what stands in the place of one.

    Attributes:
        path: as the user would write it; the URL of a URL. Undecodable bytes of names are surrogate escapes.
        source: None where there is an `error`.
        error: why it cannot be read.
    """

    path: str
    source: Path | Url | None
    error: ImageUnreadable | None = None


@dataclass
class Sources:
    """Files, folders and lists; iterate once.

    Folders are walked in sorted order, through their sub-folders, for files whose names end like an image's. Links to
    files are followed, links to folders are not: they can make loops. A folder or list that cannot be read becomes an
    error in its place.

    Attributes:
        paths: files, folders and URLs; files are taken whatever they are called.
        lists: files with a path or URL on each line, or a CSV (named so) with a column `path` or `url`; '-' is stdin.
        stdin: what '-' reads.
        linked_folders: those that were not followed, so far.
    """

    paths: Sequence[str]
    lists: Sequence[str]
    stdin: BufferedIOBase | None = None
    linked_folders: int = field(default=0, init=False)

    def __iter__(self) -> Iterator[Found]:
        for path in self.paths:
            yield from self._walk(path) if Path(path).is_dir() else _named(path)
        for list_path in self.lists:
            try:
                yield from self._listed(list_path)
            except (OSError, ValueError, csv.Error) as error:
                yield _unreadable(list_path, f"the list cannot be read to its end: {error}")

    def _walk(self, root: str) -> Iterator[Found]:
        from perception.image import IMAGE_EXTENSIONS

        folders = [root]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(folder) as entries:
                    ordered = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                yield _unreadable(folder, f"the folder cannot be read: {error.strerror}")
                continue
            below = []
            for entry in ordered:
                if entry.is_dir(follow_symlinks=False):
                    below.append(entry.path)
                elif _is_folder(entry):
                    self.linked_folders += 1
                elif entry.name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS:
                    yield Found(entry.path, Path(entry.path))
            folders.extend(reversed(below))

    def _listed(self, list_path: str) -> Iterator[Found]:
        with ExitStack() as stack:
            file = self.stdin if list_path == _STDIN else stack.enter_context(Path(list_path).open("rb"))
            if file is None:
                raise ValueError("there is no stdin")
            lines = _lines(file)
            if not list_path.lower().endswith(".csv"):
                for line in lines:
                    if line:
                        yield from _named(line)
                return
            rows = csv.DictReader(line + "\n" for line in lines)
            columns = [name for name in ("path", "url") if name in (rows.fieldnames or ())]
            if not columns:
                raise ValueError("a CSV needs a column path or url")
            for row in rows:
                if value := next((row[name] for name in columns if row[name]), None):
                    yield from _named(value)


def _named(path: str) -> Iterator[Found]:
    """What a user named: an only image, or an error in its place."""
    try:
        is_url = path.lower().startswith(URL_SCHEMES)
        yield Found(path, Url(path) if is_url else Path(path))
    except ValueError as error:
        yield _unreadable(path, str(error))


def _unreadable(path: str, reason: str) -> Found:
    return Found(path, None, ImageUnreadable(f"{path}: {reason}"))


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle: the client says so when it opens it
        return False


def _lines(file: BufferedIOBase) -> Iterator[str]:
    """Lines without their ends; bytes that are not UTF-8 become surrogate escapes, as in names from the system.

    Raises:
        ValueError: a line is longer than any path.
    """
    number = 0
    while line := file.readline(_MAX_LINE_BYTES):
        number += 1
        if len(line) == _MAX_LINE_BYTES:
            raise ValueError(f"line {number} has {_MAX_LINE_BYTES} bytes or more")
        text = line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape")
        yield text.rstrip("\r\n")
