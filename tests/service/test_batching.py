"""The batcher: order, batches, bound, deadline, cancellation, bad items, and an end that loses nothing."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.batching import Batcher, Observer, Replica
from service.errors import DeadlineExceeded, NotReady, Overloaded

LONG_S = 30.0


class Doubler:
    """Doubles numbers, notes its batches, and can be held up."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.entered, self.gate = threading.Event(), threading.Event()
        self.gate.set()

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.entered.set()
        assert self.gate.wait(LONG_S)
        self.batches.append(list(items))
        return [2 * item for item in items]


async def eventually(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("the condition did not come true")


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(_as_coroutine(work), LONG_S))


async def _as_coroutine(work: Callable[[], Awaitable[None]]) -> None:
    await work()


@settings(max_examples=25)
@given(
    groups=st.lists(st.lists(st.integers(), max_size=5), max_size=12),
    max_batch=st.integers(1, 8),
    bad=st.sets(st.integers(0, 60), max_size=5),
)
def test_every_caller_gets_its_own_answers_whatever_travels_with_them(
    groups: list[list[int]], max_batch: int, bad: set[int]
) -> None:
    """The naive twin calls the function item by item."""
    sizes: list[int] = []

    def function(items: Sequence[int]) -> list[int]:
        sizes.append(len(items))
        if bad & set(items):
            raise ValueError(f"bad among {items}")
        return [item + 1 for item in items]

    async def work() -> None:
        async with Batcher([Replica(function)], max_batch=max_batch, max_queue=100) as batcher:
            outcomes = await asyncio.gather(
                *(batcher.submit(group, timeout_s=LONG_S) for group in groups), return_exceptions=True
            )
        for group, outcome in zip(groups, outcomes, strict=True):
            if bad & set(group):
                assert isinstance(outcome, ValueError)
            else:
                assert outcome == [item + 1 for item in group]
        assert all(size <= max_batch for size in sizes)

    run(work)


def test_what_arrives_while_a_batch_runs_travels_together() -> None:
    async def work() -> None:
        doubler = Doubler()
        doubler.gate.clear()
        async with Batcher([Replica(doubler)], max_batch=4, max_queue=20) as batcher:
            tasks = [asyncio.create_task(batcher.submit([0], timeout_s=LONG_S))]
            await eventually(doubler.entered.is_set)
            tasks += [asyncio.create_task(batcher.submit([i], timeout_s=LONG_S)) for i in range(1, 7)]
            await asyncio.sleep(0.05)
            doubler.gate.set()
            assert await asyncio.gather(*tasks) == [[2 * i] for i in range(7)]
        assert doubler.batches == [[0], [1, 2, 3, 4], [5, 6]]

    run(work)


def test_an_idle_batcher_does_not_wait() -> None:
    async def work() -> None:
        async with Batcher([Replica(Doubler())], max_batch=64, max_queue=64) as batcher:
            await batcher.submit([1], timeout_s=LONG_S)
            times = []
            for _ in range(20):
                started = time.perf_counter()
                await batcher.submit([1], timeout_s=LONG_S)
                times.append(time.perf_counter() - started)
            assert sorted(times)[10] < 0.02

    run(work)


def test_a_full_queue_refuses_all_of_a_submission_and_forgets_the_abandoned() -> None:
    async def work() -> None:
        doubler = Doubler()
        doubler.gate.clear()
        async with Batcher([Replica(doubler)], max_batch=1, max_queue=3, name="the queue") as batcher:
            running = asyncio.create_task(batcher.submit([0], timeout_s=LONG_S))
            await eventually(doubler.entered.is_set)
            waiting = asyncio.create_task(batcher.submit([1, 2], timeout_s=LONG_S))
            await asyncio.sleep(0)
            with pytest.raises(Overloaded) as caught:
                await batcher.submit([3, 4], timeout_s=LONG_S)
            assert (caught.value.queue, caught.value.limit) == ("the queue", 3)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            last = asyncio.create_task(batcher.submit([5, 6, 7], timeout_s=LONG_S))
            await asyncio.sleep(0.01)
            doubler.gate.set()
            assert await running == [0]
            assert await last == [10, 12, 14]
        assert doubler.batches == [[0], [5], [6], [7]]

    run(work)


