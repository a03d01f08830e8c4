"""Files of JSON lines that grow by whole lines, and lose at most what was being appended when a job is killed."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from offline.errors import OfflineError, RunError

T = TypeVar("T")


class JsonLines:
    """One file; readers see finished lines alone."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, parse: Callable[[Any], T]) -> list[T]:
        """All lines, oldest first; an unfinished last line is what a kill leaves, and is passed over.

        Args:
            parse: from a line's JSON value; raises ValueError, TypeError, KeyError or OfflineError for a wrong one.

        Raises:
            RunError: a line is damaged.
        """
        values = []
        for number, line in enumerate(self._finished().splitlines(), 1):
            try:
                values.append(parse(json.loads(line)))
            except (ValueError, TypeError, KeyError, OfflineError) as error:
                raise RunError(f"{self.path}, line {number}: not a record: {error}") from error
        return values

    def append(self, values: Iterable[Any], *, allow_nan: bool = False) -> None:
        """Add JSON values, to the disk; an unfinished last line gives way.

        Args:
            allow_nan: write numbers that are not finite as Python does; JSON has no word for them.

        Raises:
            ValueError: a number is not finite.
        """
        lines = "".join(json.dumps(value, allow_nan=allow_nan) + "\n" for value in values)
        finished = len(self._finished())
        with self.path.open("ab") as file:
            file.truncate(finished)
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())

    def _finished(self) -> bytes:
        content = self.path.read_bytes() if self.path.exists() else b""
        return content[: content.rfind(b"\n") + 1]
