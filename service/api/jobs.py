"""/jobs: long lists of images, which are classified when there is room. Submit, poll, read the results, cancel."""

import asyncio
import json
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response

from indexer.catalog import jobs as catalog
from indexer.catalog.clock import parse_time, text_of
from indexer.catalog.jobs import NewItem
from indexer.errors import UnknownJob
from perception.errors import ImageTooLarge
from perception.verdict import VerdictLabel
from service.api.documentation import json_request_body
from service.api.items import bounded_k
from service.errors import TooManyImages
from service.intake import JSON, image_content, read_json
from service.jobs import failed_item
from service.keys import Caller
from service.runtime import Runtime, caller_of, request_id_of, runtime_of
from service.schemas import problem_responses
from service.wire import SHOWN_NEIGHBORS, ImageData
from service.wire_jobs import (
    Job,
    JobAnswer,
    JobBody,
    JobResultsAnswer,
    JobResultsQuery,
    JobsAnswer,
    JobsQuery,
)

router = APIRouter()
JobId = Annotated[str, Path(max_length=64, description="Of the job.")]
_MAX_PAGE_CHARS = 8 * 1024 * 1024
_READ = problem_responses(400, 401, 403, 404, 409, 500, 503)


@router.post(
    "/jobs",
    summary="Classify many images, in their own time",
    status_code=202,
    responses=problem_responses(400, 401, 403, 408, 409, 413, 415, 429, 500, 503),
    openapi_extra=json_request_body(JobBody),
)
async def submit(request: Request, response: Response) -> JobAnswer:
    """Hand in a list of images. When the answer is there, the job is stored: it goes on after a restart.

    The images are classified when the service has room beside what callers wait for. Poll the job, whose address is in
    `Location`, or ask for a callback. Every image gets a verdict or an error of its own, exactly once; its file is
    erased with that.
    """
    caller = await caller_of(request, "classify")
    runtime = runtime_of(request)
    runner, settings = runtime.require_jobs(), runtime.settings
    with runtime.admission.enter():
        body = await read_json(request, JobBody, settings)
        if len(body.images) > settings.max_job_images:
            raise TooManyImages(settings.max_job_images)
        shown = bounded_k(body.k, SHOWN_NEIGHBORS, settings.max_neighbors)
        await _count(runtime, caller, len(body.images))
        id = catalog.new_id()
        items = await asyncio.to_thread(_items, id, body.images, settings.max_image_bytes)
        job = await runner.submit(id, caller.id, items, {"k": shown, "callback": body.callback})
    response.headers["Location"] = f"/jobs/{id}"
    return JobAnswer(request_id=request_id_of(request), job=_job(job, settings.job_results_s))


@router.get("/jobs", summary="Which jobs are there?", responses=_READ)
async def jobs(request: Request, query: Annotated[JobsQuery, Query()]) -> JobsAnswer:
    """The caller's jobs, newest first; everybody's, for the scope `admin`."""
    caller = await caller_of(request, "classify", images=0)
    runtime = runtime_of(request)
    found = await runtime.require_editor().read(
        partial(catalog.list_jobs, owner=_sees(caller), limit=query.limit + 1, before=query.after)
    )
    shown = [_job(job, runtime.settings.job_results_s) for job in found[: query.limit]]
    following = shown[-1].id if len(found) > query.limit else None
    return JobsAnswer(request_id=request_id_of(request), jobs=shown, next=following)


@router.get("/jobs/{id}", summary="How far is this job?", responses=_READ)
async def job(request: Request, id: JobId) -> JobAnswer:
    """A job as it stands; one that is somebody else's is unknown."""
    caller = await caller_of(request, "classify", images=0)
    runtime = runtime_of(request)
    found = await runtime.require_editor().read(partial(catalog.get, id=_possible(id), owner=_sees(caller)))
    return JobAnswer(request_id=request_id_of(request), job=_job(found, runtime.settings.job_results_s))


