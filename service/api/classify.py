"""POST /classify: is this image safe?"""

import asyncio
from collections import Counter
from typing import Annotated

from fastapi import APIRouter, Query, Request

from service.api.documentation import request_body
from service.api.items import answer_each, bounded_k, count_further
from service.intake import merge_parameters, read_submission
from service.judging import Judge
from service.runtime import caller_of, request_id_of, runtime_of, unless_disconnected
from service.schemas import problem_responses, snapshot_version
from service.wire import SHOWN_NEIGHBORS, ClassifyAnswer, ClassifyBody, ClassifyParameters

router = APIRouter()


@router.post(
    "/classify",
    summary="Is this image safe?",
    responses=problem_responses(400, 401, 403, 408, 413, 415, 422, 429, 500, 503, 504),
    openapi_extra=request_body(ClassifyBody),
)
async def classify(request: Request, query: Annotated[ClassifyParameters, Query()]) -> ClassifyAnswer:
    """Send one image or many, as multipart files, as the raw body, or as base64 in JSON.

    One image: its verdict, or a problem. Many images: 200 with a verdict or an error for each, in their order. The
    verdict is `safe`, `unsafe` or `review`; of several frames the most cautious decides.
    """
    caller = await caller_of(request, "classify")
    runtime = runtime_of(request)
    settings = runtime.settings
    with runtime.admission.enter():
        snapshot = runtime.published.pools()
        with runtime.metrics.stage("body"):
            submission = await read_submission(request, ClassifyBody, settings)
        shown = bounded_k(merge_parameters(query, submission).k, SHOWN_NEIGHBORS, settings.max_neighbors)
        await count_further(runtime, caller, len(submission.uploads))
        until_s = asyncio.get_running_loop().time() + settings.deadline_s

        request_id = request_id_of(request)
        judge = Judge(runtime, caller, "/classify", request_id, snapshot, shown, until_s)
        with runtime.admission.work_on(len(submission.uploads)):
            each = answer_each(submission.uploads, judge, at_a_time=settings.decode_workers, request_id=request_id)
            results = await unless_disconnected(request, each)
        request.state.log_fields = {"verdicts": Counter(str(getattr(item, "verdict", "error")) for item in results)}
        return ClassifyAnswer(
            request_id=request_id,
            model=runtime.model,
            snapshot=snapshot_version(snapshot),
            policy=runtime.policy,
            results=results,
        )
