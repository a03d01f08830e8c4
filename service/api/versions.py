"""Versions of a collection: publish, compare, go back, try out."""

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from sqlalchemy import Connection

from indexer.catalog import chain
from indexer.catalog.edits import Create, Publish, Rollback
from indexer.catalog.entry import Entry
from indexer.catalog.ledger import CHANGES, VERSION_KINDS
from indexer.catalog.state import State, diff
from indexer.errors import EditRefused
from indexer.live.comparison import records_of
from service.api.documentation import CollectionName, json_request_body
from service.intake import read_json
from service.runtime import actor_of, caller_of, request_id_of, runtime_of
from service.schemas import problem_responses
from service.schemas_collections import dry_run_answer, state_fields, version_item
from service.webhooks import Event
from service.wire_collections import (
    CreateBody,
    DiffAnswer,
    DiffQuery,
    DryRunAnswer,
    DryRunBody,
    MovedItem,
    PublishBody,
    ReasonQuery,
    RollbackBody,
    ShadowAnswer,
    ShadowBody,
    ShadowItem,
    VersionAnswer,
    VersionsAnswer,
    VersionsQuery,
)

router = APIRouter()
_MOST_IDS = 1000
_READ = problem_responses(400, 401, 403, 404, 409, 500, 503)
_WRITE = problem_responses(400, 401, 403, 404, 408, 409, 413, 415, 422, 500, 503)


@router.post(
    "/collections",
    summary="Create an empty gallery",
    responses=_WRITE,
    openapi_extra=json_request_body(CreateBody),
)
async def create(request: Request) -> VersionAnswer:
    """Make a collection that exemplars can be added to. One that is there already stays as it is."""
    caller = await caller_of(request, "pools:write", images=0)
    runtime = runtime_of(request)
    body = await read_json(request, CreateBody, runtime.settings)
    [outcome] = await runtime.require_editor().apply(
        [Create(body.name, runtime.published.encoder)],
        actor=actor_of(caller),
        reason=body.reason,
        request_id=request_id_of(request),
    )
    return _version_answer(request, outcome.state, outcome.entry)


@router.get("/collections/{name}/versions", summary="Which versions are there?", responses=_READ)
async def versions(request: Request, name: CollectionName, query: Annotated[VersionsQuery, Query()]) -> VersionsAnswer:
    """What was published, offline or here, and gone back to; newest first. What was between can be gone back to too."""
    await caller_of(request, "pools:write", images=0)
    runtime = runtime_of(request)
    view = runtime.published.get(name)

    def read(connection: Connection) -> list[Entry]:
        return list(
            chain.read(
                connection,
                CHANGES,
                before=query.before,
                limit=query.limit,
                collection=name,
                kinds=VERSION_KINDS,
                newest_first=True,
            )
        )

    found = await runtime.require_editor().read(read)
    return VersionsAnswer(
        request_id=request_id_of(request),
        versions=[version_item(entry) for entry in found],
        next=found[-1].seq if len(found) == query.limit else None,
        **state_fields(view),
    )


@router.post(
    "/collections/{name}/versions",
    summary="Publish the present state",
    responses=_WRITE,
    openapi_extra=json_request_body(PublishBody),
)
async def publish(request: Request, name: CollectionName) -> VersionAnswer:
    """Give the present state a name. Nothing changes in what is found: changes take effect when they are made."""
    caller = await caller_of(request, "pools:write", images=0)
    runtime = runtime_of(request)
    runtime.published.get(name)
    body = await read_json(request, PublishBody, runtime.settings)
    told = {"collection": name, "name": body.name, "actor": actor_of(caller), "reason": body.reason}
    [outcome] = await runtime.require_editor().apply(
        [Publish(name, body.name)],
        actor=actor_of(caller),
        reason=body.reason,
        request_id=request_id_of(request),
        also=runtime.telling(Event("version.publish", told)),
    )
    return _version_answer(request, outcome.state, outcome.entry)


@router.post(
    "/collections/{name}/rollback",
    summary="Go back to an earlier version",
    responses=_WRITE,
    openapi_extra=json_request_body(RollbackBody),
)
async def rollback(request: Request, name: CollectionName) -> VersionAnswer:
    """Make an earlier state the present one: it answers exactly as it did. The state that is left stays a version."""
    caller = await caller_of(request, "pools:write", images=0)
    runtime = runtime_of(request)
    runtime.published.get(name)
    body = await read_json(request, RollbackBody, runtime.settings)
    editor, to = runtime.require_editor(), body.revision
    if body.version is not None:  # looked for here: it may take long, and nobody else should wait for it
        to = await asyncio.to_thread(editor.catalog.revision_of, name, body.version)
    if to is None:
        raise EditRefused(name, f"it never had the version {body.version!r}")
    told = {"collection": name, "to": to, "actor": actor_of(caller), "reason": body.reason}
    [outcome] = await editor.apply(
        [Rollback(name, to)],
        actor=actor_of(caller),
        reason=body.reason,
        request_id=request_id_of(request),
        also=runtime.telling(Event("version.rollback", told)),
    )
    return _version_answer(request, outcome.state, outcome.entry)


