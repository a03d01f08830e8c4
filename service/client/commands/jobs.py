"""hardlook jobs: hand in many images, and come back for their verdicts."""

import sys
from collections.abc import Iterator
from typing import Annotated, Literal

from cyclopts import App, Parameter

from service.client.bulk import Tally
from service.client.clients import MAX_IMAGE_BYTES
from service.client.commands.options import (
    ALL_ANSWERED,
    HERE,
    SOME_ERRORS,
    FailOn,
    Json,
    Paths,
    Service,
    flagged_verdicts,
)
from service.client.commands.output import print_json, print_line
from service.client.commands.running import NO_LISTS, Selection, exit_code, say_linked, to_stdout
from service.client.errors import ImageUnreadable, JobUnfinished
from service.client.exchange import MAX_ATTEMPTS
from service.client.images import LoadedImage, load_image
from service.client.records import job_record, printable
from service.client.sources import Sources
from service.wire import MAX_ID_CHARS
from service.wire_jobs import Job

Ids = Annotated[str, Parameter(help="Ids of jobs.")]
# In base64 it fits into what a service takes by default.
_JOB_BYTES = 20 * 1024 * 1024


def mount(app: App) -> None:
    """Add the commands."""
    jobs = App(name="jobs", help="Long lists of images that the service classifies in its own time.")
    jobs.command(_submit, name="submit")
    jobs.command(_list, name="list")
    jobs.command(_show, name="show")
    jobs.command(_wait, name="wait")
    jobs.command(_results, name="results")
    jobs.command(_cancel, name="cancel")
    app.command(jobs)


def _submit(
    *paths: Paths,
    selection: Selection = NO_LISTS,
    per_job: Annotated[int, Parameter(help="The most images in one job.")] = 100,
    k: Annotated[int | None, Parameter(help="Neighbours of each pool to show.")] = None,
    callback: Annotated[bool, Parameter(negative=(), help="Send the event job.done to webhooks.")] = False,
    json: Json = False,
    service: Service = HERE,
) -> int:
    """Hand in images, in as many jobs as it takes, and print the jobs' ids.

    In the results an image has its path as id, or the last 256 characters of it. Files that cannot be read are said
    and left out; the exit code is then 1.
    """
    if per_job < 1:
        raise ValueError(f"--per-job must be at least 1, got {per_job}")
    sources = selection.sources(paths)
    unreadable: list[ImageUnreadable] = []
    with service.client(max_attempts=MAX_ATTEMPTS) as client:  # the service may have to get on with others first
        for group in _groups(sources, per_job, unreadable):
            job = client.jobs.submit([(image.id, image.content) for image in group], k=k, callback=callback).job
            if json:
                print_json(job)
            else:
                print_line(job.id)
    say_linked(sources)
    return SOME_ERRORS if unreadable else ALL_ANSWERED


def _list(*, json: Json = False, service: Service = HERE) -> None:
    """List one's own jobs, newest first; with the scope admin everybody's."""
    with service.client() as client:
        for job in client.jobs.list(page_size=200):
            _print_job(job, json)


def _show(id: Annotated[str, Parameter(help="Of the job.")], *, json: Json = False, service: Service = HERE) -> None:
    """Show how far a job is."""
    with service.client() as client:
        _print_job(client.jobs.get(id).job, json)


def _wait(
    *ids: Ids,
    max_wait: Annotated[float | None, Parameter(help="Seconds to wait; for ever by default.")] = None,
    json: Json = False,
    service: Service = HERE,
) -> int:
    """Wait until jobs are done. Exits with 1 where images failed, a job was cancelled, or it takes longer."""
    _require(ids)
    code = ALL_ANSWERED
    with service.client() as client:
        for id in ids:
            try:
                job = client.jobs.wait(id, timeout_s=max_wait, progress=_Progress().show).job
            except JobUnfinished as error:
                job = error.job
            _print_job(job, json)
            if job.failed or job.state != "done":
                code = SOME_ERRORS
    return code


def _results(
    *ids: Ids,
    wait: Annotated[bool, Parameter(negative=(), help="Until the jobs are done.")] = False,
    fail_on: FailOn = "",
    format: Annotated[Literal["jsonl", "table"], Parameter(help="Of what goes to stdout.")] = "jsonl",
    service: Service = HERE,
) -> int:
    """Write a record for each image of some jobs, as classify does; without --wait those that there are by now."""
    _require(ids)
    flagged, tally, write = flagged_verdicts(fail_on), Tally(), to_stdout(format)
    with service.client() as client:
        for id in ids:
            for item in client.jobs.results(id, wait=wait, page_size=1000):
                record = job_record(item)
                write(record)
                tally.add(record, flagged)
    print(tally, file=sys.stderr)
    return exit_code(tally)


def _cancel(*ids: Ids, json: Json = False, service: Service = HERE) -> None:
    """End jobs; results that they have stay until they expire."""
    _require(ids)
    with service.client() as client:
        for id in ids:
            _print_job(client.jobs.cancel(id).job, json)


class _Progress:
    """Says how far a job is, on stderr, when that has changed."""

    def __init__(self) -> None:
        self._said = -1

    def show(self, job: Job) -> None:
        """To be called with the job as it stands."""
        answered = job.done + job.failed
        if answered != self._said and job.finished_at is None:
            self._said = answered
            print(f"{job.id}  {answered} of {job.total}", file=sys.stderr)


def _groups(sources: Sources, per_job: int, unreadable: list[ImageUnreadable]) -> Iterator[list[LoadedImage]]:
    """Images that can be read, as many as one job takes."""
    group: list[LoadedImage] = []
    group_bytes = 0
    for found in sources:
        try:
            if found.source is None:
                raise found.error or ImageUnreadable(found.path)
            content = load_image(found.source, MAX_IMAGE_BYTES)
        except ImageUnreadable as error:
            unreadable.append(error)
            print(printable(str(error)), file=sys.stderr)
            continue
        size_bytes = len(content) if isinstance(content, bytes) else len(content.address)
        if group and (len(group) == per_job or group_bytes + size_bytes > _JOB_BYTES):
            yield group
            group, group_bytes = [], 0
        group.append(LoadedImage(printable(found.path)[-MAX_ID_CHARS:], content))
        group_bytes += size_bytes
    if group:
        yield group


def _require(ids: tuple[str, ...]) -> None:
    if not ids:
        raise ValueError("name jobs by their ids")


def _print_job(job: Job, json: bool) -> None:
    if json:
        print_json(job)
        return
    verdicts = ", ".join(f"{n} {verdict.value}" for verdict, n in sorted(job.verdicts.items()))
    failed = f"{job.failed} failed" if job.failed else None
    print_line(job.id, f"{job.state:<9}", job.created_at, f"{job.done + job.failed} of {job.total}", verdicts, failed)
