"""POST /similar: what do we have that looks like it?"""

import asyncio
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Query, Request

from service.api.documentation import request_body
from service.api.items import answer_each, bounded_k, count_further
from service.classifier import Lookup, RemoteImage
from service.engine import Search
from service.intake import Submission, Upload, merge_parameters, read_submission
from service.keys import Caller
from service.runtime import Runtime, caller_of, request_id_of, runtime_of, unless_disconnected
from service.schemas import coarse_similar_item, problem_responses, similar_item, snapshot_version
from service.wire import FOUND_NEIGHBORS, ItemError, SimilarAnswer, SimilarBody, SimilarItem, SimilarParameters

router = APIRouter()


@router.post(
    "/similar",
    summary="What do we have that looks like it?",
    responses=problem_responses(400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503, 504),
    openapi_extra=request_body(SimilarBody),
)
async def similar(request: Request, query: Annotated[SimilarParameters, Query()]) -> SimilarAnswer:
    """Send one image or many, as to /classify, or a text; the nearest exemplars come back, most similar first.

    They are looked for in all moderation pools, in one `pool`, or in a `gallery`. Of an animation the first frame is
    searched with, of a transparent image the one on white.
    """
    caller = await caller_of(request, "similar")
    runtime = runtime_of(request)
    settings = runtime.settings
    with runtime.admission.enter():
        with runtime.metrics.stage("body"):
            submission = await read_submission(request, SimilarBody, settings)
        parameters = merge_parameters(query, submission)
        snapshot = runtime.classifier.searchable(parameters.gallery, parameters.pool)
        search = Search(
            snapshot, bounded_k(parameters.k, FOUND_NEIGHBORS, settings.max_neighbors), label=parameters.pool
        )
        await count_further(runtime, caller, len(submission.uploads))
        least = -1.0 if parameters.min_similarity is None else parameters.min_similarity
        lookup = _Lookup(runtime, caller, search, least, asyncio.get_running_loop().time() + settings.deadline_s)
        request_id = request_id_of(request)
        with runtime.admission.work_on(max(1, len(submission.uploads))):
            results = await unless_disconnected(request, lookup.answer(submission, request_id))
        return SimilarAnswer(
            request_id=request_id,
            model=runtime.model,
            snapshot=snapshot_version(snapshot),
            policy=runtime.policy,
            results=results,
        )


@dataclass(frozen=True)
class _Lookup:
    """One request's search."""

    runtime: Runtime
    caller: Caller
    search: Search
    min_similarity: float
    until_s: float

    async def answer(self, submission: Submission, request_id: str) -> list[SimilarItem | ItemError]:
        if submission.text is not None:
            return [similar_item("0", await self._find(submission.text), self.min_similarity)]
        at_a_time = self.runtime.settings.decode_workers
        return await answer_each(submission.uploads, self._one, at_a_time=at_a_time, request_id=request_id)

    async def _one(self, upload: Upload, source: bytes | RemoteImage) -> SimilarItem:
        found = await self._find(source)
        assert found.sha256 is not None
        if self.runtime.answers_coarsely(self.caller, found.sha256, found.embedding):
            return coarse_similar_item(upload.id, found, self.min_similarity)
        return similar_item(upload.id, found, self.min_similarity)

    async def _find(self, subject: bytes | RemoteImage | str) -> Lookup:
        return await self.runtime.classifier.similar(subject, self.search, self.until_s)
