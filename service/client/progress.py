"""How far a run is: a live line where stderr is a terminal, else a line every few seconds."""

import sys
import time
from typing import Self

from rich.console import Console
from rich.status import Status

from service.client.bulk import Tally

_EVERY_S = 5.0


class Progress:
    """Shows a tally while it grows.

    Args:
        tally: of the run.
        shown: False where the records themselves go to the terminal.
    """

    def __init__(self, tally: Tally, *, shown: bool) -> None:
        self._tally = tally
        self._shown = shown
        self._began_s = self._told_s = time.monotonic()
        console = Console(stderr=True)
        self._status: Status | None = Status("", console=console) if shown and console.is_terminal else None

    def __enter__(self) -> Self:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def update(self) -> None:
        """To be called for every record."""
        now_s = time.monotonic()
        if self._status is not None:
            self._status.update(self._line(now_s))
        elif self._shown and now_s - self._told_s >= _EVERY_S:
            self._told_s = now_s
            print(self._line(now_s), file=sys.stderr)

    def end(self, summary: str) -> None:
        """Say what it came to."""
        if self._status is not None:
            self._status.stop()
        print(summary, file=sys.stderr)

    def _line(self, now_s: float) -> str:
        return f"{self._tally} ({self._tally.done / max(now_s - self._began_s, 1e-9):.1f} a second)"