@router.get("/collections/{name}/diff", summary="What is different between two versions?", responses=_READ)
async def difference(request: Request, name: CollectionName, query: Annotated[DiffQuery, Query()]) -> DiffAnswer:
    """Ids that were added, removed, moved and changed from one version to another."""
    await caller_of(request, "pools:write", images=0)
    runtime = runtime_of(request)
    candidates = runtime.require_candidates()
    old, new = await candidates.view(name, query.before), await candidates.view(name, query.after)
    found = await asyncio.to_thread(lambda: diff(*records_of(old, new)))
    kinds = {"added": found.added, "removed": found.removed, "moved": found.moved, "changed": found.changed}
    return DiffAnswer(
        request_id=request_id_of(request),
        collection=name,
        before=query.before,
        after=query.after,
        counts={kind: len(ids) for kind, ids in kinds.items()},
        added=list(found.added[:_MOST_IDS]),
        removed=list(found.removed[:_MOST_IDS]),
        moved=[MovedItem(id=id, was=was, now=now) for id, was, now in found.moved[:_MOST_IDS]],
        changed=list(found.changed[:_MOST_IDS]),
    )


@router.post(
    "/collections/{name}/dry-run",
    summary="How would this version have judged?",
    responses=_WRITE,
    openapi_extra=json_request_body(DryRunBody),
)
async def dry_run(request: Request, name: Literal["pools"]) -> DryRunAnswer:
    """Judge recent requests again, by another version of the pools or by the candidate encoder, and compare.

    Of recent requests only embeddings are kept. Those of a candidate encoder are there only from the time on since it
    runs as a shadow, for the images that it saw.
    """
    await caller_of(request, "pools:write", images=0)
    runtime = runtime_of(request)
    candidates = runtime.require_candidates()
    with runtime.admission.enter():
        body = await read_json(request, DryRunBody, runtime.settings)
        candidate = None if body.version is None else await candidates.view(name, body.version)
        found = await candidates.dry_run(candidate, body.limit)
    label = f"version {body.version}" if body.version else f"encoder {body.encoder}"
    return dry_run_answer(request_id_of(request), label, found)


@router.get(
    "/shadow", summary="Which candidates see the traffic?", responses=problem_responses(401, 403, 409, 500, 503)
)
async def shadow(request: Request) -> ShadowAnswer:
    """Candidates that judge live traffic without being heard, and how often they disagree."""
    await caller_of(request, "pools:write", images=0)
    return _shadow_answer(request)


@router.put(
    "/shadow",
    summary="Let a version see the traffic",
    responses=_WRITE,
    openapi_extra=json_request_body(ShadowBody),
)
async def start_shadow(request: Request) -> ShadowAnswer:
    """Judge live traffic by another version of the moderation pools too, without answering so, until it is stopped."""
    caller = await caller_of(request, "pools:write", images=0)
    runtime = runtime_of(request)
    candidates = runtime.require_candidates()
    body = await read_json(request, ShadowBody, runtime.settings)
    await candidates.run_version(body.version, actor_of(caller), body.reason, request_id_of(request))
    return _shadow_answer(request)


@router.delete(
    "/shadow", summary="Let no version see the traffic", responses=problem_responses(400, 401, 403, 409, 500, 503)
)
async def stop_shadow(request: Request, query: Annotated[ReasonQuery, Query()]) -> ShadowAnswer:
    """Stop the version that judges live traffic; a candidate encoder runs as long as the service does."""
    caller = await caller_of(request, "pools:write", images=0)
    candidates = runtime_of(request).require_candidates()
    await candidates.stop_version(actor_of(caller), query.reason, request_id_of(request))
    return _shadow_answer(request)


def _shadow_answer(request: Request) -> ShadowAnswer:
    items = []
    for running in runtime_of(request).require_candidates().running:
        rate, n = running.disagreement()
        items.append(ShadowItem(candidate=running.name, compared=n, rate=rate if n else None, dropped=running.dropped))
    return ShadowAnswer(request_id=request_id_of(request), candidates=items)


def _version_answer(request: Request, state: State, entry: Entry | None) -> VersionAnswer:
    return VersionAnswer(request_id=request_id_of(request), changed=entry is not None, **state_fields(state))