def test_a_deadline_ends_the_wait_and_the_item_never_runs() -> None:
    async def work() -> None:
        doubler = Doubler()
        doubler.gate.clear()
        async with Batcher([Replica(doubler)], max_batch=1, max_queue=8) as batcher:
            running = asyncio.create_task(batcher.submit([0], timeout_s=LONG_S))
            await eventually(doubler.entered.is_set)
            with pytest.raises(DeadlineExceeded) as caught:
                await batcher.submit([1], timeout_s=0.05)
            assert caught.value.limit_s == 0.05
            doubler.gate.set()
            assert await running == [0]
            assert await batcher.submit([2], timeout_s=LONG_S) == [4]
        assert doubler.batches == [[0], [2]]

    run(work)


def test_a_timeout_of_the_function_is_not_a_deadline() -> None:
    def function(items: Sequence[int]) -> list[int]:
        raise TimeoutError("its own")

    async def work() -> None:
        async with Batcher([Replica(function)], max_batch=2, max_queue=2) as batcher:
            with pytest.raises(TimeoutError, match="its own"):
                await batcher.submit([1], timeout_s=LONG_S)

    run(work)


@pytest.mark.parametrize("error", [ValueError, StopIteration, SystemExit, KeyboardInterrupt, asyncio.CancelledError])
def test_the_batcher_outlives_whatever_its_function_raises(error: type[BaseException]) -> None:
    def function(items: Sequence[int]) -> list[int]:
        if 13 in items:
            raise error
        return list(items)

    async def work() -> None:
        async with Batcher([Replica(function)], max_batch=4, max_queue=8) as batcher:
            outcomes = await asyncio.gather(
                *(batcher.submit([i], timeout_s=LONG_S) for i in (1, 13, 2)), return_exceptions=True
            )
            assert outcomes[0] == [1]
            assert outcomes[2] == [2]
            assert isinstance(outcomes[1], ValueError if error is ValueError else RuntimeError)
            assert await batcher.submit([3], timeout_s=LONG_S) == [3]

    run(work)


def test_too_few_outputs_are_an_error_and_not_a_shift() -> None:
    async def work() -> None:
        async with Batcher[int, int]([Replica(lambda items: [])], max_batch=1, max_queue=1) as batcher:
            with pytest.raises(RuntimeError, match="1 items gave 0"):
                await batcher.submit([1], timeout_s=LONG_S)
        # One output whatever the batch: right only for single items, and so they run singly in the end.
        async with Batcher[int, int]([Replica(lambda items: [items[0]])], max_batch=4, max_queue=8) as batcher:
            assert await batcher.submit([1, 2, 3], timeout_s=LONG_S) == [1, 2, 3]

    run(work)


def test_closing_finishes_what_was_accepted_and_refuses_the_rest() -> None:
    async def work() -> None:
        doubler = Doubler()
        doubler.gate.clear()
        batcher: Batcher[int, int] = Batcher([Replica(doubler)], max_batch=2, max_queue=8)
        with pytest.raises(NotReady):
            await batcher.submit([1], timeout_s=LONG_S)
        await batcher.__aenter__()
        tasks = [asyncio.create_task(batcher.submit([i], timeout_s=LONG_S)) for i in range(5)]
        await eventually(doubler.entered.is_set)
        closing = asyncio.create_task(batcher.__aexit__())
        await asyncio.sleep(0.01)
        with pytest.raises(NotReady):
            await batcher.submit([9], timeout_s=LONG_S)
        assert not closing.done()
        doubler.gate.set()
        await closing
        assert [task.result() for task in tasks] == [[2 * i] for i in range(5)]

    run(work)


@pytest.mark.parametrize(("max_batch", "max_queue"), [(0, 1), (2, 1)])
def test_sizes_that_cannot_work_are_refused(max_batch: int, max_queue: int) -> None:
    with pytest.raises(ValueError, match="max_batch"):
        Batcher([Replica(Doubler())], max_batch=max_batch, max_queue=max_queue)


def test_no_replica_is_refused() -> None:
    with pytest.raises(ValueError, match="replica"):
        Batcher[int, int]([], max_batch=1, max_queue=1)


