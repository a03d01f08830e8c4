"""Batcher: many concurrent callers, one or several worker threads, batches as large as the moment offers.

Owns the bound of the queue, deadlines, cancellation, the isolation of a bad item and of a replica that has failed.
Knows nothing of images.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

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
    """Told what happens; called on the event loop. By default nobody listens.

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
        self._replicas = [_Thread(replica, f"{name} {number}") for number, replica in enumerate(replicas)]
        self._max_batch, self._max_queue, self._expected, self._name = max_batch, max_queue, expected, name
        self._observer = observer or Observer()
        self._waiting: deque[_Entry[In, Out]] = deque()
        self._arrival = asyncio.Event()
        self._idle = 0
        self._closing = False
        self._loops: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        """Prepare all replicas, and begin.

        Raises:
            Exception: what the first replica raised, where none of them could be prepared.
        """
        failures = await asyncio.gather(*(replica.prepare() for replica in self._replicas))
        if not self.working:
            for replica in self._replicas:
                replica.executor.shutdown()
            raise next(failure for failure in failures if failure is not None)
        self._loops = [asyncio.create_task(self._loop(replica), name=self._name) for replica in self._replicas]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Refuse new items, finish all that were accepted, end the threads."""
        self._closing = True
        self._arrival.set()
        await asyncio.gather(*self._loops)
        self._refuse_waiting()
        for replica in self._replicas:
            replica.executor.shutdown()

    @property
    def depth(self) -> int:
        """How many items wait."""
        return len(self._waiting)

    @property
    def working(self) -> int:
        """How many replicas have not failed."""
        return sum(replica.works for replica in self._replicas)

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
        if self._closing or not self._loops:
            raise NotReady("the service is shutting down or has not started")
        if not self.working:
            raise NotReady(f"{self._name}: every replica has failed")
        if len(self._waiting) + len(items) > self._max_queue:
            self._waiting = deque(entry for entry in self._waiting if not entry.future.done())
        if len(self._waiting) + len(items) > self._max_queue:
            raise Overloaded(self._name, self._max_queue)
        loop, now_s = asyncio.get_running_loop(), time.monotonic()
        entries: list[_Entry[In, Out]] = [_Entry(item, loop.create_future(), now_s) for item in items]
        self._waiting.extend(entries)
        self._arrival.set()
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

    async def _loop(self, replica: "_Thread[In, Out]") -> None:
        while replica.works:
            self._arrival.clear()
            batch = self._form_batch()
            if batch:
                await self._run(replica, batch)
            elif self._closing:
                return
            else:
                self._idle += 1
                try:
                    await self._arrival.wait()
                finally:
                    self._idle -= 1
        if not self.working:
            self._refuse_waiting()

    def _form_batch(self) -> list[_Entry[In, Out]]:
        """What comes next; a share of it where other replicas are idle too."""
        most = min(self._max_batch, -(-len(self._waiting) // (1 + self._idle)))
        batch: list[_Entry[In, Out]] = []
        now_s = time.monotonic()
        while self._waiting and len(batch) < most:
            entry = self._waiting.popleft()
            if not entry.future.done():
                batch.append(entry)
                self._observer.waited(now_s - entry.arrived_s)
        return batch

    async def _run(self, replica: "_Thread[In, Out]", batch: Sequence[_Entry[In, Out]]) -> None:
        """Resolve every future of the batch; never raises, so that the loop lives on."""
        started_s = time.monotonic()
        outcome = await replica.call([entry.item for entry in batch])
        self._observer.batch(len(batch), time.monotonic() - started_s)
        if not isinstance(outcome, Exception):
            for entry, output in zip(batch, outcome, strict=True):
                if not entry.future.done():
                    entry.future.set_result(output)
        elif len(batch) == 1:
            if not batch[0].future.done():
                batch[0].future.set_exception(outcome)
            if not isinstance(outcome, self._expected):
                await replica.examine()
        else:
            for position, entry in enumerate(batch):
                if not replica.works:  # the rest is for another replica, or for the refusal at the end of the loop
                    self._waiting.extendleft(reversed(batch[position:]))
                    break
                if not entry.future.done():
                    await self._run(replica, [entry])
            self._arrival.set()

    def _refuse_waiting(self) -> None:
        while self._waiting:
            entry = self._waiting.popleft()
            if not entry.future.done():
                entry.future.set_exception(NotReady(f"{self._name}: every replica has failed"))


class _Thread(Generic[In, Out]):
    """A replica together with its thread and its health."""

    def __init__(self, replica: Replica[In, Out], name: str) -> None:
        self._replica, self._name = replica, name
        self.executor = ThreadPoolExecutor(1, thread_name_prefix=name)
        self.works = True

    async def prepare(self) -> Exception | None:
        """Get ready; why it could not."""
        return await self._judge(self._replica.prepare)

    async def examine(self) -> None:
        """Find out whether it was the replica that failed."""
        await self._judge(self._replica.check)

    async def _judge(self, check: Callable[[], object] | None) -> Exception | None:
        """Call what raises where the replica cannot work; a replica that cannot gets no more work."""
        if check is None:
            return None
        outcome = await self._in_thread(check)
        if not isinstance(outcome, Exception):
            return None
        self.works = False
        _log.critical("%s has failed and gets no more work", self._name, exc_info=outcome)
        return outcome

    async def call(self, items: Sequence[In]) -> Sequence[Out] | Exception:
        """The outputs of a batch, or the error as a value."""

        def function() -> Sequence[Out]:
            outputs = self._replica.run(items)
            if len(outputs) != len(items):
                raise RuntimeError(f"{self._name}: {len(items)} items gave {len(outputs)} outputs")
            return outputs

        return await self._in_thread(function)

    async def _in_thread(self, function: Callable[[], T]) -> T | Exception:
        return await asyncio.get_running_loop().run_in_executor(self.executor, _returned, function)


def _returned(function: Callable[[], T]) -> T | Exception:
    """Call a function; hand its error back as a value.

    An exception that a future cannot hold (StopIteration, SystemExit) would otherwise end the loop of a replica, and
    every caller would wait for ever.
    """
    try:
        return function()
    except StopIteration as error:
        return RuntimeError(repr(error))
    except Exception as error:
        return error
    except BaseException as error:
        return RuntimeError(repr(error))
