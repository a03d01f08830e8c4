"""Places for requests, and memory that goes back once they are done."""

import asyncio

import pytest

import service.memory
from service.admission import Admission
from service.errors import Overloaded
from service.memory import trim_when_idle, trimmer


def refused(admission: Admission) -> bool:
    try:
        with admission.enter():
            return False
    except Overloaded:
        return True


def test_a_place_comes_back_however_the_work_ends() -> None:
    admission = Admission(2)

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
    admission = Admission(1)
    with admission.enter(), pytest.raises(Overloaded) as caught, admission.enter():
        pass
    assert (caught.value.queue, caught.value.limit) == ("requests", 1)


def test_idle_is_said_once_after_work() -> None:
    admission = Admission(1)
    assert not admission.idle_since_work()
    with admission.enter():
        assert not admission.idle_since_work()
    assert admission.idle_since_work()
    assert not admission.idle_since_work()


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
