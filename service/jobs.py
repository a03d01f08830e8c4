"""Jobs: images that nobody waits for are classified when there is room.

Owns who works on what when: jobs take turns, so that a long one does not hold up a short one; nothing is begun while
the service is loaded; and what cannot be answered for lack of room or time is tried again later. What is stored of it,
and that every image is answered once, is `indexer.catalog.jobs`.
"""

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sqlalchemy import Connection

from indexer.catalog import jobs
from indexer.catalog.jobs import FAILED, Job, NewItem, WaitingItem
from indexer.errors import CatalogError, IndexerError
from perception.errors import PerceptionError
from service.classifier import RemoteImage
from service.editing import Editor
from service.errors import DeadlineExceeded, Overloaded, ServiceError, Unavailable
from service.problems import problem
from service.webhooks import Event, Webhooks
from service.wire import Problem
from service.wire_jobs import JobItem, JobItemError

_TURN_S, _TURN_IMAGES = 5.0, 8  # of one job, before the next has its turn; images for each that is in work at a time
_FIRST_WAIT_S, _LAST_WAIT_S = 1.0, 60.0
_OWN_FAULT = 5  # times that an image misses its deadline in an idle service before that is its answer
_PURGE_EVERY_S = 600.0
_PASSING = (Unavailable, CatalogError)
_EXPECTED = (PerceptionError, IndexerError, ServiceError)
_log = logging.getLogger("hardlook.jobs")


@dataclass(frozen=True)
class JobImage:
    """An image of a job that is to be classified.

    Attributes:
        job: as it was when its turn began.
        position: of the image in the job.
        id: the caller's.
        source: the file's bytes, or where to fetch them.
    """

    job: Job
    position: int
    id: str
    source: bytes | RemoteImage = field(repr=False)

    @property
    def request_id(self) -> str:
        """What the decision log and problems call it."""
        return item_request_id(self.job.id, self.position)


Classify = Callable[[JobImage], Awaitable[JobItem]]


def item_request_id(job_id: str, position: int) -> str:
    """The request id of one image of a job."""
    return f"{job_id}-{position}"


def failed_item(job_id: str, position: int, image_id: str, error: Exception) -> JobItemError:
    """The answer to an image that cannot be classified."""
    request_id = item_request_id(job_id, position)
    details = Problem(**problem(error, request_id))
    return JobItemError(id=image_id, error=details, position=position, request_id=request_id)


def announce(webhooks: Webhooks | None, connection: Connection, job: Job) -> None:
    """Tell webhooks that a job is done, where its owner wished so; in the transaction that ends it."""
    if webhooks is None or not job.parameters.get("callback"):
        return
    counts = {"total": job.total, "done": job.done, "failed": job.failed, "verdicts": dict(job.outcomes)}
    times = {"created_at": job.time, "finished_at": job.finished_at}
    webhooks.enqueue(connection, [Event("job.done", {"job_id": job.id, **counts, **times})])


@dataclass
class _PutOff:
    """An image that is to be tried again."""

    attempts: int
    at_s: float


