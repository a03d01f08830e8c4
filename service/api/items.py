"""One request, one or many images: how they are worked on together and how each gets its result or its error."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from indexer.errors import IndexerError
from perception.errors import PerceptionError
from service.classifier import RemoteImage
from service.errors import InvalidParameter, ServiceError, TooManyImages
from service.intake import Upload
from service.keys import Caller
from service.problems import problem
from service.runtime import Runtime
from service.wire import ItemError, Problem

T = TypeVar("T")
EXPECTED = (PerceptionError, IndexerError, ServiceError)
_log = logging.getLogger("hardlook.requests")


async def answer_each(
    uploads: Sequence[Upload],
    work: Callable[[Upload, bytes | RemoteImage], Awaitable[T]],
    *,
    at_a_time: int,
    request_id: str,
) -> list[T | ItemError]:
    """Work on every image of a request.

    Args:
        uploads: the images.
        work: answers one, given its bytes or where to fetch them.
        at_a_time: bound of the images in work, so that one request cannot fill the queues.
        request_id: for problems.

    Returns:
        A result or an error for each, in order. The error of an only image is raised instead.
    """
    places = asyncio.Semaphore(at_a_time)

    async def answer(upload: Upload) -> T:
        async with places:
            if isinstance(upload.content, Exception):
                raise upload.content
            return await work(upload, upload.content)

    if len(uploads) == 1:
        return [await answer(uploads[0])]
    outcomes = await asyncio.gather(*(answer(upload) for upload in uploads), return_exceptions=True)
    return [_result(upload.id, outcome, request_id) for upload, outcome in zip(uploads, outcomes, strict=True)]


def _result(id: str, outcome: T | BaseException, request_id: str) -> T | ItemError:
    if not isinstance(outcome, BaseException):
        return outcome
    if not isinstance(outcome, Exception):
        raise outcome
    if not isinstance(outcome, EXPECTED):
        _log.error("a bug", exc_info=outcome)
    return ItemError(id=id, error=Problem(**problem(outcome, request_id)))


async def count_further(runtime: Runtime, caller: Caller, images: int) -> None:
    """Count the images of a request after its first, which was counted before its body was read.

    Raises:
        RateLimited: more than the caller may send now.
        TooManyImages: more than it may ever send at once.
    """
    most = runtime.rate_limits.most_at_once(caller)
    if most is not None and images > most:
        raise TooManyImages(most)
    if images > 1:
        await runtime.rate_limits.hit(caller, images - 1)


def bounded_k(asked: int | None, default: int, limit: int) -> int:
    """How many neighbours to answer with.

    Raises:
        InvalidParameter: more than the settings allow.
    """
    if asked is not None and asked > limit:
        raise InvalidParameter("k", f"it is {asked}, the limit is {limit}")
    return min(default, limit) if asked is None else asked
