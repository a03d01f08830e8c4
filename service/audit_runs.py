"""Audit runs: what the folder that HARDLOOK_AUDITS names holds, newest first, with what is wrong with each.

Owns which sub-folders count, and when they are read again. A run that is damaged, or being written, is listed as that
and hides no other. What is deployed now is the matter of `service.audit_fit`.
"""

import os
import re
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from service.audit_files import FILES, PAGE, RunDamaged, opened_folder, read_bytes
from service.audit_reading import AuditRun, Signature, read_run
from service.errors import AuditUnusable, UnknownItem

MAX_RUNS = 500
"""Sub-folders that are looked at; of more, those that were changed last."""
MAX_ENTRIES = 10_000
"""Entries of the folder that are looked at at all."""
# What can stand in a URL and in a command without more ado, and is no step through the file system.
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Listing:
    """What the folder holds.

    Attributes:
        runs: newest first.
        skipped: what in the folder is no run that can be named, and why.
        left_out: sub-folders that were not looked at, for there are more than `MAX_RUNS`.
    """

    runs: tuple[AuditRun, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    left_out: int = 0


@dataclass
class AuditRuns:
    """Reads the folder; threads may share it. Every method reads files, and is not for the event loop.

    Attributes:
        folder: with the run directories; None where there is none.
    """

    folder: Path | None
    _known: dict[str, tuple[Signature, AuditRun]] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def listed(self) -> Listing:
        """All runs; those whose files have not changed are not read again."""
        if self.folder is None:
            return Listing()
        ids, skipped, left_out = self._ids(self.folder)
        with self._lock:
            runs = [run for id in ids if (run := self._run(id)) is not None]
            self._known = {id: known for id, known in self._known.items() if id in set(ids)}
        runs.sort(key=lambda run: (run.date, run.id), reverse=True)
        return Listing(tuple(runs), tuple(skipped), left_out)

    def get(self, id: str) -> AuditRun:
        """One run.

        Raises:
            UnknownItem: there is none of that name.
        """
        if self.folder is not None and _ID.fullmatch(id):
            with self._lock:
                run = self._run(id)
            if run is not None:
                return run
        raise UnknownItem("audit", id)

    def page(self, id: str) -> bytes:
        """The report of a run, an HTML page that needs nothing else.

        Raises:
            UnknownItem: there is no such run.
            AuditUnusable: it has no report that can be read.
        """
        run = self.get(id)
        try:
            with opened_folder(self.path_of(run)) as folder:
                return read_bytes(folder, PAGE)
        except (RunDamaged, OSError) as error:
            raise AuditUnusable(id, _said(error)) from error

    def path_of(self, run: AuditRun) -> Path:
        """The folder of a run."""
        assert self.folder is not None  # else there is no run
        return self.folder / run.id

    def _ids(self, root: Path) -> tuple[list[str], list[tuple[str, str]], int]:
        """Names of the sub-folders, what is none, and how many are left out."""
        found: list[tuple[int, str]] = []
        skipped: list[tuple[str, str]] = []
        try:
            with os.scandir(root) as entries:
                for count, entry in enumerate(entries):
                    if count >= MAX_ENTRIES:
                        skipped.append(("...", f"the folder has more than {MAX_ENTRIES} entries, which is the limit"))
                        break
                    reason = _no_run(entry)
                    if reason is None:
                        found.append((entry.stat(follow_symlinks=False).st_mtime_ns, entry.name))
                    elif reason:
                        skipped.append((_shown(entry.name), reason))
        except OSError as error:
            skipped.append((root.name, f"the folder cannot be read: {error.strerror}"))
        found.sort(reverse=True)
        return [name for _, name in found[:MAX_RUNS]], sorted(skipped), max(0, len(found) - MAX_RUNS)

    def _run(self, id: str) -> AuditRun | None:
        """Read a run, unless it is known as it is; None where it is gone."""
        assert self.folder is not None
        try:
            with opened_folder(self.folder / id) as folder:
                signature = _signature(folder)
                known = self._known.get(id)
                if known is None or known[0] != signature:
                    known = self._known[id] = (signature, read_run(id, folder, signature))
                return known[1]
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            problem = f"the folder cannot be opened: {error.strerror}"
            return AuditRun(id, "damaged", (problem,), datetime.fromtimestamp(0, UTC), "file")


def _no_run(entry: "os.DirEntry[str]") -> str | None:
    """Why an entry of the folder is no run directory, empty where nobody would think so; None where it may be one."""
    if entry.is_symlink():
        return "is a link; links are not followed"
    if not entry.is_dir(follow_symlinks=False) or entry.name.startswith("."):
        return ""
    return None if _ID.fullmatch(entry.name) else "has a name of other characters than A-Z a-z 0-9 . _ -"


def _shown(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "?", name)[:128]


def _said(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"the folder cannot be opened: {error.strerror}"
    return str(error)


def _signature(folder: int) -> Signature:
    """What changes where a file does; of the folder itself too."""
    found = []
    for name in FILES:
        try:
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        except OSError:
            continue
        found.append((name, status.st_mtime_ns, status.st_size, status.st_ino))
    own = os.fstat(folder)
    return (*found, (".", own.st_mtime_ns, 0, own.st_ino))