class JobRunner:
    """Works on the jobs in the database, those of an earlier process included.

    Args:
        editor: of that database; open for as long as `run` runs.
        classify: answers one image. Where it raises Unavailable or CatalogError the image waits; whatever else it
            raises is the image's answer.
        busy: whether the service is loaded, so that nothing is to be begun.
        webhooks: told of jobs that are done.
        concurrency: images in work at a time.
        max_jobs: that wait or run.
        max_bytes: of image files that wait.
        results_s: how long a job is kept after its end.
        poll_s: how often to look for jobs and for room.
        lease_s: after which another process takes over from one that was killed.
    """

    def __init__(
        self,
        editor: Editor,
        classify: Classify,
        *,
        busy: Callable[[], bool] = lambda: False,
        webhooks: Webhooks | None = None,
        concurrency: int = 2,
        max_jobs: int = 100,
        max_bytes: int = 1024**3,
        results_s: float = 7 * 86400.0,
        poll_s: float = 1.0,
        lease_s: float = 30.0,
    ) -> None:
        self._editor, self._classify, self._busy, self._webhooks = editor, classify, busy, webhooks
        self._concurrency, self._max_jobs, self._max_bytes = concurrency, max_jobs, max_bytes
        self._results_s, self._poll_s, self._lease_s = results_s, poll_s, lease_s
        self._name = secrets.token_hex(8)
        self._news = asyncio.Event()
        self._later: dict[tuple[str, int], _PutOff] = {}
        self._purge_at_s = 0.0

    async def submit(self, id: str, owner: str, items: Sequence[NewItem], parameters: Mapping[str, Any]) -> Job:
        """Store a job, which is durable on return, and begin with it; see `indexer.catalog.jobs.submit`.

        Replicas that take jobs at the same moment may exceed the bounds by one each.

        Raises:
            Overloaded: there are as many jobs, or bytes of images, as may wait.
            CatalogError: it cannot be stored.
        """

        def store(connection: Connection) -> Job:
            if jobs.open_jobs(connection) >= self._max_jobs:
                raise Overloaded("jobs", self._max_jobs)
            new_bytes = sum(len(item.data or b"") for item in items)
            if new_bytes and jobs.waiting_bytes(connection) + new_bytes > self._max_bytes:
                raise Overloaded("bytes of jobs", self._max_bytes)
            job = jobs.submit(connection, id, owner, items, parameters)
            if job.finished_at is not None:
                announce(self._webhooks, connection, job)
            return job

        job = await self._editor.write(store)
        self._news.set()
        return job

    async def run(self) -> None:
        """Work, until cancelled; images in work are then left to whoever comes next."""
        while True:
            worked = False
            try:
                await self._purge()
                worked = await self._work()
            except _PASSING as error:
                _log.warning("jobs wait: %s", error)
            except Exception:
                _log.exception("a bug")
            if not worked:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._poll_s):
                        await self._news.wait()
                self._news.clear()

    async def _work(self) -> bool:
        """Give a job its turn; whether anything came of it."""
        if self._busy():
            return False
        job = None
        if await self._editor.read(jobs.open_jobs):
            job = await self._editor.write(partial(jobs.claim, by=self._name, lease_s=self._lease_s))
        else:
            self._later.clear()
        if job is None:
            return False
        lost = asyncio.Event()
        holding = asyncio.create_task(self._hold(job.id, lost))
        try:
            return await self._turn(job, lost)
        finally:
            holding.cancel()
            with suppress(*_PASSING):  # the lease ends by itself
                await self._editor.write(partial(jobs.release, id=job.id, by=self._name))

    async def _hold(self, id: str, lost: asyncio.Event) -> None:
        """Renew the lease of a job as long as it can be."""
        while not lost.is_set():
            await asyncio.sleep(self._lease_s / 3)
            with suppress(*_PASSING):
                renew = partial(jobs.renew, id=id, by=self._name, lease_s=self._lease_s)
                if not await self._editor.write(renew):
                    lost.set()

    async def _turn(self, job: Job, lost: asyncio.Event) -> bool:
        """Answer some images of a job; whether any was."""
        now_s = time.monotonic()
        not_yet = [position for (id, position), item in self._later.items() if id == job.id and item.at_s > now_s]
        most = _TURN_IMAGES * self._concurrency
        waiting = deque(await self._editor.read(partial(jobs.waiting, id=job.id, limit=most, skipping=not_yet)))

        async def work() -> bool:
            answered = False
            while waiting and not lost.is_set() and not self._busy() and time.monotonic() < now_s + _TURN_S:
                answered |= await self._answer(job, waiting.popleft())
            return answered

        each = await asyncio.gather(*(work() for _ in range(self._concurrency)), return_exceptions=True)
        for outcome in each:
            if isinstance(outcome, BaseException):
                raise outcome
        return any(each)

    async def _answer(self, job: Job, position: int) -> bool:
        """Answer an image, unless it has to wait; whether it was."""
        item = await self._editor.read(partial(jobs.waiting_item, id=job.id, position=position))
        if item is None:
            return False
        found = await self._outcome(job, item)
        if found is None:
            return False
        outcome, answer = found

        def finish(connection: Connection) -> None:
            ended = jobs.finish_item(connection, job.id, position, outcome, answer.model_dump_json())
            if ended is not None:
                announce(self._webhooks, connection, ended)

        await self._editor.write(finish)
        self._later.pop((job.id, position), None)
        return True

    async def _outcome(self, job: Job, item: WaitingItem) -> tuple[str, JobItem | JobItemError] | None:
        """What comes of an image; None where it has to wait."""
        source = RemoteImage(item.url) if item.url is not None else item.data or b""
        try:
            result = await self._classify(JobImage(job, item.position, item.image_id, source))
        except Exception as error:
            if isinstance(error, _PASSING) and self._puts_off((job.id, item.position), error):
                return None
            if not isinstance(error, _EXPECTED):
                _log.error("a bug", exc_info=error)
            return FAILED, failed_item(job.id, item.position, item.image_id, error)
        return result.verdict.value, result

    def _puts_off(self, image: tuple[str, int], error: Exception) -> bool:
        """Note that an image is to be tried again, each time after a longer while.

        Not where it is the image that takes too long: it has missed its deadline again and again with nothing beside
        it, and would keep its job from ever being done.
        """
        attempts = self._later[image].attempts + 1 if image in self._later else 1
        if isinstance(error, DeadlineExceeded) and attempts >= _OWN_FAULT and not self._busy():
            return False
        wait_s = min(_FIRST_WAIT_S * 2 ** (attempts - 1), _LAST_WAIT_S)
        self._later[image] = _PutOff(attempts, time.monotonic() + wait_s)
        return True

    async def _purge(self) -> None:
        if time.monotonic() < self._purge_at_s:
            return
        while await self._editor.write(partial(jobs.purge, older_than_s=self._results_s)):
            pass
        self._purge_at_s = time.monotonic() + _PURGE_EVERY_S
