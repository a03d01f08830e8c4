"""Batcher: many concurrent callers, one or several worker threads, batches as large as the moment offers.

Owns the bound of the queue, deadlines, cancellation, the isolation of a bad item and of a replica that has failed.
Knows nothing of images.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

from service.errors import DeadlineExceeded, NotReady, Overloaded

In = TypeVar("In")
Out = TypeVar("Out")
T = TypeVar("T")
_log = logging.getLogger("hardlook.batching")


@dataclass(frozen=True)
class Replica(Generic[In, Out]):
    """One copy of the function that batches are run by, with a thread of its own.

    Attributes:
        run: b inputs -> b outputs, in order.
        check: run after an item has failed alone; a replica whose check raises is given no more work. What breaks a
            GPU for good breaks the check too, what is the fault of an item does not.
        prepare: run once in the replica's thread, before anything else.
    """

    run: Callable[[Sequence[In]], Sequence[Out]]
    check: Callable[[], object] | None = None
    prepare: Callable[[], object] | None = None


@dataclass(frozen=True, eq=False)
class _Entry(Generic[In, Out]):
    item: In
    future: "asyncio.Future[Out]"
    arrived_s: float


@dataclass(frozen=True)
class Observer:
    """Told what happens; called in the threads of the replicas, and must not raise. By default nobody listens.

    Attributes:
        batch: items and seconds of a batch that was run.
        waited: seconds that an item was in the queue.
    """

    batch: Callable[[int, float], object] = lambda size, seconds: None
    waited: Callable[[float], object] = lambda seconds: None


class Batcher(Generic[In, Out]):
    """Runs a function over batches of what concurrent callers submit.

    While the batches of all replicas run, the next one gathers; an idle replica takes an item at once, and several
    idle ones share what waits. A replica's function is called in one thread of its own, never twice at a time. Where
    a batch fails, its items run again one by one, so that a bad item fails alone. Items whose caller has gone are
    dropped when a batch is formed.

    Args:
        replicas: at least one.
        max_batch: the most items in a batch.
        max_queue: the most items that wait; what comes on top is refused.
        expected: errors that say something of an item and nothing of its replica.
        name: of the queue, for errors and the threads.
        observer: of batches and waiting times.
    """

    def __init__(
        self,
        replicas: Sequence[Replica[In, Out]],
        *,
        max_batch: int,
        max_queue: int,
        expected: tuple[type[Exception], ...] = (),
        name: str = "batcher",
        observer: Observer | None = None,
    ) -> None:
        if not replicas:
            raise ValueError("need at least one replica")
        if not 1 <= max_batch <= max_queue:
            raise ValueError(f"need 1 <= max_batch <= max_queue, got {max_batch} and {max_queue}")
        self._max_batch, self._max_queue, self._expected, self._name = max_batch, max_queue, expected, name
        self._observer = observer or Observer()
        self._threads = [_Thread(replica, f"{name} {number}", self) for number, replica in enumerate(replicas)]
        self._waiting: deque[_Entry[In, Out]] = deque()
        self._change = threading.Condition()  # guards what waits, who is idle, and the end
        self._idle = 0
        self._open = False

    async def __aenter__(self) -> Self:
        """Prepare all replicas, and begin.

        Raises:
            Exception: what the first replica raised, where none of them could be prepared.
        """
        loop = asyncio.get_running_loop()
        self._open = True
        failures = await asyncio.gather(*(thread.begin(loop) for thread in self._threads))
        if not self.working:
            raise next(failure for failure in failures if failure is not None)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Refuse new items, finish all that were accepted, end the threads."""
        with self._change:
            self._open = False
            self._change.notify_all()
        await asyncio.gather(*(asyncio.to_thread(thread.join) for thread in self._threads))

    @property
    def depth(self) -> int:
        """How many items wait."""
        return len(self._waiting)

    @property
    def working(self) -> int:
        """How many replicas have not failed."""
        return sum(thread.works for thread in self._threads)

    async def submit(self, items: Sequence[In], *, timeout_s: float | None = None) -> list[Out]:
        """Run items, which may travel in different batches; all are accepted or none.

        Args:
            items: at least none.
            timeout_s: how long to wait; None where the caller keeps the time and cancels.

        Raises:
            Overloaded: the queue has no room for them.
            DeadlineExceeded: not done in time; what still waits of them will not run.
            NotReady: closing, not started, or every replica has failed.
            Exception: what the function raised for the first of these items that failed.
        """
        loop, now_s = asyncio.get_running_loop(), time.monotonic()
        entries: list[_Entry[In, Out]] = [_Entry(item, loop.create_future(), now_s) for item in items]
        self._accept(entries)
        timer = asyncio.timeout(timeout_s)
        try:
            async with timer:
                return list(await asyncio.gather(*(entry.future for entry in entries)))
        except TimeoutError as error:
            if timeout_s is not None and timer.expired():
                raise DeadlineExceeded(timeout_s) from error
            raise
        finally:
            for entry in entries:
                entry.future.cancel()

    def _accept(self, entries: Sequence[_Entry[In, Out]]) -> None:
        with self._change:
            if not self._open:
                raise NotReady("the service is shutting down or has not started")
            if not self.working:
                raise self._all_failed()
            if len(self._waiting) + len(entries) > self._max_queue:
                self._waiting = deque(entry for entry in self._waiting if not entry.future.done())
            if len(self._waiting) + len(entries) > self._max_queue:
                raise Overloaded(self._name, self._max_queue)
            self._waiting.extend(entries)
            if self._idle:
                self._change.notify_all()

    def _all_failed(self) -> NotReady:
        return NotReady(f"{self._name}: every replica has failed")

    def next_batch(self) -> list[_Entry[In, Out]]:
        """What a replica is to run next, as soon as there is something; nothing at the end."""
        with self._change:
            while not (batch := self._form_batch()) and self._open:
                self._idle += 1
                self._change.wait()
                self._idle -= 1
        return batch

    def _form_batch(self) -> list[_Entry[In, Out]]:
        """The first that wait; a share of them where other replicas are idle too."""
        most = min(self._max_batch, -(-len(self._waiting) // (1 + self._idle)))
        batch: list[_Entry[In, Out]] = []
        now_s = time.monotonic()
        while self._waiting and len(batch) < most:
            entry = self._waiting.popleft()
            if not entry.future.done():
                batch.append(entry)
                self._observer.waited(now_s - entry.arrived_s)
        return batch

    def give_back(self, entries: Sequence[_Entry[In, Out]]) -> None:
        """Take over what a replica that has failed did not run: for another one, or refused where there is none."""
        with self._change:
            self._waiting.extendleft(reversed(entries))
            refused = [] if self.working else list(self._waiting)
            if refused:
                self._waiting.clear()
            self._change.notify_all()
        if refused:
            _resolve(refused, [self._all_failed() for _ in refused])

    def observed(self, size: int, seconds: float) -> None:
        """Pass a batch on to the observer."""
        self._observer.batch(size, seconds)

    def is_expected(self, error: Exception) -> bool:
        """Whether an error says something of an item and nothing of its replica."""
        return isinstance(error, self._expected)


class _Thread(threading.Thread, Generic[In, Out]):
    """A replica, its thread and its health."""

    def __init__(self, replica: Replica[In, Out], name: str, batcher: Batcher[In, Out]) -> None:
        super().__init__(name=name, daemon=True)
        self._replica, self._batcher = replica, batcher
        self._prepared: asyncio.Future[Exception | None] | None = None
        self.works = True

    def begin(self, loop: asyncio.AbstractEventLoop) -> "asyncio.Future[Exception | None]":
        """Start; the future says when it is prepared, or why it cannot be."""
        self._prepared = loop.create_future()
        self.start()
        return self._prepared

    def run(self) -> None:
        """Run batches until the end, or until the replica has failed."""
        failure = self._judge(self._replica.prepare)
        assert self._prepared is not None
        _call_soon(self._prepared, self._prepared.set_result, failure)
        while self.works and (batch := self._batcher.next_batch()):
            self._run_batch(batch)
        if not self.works:
            self._batcher.give_back([])

    def _run_batch(self, batch: Sequence[_Entry[In, Out]]) -> None:
        started_s = time.monotonic()
        outcome = self._outputs([entry.item for entry in batch])
        self._batcher.observed(len(batch), time.monotonic() - started_s)
        if not isinstance(outcome, Exception):
            _resolve(batch, outcome)
        elif len(batch) == 1:
            _resolve(batch, [outcome])
            if not self._batcher.is_expected(outcome):
                self._judge(self._replica.check)
        else:
            for position, entry in enumerate(batch):
                if not self.works:
                    self._batcher.give_back(batch[position:])
                    return
                if not entry.future.done():
                    self._run_batch([entry])

    def _judge(self, check: Callable[[], object] | None) -> Exception | None:
        """Call what raises where the replica cannot work; a replica that cannot gets no more work."""
        outcome = None if check is None else _returned(check)
        if not isinstance(outcome, Exception):
            return None
        self.works = False
        _log.critical("%s has failed and gets no more work", self.name, exc_info=outcome)
        return outcome

    def _outputs(self, items: Sequence[In]) -> Sequence[Out] | Exception:
        """The outputs of a batch, or the error as a value."""
        outputs = _returned(lambda: self._replica.run(items))
        if not isinstance(outputs, Exception) and len(outputs) != len(items):
            return RuntimeError(f"{self.name}: {len(items)} items gave {len(outputs)} outputs")
        return outputs


def _resolve(entries: Sequence[_Entry[In, Out]], outcomes: Sequence[Out | Exception]) -> None:
    """Hand outcomes to callers, who wait on the event loop."""

    def hand_over() -> None:
        for entry, outcome in zip(entries, outcomes, strict=True):
            if entry.future.done():
                continue
            if isinstance(outcome, Exception):
                entry.future.set_exception(outcome)
            else:
                entry.future.set_result(outcome)

    _call_soon(entries[0].future, hand_over)


def _call_soon(future: "asyncio.Future[Any]", function: Callable[..., object], *arguments: object) -> None:
    with suppress(RuntimeError):  # the loop has ended, and with it everybody who waited
        future.get_loop().call_soon_threadsafe(function, *arguments)


def _returned(function: Callable[[], T]) -> T | Exception:
    """Call a function; hand its error back as a value.

    An exception that a future cannot hold (StopIteration, SystemExit) would otherwise end the thread, and every caller
    would wait for ever.
    """
    try:
        return function()
    except StopIteration as error:
        return RuntimeError(repr(error))
    except Exception as error:
        return error
    except BaseException as error:
        return RuntimeError(repr(error))
