"""A run over many images: several requests at a time, a bounded number of images in memory, records as they come."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import TypeVar

from service.client.errors import (
    AnswerNotUnderstood,
    ConnectionFailed,
    Forbidden,
    HardlookError,
    ImageUnreadable,
    ProblemError,
    RateLimited,
    Unauthenticated,
    Unavailable,
    one_line,
)
from service.client.images import LoadedImage, load_image
from service.client.records import Record, error_record
from service.client.sources import Found

T = TypeVar("T")
# All other images would get the same answer: it is about the key, or about the command line.
_FATAL_TYPES = (
    "invalid-parameter",
    "unknown-gallery",
    "not-found",
    "method-not-allowed",
    "too-many-images",
    "invalid-label",
    "editing-disabled",
)
_FATAL = (Unauthenticated, Forbidden)
_NOT_THERE = (ConnectionFailed, AnswerNotUnderstood, Unavailable, RateLimited)
GIVE_UP_AFTER = 20


class BrokenOff(Exception):
    """The run cannot go on; what was answered is written."""


@dataclass
class Tally:
    """What a run came to so far."""

    skipped: int = 0
    errors: int = 0
    flagged: int = 0
    answers: dict[str, int] = field(default_factory=dict)

    @property
    def done(self) -> int:
        """Images with a record of this run."""
        return sum(self.answers.values()) + self.errors

    def add(self, record: Record, flagged_verdicts: Iterable[str]) -> None:
        """Count one record."""
        if record["status"] == "error":
            self.errors += 1
            return
        kind = record.get("verdict") or record.get("outcome", "answered")
        self.answers[kind] = self.answers.get(kind, 0) + 1
        self.flagged += kind in flagged_verdicts

    def __str__(self) -> str:
        counts = [f"{self.answers[kind]} {kind}" for kind in sorted(self.answers)]
        counts += [f"{self.errors} errors"] if self.errors else []
        counts += [f"{self.skipped} skipped"] if self.skipped else []
        return ", ".join(counts) or "no images"


@dataclass(frozen=True)
class Bulk:
    """How to run.

    Attributes:
        ask: answers some images with a record for each, in order; raises HardlookError.
        emit: takes one record.
        concurrency: requests at a time.
        per_request: images in one.
        max_image_bytes: of one image.
    """

    ask: Callable[[list[LoadedImage]], Awaitable[list[Record]]]
    emit: Callable[[Record], None]
    concurrency: int
    per_request: int
    max_image_bytes: int

    async def run(self, sources: Iterator[Found]) -> None:
        """Ask about all images; records come in the order of the answers.

        Raises:
            BrokenOff: the service is not there any more, or refuses everything.
        """
        queue: asyncio.Queue[list[Found] | None] = asyncio.Queue(2)
        feeding = _feed(_grouped(sources, self.per_request), queue, asyncio.get_running_loop())
        failures = _Streak()
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(self.concurrency):
                    tasks.create_task(self._work(queue, failures))
        except* BrokenOff as group:
            raise BrokenOff(str(group.exceptions[0])) from None
        if feeding.error is not None:
            raise feeding.error

    async def _work(self, queue: "asyncio.Queue[list[Found] | None]", failures: "_Streak") -> None:
        while (group := await queue.get()) is not None:
            images = []
            for found in group:
                image = await asyncio.to_thread(_loaded, found, self.max_image_bytes)
                if isinstance(image, ImageUnreadable):
                    self.emit(error_record(found.path, image))
                else:
                    images.append(image)
            if images:
                await self._answer(images, failures)
        await queue.put(None)  # for the next worker

    async def _answer(self, images: list[LoadedImage], failures: "_Streak") -> None:
        try:
            records = await self.ask(images)
        except HardlookError as error:
            if isinstance(error, _FATAL) or _is_fatal_type(error):
                raise BrokenOff(str(error)) from error
            records = [error_record(image.id, error) for image in images]
            failures.add(error)
        except ValueError as error:  # about the command line
            raise BrokenOff(one_line(error)) from error
        else:
            failures.clear()
        for record in records:
            self.emit(record)
        failures.check()


class _Streak:
    """Requests in a row that got no answer."""

    def __init__(self) -> None:
        self._length, self._last = 0, ""

    def add(self, error: HardlookError) -> None:
        if isinstance(error, _NOT_THERE):
            self._length, self._last = self._length + 1, str(error)
        else:
            self.clear()

    def clear(self) -> None:
        self._length = 0

    def check(self) -> None:
        if self._length >= GIVE_UP_AFTER:
            raise BrokenOff(f"{self._length} requests in a row failed, the last one: {self._last}")


def _is_fatal_type(error: HardlookError) -> bool:
    return isinstance(error, ProblemError) and error.slug in _FATAL_TYPES


def _loaded(found: Found, max_bytes: int) -> LoadedImage | ImageUnreadable:
    if found.source is None:
        return found.error or ImageUnreadable(found.path)
    try:
        return LoadedImage(found.path, load_image(found.source, max_bytes))
    except ImageUnreadable as error:
        return error


def _grouped(items: Iterator[T], size: int) -> Iterator[list[T]]:
    group: list[T] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


@dataclass
class _Feeding:
    error: Exception | None = None


def _feed(items: Iterator[T], queue: "asyncio.Queue[T | None]", loop: asyncio.AbstractEventLoop) -> _Feeding:
    """Put everything into the queue and None at the end, from a thread: reading from a pipe or a disk may wait.

    A daemon, since it may wait for ever; a run that is broken off does not wait for it.
    """
    feeding = _Feeding()

    def put(item: T | None) -> bool:
        """Whether the run still takes anything."""
        putting = queue.put(item)
        try:
            asyncio.run_coroutine_threadsafe(putting, loop).result()
        except (RuntimeError, CancelledError):  # the loop is closed, or being closed
            putting.close()
            return False
        return True

    def feed() -> None:
        try:
            for item in items:
                if not put(item):
                    return
        except Exception as error:
            feeding.error = error
        put(None)

    threading.Thread(target=feed, name="feeding", daemon=True).start()
    return feeding
