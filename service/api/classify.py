"""POST /classify: is this image safe?"""

import asyncio
from collections import Counter
from typing import Annotated

from fastapi import APIRouter, Query, Request

from service.api.documentation import request_body
from service.api.items import answer_each, bounded_k, count_further
from service.classifier import RemoteImage
from service.intake import Upload, merge_parameters, read_submission
from service.runtime import caller_of, request_id_of, runtime_of, unless_disconnected
from service.schemas import classify_item, coarse_classify_item, problem_responses, snapshot_version
from service.wire import SHOWN_NEIGHBORS, ClassifyAnswer, ClassifyBody, ClassifyItem, ClassifyParameters

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
        await count_further(runtime, caller, submission)
        until_s = asyncio.get_running_loop().time() + settings.deadline_s

        async def work(upload: Upload, source: bytes | RemoteImage) -> ClassifyItem:
            found = await runtime.classifier.classify(source, snapshot, shown, until_s)
            if runtime.answers_coarsely(caller, found.sha256, found.embedding):
                return coarse_classify_item(upload.id, found)
            return classify_item(upload.id, found, runtime.calibrated)

        request_id = request_id_of(request)
        with runtime.admission.work_on(len(submission.uploads)):
            each = answer_each(submission.uploads, work, at_a_time=settings.decode_workers, request_id=request_id)
            results = await unless_disconnected(request, each)
        request.state.log_fields = {"verdicts": Counter(str(getattr(item, "verdict", "error")) for item in results)}
        return ClassifyAnswer(
            request_id=request_id,
            model=runtime.model,
            snapshot=snapshot_version(snapshot),
            policy=runtime.policy,
            results=results,
        )
