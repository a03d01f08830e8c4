"""Jobs: long lists of images that the service classifies in its own time."""

import time
from collections.abc import Callable

from service.client.calls import Call, given, image_source, json_call, path_of
from service.client.errors import JobUnfinished
from service.client.images import Images, load_images
from service.client.parts import Item, Items, Part, Steps, WayT, ask, asked, growing_pauses, listed, stepped
from service.wire import ImageData
from service.wire_jobs import Job, JobAnswer, JobBody, JobItem, JobItemError, JobResultsAnswer, JobsAnswer

_MOST_BETWEEN_POLLS_S = 10.0
_MOST_BETWEEN_RESULTS_S = 2.0


class Jobs(Part[WayT]):
    """Submit, poll, read the results, cancel. Needs the scope `classify`; others' jobs are unknown.

    What waits for a job waits through restarts of the service, as long as one of them takes less than `timeout_s` of
    the client. All raise ConnectionFailed, AnswerNotUnderstood and ProblemError.
    """

    @asked
    def submit(self, images: Images, *, k: int | None = None, callback: bool = False) -> Call[JobAnswer]:
        """Hand in a list of images; the job is stored when this returns.

        It is not sent again where it may have been heard: there would be two jobs. `list` then shows whether there is
        one.

        Args:
            images: as of `classify`; ids have at most 256 characters.
            k: neighbours of each pool to show.
            callback: send the event `job.done` to the webhooks that ask for it.

        Raises:
            ImageUnreadable: an image cannot be read here.
        """
        return _submission(images, k, callback, self.carrier.max_image_bytes)

    @listed
    def list(self, *, page_size: int | None = None) -> Items[Job]:
        """Iterate over one's own jobs, newest first; with the scope `admin` over everybody's."""
        after: str | None = None
        while True:
            page = yield from ask(Call("GET", "/jobs", JobsAnswer, given(limit=page_size, after=after)))
            for job in page.jobs:
                yield Item(job)
            if page.next is None:
                return
            after = page.next

    @asked
    def get(self, id: str) -> Call[JobAnswer]:
        """A job as it stands."""
        return _job(id)

    @asked
    def cancel(self, id: str) -> Call[JobAnswer]:
        """End a job; results that it has stay until they expire."""
        return Call("DELETE", path_of("jobs", id), JobAnswer)

    @stepped
    def wait(
        self, id: str, *, timeout_s: float | None = None, progress: Callable[[Job], object] | None = None
    ) -> Steps[JobAnswer]:
        """Poll, less and less often, until a job is done or cancelled.

        Args:
            id: of the job.
            timeout_s: how long; for ever where None.
            progress: called with the job as it stands after every poll.

        Raises:
            JobUnfinished: it is not done in that time.
        """
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        for pause in growing_pauses(_MOST_BETWEEN_POLLS_S):
            answer = yield from ask(_job(id), patient=True)
            if progress is not None:
                progress(answer.job)
            if answer.job.finished_at is not None:
                return answer
            if timeout_s is not None and until_s is not None and time.monotonic() + pause.seconds > until_s:
                raise JobUnfinished(answer.job, timeout_s)
            yield pause
        raise AssertionError("pauses have no end")

    @listed
    def results(self, id: str, *, wait: bool = False, page_size: int | None = None) -> Items[JobItem | JobItemError]:
        """Iterate over results in the order of the job: a verdict or an error an image.

        Args:
            id: of the job.
            wait: for all of them, while the job runs; otherwise those up to the first image that still waits.
            page_size: results in one request, at most 1000.
        """
        return _results(id, wait, page_size)

    @listed
    def run(self, images: Images, *, k: int | None = None) -> Items[JobItem | JobItemError]:
        """Submit a job, and iterate over its results as they come.

        A job that nobody iterates over any more goes on. Arguments and errors are those of `submit`.
        """
        submission = _submission(images, k, False, self.carrier.max_image_bytes)

        def steps() -> Items[JobItem | JobItemError]:
            answer = yield from ask(submission)
            yield from _results(answer.job.id, True, None)

        return steps()


def _submission(images: Images, k: int | None, callback: bool, max_image_bytes: int) -> Call[JobAnswer]:
    loaded = load_images(images, max_image_bytes)
    entries = [ImageData(id=image.id, **image_source(image.content)) for image in loaded]
    body = JobBody(images=entries, k=k, callback=callback)
    return json_call("POST", "/jobs", JobAnswer, body, status=202, repeatable=False)


def _job(id: str) -> Call[JobAnswer]:
    return Call("GET", path_of("jobs", id), JobAnswer)


def _results(id: str, wait: bool, page_size: int | None) -> Items[JobItem | JobItemError]:
    pauses = growing_pauses(_MOST_BETWEEN_RESULTS_S)
    after: int | None = None
    while True:
        params = given(limit=page_size, after=after)
        page = yield from ask(Call("GET", path_of("jobs", id, "results"), JobResultsAnswer, params), patient=wait)
        for result in page.results:
            yield Item(result)
        if page.next is None:
            return
        if not page.results:
            if not wait:
                return
            yield next(pauses)
        after = page.next
