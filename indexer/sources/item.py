"""What sources yield, and how they read a file of which nothing is known."""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from perception.errors import ImageTooLarge


@dataclass(frozen=True)
class SourceItem:
    """One image file that can be asked for its bytes.

    Attributes:
        id: unique within the source.
        label: pool, class or the empty string.
        source: where it came from, for a person.
        metadata: what else the source says of it.
        stamp: size and time of the file; another one means that the file was changed. Empty where it has none.
        read: returns the bytes; raises whatever a hostile file system or file makes it raise.
    """

    id: str
    label: str
    source: str
    metadata: Mapping[str, str]
    stamp: str
    read: Callable[[], bytes]

    @property
    def key(self) -> str:
        """Hash of all that would make it another entry."""
        return _hash(self.id, self.label, self.source, dict(self.metadata), self.stamp)


@dataclass(frozen=True)
class Skipped:
    """One entry of a source that cannot be used.

    Attributes:
        id: that it would have had.
        source: where it came from, for a person.
        error: type of the failure.
        message: the failure, for a person.
    """

    id: str
    source: str
    error: str
    message: str

    @property
    def key(self) -> str:
        """Hash of all that would make it another entry."""
        return _hash(self.id, self.source, self.error)

    @classmethod
    def because(cls, id: str, source: str, error: Exception) -> "Skipped":
        """Skip for an exception."""
        return cls(id, source, type(error).__name__, str(error))


class Source(Protocol):
    """A stream of images, the same each time that it is iterated."""

    @property
    def identity(self) -> str:
        """Tells sources apart, so that an interrupted build is not resumed from another one."""

    def count(self) -> int | None:
        """How many entries it will yield; None where only reading it would tell."""

    def __iter__(self) -> Iterator[SourceItem | Skipped]:
        """The entries; `read` of one is called at most once, and may be after later entries were taken."""


def _hash(*fields: str | dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]


def stamp_of(path: Path) -> str:
    """Size and modification time of a file; empty where it cannot be looked at, which reading will report."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"


def as_text(name: str) -> str:
    """A file name as text that can be written anywhere: bytes that are not UTF-8 become backslash escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def read_regular_file(path: Path, max_bytes: int) -> bytes:
    """Read a file that may be anything: a pipe or device does not block, a huge file is not read.

    Raises:
        ImageTooLarge: more than `max_bytes`.
        OSError: cannot be read, or is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"not a regular file: {path.name!r}")
        if status.st_size > max_bytes:
            raise ImageTooLarge("bytes", max_bytes, status.st_size)
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:  # it grew, or belongs to a file system that reports no sizes
        raise ImageTooLarge("bytes", max_bytes, len(data))
    return data
