"""POST /v1/moderations and POST /adapters/pict-rs: ways in for programs that know nothing of hardlook.

Both fail closed: what was not judged is never answered as if it had been.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from service.api.documentation import json_request_body, raw_request_body
from service.api.items import EXPECTED, answer_each, bounded_k, count_further
from service.classifier import RemoteImage
from service.errors import InvalidParameter, MalformedBody, TooManyImages, UnsupportedBody
from service.intake import RAW, Submission, Upload, image_content, invalid_parameter, read_json, read_submission
from service.judging import Judge
from service.problems import MEDIA_TYPE, extra_headers, problem
from service.runtime import caller_of, request_id_of, runtime_of, unless_disconnected
from service.schemas import problem_responses, snapshot_version
from service.schemas_adapters import (
    moderation_result,
    most_cautious_verdict,
    rejection,
    with_openai_error,
)
from service.wire import MAX_URL_CHARS, SHOWN_NEIGHBORS, ClassifyBody, ClassifyItem, ImageData, ItemError
from service.wire_adapters import (
    ImagePart,
    ModerationAnswer,
    ModerationBody,
    ModerationDetails,
    ModerationParameters,
    ValidationAnswer,
    ValidationParameters,
)

router = APIRouter()
_STATUSES = (400, 401, 403, 408, 413, 415, 422, 429, 500, 503, 504)
_ABOUT_THE_INPUT = (400, 413, 415, 422)


class _OpenAIRoute(APIRoute):
    """Answers with problems that clients of OpenAI can read."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See FastAPI's "Custom Request and APIRoute class"."""
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                return _openai_problem(request, invalid_parameter(error.errors()))
            except EXPECTED as error:
                return _openai_problem(request, error)

        return handler


openai = APIRouter(route_class=_OpenAIRoute)


@openai.post(
    "/v1/moderations",
    summary="Is this image safe? For clients of OpenAI's moderation endpoint",
    response_model=ModerationAnswer,
    responses=problem_responses(*_STATUSES),
    openapi_extra=json_request_body(ModerationBody),
)
async def moderations(
    request: Request, query: Annotated[ModerationParameters, Query()]
) -> ModerationAnswer | JSONResponse:
    """Send what a client of OpenAI sends for images; one result comes back for all of them together.

    Images alone are judged: input without any is an error, and so is text beside them unless the query says
    `text=ignore`. An image that cannot be judged is an error of the whole request. Errors have the member `error` that
    such clients read.
    """
    caller = await caller_of(request, "classify")
    runtime = runtime_of(request)
    settings = runtime.settings
    with runtime.admission.enter():
        snapshot = runtime.published.pools()
        with runtime.metrics.stage("body"):
            body = await read_json(request, ModerationBody, settings)
            submission, not_judged = await asyncio.to_thread(_images_of, body, query.text)
        if len(submission.uploads) > settings.max_images_per_request:
            raise TooManyImages(settings.max_images_per_request)
        await count_further(runtime, caller, len(submission.uploads))
        shown = bounded_k(None, SHOWN_NEIGHBORS, settings.max_neighbors)
        if runtime.policy.rule == "vote":  # the answer says of what category the voters are
            shown = max(shown, runtime.policy.k)
        until_s = asyncio.get_running_loop().time() + settings.deadline_s
        judge = Judge(runtime, caller, "/v1/moderations", request_id_of(request), snapshot, shown, until_s)
        request_id = request_id_of(request)
        with runtime.admission.work_on(len(submission.uploads)):
            each = answer_each(submission.uploads, judge, at_a_time=settings.decode_workers, request_id=request_id)
            results = await unless_disconnected(request, each)
    request.state.log_fields = {"verdicts": Counter(str(getattr(item, "verdict", "error")) for item in results)}
    items = [item for item in results if isinstance(item, ClassifyItem)]
    for item in results:
        if isinstance(item, ItemError):
            return _problem_response(with_openai_error(item.error.model_dump(), f"input[{item.id}]"))
    details = ModerationDetails(
        request_id=request_id,
        verdict=most_cautious_verdict(items),
        model=runtime.model,
        snapshot=snapshot_version(snapshot),
        policy=runtime.policy,
        images=items,
        not_judged=not_judged,
    )
    result = moderation_result(details, settings.moderations_flag_review)
    return ModerationAnswer(id=f"modr-{request_id}", model=runtime.model.name, results=[result])


