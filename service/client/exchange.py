"""One call from the first attempt to its answer, without sending: both clients do what this says, each in its way."""

import itertools
import random
import re
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeVar
from uuid import uuid4

from pydantic import BaseModel

from service.client.answers import Reply, read_reply, reply_retry_after_s
from service.client.calls import Call
from service.client.errors import ConnectionFailed, HardlookError
from service.client.retries import REFUSED_STATUSES, RETRIED_STATUSES, pause_s

AnswerT = TypeVar("AnswerT", bound=BaseModel)
MAX_ATTEMPTS = 999
# The service takes 64 characters; the attempt's number needs four.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,60}")


@dataclass(frozen=True)
class Send:
    """Send the call with this request id, and have the whole reply within this time."""

    request_id: str
    timeout_s: float


@dataclass(frozen=True)
class Pause:
    """Wait."""

    seconds: float


@dataclass(frozen=True)
class Failure:
    """There was no reply.

    Attributes:
        reason: why.
        retried: whether there may be one to the next attempt.
        sent: whether the service may have heard of it.
    """

    reason: str
    retried: bool
    sent: bool = True


@dataclass(frozen=True)
class RetryRules:
    """How long and how often to ask.

    Attributes:
        timeout_s: for everything together, pauses included.
        max_attempts: of sending.

    Raises:
        ValueError: out of range.
    """

    timeout_s: float
    max_attempts: int

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s < float("inf"):
            raise ValueError(f"timeout_s must be above 0 and finite, got {self.timeout_s}")
        if not 1 <= self.max_attempts <= MAX_ATTEMPTS:
            raise ValueError(f"max_attempts must be in 1..{MAX_ATTEMPTS}, got {self.max_attempts}")


def exchange(
    call: Call[AnswerT],
    rules: RetryRules,
    request_id: str | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
    share: Callable[[], float] = random.random,
) -> Generator[Send | Pause, Reply | Failure | None, AnswerT]:
    """What to do until there is an answer.

    What may be done twice is sent again whenever that may help; other calls only where the service has not done it.

    Args:
        call: what to ask.
        rules: how long and how often.
        request_id: 1 to 60 of A-Z a-z 0-9 . _ -; later attempts add '-2', '-3' and so on, so that each has its own
            line in the service's log. A random one where None.
        clock: seconds that only grow.
        share: uniform in [0, 1).

    Yields:
        Send, to be answered with its Reply or Failure, or Pause, to be answered with None.

    Returns:
        The answer.

    Raises:
        ConnectionFailed, AnswerNotUnderstood, ProblemError: what the last attempt came to.
        ValueError: not a request id.
    """
    if request_id is not None and not _REQUEST_ID.fullmatch(request_id):
        raise ValueError("a request id has 1 to 60 of A-Z a-z 0-9 . _ -")
    first_id = request_id or uuid4().hex
    until_s = clock() + rules.timeout_s
    for attempt in itertools.count(1):
        outcome = yield Send(first_id if attempt == 1 else f"{first_id}-{attempt}", until_s - clock())
        assert outcome is not None
        try:
            return _answer(call, outcome, attempt)
        except HardlookError:
            wait_s = _wait_s(call, outcome, attempt, share())
            if wait_s is None or attempt >= rules.max_attempts or clock() + wait_s >= until_s:
                raise
        yield Pause(wait_s)
    raise AssertionError("itertools.count has no end")


def _answer(call: Call[AnswerT], outcome: Reply | Failure, attempt: int) -> AnswerT:
    if isinstance(outcome, Failure):
        raise ConnectionFailed(outcome.reason, attempt, in_doubt=outcome.sent and not call.repeatable)
    return read_reply(call, outcome)


def _wait_s(call: Call[AnswerT], outcome: Reply | Failure, attempt: int, share: float) -> float | None:
    """How long to wait before the next attempt; None where it would come to the same, or be done twice."""
    if isinstance(outcome, Failure):
        again = outcome.retried and (call.repeatable or not outcome.sent)
        return pause_s(attempt, share, None) if again else None
    if outcome.status not in (RETRIED_STATUSES if call.repeatable else REFUSED_STATUSES):
        return None
    return pause_s(attempt, share, reply_retry_after_s(outcome))
