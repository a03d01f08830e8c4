"""Looking collections through: duplicates, contradictions, probes, and pool files out and in."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from indexer.curation import Contradiction, Group, contradictions, near_duplicates, probe
from indexer.pool_file import PoolFile, export, parse_pool_file
from perception.verdict import Neighbor
from service.api.documentation import CollectionName, json_request_body
from service.curation import MAX_COMPARED, MAX_CONTRADICTED, Curation, file_name, require_few, take_in
from service.errors import MalformedBody, UnsupportedBody
from service.intake import RAW, read_json, read_submission
from service.runtime import Runtime, actor_of, caller_of, request_id_of, runtime_of
from service.schemas import problem_responses
from service.schemas_collections import state_fields
from service.wire import SimilarBody
from service.wire_curation import (
    MAX_LISTED,
    CandidateItem,
    ContradictionItem,
    ContradictionsAnswer,
    ContradictionsQuery,
    DuplicateGroup,
    DuplicateItem,
    DuplicatesAnswer,
    DuplicatesQuery,
    ImportAnswer,
    ImportQuery,
    LabelQuery,
    NearItem,
    ProbeAnswer,
    ProbeBody,
)

router = APIRouter()
_READ = (400, 401, 403, 404, 429, 500, 503)
_WRITE = problem_responses(400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 500, 503)
_FILE: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}


@router.get(
    "/collections/{name}/duplicates",
    summary="Which exemplars are near-duplicates?",
    responses=problem_responses(*_READ, 422),
)
async def duplicates(
    request: Request, name: CollectionName, query: Annotated[DuplicatesQuery, Query()]
) -> DuplicatesAnswer:
    """Groups of near-duplicates within each pool, largest first, with the one to keep and what to do about the others.

    Nothing is changed. It takes up to a minute or so, one request at a time; larger collections are refused, and
    `hardlook-index duplicates` looks through them.
    """
    await caller_of(request, "pools:write")
    view = runtime_of(request).published.get(name)
    require_few(view, query.label, MAX_COMPARED, "duplicates")
    found = await _curation(request).search.work(
        lambda: near_duplicates(view, query.min_similarity, query.label, threads=1)
    )
    groups = [_group(group) for group in found[: query.limit]]
    return DuplicatesAnswer(request_id=request_id_of(request), total=len(found), groups=groups, **state_fields(view))


@router.get(
    "/collections/{name}/contradictions",
    summary="Which exemplars are nearest to another pool?",
    responses=problem_responses(*_READ),
)
async def contradicting(
    request: Request, name: Literal["pools"], query: Annotated[ContradictionsQuery, Query()]
) -> ContradictionsAnswer:
    """Exemplars whose nearest neighbour lies in another pool, worst first, each with a suggestion. Nothing is changed.

    It takes up to a minute or so, one request at a time; larger collections are refused, and
    `hardlook-index contradictions` looks through them.
    """
    await caller_of(request, "pools:write")
    view = runtime_of(request).published.get(name)
    require_few(view, None, MAX_CONTRADICTED, "contradictions")
    found = await _curation(request).search.work(lambda: contradictions(view))
    items = [_contradiction(each) for each in found[: query.limit]]
    return ContradictionsAnswer(request_id=request_id_of(request), total=len(found), items=items, **state_fields(view))


@router.post(
    "/collections/{name}/probes",
    summary="Which exemplars do these texts describe?",
    responses=problem_responses(400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503, 504),
    openapi_extra=json_request_body(ProbeBody),
)
async def probes(request: Request, name: CollectionName) -> ProbeAnswer:
    """Candidates for a pool among the exemplars of a collection, best first; those that a pool has already are marked.

    Only encoders with a text tower can.
    """
    caller = await caller_of(request, "pools:write")
    runtime = runtime_of(request)
    view = runtime.published.get(name)
    with runtime.admission.enter():
        body = await read_json(request, ProbeBody, runtime.settings)
        texts = [*body.prompts, *body.negatives]
        if len(texts) > 1:
            await runtime.rate_limits.hit(caller, len(texts) - 1)
        until_s = asyncio.get_running_loop().time() + runtime.settings.deadline_s
        with runtime.admission.work_on(len(texts)):
            embeddings = await runtime.classifier.embed_texts(texts, until_s)
        n = len(body.prompts)
        found = await _curation(request).search.work(
            lambda: probe(
                view,
                body.prompts,
                embeddings[:n],
                k=body.k,
                min_similarity=body.min_similarity,
                negatives=embeddings[n:],
                pools=runtime.published.snapshots.get("pools"),
            )
        )
    items = [
        CandidateItem(
            **_item(each.exemplar),
            prompt=each.prompt,
            similarity=each.similarity,
            contrast=each.contrast,
            known=_near(each.known),
        )
        for each in found
    ]
    return ProbeAnswer(request_id=request_id_of(request), items=items, **state_fields(view))


@router.get(
    "/collections/{name}/file",
    summary="The collection as a file",
    responses={**problem_responses(*_READ, 422), 200: {"content": {RAW: _FILE}}},
    response_class=StreamingResponse,
)
async def download(request: Request, name: CollectionName, query: Annotated[LabelQuery, Query()]) -> StreamingResponse:
    """A pool file: embeddings, ids, labels, hashes, sources, metadata and notes, without pixels, with a checksum.

    Another service of the same encoder takes it in. Disabled exemplars and suppress items are not in it.
    """
    await caller_of(request, "pools:write")
    view = runtime_of(request).published.get(name)
    with ExitStack() as stack:
        stack.enter_context(_curation(request).files.place())
        made = await asyncio.to_thread(export, view, query.label)
        return _PoolFileResponse(made, file_name(view, query.label), stack.pop_all())


@router.post(
    "/collections/{name}/file",
    summary="Take in a pool file",
    responses=_WRITE,
    openapi_extra={"requestBody": {"required": True, "content": {RAW: _FILE}}},
)
async def upload(request: Request, name: CollectionName, query: Annotated[ImportQuery, Query()]) -> ImportAnswer:
    """Take the exemplars of a pool file into a collection of the same encoder, which is made where there is none.

    When the answer is there, they are durable and every answer that follows knows them. Files larger than
    HARDLOOK_MAX_BODY_BYTES are for `hardlook-index import-pool`.
    """
    caller = await caller_of(request, "pools:write")
    runtime = runtime_of(request)
    editor = runtime.require_editor()
    with runtime.admission.enter(), _curation(request).files.place():
        data = await _read_file(request, runtime)
        encoder = runtime.published.encoder
        pool_file = await asyncio.to_thread(parse_pool_file, data, "the request body", encoder.fingerprint)
        changed = await take_in(
            runtime.published,
            editor,
            name,
            pool_file,
            query.on_conflict,
            actor=actor_of(caller),
            reason=query.reason,
            request_id=request_id_of(request),
        )
    view = runtime.published.get(name)
    n = pool_file.header.n
    return ImportAnswer(request_id=request_id_of(request), changed=changed, exemplars=n, **state_fields(view))


class _PoolFileResponse(StreamingResponse):
    """A pool file, sent in pieces that are made in another thread; however it ends, its place is free again."""

    def __init__(self, pool_file: PoolFile, name: str, held: ExitStack) -> None:
        headers = {
            "Content-Length": str(pool_file.size_bytes),
            "Content-Disposition": f'attachment; filename="{name}"',
        }
        super().__init__(_sent(pool_file.chunks()), media_type=RAW, headers=headers)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        with self._held:
            await super().__call__(scope, receive, send)


async def _sent(chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
        yield chunk


async def _read_file(request: Request, runtime: Runtime) -> bytes:
    """The body of a request that can only be a file."""
    content_type = request.headers.get("content-type", RAW).partition(";")[0].strip().lower()
    if content_type != RAW:
        raise UnsupportedBody(content_type, (RAW,))
    [upload] = (await read_submission(request, SimilarBody, runtime.settings)).uploads
    if not isinstance(upload.content, bytes):
        raise MalformedBody("it is no pool file")
    return upload.content


def _curation(request: Request) -> Curation:
    """Where long work of this application is done; made with the first request for some."""
    state = request.app.state
    if not hasattr(state, "curation"):
        state.curation = Curation()
    found: Curation = state.curation
    return found


def _group(group: Group) -> DuplicateGroup:
    members = [
        DuplicateItem(
            **_item(member.exemplar),
            similarity=member.similarity,
            same_file=member.same_file,
            suggestion=member.suggestion,
        )
        for member in group.members[:MAX_LISTED]
    ]
    return DuplicateGroup(size=len(group.members), members=members)


def _contradiction(found: Contradiction) -> ContradictionItem:
    other = _near(found.other)
    assert other is not None
    return ContradictionItem(
        **_item(found.exemplar),
        own=_near(found.own),
        other=other,
        margin=found.margin,
        suggestion=found.suggestion,
        to=found.to,
        reason=found.reason,
    )


def _item(exemplar: Any) -> dict[str, str]:
    return {"id": exemplar.id, "label": exemplar.label, "sha256": exemplar.sha256, "source": exemplar.source}


def _near(neighbor: Neighbor | None) -> NearItem | None:
    return None if neighbor is None else NearItem(id=neighbor.id, pool=neighbor.pool, similarity=neighbor.similarity)