router.include_router(openai)


@router.post(
    "/adapters/pict-rs",
    summary="May pict-rs keep this file? For its external validation",
    response_model=ValidationAnswer,
    responses=problem_responses(*_STATUSES),
    openapi_extra=raw_request_body(),
)
async def pict_rs(request: Request, query: Annotated[ValidationParameters, Query()]) -> ValidationAnswer | JSONResponse:
    """200 for an image that is safe, and for one to be reviewed where the query says `review=accept`.

    Everything else is a problem, so that pict-rs refuses the upload: an unsafe image is `image-rejected`, and so is one
    to be reviewed; a video, a file that cannot be judged and a service at its capacity have their own.
    """
    caller = await caller_of(request, "classify")
    runtime = runtime_of(request)
    settings = runtime.settings
    content_type = request.headers.get("content-type", RAW).partition(";")[0].strip().lower()
    if content_type != RAW and not content_type.startswith("image/"):
        raise UnsupportedBody(content_type, ("image/*", RAW))
    with runtime.admission.enter():
        snapshot = runtime.published.pools()
        with runtime.metrics.stage("body"):
            submission = await read_submission(request, ClassifyBody, settings)
        until_s = asyncio.get_running_loop().time() + settings.deadline_s
        judge = Judge(runtime, caller, "/adapters/pict-rs", request_id_of(request), snapshot, 1, until_s)
        request_id = request_id_of(request)
        with runtime.admission.work_on(1):
            each = answer_each(submission.uploads, judge, at_a_time=1, request_id=request_id)
            [item] = await unless_disconnected(request, each)
    assert isinstance(item, ClassifyItem)  # the error of an only image is raised
    request.state.log_fields = {"verdicts": Counter([str(item.verdict)])}
    if item.verdict == "safe" or (item.verdict == "review" and query.review == "accept"):
        return ValidationAnswer(request_id=request_id, verdict=item.verdict, reason=item.reason)
    return _problem_response(rejection(item, request_id))


def _images_of(body: ModerationBody, text: Literal["refuse", "ignore"]) -> tuple[Submission, list[str]]:
    """The images of a body, and the names of the parts that are not judged.

    Raises:
        InvalidParameter: there is no image, or a text that is not to be ignored.
    """
    uploads: list[Upload] = []
    not_judged: list[str] = []
    for position, part in enumerate([body.input] if isinstance(body.input, str) else body.input):
        if isinstance(part, ImagePart):
            uploads.append(Upload(str(position), _content(part.image_url.url)))
        else:
            not_judged.append(f"input[{position}]")
    if not uploads:
        raise InvalidParameter("input", "there is no image in it, and this service judges images alone")
    if not_judged and text == "refuse":
        raise InvalidParameter(
            "input",
            f"{not_judged[0]} is a text, and this service judges images alone: send none, or have it left out of the "
            "judgement with the query parameter text=ignore",
        )
    return Submission(tuple(uploads)), not_judged


def _content(url: str) -> bytes | RemoteImage | MalformedBody:
    if url.startswith("data:"):
        return image_content(ImageData(data=url))
    if len(url) > MAX_URL_CHARS:
        return MalformedBody(f"the URL has {len(url)} characters, the limit is {MAX_URL_CHARS}")
    return RemoteImage(url)


def _openai_problem(request: Request, error: Exception) -> JSONResponse:
    body = problem(error, request_id_of(request))
    param = "input" if body["status"] in _ABOUT_THE_INPUT else None
    if isinstance(error, InvalidParameter):
        param = error.name
    return _problem_response(with_openai_error(body, param), error)


def _problem_response(body: dict[str, Any], error: Exception | None = None) -> JSONResponse:
    status = int(body["status"])
    return JSONResponse(body, status_code=status, media_type=MEDIA_TYPE, headers=extra_headers(status, error))
