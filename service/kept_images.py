"""KeptImages: a folder of small pictures, each named after the SHA-256 of the image file that it was made from.

    <folder>/
        recent/ab/ab12....jpg       of verdicts and of the review queue; the oldest go, by age and by bytes
        exemplars/ab/ab12....jpg    of exemplars, which stay until they are forgotten

Owns names, modes and what goes when. Folders are 0700, files 0600, and a picture is there whole or not at all. It is
not synced to the disk: a picture is no acknowledged fact, and one that a power cut takes is merely not there. Never
holds a byte that a caller sent; see `service.decode_worker`. Blocks on the disk: `service.image_keeping` calls it from
threads of its own. Knows nothing of reviews or collections.
"""

import errno
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["recent", "exemplars"]
KINDS: tuple[Kind, ...] = ("recent", "exemplars")
MOST_BYTES = 4 * 1024 * 1024  # of one picture that is read; none that is made comes near it
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = ".tmp"
_ABANDONED_S = 3600.0  # after that a temporary file is one of a process that was killed
_SPARE = 0.1  # of the bytes that there may be: made free together, so that not every picture has to look for room
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}


@dataclass(frozen=True)
class _File:
    """A picture that was found: path, time of its last change in seconds since the epoch, and bytes."""

    path: Path
    changed_s: float
    size_bytes: int


