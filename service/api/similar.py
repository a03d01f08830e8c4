"""POST /similar: what do we have that looks like it?"""

from typing import Annotated

from fastapi import APIRouter, Query, Request

from service.api.documentation import request_body
from service.api.items import answer_each, bounded_k
from service.engine import Search
from service.intake import Submission, Upload, merge_parameters, read_submission
from service.runtime import Runtime, request_id_of, runtime_of, unless_disconnected
from service.schemas import (
    FOUND_NEIGHBORS,
    ItemError,
    SimilarAnswer,
    SimilarBody,
    SimilarItem,
    SimilarParameters,
    SnapshotVersion,
    problem_responses,
)

router = APIRouter()


@router.post(
    "/similar",
    summary="What do we have that looks like it?",
    responses=problem_responses(400, 404, 408, 413, 415, 422, 500, 503, 504),
    openapi_extra=request_body(SimilarBody),
)
async def similar(request: Request, query: Annotated[SimilarParameters, Query()]) -> SimilarAnswer:
    """Send one image or many, as to /classify, or a text; the nearest exemplars come back, most similar first.

    They are looked for in all moderation pools, in one `pool`, or in a `gallery`. Of an animation the first frame is
    searched with, of a transparent image the one on white.
    """
    runtime = runtime_of(request)
    settings = runtime.settings
    with runtime.admission.enter():
        submission = await read_submission(request, SimilarBody, settings)
        parameters = merge_parameters(query, submission)
        snapshot = runtime.classifier.searchable(parameters.gallery, parameters.pool)
        search = Search(
            snapshot, bounded_k(parameters.k, FOUND_NEIGHBORS, settings.max_neighbors), label=parameters.pool
        )
        least = -1.0 if parameters.min_similarity is None else parameters.min_similarity
        request_id = request_id_of(request)
        return SimilarAnswer(
            request_id=request_id,
            model=runtime.model,
            snapshot=SnapshotVersion.of(snapshot),
            policy=runtime.policy,
            results=await unless_disconnected(request, _answer(runtime, submission, search, least, request_id)),
        )


async def _answer(
    runtime: Runtime, submission: Submission, search: Search, min_similarity: float, request_id: str
) -> list[SimilarItem | ItemError]:
    if submission.text is not None:
        return [SimilarItem.of("0", await runtime.classifier.similar(submission.text, search, min_similarity))]

    async def work(upload: Upload, data: bytes) -> SimilarItem:
        return SimilarItem.of(upload.id, await runtime.classifier.similar(data, search, min_similarity))

    at_a_time = runtime.settings.decode_workers
    return await answer_each(submission.uploads, work, at_a_time=at_a_time, request_id=request_id)
