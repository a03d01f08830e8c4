"""A runner of jobs at work, and what came of them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from pydantic import TypeAdapter

from indexer.catalog import jobs
from indexer.catalog.jobs import Job, NewItem
from service.editing import Editor
from service.jobs import JobImage, JobRunner
from service.wire_jobs import JobItem, JobItemError
from tests.service.job_doubles import judged

T = TypeVar("T")
LONG_S = 20.0
RESULTS: TypeAdapter[JobItem | JobItemError] = TypeAdapter(JobItem | JobItemError)


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, LONG_S))


async def judge(image: JobImage) -> JobItem:
    return judged(image)


def quick(editor: Editor, classify: Callable[[JobImage], Awaitable[JobItem]] = judge, **options: Any) -> JobRunner:
    return JobRunner(editor, classify, **{"poll_s": 0.01, "lease_s": 0.5, **options})


@asynccontextmanager
async def working(runner: JobRunner) -> AsyncIterator[None]:
    task = asyncio.create_task(runner.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def submit(editor: Editor, words: Sequence[str], id: str = "j", **parameters: Any) -> str:
    items = [NewItem(word, data=word.encode()) for word in words]
    job = await JobRunner(editor, judge).submit(id, "ann", items, {"k": 3, **parameters})
    return job.id


async def ended(editor: Editor, id: str = "j") -> Job:
    while True:
        job = await editor.read(partial(jobs.get, id=id))
        if job.finished_at is not None:
            return job
        await asyncio.sleep(0.005)


async def results(editor: Editor, id: str = "j") -> list[JobItem | JobItemError]:
    page = await editor.read(partial(jobs.answers, id=id, after=-1, limit=1000, max_chars=10**9))
    assert not page.more
    found = [RESULTS.validate_json(answer) for _, answer in page.answers]
    assert [item.position for item in found] == [position for position, _ in page.answers]
    return found


def outcomes(found: Sequence[JobItem | JobItemError]) -> list[str]:
    return [str(item.verdict) if isinstance(item, JobItem) else item.error.type.rpartition(":")[2] for item in found]
