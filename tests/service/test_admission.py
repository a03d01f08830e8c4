"""Places for requests, and memory that goes back once they are done."""

import asyncio
from contextlib import ExitStack

import pytest

import service.memory
from service.admission import Admission
from service.errors import Overloaded, WaitTooLong
from service.memory import trim_when_idle, trimmer


def refused(admission: Admission) -> bool:
    try:
        with admission.enter():
            return False
    except Overloaded:
        return True


def test_a_place_comes_back_however_the_work_ends() -> None:
    admission = Admission(2, 30.0)

    def work() -> None:
        with admission.enter():
            assert refused(admission)
            raise KeyError

    with admission.enter():
        assert not refused(admission)
        with pytest.raises(KeyError):
            work()
        assert not refused(admission)
    assert not refused(admission)


def test_a_refusal_names_the_limit() -> None:
    admission = Admission(1, 30.0)
    with admission.enter(), pytest.raises(Overloaded) as caught, admission.enter():
        pass
    assert (caught.value.queue, caught.value.limit) == ("requests", 1)


def test_idle_is_said_once_after_work() -> None:
    admission = Admission(1, 30.0)
    assert not admission.idle_since_work()
    with admission.enter():
        assert not admission.idle_since_work()
    assert admission.idle_since_work()
    assert not admission.idle_since_work()


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def answer(admission: Admission, clock: Clock, images: int, seconds_each: float) -> None:
    with admission.enter(), admission.work_on(images):
        for _ in range(images):
            clock.now_s += seconds_each
            admission.answered()


def room(admission: Admission) -> int:
    """How many requests of one image are admitted at the same moment."""
    with ExitStack() as stack:
        for number in range(10_000):
            try:
                stack.enter_context(admission.enter())
                stack.enter_context(admission.work_on(1))
            except WaitTooLong:
                return number
    raise AssertionError("there is no bound")


@pytest.mark.parametrize("seconds_each", [0.05, 0.2, 3.0])
def test_as_much_is_admitted_as_is_answered_in_time(seconds_each: float) -> None:
    clock = Clock()
    admission = Admission(10_000, 10.0, clock=clock)
    answer(admission, clock, 100, seconds_each)
    assert room(admission) == pytest.approx(7.0 / seconds_each, abs=1)


def test_the_bound_follows_the_pace_and_forgets_idle_time() -> None:
    clock = Clock()
    admission = Admission(10_000, 10.0, clock=clock)
    answer(admission, clock, 100, 1.0)
    assert room(admission) == 7
    clock.now_s += 10_000
    assert room(admission) == 7
    answer(admission, clock, 70, 0.1)
    assert room(admission) == pytest.approx(70, abs=1)


def test_what_is_assumed_holds_until_it_is_known_better() -> None:
    clock = Clock()
    admission = Admission(10_000, 10.0, pace_s=0.7, clock=clock)
    assert room(admission) == 10
    answer(admission, clock, 100, 0.07)
    assert room(admission) == 100


def test_an_idle_service_admits_whatever_it_is_asked() -> None:
    clock = Clock()
    admission = Admission(10, 10.0, clock=clock)
    answer(admission, clock, 3, 60.0)
    with admission.enter(), admission.work_on(16):
        with pytest.raises(WaitTooLong) as caught, admission.enter():
            pass
        assert caught.value.expected_s == pytest.approx(17 * 45.0)
        assert caught.value.limit_s == 10.0
        assert caught.value.retry_after_s == pytest.approx(17 * 45.0 - 10.0)
    assert room(admission) == 1


def test_many_images_count_as_many() -> None:
    clock = Clock()
    admission = Admission(10_000, 10.0, clock=clock)
    answer(admission, clock, 100, 1.0)
    with admission.enter(), admission.work_on(1), admission.enter():
        with pytest.raises(WaitTooLong), admission.work_on(7):
            pass
        with admission.work_on(6):
            assert admission.images == 7
    assert (admission.images, admission.requests) == (0, 0)


def test_memory_is_trimmed_when_idle_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed: list[int] = []
    answers = iter([False, True, False, False])
    asked: list[bool] = []

    def idle() -> bool:
        asked.append(next(answers, False))
        return asked[-1]

    monkeypatch.setattr(service.memory, "_QUIET_S", 0.001)
    monkeypatch.setattr(service.memory, "trimmer", lambda: lambda: trimmed.append(len(asked)))

    async def work() -> None:
        task = asyncio.create_task(trim_when_idle(idle))
        for _ in range(2000):
            if len(asked) >= 6:
                break
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(work())
    assert trimmed == [2]


def test_trimming_works_where_the_c_library_can() -> None:
    trim = trimmer()
    if trim is None:
        pytest.skip("this C library has no malloc_trim")
    assert trim() in (0, 1)