class KeptImages:
    """The pictures in a folder; any thread may use it, and several processes may share the folder.

    Args:
        folder: need not be there.
        kept_s: how long after it was kept last a picture of `recent` is there.
        max_bytes: of the pictures of `recent` together.
        clock: seconds since the epoch.
    """

    def __init__(self, folder: Path, *, kept_s: float, max_bytes: int, clock: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self._kept_s, self._max_bytes, self.clock = kept_s, max_bytes, clock
        self._writing = threading.Lock()
        # Of `recent`, as far as this process knows; None until it has looked.
        self._recent_bytes: int | None = None

    def prepare(self) -> None:
        """Make the folders, for this user alone.

        Raises:
            OSError: they cannot be made.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for kind in KINDS:
            (self.folder / kind).mkdir(mode=0o700, exist_ok=True)
            (self.folder / kind).chmod(0o700)

    def keep(self, sha256: str, jpeg: bytes, *, exemplar: bool) -> bool:
        """Keep a picture, in place of one that may be there; whether it is kept.

        Args:
            sha256: of the image file, 64 lower-case hex digits.
            jpeg: the picture.
            exemplar: whether it stays until it is forgotten; one that does is not taken back into `recent`.

        Returns:
            False where it has more bytes than there may be of `recent`.

        Raises:
            ValueError: not such a hash.
            OSError: it cannot be written.
        """
        recent, kept = self._path("recent", sha256), self._path("exemplars", sha256)
        with self._writing:
            if exemplar or kept.exists():
                self._write(kept, jpeg)
                self._drop(recent)
                return True
            if not self._make_room(len(jpeg)):
                return False
            with suppress(FileNotFoundError):
                self._account(-recent.stat().st_size)  # of the one that gives way
            self._write(recent, jpeg)
            self._account(len(jpeg))
            return True

    def read(self, sha256: str) -> bytes | None:
        """A picture; None where none is kept, or its time is over.

        Raises:
            ValueError: not a hash as of `keep`; the disk has not been touched.
            OSError: it is there and cannot be read.
        """
        _require_sha256(sha256)
        # It may be promoted or taken back between the looks.
        for kind in ("recent", "exemplars", "recent"):
            found = self._read(kind, sha256)
            if found is not None:
                return found
        return None

    def kept(self, sha256s: Iterable[str]) -> frozenset[str]:
        """Of which files there are pictures; of what is no hash, and of what cannot be looked at, there is none."""
        return frozenset(name for name in set(sha256s) if _SHA256.fullmatch(name) and self._is_there(name))

    def touch(self, sha256: str) -> bool:
        """Let the time of a picture begin anew; whether there is one. Errors are those of `keep`."""
        recent, kept = self._path("recent", sha256), self._path("exemplars", sha256)
        with self._writing:
            if kept.exists():
                return True
            if self._is_there(sha256):  # not where its time is over already
                with suppress(FileNotFoundError):
                    self._date(recent)
                    return True
            return False

    def promote(self, sha256: str) -> bool:
        """Let a picture stay, since it is one of an exemplar now; whether there is one. Errors are those of `keep`."""
        recent, kept = self._path("recent", sha256), self._path("exemplars", sha256)
        with self._writing:
            if self._is_there(sha256) and not kept.exists():
                self._make_folders(kept)
                with suppress(FileNotFoundError):
                    self._account(-recent.stat().st_size)
                    recent.rename(kept)
                    self._date(kept)
            else:
                self._drop(recent)
            return kept.exists()

    def take_back(self, sha256: str) -> None:
        """Let the picture of what is no exemplar any more go as all others do. Errors are those of `keep`."""
        recent, kept = self._path("recent", sha256), self._path("exemplars", sha256)
        with self._writing, suppress(FileNotFoundError):
            self._make_folders(recent)
            kept.rename(recent)
            self._date(recent)
            self._account(recent.stat().st_size)

    def forget(self, sha256: str, *, exemplar: bool = True) -> bool:
        """Remove a picture; whether there was one. Errors are those of `keep`.

        Args:
            sha256: as of `keep`.
            exemplar: also where it is kept as one of an exemplar.
        """
        recent, kept = self._path("recent", sha256), self._path("exemplars", sha256)
        with self._writing:
            there = self._drop(recent)
            if exemplar:
                with suppress(FileNotFoundError):
                    kept.unlink()
                    there = True
            return there

    def prune(self, now: float) -> int:
        """Remove what is too old, then the oldest of what is too much; pictures of exemplars stay.

        Args:
            now: seconds since the epoch.

        Returns:
            How many went.

        Raises:
            OSError: the folder cannot be read, or a picture not removed.
        """
        with self._writing:
            self._remove_abandoned(now)
            return self._prune(now, self._max_bytes)

    def exemplars(self, before_s: float) -> list[str]:
        """The hashes of what is kept as exemplars, and has been since before a time in seconds since the epoch.

        Raises:
            OSError: the folder cannot be read.
        """
        return [file.path.stem for file in self._files("exemplars") if file.changed_s < before_s]

    def _path(self, kind: Kind, sha256: str) -> Path:
        _require_sha256(sha256)
        return self.folder / kind / sha256[:2] / f"{sha256}.jpg"

    def _read(self, kind: Kind, sha256: str) -> bytes | None:
        try:
            handle = os.open(self._path(kind, sha256), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            raise
        with os.fdopen(handle, "rb") as file:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode) or found.st_size > MOST_BYTES or self._is_over(kind, found.st_mtime):
                return None
            return file.read(MOST_BYTES)

    def _is_there(self, sha256: str) -> bool:
        for kind in KINDS:
            with suppress(OSError):
                if not self._is_over(kind, self._path(kind, sha256).stat().st_mtime):
                    return True
        return False

    def _is_over(self, kind: str, changed_s: float) -> bool:
        """Whether a picture is past its time: it is not shown any more, even where it is not removed yet."""
        return kind == "recent" and changed_s <= self.clock() - self._kept_s

    def _make_folders(self, path: Path) -> None:
        for folder in (self.folder, path.parent.parent, path.parent):
            folder.mkdir(mode=0o700, exist_ok=True)

    def _write(self, path: Path, data: bytes) -> None:
        self._make_folders(path)
        part = path.with_name(f".{path.stem}.{secrets.token_hex(8)}{_TEMPORARY}")
        try:
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(data)
            self._date(part)
            part.rename(path)
        finally:
            part.unlink(missing_ok=True)

    def _date(self, path: Path) -> None:
        now_s = self.clock()
        os.utime(path, (now_s, now_s))

    def _drop(self, recent: Path) -> bool:
        """Remove a picture of `recent`; whether there was one."""
        with suppress(FileNotFoundError):
            size_bytes = recent.stat().st_size
            recent.unlink()
            self._account(-size_bytes)
            return True
        return False

    def _account(self, more_bytes: int) -> None:
        if self._recent_bytes is not None:
            self._recent_bytes = max(0, self._recent_bytes + more_bytes)

    def _make_room(self, size_bytes: int) -> bool:
        """Room for one more picture of `recent`; False where there can be none."""
        if size_bytes > self._max_bytes:
            return False
        if self._recent_bytes is None:
            self._recent_bytes = sum(file.size_bytes for file in self._files("recent"))
        if self._recent_bytes + size_bytes > self._max_bytes:
            self._prune(self.clock(), max(0, int((1 - _SPARE) * self._max_bytes) - size_bytes))
        return True

    def _prune(self, now: float, most_bytes: int) -> int:
        files = sorted(self._files("recent"), key=lambda file: file.changed_s)
        left_bytes = sum(file.size_bytes for file in files)
        removed = 0
        for file in files:
            if file.changed_s > now - self._kept_s and left_bytes <= most_bytes:
                break
            file.path.unlink(missing_ok=True)
            left_bytes -= file.size_bytes
            removed += 1
        self._recent_bytes = left_bytes
        return removed

    def _remove_abandoned(self, now: float) -> None:
        """What processes left behind that were killed while they wrote."""
        for kind in KINDS:
            for entry in self._entries(kind):
                if entry.name.startswith(".") and entry.name.endswith(_TEMPORARY):
                    with suppress(FileNotFoundError):
                        if entry.stat(follow_symlinks=False).st_mtime < now - _ABANDONED_S:
                            Path(entry.path).unlink()

    def _files(self, kind: Kind) -> Iterator[_File]:
        """The pictures of a kind, in no order; whatever else lies there is not looked at."""
        for entry in self._entries(kind):
            if entry.name.endswith(".jpg") and _SHA256.fullmatch(entry.name.removesuffix(".jpg")):
                with suppress(FileNotFoundError):
                    found = entry.stat(follow_symlinks=False)
                    yield _File(Path(entry.path), found.st_mtime, found.st_size)

    def _entries(self, kind: Kind) -> Iterator[os.DirEntry[str]]:
        try:
            buckets = sorted(path for path in (self.folder / kind).iterdir() if path.is_dir())
        except FileNotFoundError:
            return
        for bucket in buckets:
            with os.scandir(bucket) as entries:
                yield from entries


def _require_sha256(text: str) -> None:
    if _SHA256.fullmatch(text) is None:
        raise ValueError("a picture is named by the SHA-256 of its file, 64 lower-case hex digits")
