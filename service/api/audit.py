"""The audit log: read it, export it, check it."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from sqlalchemy import Connection

from indexer.catalog import chain as chains
from indexer.catalog.entry import Entry
from service.editing import Editor
from service.runtime import caller_of, request_id_of, runtime_of
from service.schemas import problem_responses
from service.schemas_collections import audit_entry
from service.wire_audit import AuditAnswer, AuditQuery, ChainState, ExportQuery, VerifyAnswer

router = APIRouter()
NDJSON = "application/x-ndjson"
CHAINS: tuple[Literal["changes", "decisions"], ...] = ("changes", "decisions")
_LINES = 500  # sent at a time
_RESPONSES = problem_responses(400, 401, 403, 409, 500, 503)


@router.get("/audit", summary="What was done, by whom, and why?", responses=_RESPONSES)
async def audit(request: Request, query: Annotated[AuditQuery, Query()]) -> AuditAnswer:
    """Entries of the audit log, oldest first."""
    await caller_of(request, "admin", images=0)
    editor = runtime_of(request).require_editor()

    def read(connection: Connection) -> list[Entry]:
        return chains.read(
            connection,
            query.chain,
            after=query.after,
            limit=query.limit,
            collection=query.collection,
            kinds=None if query.kind is None else (query.kind,),
            subject=query.subject,
        )

    found = await editor.read(read)
    following = found[-1].seq if len(found) == query.limit else None
    return AuditAnswer(
        request_id=request_id_of(request), entries=[audit_entry(entry) for entry in found], next=following
    )


@router.get(
    "/audit/export",
    summary="The audit log as a file",
    responses={**_RESPONSES, 200: {"content": {NDJSON: {"schema": {"type": "string"}}}}},
    response_class=StreamingResponse,
)
async def export(request: Request, query: Annotated[ExportQuery, Query()]) -> StreamingResponse:
    """JSON lines, each with the hash of the one before. `hardlook-index audit verify --file` checks them."""
    await caller_of(request, "admin", images=0)
    editor = runtime_of(request).require_editor()
    stack = ExitStack()
    connection = await asyncio.to_thread(stack.enter_context, editor.catalog.database.reading())
    lines = chains.jsonl_lines(connection, query.chain, query.embeddings, after=query.after)
    name = f'attachment; filename="hardlook-{query.chain}.jsonl"'
    return StreamingResponse(_sent(stack, lines), media_type=NDJSON, headers={"Content-Disposition": name})


@router.post("/audit/verify", summary="Is the audit log whole?", responses=problem_responses(401, 403, 409, 500, 503))
async def verify(request: Request) -> VerifyAnswer:
    """Go through the whole log: no entry was changed, removed or put in between, and replaying it gives what serves."""
    await caller_of(request, "admin", images=0)
    runtime = runtime_of(request)
    editor = runtime.require_editor()
    with runtime.admission.enter():
        states = [await editor.read(partial(_checked, chain=chain)) for chain in CHAINS]
        replayed = await asyncio.to_thread(_replayed, editor)
    return VerifyAnswer(
        request_id=request_id_of(request),
        sound=all(replayed.values()) and not any(state.problems for state in states),
        chains=states,
        replayed=replayed,
    )


def _checked(connection: Connection, chain: Literal["changes", "decisions"]) -> ChainState:
    found = chains.verify(connection, chain)
    return ChainState(
        chain=chain, entries=found.n, seq=found.head.seq, hash=found.head.hash, problems=list(found.problems)
    )


def _replayed(editor: Editor) -> dict[str, bool]:
    """Whether the log alone gives each collection; one that is changed meanwhile is looked at again."""
    catalog = editor.catalog
    found = {}
    for name in sorted(catalog.states):
        again = catalog.replayed(name)
        found[name] = again == catalog.state_at(name, again.revision)
    return found


async def _sent(stack: ExitStack, lines: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Lines in a few pieces, taken in a thread; the transaction ends with them, or when the caller hangs up."""

    def some() -> bytes:
        return b"".join(line for _, line in zip(range(_LINES), lines, strict=False))

    try:
        while piece := await asyncio.to_thread(some):
            yield piece
    finally:
        await asyncio.to_thread(stack.close)
