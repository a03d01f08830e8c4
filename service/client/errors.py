"""What the client raises. None of it is ever a verdict, and none of it holds the API key.

HardlookError
├── ImageUnreadable      an image could not be read on this side; nothing was sent
├── ConnectionFailed     no answer: refused, cut off, or not there in time
├── AnswerNotUnderstood  an answer that is none of this service's
├── JobUnfinished        a job did not end in the time that was given
├── WebhookRejected      a message that is not to be believed (`service.client.webhooks`)
└── ProblemError         the service said no, and why
    ├── Unauthenticated  401: no key, or none that is known and in force
    ├── Forbidden        403: the key has not the scope
    ├── NotFound         404: there is no such collection, exemplar, review or job
    ├── Conflict         409: it cannot be done to what is there now
    ├── RateLimited      429: more images than the key may send in a time
    └── Unavailable      503, 504: the same request may succeed later
"""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from service.wire import Problem
from service.wire_jobs import Job


class HardlookError(Exception):
    """Root of everything that the client raises, besides ValueError and TypeError for wrong arguments."""


class ImageUnreadable(HardlookError):
    """An image could not be read on this side: no such file, not a regular file, too large."""


class ConnectionFailed(HardlookError):
    """There is no answer.

    Attributes:
        reason: why.
        attempts: how often the request was sent.
        in_doubt: whether it may have been done all the same, where doing it again would not come to the same.
    """

    def __init__(self, reason: str, attempts: int = 1, *, in_doubt: bool = False) -> None:
        self.reason, self.attempts, self.in_doubt = reason, attempts, in_doubt
        doubt = "; it may have been done all the same, so it was not sent again" if in_doubt else ""
        super().__init__(f"no answer: {reason}" + (f" (after {attempts} attempts)" if attempts > 1 else "") + doubt)


class AnswerNotUnderstood(HardlookError):
    """The answer is not one that this service gives. `status` is its HTTP status."""

    def __init__(self, status: int, reason: str) -> None:
        self.status, self.reason = status, reason
        super().__init__(f"answer with status {status} not understood: {reason}")


class JobUnfinished(HardlookError):
    """A job did not end in the time that was given; it goes on. `job` is how it stood last."""

    def __init__(self, job: Job, waited_s: float) -> None:
        self.job = job
        super().__init__(f"job {job.id} is {job.state} after {waited_s:g} s: {job.waiting} of {job.total} images wait")


class ProblemError(HardlookError):
    """The service answered with a problem (RFC 9457).

    Attributes:
        problem: as parsed.
        status: HTTP status of the answer.
        retry_after_s: when to come back, in seconds, where the answer says so.
    """

    def __init__(self, problem: Problem, status: int, retry_after_s: float | None = None) -> None:
        self.problem, self.status, self.retry_after_s = problem, status, retry_after_s
        super().__init__(f"{status} {problem.title}: {problem.detail} (request {problem.request_id})")

    @property
    def type(self) -> str:
        """The problem's type, such as 'urn:hardlook:problem:corrupt-image'; docs/api.md lists them."""
        return self.problem.type

    @property
    def slug(self) -> str:
        """The last part of the problem's type, such as 'corrupt-image'."""
        return self.problem.type.rpartition(":")[2]

    @property
    def detail(self) -> str:
        """What was wrong with this request."""
        return self.problem.detail

    @property
    def request_id(self) -> str:
        """Under which the service's log has more."""
        return self.problem.request_id

    @property
    def members(self) -> Mapping[str, Any]:
        """What problems of this type carry besides, such as `limit` and `actual`."""
        return dict(self.problem.model_extra or {})


class Unauthenticated(ProblemError):
    """401: the service wants an API key, or does not know this one."""


class Forbidden(ProblemError):
    """403: the key does not have the scope that this needs."""


class NotFound(ProblemError):
    """404: there is no such collection, exemplar, version, review or job."""


class Conflict(ProblemError):
    """409: it cannot be done to what is there now; `type` says why, such as `review-taken`."""


class RateLimited(ProblemError):
    """429: the key has sent all the images that it may for now."""


class Unavailable(ProblemError):
    """503 or 504: not ready, at capacity, or out of time; the same request may succeed later."""


def problem_error(problem: Problem, status: int, retry_after_s: float | None) -> ProblemError:
    """The exception that goes with an HTTP status."""
    kinds = {
        401: Unauthenticated,
        403: Forbidden,
        404: NotFound,
        409: Conflict,
        429: RateLimited,
        503: Unavailable,
        504: Unavailable,
    }
    return kinds.get(status, ProblemError)(problem, status, retry_after_s)


def one_line(error: BaseException) -> str:
    """What an error says, in one line; of arguments that pydantic refuses, which one and why."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        return f"{place}: {first['msg'].removeprefix('Value error, ')}".removeprefix(": ")
    return " ".join(str(error).split())
