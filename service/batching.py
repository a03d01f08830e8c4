"""Batcher: many concurrent callers, one worker thread, batches as large as the moment offers.

Owns the bound of the queue, deadlines, cancellation and the isolation of a bad item. Knows nothing of images.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

from service.errors import DeadlineExceeded, NotReady, Overloaded

In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True, eq=False)
class _Entry(Generic[In, Out]):
    item: In
    future: "asyncio.Future[Out]"


class Batcher(Generic[In, Out]):
    """Runs a function over batches of what concurrent callers submit.

    While a batch runs, the next one gathers; when idle, an item runs at once. The function is called in one thread
    of its own, never twice at a time. Where a batch fails, its items run again one by one, so that a bad item fails
    alone. Items whose caller has gone are dropped when a batch is formed.

    Args:
        run: b inputs -> b outputs, in order.
        max_batch: the most items in a batch.
        max_queue: the most items that wait; what comes on top is refused.
        name: of the queue, for errors and the thread.
    """

    def __init__(
        self, run: Callable[[Sequence[In]], Sequence[Out]], *, max_batch: int, max_queue: int, name: str = "batcher"
    ) -> None:
        if not 1 <= max_batch <= max_queue:
            raise ValueError(f"need 1 <= max_batch <= max_queue, got {max_batch} and {max_queue}")
        self._function, self._max_batch, self._max_queue, self._name = run, max_batch, max_queue, name
        self._waiting: deque[_Entry[In, Out]] = deque()
        self._arrival = asyncio.Event()
        self._closing = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._loop_task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._loop_task = asyncio.create_task(self._loop(), name=self._name)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Refuse new items, finish all that were accepted, end the thread."""
        self._closing = True
        self._arrival.set()
        if self._loop_task is not None:
            await self._loop_task
        self._thread.shutdown()

    async def submit(self, items: Sequence[In], *, timeout_s: float) -> list[Out]:
        """Run items, which may travel in different batches; all are accepted or none.

        Raises:
            Overloaded: the queue has no room for them.
            DeadlineExceeded: not done in time; what still waits of them will not run.
            NotReady: closing, or not started.
            Exception: what the function raised for the first of these items that failed.
        """
        if self._closing or self._loop_task is None:
            raise NotReady("the service is shutting down or has not started")
        if len(self._waiting) + len(items) > self._max_queue:
            self._waiting = deque(entry for entry in self._waiting if not entry.future.done())
        if len(self._waiting) + len(items) > self._max_queue:
            raise Overloaded(self._name, self._max_queue)
        loop = asyncio.get_running_loop()
        entries: list[_Entry[In, Out]] = [_Entry(item, loop.create_future()) for item in items]
        self._waiting.extend(entries)
        self._arrival.set()
        timer = asyncio.timeout(timeout_s)
        try:
            async with timer:
                return list(await asyncio.gather(*(entry.future for entry in entries)))
        except TimeoutError as error:
            if timer.expired():
                raise DeadlineExceeded(timeout_s) from error
            raise
        finally:
            for entry in entries:
                entry.future.cancel()

    async def _loop(self) -> None:
        while True:
            self._arrival.clear()
            batch = self._form_batch()
            if batch:
                await self._run(batch)
            elif self._closing:
                return
            else:
                await self._arrival.wait()

    def _form_batch(self) -> list[_Entry[In, Out]]:
        batch: list[_Entry[In, Out]] = []
        while self._waiting and len(batch) < self._max_batch:
            entry = self._waiting.popleft()
            if not entry.future.done():
                batch.append(entry)
        return batch

    async def _run(self, batch: Sequence[_Entry[In, Out]]) -> None:
        """Resolve every future of the batch; never raises, so that the loop lives on."""
        items = [entry.item for entry in batch]
        outcome = await asyncio.get_running_loop().run_in_executor(self._thread, self._call, items)
        if not isinstance(outcome, Exception):
            for entry, output in zip(batch, outcome, strict=True):
                if not entry.future.done():
                    entry.future.set_result(output)
        elif len(batch) == 1:
            if not batch[0].future.done():
                batch[0].future.set_exception(outcome)
        else:
            for entry in batch:
                if not entry.future.done():
                    await self._run([entry])

    def _call(self, items: Sequence[In]) -> Sequence[Out] | Exception:
        """Call the function in the worker thread; hand its error back as a value.

        An exception that a future cannot hold (StopIteration, SystemExit) would otherwise end the loop, and every
        caller would wait for ever.
        """
        try:
            outputs = self._function(items)
            if len(outputs) != len(items):
                raise RuntimeError(f"{self._name}: {len(items)} items gave {len(outputs)} outputs")
        except StopIteration as error:
            return RuntimeError(repr(error))
        except Exception as error:
            return error
        except BaseException as error:
            return RuntimeError(repr(error))
        return outputs