def test_idle_replicas_share_what_waits_and_work_side_by_side() -> None:
    """Each waits for the other inside its batch: one alone would never finish."""
    together = threading.Barrier(2)
    batches: list[list[int]] = []

    def function(items: Sequence[int]) -> list[int]:
        together.wait(LONG_S)
        batches.append(list(items))
        return [2 * item for item in items]

    async def work() -> None:
        async with Batcher([Replica(function), Replica(function)], max_batch=8, max_queue=8) as batcher:
            await eventually(lambda: batcher._idle == 2)  # else the first that is there takes all of it
            assert await batcher.submit([1, 2, 3, 4], timeout_s=LONG_S) == [2, 4, 6, 8]
        assert sorted(batches) == [[1, 2], [3, 4]]

    run(work)


class Breakable:
    """Fails from its first 13 on, whatever it is given; its check tells."""

    def __init__(self) -> None:
        self.broken, self.checks = False, 0

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.broken |= 13 in items
        self.check()
        return list(items)

    def check(self) -> None:
        self.checks += 1
        if self.broken:
            raise RuntimeError("device lost")


def test_a_replica_that_has_failed_gets_no_more_work() -> None:
    async def work() -> None:
        bad, good = Breakable(), Doubler()
        good.gate.clear()
        replicas = [Replica(bad, check=bad.check), Replica[int, int](good)]
        async with Batcher(replicas, max_batch=4, max_queue=8) as batcher:
            held = []
            while not good.entered.is_set():  # whatever the bad one takes before, it answers at once
                held.append(asyncio.create_task(batcher.submit([5], timeout_s=LONG_S)))
                await asyncio.sleep(0.005)
            tasks = [asyncio.create_task(batcher.submit([i], timeout_s=LONG_S)) for i in (13, 6, 7)]
            await eventually(lambda: batcher.working == 1)
            good.gate.set()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(outcomes[0], RuntimeError)
            assert outcomes[1:] == [[12], [14]]
            assert await batcher.submit([8], timeout_s=LONG_S) == [16]
            assert all(answer in ([5], [10]) for answer in await asyncio.gather(*held))
        assert bad.broken

    run(work)


def test_without_a_working_replica_everything_is_refused() -> None:
    async def work() -> None:
        bad = Breakable()
        async with Batcher([Replica(bad, check=bad.check)], max_batch=1, max_queue=8) as batcher:
            outcomes = await asyncio.gather(
                *(batcher.submit([i], timeout_s=LONG_S) for i in (13, 1, 2)), return_exceptions=True
            )
            assert [type(outcome) for outcome in outcomes] == [RuntimeError, NotReady, NotReady]
            with pytest.raises(NotReady, match="every replica has failed"):
                await batcher.submit([3], timeout_s=LONG_S)

    run(work)


def test_a_replica_that_cannot_be_prepared_is_not_used() -> None:
    def prepare() -> None:
        raise RuntimeError("no such device")

    async def work() -> None:
        replicas = [Replica(Doubler(), prepare=prepare), Replica(Doubler())]
        async with Batcher(replicas, max_batch=1, max_queue=8) as batcher:
            assert await batcher.submit([1, 2, 3], timeout_s=LONG_S) == [2, 4, 6]
            assert batcher.working == 1
        with pytest.raises(RuntimeError, match="no such device"):
            await Batcher([Replica(Doubler(), prepare=prepare)], max_batch=1, max_queue=8).__aenter__()

    run(work)


@pytest.mark.parametrize(("expected", "checks"), [((ValueError,), 0), ((), 1)])
def test_an_error_of_an_item_is_not_held_against_the_replica(
    expected: tuple[type[Exception], ...], checks: int
) -> None:
    def function(items: Sequence[int]) -> list[int]:
        raise ValueError("of the item")

    async def work() -> None:
        checked = Breakable()
        replica = Replica(function, check=checked.check)
        async with Batcher([replica], max_batch=1, max_queue=1, expected=expected) as batcher:
            for _ in range(2):
                with pytest.raises(ValueError, match="of the item"):
                    await batcher.submit([1], timeout_s=LONG_S)
            assert batcher.working == 1
        assert checked.checks == 2 * checks

    run(work)


def test_batches_and_waiting_times_are_observed() -> None:
    async def work() -> None:
        sizes: list[int] = []
        waits: list[float] = []
        observer = Observer(batch=lambda size, seconds: sizes.append(size), waited=waits.append)
        async with Batcher([Replica(Doubler())], max_batch=2, max_queue=8, observer=observer) as batcher:
            await batcher.submit([1, 2, 3], timeout_s=LONG_S)
        assert sizes == [2, 1]
        assert len(waits) == 3
        assert min(waits) >= 0

    run(work)
