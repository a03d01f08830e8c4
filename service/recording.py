"""The recorder: puts decisions into the log, the ring and the review queue, soon after they were answered.

Owns the queue between the answers and the database. An answer waits for no disk: a decision is written within a
twentieth of a second, together with the others of that time. Nothing that was observed is dropped: where the database
fails, decisions wait, and once too many do, the service has to refuse new requests (`full`), since what cannot be
recorded must not be decided. Knows nothing of HTTP.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, Protocol, Self, TypeVar

from sqlalchemy import Connection

from indexer.catalog.reviews import NewItem, open_items
from indexer.catalog.traffic import Decision, record_decisions
from indexer.errors import IndexerError
from perception.verdict import VerdictLabel
from service.errors import ServiceError
from service.flood import Flood, FloodGuard

T = TypeVar("T")
LIMIT = 10_000
GATHER_S = 0.05  # how long a decision waits for others to be written with
_GROUP = 500  # decisions in one transaction
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0  # between attempts while the database fails
REPORTER = "hardlook-serve"  # of review items that verdicts open
Outcome = Literal["recorded", "failed", "lost", "not-queued"]
_log = logging.getLogger("hardlook.recording")


class Writer(Protocol):
    """What writes for the whole process; see `service.editing.Editor`."""

    async def write(self, function: Callable[[Connection], T]) -> T:
        """Call a function in a transaction of its own; raises what it does, or what the commit does."""


@dataclass(frozen=True)
class Recording:
    """What is recorded.

    Attributes:
        log: whether decisions go into the log.
        keep: rows of the ring of recent traffic; 0 for none.
        reviews: undecided items that the review queue may have; 0 where verdicts open none.
    """

    log: bool = True
    keep: int = 10_000
    reviews: int = 10_000


async def _nobody_on_flood(flood: Flood) -> None:
    pass


async def _nobody_on_decisions(decisions: Sequence[Decision]) -> None:
    pass


def _nothing_else(connection: Connection, decisions: Sequence[Decision]) -> None:
    pass


class Recorder:
    """Records decisions in groups.

    Use it as an asynchronous context manager, inside that of the writer: at the end it writes what it has.

    Args:
        writer: to the catalogue.
        recording: what is recorded.
        guard: told of every decision that has an embedding; None where nobody watches.
        also: called in the transaction of each group, in the writer's thread, for what is to be there if and only if
            the decisions are; again where the transaction failed.
        on_flood: called for each flood, after the decisions that made it are durable.
        on_decisions: called with each group, after it is durable. What either raises is logged, and changes nothing.
        counted: called with an outcome and how many decisions had it: 'recorded'; 'failed' for each attempt that
            failed; 'lost' at the end, where the database still failed; 'not-queued' for verdicts that found the review
            queue full.
        limit: decisions that may wait before `full` is true.
        last_s: at the end, how long to go on writing before what is left is lost.
    """

    def __init__(
        self,
        writer: Writer,
        recording: Recording,
        guard: FloodGuard | None = None,
        *,
        also: Callable[[Connection, Sequence[Decision]], None] = _nothing_else,
        on_flood: Callable[[Flood], Awaitable[None]] = _nobody_on_flood,
        on_decisions: Callable[[Sequence[Decision]], Awaitable[None]] = _nobody_on_decisions,
        counted: Callable[[Outcome, int], None] = lambda outcome, n: None,
        limit: int = LIMIT,
        last_s: float = 10.0,
    ) -> None:
        self._writer, self._recording, self._guard = writer, recording, guard
        self._also = also
        self._on_flood, self._on_decisions, self._counted = on_flood, on_decisions, counted
        self._limit, self._last_s = limit, last_s
        self._waiting: deque[Decision] = deque()
        self._observed = self._done = 0
        self._came, self._hurry, self._went = asyncio.Event(), asyncio.Event(), asyncio.Condition()
        self._ending = False
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._ending = True
        self._came.set()
        self._hurry.set()
        try:
            await asyncio.wait_for(self._task, self._last_s)
        except TimeoutError:
            _log.error("%d decisions are lost: the catalogue could not be written until the end", self.depth)
            self._counted("lost", self.depth)

    @property
    def depth(self) -> int:
        """Decisions that wait to be durable."""
        return self._observed - self._done

    @property
    def full(self) -> bool:
        """Whether new requests must be refused; those in progress are still recorded, so the bound is theirs too."""
        return self.depth >= self._limit

    def observe(self, decision: Decision) -> None:
        """Take a decision to be recorded. Call it from the event loop, before the answer is sent."""
        self._waiting.append(decision)
        self._observed += 1
        self._came.set()
        if len(self._waiting) >= _GROUP:
            self._hurry.set()

    async def settled(self, within_s: float) -> bool:
        """Wait until what has been observed by now is durable; whether it is."""
        target = self._observed
        self._hurry.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s), self._went:
                await self._went.wait_for(lambda: self._done >= target)
        return self._done >= target

    async def _run(self) -> None:
        while True:
            await self._came.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(GATHER_S):
                    await self._hurry.wait()
            while self._waiting:
                group = [self._waiting.popleft() for _ in range(min(len(self._waiting), _GROUP))]
                await self._until_written(group)
                await self._tell(group)
            if self._ending:
                return
            self._came.clear()
            self._hurry.clear()

    async def _until_written(self, group: Sequence[Decision]) -> None:
        """Try again and again; only being cancelled ends it otherwise."""
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                unqueued = await self._writer.write(lambda connection: self._write(connection, group))
                break
            except Exception as error:
                self._counted("failed", len(group))
                if pause_s == _FIRST_PAUSE_S:  # once for each failure, not once for each attempt
                    bug = None if isinstance(error, IndexerError | ServiceError) else error
                    _log.error("decisions cannot be recorded, %d wait: %s", self.depth, error, exc_info=bug)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        if pause_s != _FIRST_PAUSE_S:
            _log.info("decisions are recorded again")
        self._counted("recorded", len(group))
        if unqueued:
            self._counted("not-queued", unqueued)
        self._done += len(group)
        async with self._went:
            self._went.notify_all()

    def _write(self, connection: Connection, group: Sequence[Decision]) -> int:
        """Log, ring and review queue in one transaction; how many verdicts found no room in the queue."""
        record_decisions(connection, group, log=self._recording.log, keep=self._recording.keep)
        self._also(connection, group)
        if not self._recording.reviews:
            return 0
        items = [item for decision in group if (item := _item(decision)) is not None]
        return open_items(connection, items, limit=self._recording.reviews).count(None) if items else 0

    async def _tell(self, group: Sequence[Decision]) -> None:
        """Call the listeners; one that fails must not stop the recording."""
        try:
            await self._on_decisions(group)
        except Exception:
            _log.exception("a listener failed")
        if self._guard is None:
            return
        for flood in await asyncio.to_thread(self._floods, group):
            try:
                await self._on_flood(flood)
            except Exception:
                _log.exception("a listener failed")

    def _floods(self, group: Sequence[Decision]) -> list[Flood]:
        """What the guard notices; in a thread, since it may look something up."""
        assert self._guard is not None
        found: list[Flood] = []
        for decision in group:
            if decision.embedding is None:
                continue
            deciding = decision.deciding
            try:
                flood = self._guard.observe("" if deciding is None else deciding.id, decision.embedding)
            except Exception:
                _log.exception("the flood guard failed")
                continue
            if flood is not None:
                found.append(flood)
        return found


def _item(decision: Decision) -> NewItem | None:
    """The review item that a verdict opens."""
    if decision.verdict is not VerdictLabel.REVIEW or decision.embedding is None:
        return None
    return NewItem(
        origin="verdict",
        collection=decision.collection,
        image_sha256=decision.sha256,
        embedding=decision.embedding,
        verdict=decision.verdict,
        evidence=decision.evidence,
        request_id=decision.request_id,
        reporter=REPORTER,
    )
