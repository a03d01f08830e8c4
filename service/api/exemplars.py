"""Exemplars of a collection: list, add, change, remove them while it serves."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Query, Request
from numpy.typing import NDArray

from indexer.catalog.edits import Add, Annotate, Create, Delete, Disable, Enable, Move
from indexer.catalog.ledger import Outcome
from indexer.catalog.records import SUPPRESS, Disabled, embedding_sha256
from indexer.catalog.situation import Edit
from indexer.contents import POOLS, Exemplar
from indexer.errors import IndexerError
from perception.errors import FingerprintMismatch
from service.api.documentation import CollectionName, ExemplarId, json_request_body
from service.api.images import keeper_of, kept_among
from service.api.items import EXPECTED, count_further
from service.classifier import Embedded
from service.errors import InvalidParameter, TooManyImages
from service.intake import image_content, read_json
from service.keys import Caller
from service.retroactive import retroactive_of
from service.runtime import Runtime, actor_of, caller_of, request_id_of, runtime_of
from service.schemas import problem_responses
from service.schemas_collections import exemplar_item, item_of, state_fields
from service.wire import ImageData
from service.wire_collections import (
    AddBody,
    ChangeBody,
    ChangedAnswer,
    ExemplarAnswer,
    ExemplarItem,
    ExemplarsAnswer,
    ExemplarsQuery,
    NewExemplar,
    ReasonQuery,
    SuppressBody,
)

router = APIRouter()
Embedding = NDArray[np.float32]
_ID_CHARS = 16
_CHANGE = (400, 401, 403, 404, 408, 409, 413, 415, 422, 500, 503)


@dataclass(frozen=True, eq=False)
class _Encoded:
    """An embedding (d,), and the hash of the file that it is from, empty where there was none; and that image."""

    embedding: Embedding
    sha256: str
    of: Embedded | None = None


@router.get(
    "/collections/{name}/exemplars",
    summary="What is in this collection?",
    responses=problem_responses(400, 401, 403, 404, 422, 500, 503),
)
async def exemplars(
    request: Request, name: CollectionName, query: Annotated[ExemplarsQuery, Query()]
) -> ExemplarsAnswer:
    """Exemplars and suppress items in the order of their ids, page by page; disabled ones too."""
    await caller_of(request, "pools:write", images=0)
    view = runtime_of(request).published.get(name)
    found = await asyncio.to_thread(view.page, query.after, query.limit, label=query.label, inactive=True)
    items = await _with_images(request, [exemplar_item(exemplar, view.record(exemplar.id)) for exemplar in found])
    following = found[-1].id if len(found) == query.limit else None
    return ExemplarsAnswer(request_id=request_id_of(request), items=items, next=following, **state_fields(view))


@router.get(
    "/collections/{name}/exemplars/{id:path}",
    summary="What is known of this exemplar?",
    responses=problem_responses(400, 401, 403, 404, 500, 503),
)
async def exemplar(request: Request, name: CollectionName, id: ExemplarId) -> ExemplarAnswer:
    """One exemplar or suppress item, disabled or not."""
    await caller_of(request, "pools:write", images=0)
    view = runtime_of(request).published.get(name)
    [item] = await _with_images(request, [item_of(view, id)])
    return ExemplarAnswer(request_id=request_id_of(request), item=item, **state_fields(view))


@router.post(
    "/collections/{name}/exemplars",
    summary="Add exemplars",
    responses=problem_responses(*_CHANGE, 429, 504),
    openapi_extra=json_request_body(AddBody),
)
async def add(request: Request, name: CollectionName) -> ChangedAnswer:
    """Add images, or embeddings that this service's encoder made. All or none are added.

    When the answer is there, the additions are durable and every answer that follows knows them. Adding again what is
    there already changes nothing. Additions to the moderation pools list the recent requests that they would have
    caught.
    """
    caller = await caller_of(request, "pools:write")
    runtime = runtime_of(request)
    editor = runtime.require_editor()
    if name != POOLS:  # which comes into being with its first exemplar; galleries are created by name
        runtime.published.get(name)
    with runtime.admission.enter():
        body = await read_json(request, AddBody, runtime.settings)
        encoded = await _encode_all(runtime, caller, body.items)
        before = runtime.published.snapshots.get(name)
        additions = [_addition(runtime, name, item, found) for item, found in zip(body.items, encoded, strict=True)]
        outcomes = await editor.apply(
            [*_creation(runtime, name), *additions],
            actor=actor_of(caller),
            reason=body.reason,
            request_id=request_id_of(request),
        )
        _keep_images(request, name, [edit.exemplar.id for edit in additions], encoded)
        answer = await _changed(request, outcomes[-len(additions) :], [edit.exemplar.id for edit in additions])
        if name != POOLS or not answer.changed:
            return answer
        caught = await retroactive_of(runtime, before, additions, actor_of(caller), request_id_of(request))
        return answer.model_copy(update={"retroactive": caught})


@router.post(
    "/collections/{name}/suppressions",
    summary="Add a suppress item",
    responses=problem_responses(*_CHANGE, 504),
    openapi_extra=json_request_body(SuppressBody),
)
async def suppress(request: Request, name: CollectionName) -> ChangedAnswer:
    """Say that near an image some exemplars are no evidence: they match it by mistake.

    For what is as similar to the item as `min_similarity` says, verdicts are made without the named exemplars, and the
    answer says so. Suppress items are listed, changed and deleted as exemplars are.
    """
    caller = await caller_of(request, "pools:write")
    runtime = runtime_of(request)
    editor = runtime.require_editor()
    runtime.published.get(name)
    with runtime.admission.enter():
        body = await read_json(request, SuppressBody, runtime.settings)
        [found] = await _encode_all(runtime, caller, [body])
        id = body.id or f"suppress-{(found.sha256 or embedding_sha256(found.embedding))[:_ID_CHARS]}"
        edit = Add(
            name,
            Exemplar(id, SUPPRESS, found.sha256, body.source, body.metadata),
            found.embedding,
            runtime.published.encoder,
            body.note,
            suppresses=tuple(body.suppresses),
            min_similarity=body.min_similarity,
        )
        outcomes = await editor.apply(
            [edit], actor=actor_of(caller), reason=body.reason, request_id=request_id_of(request)
        )
        _keep_images(request, name, [id], [found])
        return await _changed(request, outcomes, [id])


@router.patch(
    "/collections/{name}/exemplars/{id:path}",
    summary="Move, disable or annotate",
    responses=problem_responses(*_CHANGE),
    openapi_extra=json_request_body(ChangeBody),
)
async def change(request: Request, name: CollectionName, id: ExemplarId) -> ChangedAnswer:
    """Change one exemplar: its pool, whether and until when it is disabled, its note, source and metadata."""
    caller = await caller_of(request, "pools:write", images=0)
    runtime = runtime_of(request)
    editor = runtime.require_editor()
    with runtime.admission.enter():
        body = await read_json(request, ChangeBody, runtime.settings)
        edits: list[Edit] = []
        if body.label is not None:
            edits.append(Move(name, id, body.label))
        if {body.note, body.source} != {None} or body.metadata is not None:
            edits.append(Annotate(name, id, body.note, body.source, body.metadata))
        if body.disabled is not None:
            edits.append(Disable(name, id, body.disabled_until) if body.disabled else Enable(name, id))
        if not edits:
            raise InvalidParameter("body", "nothing is to change")
        outcomes = await editor.apply(
            edits, actor=actor_of(caller), reason=body.reason, request_id=request_id_of(request)
        )
        released = any(outcome.entry is not None and outcome.entry.kind == "exemplar.release" for outcome in outcomes)
        if released:
            runtime.excuse(id)
        return await _changed(request, outcomes, [id])


@router.delete(
    "/collections/{name}/exemplars/{id:path}",
    summary="Remove an exemplar",
    responses=problem_responses(400, 401, 403, 404, 409, 422, 500, 503),
)
async def delete(
    request: Request, name: CollectionName, id: ExemplarId, query: Annotated[ReasonQuery, Query()]
) -> ChangedAnswer:
    """Remove one exemplar; versions from before still have it. Its picture is forgotten where one is kept."""
    caller = await caller_of(request, "pools:write", images=0)
    runtime = runtime_of(request)
    sha256 = _sha256_of(runtime, name, id)
    outcomes = await runtime.require_editor().apply(
        [Delete(name, id)], actor=actor_of(caller), reason=query.reason, request_id=request_id_of(request)
    )
    keeper = keeper_of(request)
    if keeper is not None:
        await keeper.removed(sha256)
    return await _changed(request, outcomes, [])


async def _encode_all(
    runtime: Runtime, caller: Caller, items: Sequence[NewExemplar] | Sequence[SuppressBody]
) -> list[_Encoded]:
    """The embeddings of all items, or the error of the first that has none."""
    images = sum(item.embedding is None for item in items)
    if images > runtime.settings.max_images_per_request:
        raise TooManyImages(runtime.settings.max_images_per_request)
    await count_further(runtime, caller, images)
    places = asyncio.Semaphore(runtime.settings.decode_workers)
    until_s = asyncio.get_running_loop().time() + runtime.settings.deadline_s

    async def encoded(item: NewExemplar | SuppressBody) -> _Encoded:
        if item.embedding is not None:
            return _given(runtime, item.embedding, item.fingerprint or "")
        async with places:
            source = image_content(ImageData(data=item.data, url=item.url))
            if isinstance(source, Exception):
                raise source
            found = await runtime.classifier.embed(source, item.frame, until_s)
            return _Encoded(found.embedding, found.sha256.hex(), found)

    with runtime.admission.work_on(max(1, images)):
        outcomes = await asyncio.gather(*(encoded(item) for item in items), return_exceptions=True)
    encodings = []
    for position, outcome in enumerate(outcomes):
        if isinstance(outcome, BaseException):
            if len(outcomes) > 1 and isinstance(outcome, EXPECTED):
                raise InvalidParameter(f"items.{position}", str(outcome)) from outcome
            raise outcome
        encodings.append(outcome)
    return encodings


def _given(runtime: Runtime, numbers: Sequence[float], fingerprint: str) -> _Encoded:
    """An embedding that the caller has sent."""
    encoder = runtime.published.encoder
    if fingerprint != encoder.fingerprint:
        raise FingerprintMismatch("the embedding", encoder.fingerprint, fingerprint)
    if len(numbers) != encoder.dim:
        raise InvalidParameter("embedding", f"it has {len(numbers)} numbers, the encoder makes {encoder.dim}")
    wide = np.array(numbers, np.float64)
    if not np.isfinite(wide).all() or not abs(np.linalg.norm(wide) - 1.0) < 1e-3:
        raise InvalidParameter("embedding", "it is not finite and of unit L2 norm")
    return _Encoded(wide.astype(np.float32), "")


def _addition(runtime: Runtime, name: str, item: NewExemplar, found: _Encoded) -> Add:
    id = item.id
    if id is None:
        id = (found.sha256 or embedding_sha256(found.embedding))[:_ID_CHARS]
        id = f"{id}-{item.frame}" if item.frame else id
    disabled = None if item.disabled_until is None else Disabled("operator", item.disabled_until)
    exemplar = Exemplar(id, item.label, found.sha256, item.source, item.metadata)
    return Add(name, exemplar, found.embedding, runtime.published.encoder, item.note, disabled)


def _creation(runtime: Runtime, name: str) -> list[Edit]:
    """The moderation collection comes into being with its first exemplar."""
    there = runtime.published.snapshots.get(name) is not None
    return [] if there else [Create(name, replace(runtime.published.encoder))]


def _keep_images(request: Request, name: str, ids: Sequence[str], encoded: Sequence[_Encoded]) -> None:
    """Have pictures kept of what was added as images, where the operator wishes so."""
    keeper = keeper_of(request)
    for id, each in zip(ids, encoded, strict=True):
        if keeper is not None and each.of is not None:
            still = each.of.image.frames_in_file == 1
            keeper.added(name, id, each.sha256, each.of.file, each.of.frame, still=still)


def _sha256_of(runtime: Runtime, name: str, id: str) -> str:
    """Of the image file of an exemplar; empty where it is unknown."""
    try:
        return runtime.published.get(name).exemplar(id).sha256
    except IndexerError:
        return ""


async def _with_images(request: Request, items: list[ExemplarItem]) -> list[ExemplarItem]:
    """The same items, which say of which there are pictures."""
    kept = await kept_among(request, (item.sha256 for item in items))
    return [item.model_copy(update={"image_kept": True}) if item.sha256 in kept else item for item in items]


async def _changed(request: Request, outcomes: Sequence[Outcome], ids: Sequence[str]) -> ChangedAnswer:
    state = outcomes[-1].state
    view = runtime_of(request).published.get(state.collection)
    items: list[ExemplarItem] = []
    for id in ids:
        record = state.records.get(id)
        items.append(item_of(view, id) if record is None else exemplar_item(record.exemplar, record))
    return ChangedAnswer(
        request_id=request_id_of(request),
        changed=any(outcome.entry is not None for outcome in outcomes),
        items=await _with_images(request, items),
        **state_fields(state),
    )
