"""Editor: the one thread of the process that writes to the catalogue, and shows what was written.

Owns the order commit -> show -> acknowledge: whoever is told that a change is made finds it in the next answer. What
arrives while one transaction is committed goes into the next together. Knows nothing of HTTP.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, TypeVar

from sqlalchemy import Connection

from indexer.catalog.ledger import PUBLISHER, Also, Catalog, EditRequest, Outcome
from indexer.catalog.situation import Edit
from indexer.catalog.state import State
from indexer.errors import CatalogError, IndexerError
from perception.errors import PerceptionError
from service.errors import NotReady, Overloaded

T = TypeVar("T")
MAX_WAITING = 5000
_AT_A_TIME = 500  # groups of edits in one transaction
_log = logging.getLogger("hardlook.editing")


class Shown(Protocol):
    """What answers requests, and is kept up to date with the catalogue."""

    def show(self) -> object:
        """Let searches see the present states."""

    def shows(self, state: State) -> bool:
        """Whether searches see a state, or a later one."""


@dataclass(eq=False)
class _Task:
    """Work for the writer: a group of edits, or a function that writes."""

    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[Any]"
    group: Sequence[EditRequest] = ()
    function: Callable[[Connection], Any] | None = None


@dataclass
class Editor:
    """Writes to the catalogue, one transaction after the other.

    Use it as an asynchronous context manager: at the end it finishes what was accepted.

    Attributes:
        catalog: whose database it writes to.
        shown: told after every change, its own and those of other processes.
        poll_s: how often to look for those.
    """

    catalog: Catalog
    shown: Shown
    poll_s: float
    _waiting: deque[_Task] = field(default_factory=deque)
    _change: threading.Condition = field(default_factory=threading.Condition)
    _open: bool = False
    _last_failure: str = ""
    _thread: threading.Thread | None = None

    async def __aenter__(self) -> Self:
        self._open = True
        self._thread = threading.Thread(target=self._run, name="editor", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        with self._change:
            self._open = False
            self._change.notify_all()
        assert self._thread is not None
        await asyncio.to_thread(self._thread.join)

    @property
    def depth(self) -> int:
        """How much waits to be written."""
        return len(self._waiting)

    async def apply(
        self, edits: Sequence[Edit], *, actor: str, reason: str = "", request_id: str = "", also: Also | None = None
    ) -> list[Outcome]:
        """Make edits, all or none; on return they are durable and searches see them.

        Args:
            edits: at least one; each sees what those before it did.
            actor: who makes them.
            reason: why.
            request_id: of the request that asked for it.
            also: written in the same transaction, after the last; see `EditRequest`.

        Raises:
            EditError, ContentsError, InvalidLabel, UnknownExemplar, FingerprintMismatch: the first that is refused.
            IndexerError: from `also`.
            CatalogError: it cannot be written.
            Overloaded, NotReady: too much waits; the service is shutting down.
        """
        last = len(edits) - 1
        group = [
            EditRequest(edit, actor, reason, request_id, also if position == last else None)
            for position, edit in enumerate(edits)
        ]
        outcomes: list[Outcome] = await self._submit(group=group)
        return outcomes

    async def write(self, function: Callable[[Connection], T]) -> T:
        """Call a function in a transaction of its own, in the writer's thread; raises what it does, or as `apply`."""
        written: T = await self._submit(function=function)
        return written

    async def read(self, function: Callable[[Connection], T]) -> T:
        """Call a function in a transaction that only reads, in another thread.

        Raises:
            CatalogError: the database cannot be read.
        """

        def read() -> T:
            with self.catalog.database.reading() as connection:
                return function(connection)

        return await asyncio.to_thread(read)

    async def _submit(self, **work: Any) -> Any:
        loop = asyncio.get_running_loop()
        task = _Task(loop, loop.create_future(), **work)
        with self._change:
            if not self._open:
                raise NotReady("the service is shutting down or has not started")
            if len(self._waiting) >= MAX_WAITING:
                raise Overloaded("changes", MAX_WAITING)
            self._waiting.append(task)
            self._change.notify_all()
        # Who hangs up does not take back what may be written already.
        return await asyncio.shield(task.future)

    def _run(self) -> None:
        next_look_s = time.monotonic() + self.poll_s
        while True:
            with self._change:
                while not self._waiting and self._open and time.monotonic() < next_look_s:
                    self._change.wait(max(0.0, next_look_s - time.monotonic()))
                tasks = [self._waiting.popleft() for _ in range(min(len(self._waiting), _AT_A_TIME))]
                if not tasks and not self._open:
                    return
            try:
                if tasks:
                    self._work(tasks)
                if time.monotonic() >= next_look_s:
                    next_look_s = time.monotonic() + self.poll_s
                    self._look()
            except Exception:
                _log.exception("a bug")

    def _work(self, tasks: Sequence[_Task]) -> None:
        """Edits in one transaction, then each function in its own."""
        groups = [task for task in tasks if task.function is None]
        if groups:
            for task, outcome in zip(groups, self._made([task.group for task in groups]), strict=True):
                _resolve(task, outcome)
        for task in tasks:
            if task.function is not None:
                _resolve(task, self._written(task.function))

    def _made(self, groups: Sequence[Sequence[EditRequest]]) -> Sequence[Any]:
        """Commit, then show: for each group its outcomes, or why it is not made or not seen."""
        try:
            made = self.catalog.apply(groups)
        except Exception as error:
            if not isinstance(error, CatalogError):
                _log.exception("a bug")
            return [error] * len(groups)
        try:
            self.shown.show()
        except Exception as error:
            _log.exception("what is written cannot be shown")
            return [outcome if self._is_shown(outcome) else error for outcome in made]
        return made

    def _is_shown(self, made: list[Outcome] | Exception) -> bool:
        if isinstance(made, Exception):
            return True  # nothing was written: the refusal stands
        return all(not outcome.state.collection or self.shown.shows(outcome.state) for outcome in made)

    def _written(self, function: Callable[[Connection], Any]) -> Any:
        try:
            with self.catalog.database.writing() as connection:
                return function(connection)
        except Exception as error:
            return error

    def _look(self) -> None:
        """Take over what other processes wrote, and what time has changed."""
        try:
            self.catalog.follow()
            self.shown.show()
            self._last_failure = ""
        except (IndexerError, PerceptionError) as error:
            if str(error) != self._last_failure:  # once for each failure, not once for each look
                _log.error("changes of other processes are not taken over: %s", error)
            self._last_failure = str(error)


def adopt_with(editor: Editor) -> Callable[[Sequence[Edit]], Awaitable[object]]:
    """What puts offline publications into the catalogue, for `Published.watch`."""

    async def adopt(publications: Sequence[Edit]) -> None:
        for edit in publications:
            await editor.apply([edit], actor=PUBLISHER, reason="published offline")

    return adopt


def _resolve(task: _Task, outcome: Any) -> None:
    def hand_over() -> None:
        if task.future.done():
            return
        if isinstance(outcome, Exception):
            task.future.set_exception(outcome)
        else:
            task.future.set_result(outcome)

    with suppress(RuntimeError):  # the loop has ended, and with it everybody who waited
        task.loop.call_soon_threadsafe(hand_over)
