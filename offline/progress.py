"""How far long jobs are: bars on a terminal, a line now and then in a log file. Knows nothing of the jobs."""

import time
from collections.abc import Callable
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 30.0


class ProgressDisplay:
    """Shows one or several tasks that advance one after the other; a context manager."""

    def __init__(
        self, *, quiet: bool = False, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Choose by what the console is.

        Args:
            quiet: show nothing, as the second and later processes of a distributed job should.
            clock: seconds.
        """
        self._quiet, self._clock = quiet, clock
        self._console = console or Console()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bars = Progress(*columns, console=self._console, disable=quiet or not self._console.is_terminal)
        self._tasks: dict[str, TaskID] = {}
        self._first: dict[str, tuple[float, int]] = {}
        self._last_line_s = -LINE_EVERY_S

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def update(self, task: str, done: int, total: int, text: str) -> None:
        """Say that `done` of a task's `total` parts are done, with a line of text on how it goes."""
        if self._console.is_terminal:
            if task not in self._tasks:
                self._tasks[task] = self._bars.add_task(text, total=total)
            self._bars.update(self._tasks[task], completed=done, description=text)
            return
        now = self._clock()
        began, at = self._first.setdefault(task, (now, done))
        if self._quiet or (now - self._last_line_s < LINE_EVERY_S and done < total):
            return
        self._last_line_s = now
        # Until two updates have been seen there is no pace.
        left = f", about {(now - began) / (done - at) * (total - done) / 60:.1f} min left" if done > at else ""
        self._console.print(f"{text}: {done} of {total}{left}", markup=False, highlight=False, soft_wrap=True)
