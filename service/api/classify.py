"""POST /classify: is this image safe?"""

from typing import Annotated

from fastapi import APIRouter, Query, Request

from service.api.documentation import request_body
from service.api.items import answer_each, bounded_k
from service.intake import Upload, merge_parameters, read_submission
from service.runtime import request_id_of, runtime_of, unless_disconnected
from service.schemas import (
    SHOWN_NEIGHBORS,
    ClassifyAnswer,
    ClassifyBody,
    ClassifyItem,
    ClassifyParameters,
    SnapshotVersion,
    problem_responses,
)

router = APIRouter()


@router.post(
    "/classify",
    summary="Is this image safe?",
    responses=problem_responses(400, 408, 413, 415, 422, 500, 503, 504),
    openapi_extra=request_body(ClassifyBody),
)
async def classify(request: Request, query: Annotated[ClassifyParameters, Query()]) -> ClassifyAnswer:
    """Send one image or many, as multipart files, as the raw body, or as base64 in JSON.

    One image: its verdict, or a problem. Many images: 200 with a verdict or an error for each, in their order. The
    verdict is `safe`, `unsafe` or `review`; of several frames the most cautious decides.
    """
    runtime = runtime_of(request)
    settings = runtime.settings
    with runtime.admission.enter():
        snapshot = runtime.published.pools()
        submission = await read_submission(request, ClassifyBody, settings)
        shown = bounded_k(merge_parameters(query, submission).k, SHOWN_NEIGHBORS, settings.max_neighbors)

        async def work(upload: Upload, data: bytes) -> ClassifyItem:
            found = await runtime.classifier.classify(data, snapshot, shown)
            return ClassifyItem.of(upload.id, found, runtime.calibrated)

        request_id = request_id_of(request)
        each = answer_each(submission.uploads, work, at_a_time=settings.decode_workers, request_id=request_id)
        return ClassifyAnswer(
            request_id=request_id,
            model=runtime.model,
            snapshot=SnapshotVersion.of(snapshot),
            policy=runtime.policy,
            results=await unless_disconnected(request, each),
        )
