"""What comes back: an answer of the expected shape, or an exception. Nothing in between becomes a verdict."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar, cast

from pydantic import BaseModel, ValidationError

from service.client.calls import Call, Content, Saved
from service.client.errors import AnswerNotUnderstood, problem_error
from service.client.retries import retry_after_s
from service.wire import ClassifyAnswer, Problem, SimilarAnswer
from service.wire_explain import ExplainAnswer

AnswerT = TypeVar("AnswerT", bound=BaseModel)
ModelT = TypeVar("ModelT", bound=BaseModel)
PROBLEM = "application/problem+json"
_SHOWN_CHARS = 80


@dataclass(frozen=True)
class Reply:
    """An HTTP response that was read.

    Attributes:
        status: of HTTP.
        headers: by lower-case name.
        body: None where it has more bytes than the client reads.
        received_s: when it came, in seconds since the epoch.
        saved: where the body is, which then is not in `body`.
    """

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes | None = field(repr=False)
    received_s: float = 0.0
    saved: Saved | None = None


def read_reply(call: Call[AnswerT], reply: Reply) -> AnswerT:
    """The answer to a call.

    Raises:
        ProblemError: the service answered with a problem.
        AnswerNotUnderstood: no answer of this service.
    """
    if reply.status == call.status:
        if reply.saved is not None:
            return cast(AnswerT, reply.saved)
        if call.answer is Content:
            return cast(AnswerT, Content(content=_whole(reply, call.media_type)))
        return _named(call, _parsed(reply, call.media_type, call.answer))
    if reply.status >= 400:
        problem = _parsed(reply, PROBLEM, Problem)
        raise problem_error(problem, reply.status, reply_retry_after_s(reply))
    if 300 <= reply.status < 400:
        raise AnswerNotUnderstood(reply.status, "redirects are not followed: the base URL must be the last one")
    raise AnswerNotUnderstood(reply.status, "this is not answered with that status")


def reply_retry_after_s(reply: Reply) -> float | None:
    """What a reply says of when to come back."""
    return retry_after_s(reply.headers.get("retry-after"), reply.received_s)


def _whole(reply: Reply, media_type: str) -> bytes:
    """The body, where it is all there and is what was asked for."""
    encoding = reply.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise AnswerNotUnderstood(reply.status, f"it is encoded as {_shown(encoding)}, which was not asked for")
    found = reply.headers.get("content-type", "")
    if found.partition(";")[0].strip().lower() != media_type:
        raise AnswerNotUnderstood(reply.status, f"it has content type {_shown(found)} in place of {media_type}")
    if reply.body is None:
        raise AnswerNotUnderstood(reply.status, "it is too large")
    return reply.body


def _parsed(reply: Reply, media_type: str, model: type[ModelT]) -> ModelT:
    body = _whole(reply, media_type)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:  # its message would quote the answer
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole"
        reason = f"{_shown(place)}: {first['msg'][:_SHOWN_CHARS]}"
    raise AnswerNotUnderstood(reply.status, reason)


def _named(call: Call[AnswerT], answer: AnswerT) -> AnswerT:
    """Give the results the caller's ids; positions were sent.

    Raises:
        AnswerNotUnderstood: not one result for each image, in order: a verdict could be taken for another image's.
    """
    if call.ids is not None and isinstance(answer, ExplainAnswer):
        [id] = call.ids
        return cast(AnswerT, answer.model_copy(update={"result": answer.result.model_copy(update={"id": id})}))
    if call.ids is None or not isinstance(answer, ClassifyAnswer | SimilarAnswer):
        return answer
    found = [result.id for result in answer.results]
    if found != [str(position) for position in range(len(call.ids))]:
        raise AnswerNotUnderstood(200, f"its {len(found)} results are not those of the {len(call.ids)} images sent")
    named = [result.model_copy(update={"id": id}) for result, id in zip(answer.results, call.ids, strict=True)]
    return cast(AnswerT, answer.model_copy(update={"results": named}))


def _shown(text: str) -> str:
    return repr(text[:_SHOWN_CHARS])
