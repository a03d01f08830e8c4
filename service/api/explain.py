"""POST /explain: why has this image the verdict that it has?"""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query, Request

from service.api.documentation import request_body
from service.api.items import bounded_k
from service.errors import TooManyImages
from service.intake import merge_parameters, read_submission
from service.runtime import caller_of, request_id_of, runtime_of, unless_disconnected
from service.schemas import classify_item, problem_responses, snapshot_version
from service.schemas_explain import attribution_item, decision_item, png_base64
from service.wire import SHOWN_NEIGHBORS
from service.wire_explain import ExplainAnswer, ExplainBody, ExplainParameters

router = APIRouter()


@router.post(
    "/explain",
    summary="Why this verdict?",
    responses=problem_responses(400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503, 504),
    openapi_extra=request_body(ExplainBody),
)
async def explain(request: Request, query: Annotated[ExplainParameters, Query()]) -> ExplainAnswer:
    """Send one image, as for /classify, and get its verdict with the decision spelt out.

    For each of up to two exemplars a grid says which parts of the image make it similar to them, and which do not.
    An explanation is no verdict on traffic: it is neither recorded nor seen by candidates. It counts against the rate
    limit. A few are worked on or wait at a time, more are refused.
    """
    await caller_of(request, "review")
    runtime = runtime_of(request)
    settings = runtime.settings
    with runtime.admission.enter():
        snapshot = runtime.published.pools()
        submission = await read_submission(request, ExplainBody, settings)
        if len(submission.uploads) > 1:
            raise TooManyImages(1)
        [upload] = submission.uploads
        if isinstance(upload.content, Exception):
            raise upload.content
        parameters = merge_parameters(query, submission)
        shown = bounded_k(parameters.k, SHOWN_NEIGHBORS, settings.max_neighbors)
        until_s = asyncio.get_running_loop().time() + settings.deadline_s
        with runtime.explainer.place():
            work = runtime.explainer.explain(
                upload.content,
                snapshot,
                shown,
                until_s,
                against=parameters.against or (),
                attributed=parameters.attribute is not False,
            )
            found = await unless_disconnected(request, work)
        return ExplainAnswer(
            request_id=request_id_of(request),
            model=runtime.model,
            snapshot=snapshot_version(snapshot),
            policy=runtime.policy,
            result=classify_item(upload.id, found.found, runtime.calibrated),
            decision=decision_item(found.reasoning, runtime.rule, found.found.verdict.margin),
            input_png=await asyncio.to_thread(png_base64, found.pixels),
            undefended=runtime.model.defense is not None,
            attributions=[attribution_item(compared) for compared in found.compared],
        )