@router.get("/jobs/{id}/results", summary="What came of this job?", response_model=JobResultsAnswer, responses=_READ)
async def results(request: Request, id: JobId, query: Annotated[JobResultsQuery, Query()]) -> Response:
    """Verdicts and errors in the order of the job, up to the first image that still waits.

    So who goes on with `next` until it is null has every result once, while the job runs or afterwards. A page may have
    fewer results than asked for, and none where there are no new ones yet.
    """
    caller = await caller_of(request, "classify", images=0)
    editor = runtime_of(request).require_editor()
    await editor.read(partial(catalog.get, id=_possible(id), owner=_sees(caller)))
    page = await editor.read(
        partial(catalog.answers, id=id, after=query.after, limit=query.limit, max_chars=_MAX_PAGE_CHARS)
    )
    last = page.answers[-1][0] if page.answers else query.after
    # As they were stored, perhaps by an earlier version of this program, whose answers may lack what is new.
    found = ",".join(answer for _, answer in page.answers)
    head = json.dumps({"request_id": request_id_of(request), "job_id": id, "next": last if page.more else None})
    return Response(f'{head[:-1]}, "results": [{found}]}}', media_type=JSON)


@router.delete("/jobs/{id}", summary="Cancel this job", responses=_READ)
async def cancel(request: Request, id: JobId) -> JobAnswer:
    """End a job. Its images that wait are erased; results that it has stay until they expire.

    A job that has ended stays as it is.
    """
    caller = await caller_of(request, "classify", images=0)
    runtime = runtime_of(request)
    found = await runtime.require_editor().write(partial(catalog.cancel, id=_possible(id), owner=_sees(caller)))
    return JobAnswer(request_id=request_id_of(request), job=_job(found, runtime.settings.job_results_s))


def _possible(id: str) -> str:
    """An id that a job may have; PostgreSQL does not even look for one with NUL."""
    if "\0" in id:
        raise UnknownJob(id)
    return id


def _sees(caller: Caller) -> str | None:
    """Whose jobs a caller sees; None for everybody's."""
    return None if "admin" in caller.scopes else caller.id


async def _count(runtime: Runtime, caller: Caller, images: int) -> None:
    """Count the images of a job after its first, which was counted before its body was read.

    A job may be larger than what its caller may send at once: that is what jobs are for. It then counts as much as can
    be counted at once, so that it uses the limit up, and what bounds the rest is that the service works on jobs a few
    images at a time, only when it has room, and takes a bounded number of them.

    Raises:
        RateLimited: more than the caller may send now.
    """
    most = runtime.rate_limits.most_at_once(caller)
    further = (images if most is None else min(images, most)) - 1
    if further > 0:
        await runtime.rate_limits.hit(caller, further)


def _items(id: str, images: Sequence[ImageData], max_image_bytes: int) -> list[NewItem]:
    """What is stored of the images of a job; those that cannot be images have their answer at once."""
    items = []
    for position, image in enumerate(images):
        image_id = str(position) if image.id is None else image.id
        if image.url is not None:
            items.append(NewItem(image_id, url=image.url))
            continue
        content = image_content(image)
        if isinstance(content, bytes) and len(content) > max_image_bytes:
            error: Exception = ImageTooLarge("bytes", max_image_bytes, len(content))
        elif isinstance(content, bytes):
            items.append(NewItem(image_id, data=content))
            continue
        else:
            assert isinstance(content, Exception)
            error = content
        items.append(NewItem(image_id, answer=failed_item(id, position, image_id, error).model_dump_json()))
    return items


def _job(job: catalog.Job, results_s: float) -> Job:
    expires = job.finished_at and text_of(parse_time(job.finished_at) + timedelta(seconds=results_s))
    return Job(
        id=job.id,
        state=job.state,
        total=job.total,
        done=job.done,
        failed=job.failed,
        waiting=job.waiting,
        verdicts={VerdictLabel(outcome): count for outcome, count in job.outcomes.items()},
        created_at=job.time,
        finished_at=job.finished_at,
        expires_at=expires,
    )
