"""The review queue, and the reports that get into it: one call corrects a verdict, for this image and its like."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, TypeVar

from fastapi import APIRouter, Path, Query, Request
from sqlalchemy import Connection

from indexer.catalog import reviews as queue
from indexer.catalog.clock import text_of
from indexer.catalog.edits import Add, Enable, Move, Note
from indexer.catalog.entry import Entry
from indexer.catalog.ledger import Outcome
from indexer.catalog.reviews import Embedding, Item, NewItem
from indexer.catalog.situation import Edit
from indexer.catalog.traffic import Found, find_decisions
from indexer.contents import POOLS, Exemplar
from indexer.errors import EditRefused, UnknownExemplar
from perception.verdict import VerdictLabel
from service.api.documentation import json_request_body
from service.api.images import keeper_of, kept_among
from service.errors import InvalidParameter, Overloaded, UnknownDecision
from service.intake import read_json
from service.keys import Caller
from service.retroactive import retroactive_of
from service.runtime import Runtime, actor_of, caller_of, request_id_of, runtime_of
from service.schemas import problem_responses
from service.webhooks import Event
from service.wire_reviews import (
    ClaimBody,
    DecideBody,
    DecidedAnswer,
    FeedbackAnswer,
    FeedbackBody,
    ReviewAnswer,
    ReviewItem,
    ReviewsAnswer,
    ReviewsQuery,
    StepBody,
)

router = APIRouter()
BodyT = TypeVar("BodyT", ClaimBody, StepBody)
ReviewId = Annotated[str, Path(max_length=64, description="Of the item.")]
SETTLE_S = 2.0
_ID_CHARS = 16  # of an exemplar's id that is made of its image's hash
_READ = problem_responses(400, 401, 403, 404, 409, 500, 503)
_STEP = problem_responses(400, 401, 403, 404, 408, 409, 413, 415, 500, 503)
_RIGHT = {"false-positive": VerdictLabel.SAFE, "false-negative": VerdictLabel.UNSAFE}


@router.get("/reviews", summary="What is to be reviewed?", responses=_READ)
async def reviews(request: Request, query: Annotated[ReviewsQuery, Query()]) -> ReviewsAnswer:
    """The queue, the oldest item first, page by page."""
    await caller_of(request, "review", images=0)

    def read(connection: Connection) -> tuple[list[Item], dict[queue.State, int]]:
        asked = {"state": query.state, "origin": query.origin, "after": query.after}
        return queue.list_items(connection, limit=query.limit + 1, **asked), queue.counts(connection)  # type: ignore[arg-type]

    found, counts = await runtime_of(request).require_editor().read(read)
    page = found[: query.limit]
    kept = await kept_among(request, (item.image_sha256 for item in page))
    shown = [_shown(item, item.image_sha256 in kept) for item in page]
    following = shown[-1].id if len(found) > query.limit else None
    return ReviewsAnswer(request_id=request_id_of(request), counts=counts, reviews=shown, next=following)


@router.get("/reviews/{id}", summary="What is known of this item?", responses=_READ)
async def review(request: Request, id: ReviewId) -> ReviewAnswer:
    """One item with the evidence that its verdict was made from."""
    await caller_of(request, "review", images=0)
    return await _answer(request, await runtime_of(request).require_editor().read(partial(queue.get, id=id)))


@router.post(
    "/reviews/{id}/claim",
    summary="Have this item to oneself",
    responses=_STEP,
    openapi_extra=json_request_body(ClaimBody, required=False),
)
async def claim(request: Request, id: ReviewId) -> ReviewAnswer:
    """Keep others from working on an item for a while. Of several who ask at once one gets it."""
    caller = await caller_of(request, "review", images=0)
    body = await _optional(request, ClaimBody)
    step = partial(queue.claim, id=id, who=actor_of(caller), for_s=body.for_s)
    return await _step(request, caller, id, "review.claim", body.reason, step)


@router.post(
    "/reviews/{id}/release",
    summary="Give this item back",
    responses=_STEP,
    openapi_extra=json_request_body(StepBody, required=False),
)
async def release(request: Request, id: ReviewId) -> ReviewAnswer:
    """End one's own claim before its time."""
    caller = await caller_of(request, "review", images=0)
    body = await _optional(request, StepBody)
    step = partial(queue.release, id=id, who=actor_of(caller))
    return await _step(request, caller, id, "review.release", body.reason, step)


@router.post(
    "/reviews/{id}/skip",
    summary="Leave this item undecided",
    responses=_STEP,
    openapi_extra=json_request_body(StepBody, required=False),
)
async def skip(request: Request, id: ReviewId) -> ReviewAnswer:
    """Put an item aside. It can still be claimed and decided, and comes back where somebody reports the image."""
    caller = await caller_of(request, "review", images=0)
    body = await _optional(request, StepBody)
    step = partial(queue.skip, id=id, who=actor_of(caller))
    return await _step(request, caller, id, "review.skip", body.reason, step)


@router.post(
    "/reviews/{id}/decide",
    summary="Decide this item",
    responses=problem_responses(400, 401, 403, 404, 408, 409, 413, 415, 422, 500, 503),
    openapi_extra=json_request_body(DecideBody),
)
async def decide(request: Request, id: ReviewId) -> DecidedAnswer:
    """Put the image into a pool and close the item, or dismiss it, all in one: both happen or neither.

    When the answer is there, every verdict that follows knows the new exemplar. No claim is needed, unless somebody
    else has one. An item that the flood guard opened is about an exemplar in quarantine: naming a pool puts it back
    into searches, in that pool; dismissing the item leaves it where it is.
    """
    caller = await caller_of(request, "review", images=0)
    runtime = runtime_of(request)
    editor = runtime.require_editor()
    body = await read_json(request, DecideBody, runtime.settings)

    def read(connection: Connection) -> tuple[Item, Embedding]:
        return queue.get(connection, id), queue.embedding_of(connection, id)

    item, embedding = await editor.read(read)
    exemplar_id = None if body.label == "dismiss" else _exemplar_id(item, body)
    edits = [] if exemplar_id is None else _into_pool(runtime, item, embedding, body, exemplar_id)
    said = {"decision": body.label, "exemplar_id": exemplar_id, "image_sha256": item.image_sha256}
    step = partial(queue.decide, id=id, who=actor_of(caller), decision=body.label, exemplar_id=exemplar_id)
    said |= {"origin": item.origin, "verdict": item.verdict}
    before = runtime.published.snapshots.get(item.collection)
    edits_and_note = [*edits, Note(item.collection, "review.decide", id, said)]
    event = Event("review.decided", {"review": id, "collection": item.collection, **said})
    decided, outcomes = await _apply(request, caller, edits_and_note, body.reason, step, event)
    if item.origin == "flood" and exemplar_id is not None:
        runtime.excuse(exemplar_id)
    keeper = keeper_of(request)
    if keeper is not None:
        await keeper.decided(item.collection, exemplar_id, item.image_sha256)
    added = [edit for edit in edits if isinstance(edit, Add)]
    caught = None
    if added and item.collection == POOLS:
        caught = await retroactive_of(runtime, before, added, actor_of(caller), request_id_of(request))
    state = outcomes[-1].state
    return DecidedAnswer(
        request_id=request_id_of(request),
        review=(await _answer(request, decided)).review,
        collection=state.collection,
        version=state.version,
        revision=state.revision,
        retroactive=caught,
    )


@router.post(
    "/feedback",
    summary="This verdict was wrong",
    responses=problem_responses(400, 401, 403, 404, 408, 409, 413, 415, 429, 500, 503),
    openapi_extra=json_request_body(FeedbackBody),
)
async def feedback(request: Request) -> FeedbackAnswer:
    """Report a verdict, by the id of the request, by the SHA-256 of the image file, or both; a person will look at it.

    Only recent verdicts can be reported: HARDLOOK_TRAFFIC_KEPT says how many are kept. Several reports of one image are
    one item.
    """
    caller = await caller_of(request, "classify")
    runtime = runtime_of(request)
    body = await read_json(request, FeedbackBody, runtime.settings)
    found = await _reported(runtime, body)
    limit = runtime.settings.max_open_reviews
    evidence = dict(found.evidence or {"encoder_fingerprint": found.encoder_fingerprint, "version": found.seen.version})
    item = NewItem(
        origin=body.kind,
        collection=POOLS,
        image_sha256=found.seen.sha256,
        embedding=found.embedding,
        verdict=found.seen.verdict,
        evidence=evidence,
        comment=body.comment,
        request_id=found.seen.request_id,
        reporter=actor_of(caller),
    )

    def opened(connection: Connection) -> str:
        [id] = queue.open_items(connection, [item], limit=limit)
        if id is None:
            raise EditRefused(item.collection, "the review queue is full")
        return id

    # What people write stays out of the log, which cannot forget it.
    said = {"kind": body.kind, "request_id": item.request_id, "verdict": item.verdict}
    note = Note(item.collection, "review.open", item.image_sha256, said)
    event = Event("review.opened", {"image_sha256": item.image_sha256, "collection": item.collection, **said})
    try:
        id, _ = await _apply(request, caller, [note], "", opened, event)
    except EditRefused as error:
        raise Overloaded("the review queue", limit) from error
    return FeedbackAnswer(request_id=request_id_of(request), review_id=id)


T = TypeVar("T")


async def _apply(
    request: Request,
    caller: Caller,
    edits: Sequence[Edit],
    reason: str,
    step: Callable[[Connection], T],
    event: Event | None = None,
) -> tuple[T, list[Outcome]]:
    """Make edits and a step of the queue, and tell webhooks of it, in one transaction."""
    runtime = runtime_of(request)
    tell = None if event is None else runtime.telling(event)
    done: list[T] = []

    def also(connection: Connection, entry: Entry | None) -> None:
        done.append(step(connection))
        if tell is not None:
            tell(connection, entry)

    outcomes = await runtime.require_editor().apply(
        edits, actor=actor_of(caller), reason=reason, request_id=request_id_of(request), also=also
    )
    return done[-1], outcomes


async def _step(
    request: Request, caller: Caller, id: str, kind: str, reason: str, step: Callable[[Connection], Item]
) -> ReviewAnswer:
    """Let an item take a step, and log it."""
    present = await runtime_of(request).require_editor().read(partial(queue.get, id=id))
    item, _ = await _apply(request, caller, [Note(present.collection, kind, id)], reason, step)
    return await _answer(request, item)


async def _optional(request: Request, body_type: type[BodyT]) -> BodyT:
    """A body that may be left out."""
    headers = request.headers
    if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
        return body_type()
    return await read_json(request, body_type, runtime_of(request).settings)


def _exemplar_id(item: Item, body: DecideBody) -> str:
    """Of the exemplar that an image becomes; by default the same as where the image itself is added."""
    if item.origin != "flood":
        frame = item.evidence.get("frame", {}).get("index", 0)
        return body.exemplar_id or item.image_sha256[:_ID_CHARS] + (f"-{frame}" if frame else "")
    present = str(item.evidence["exemplar"])
    if body.exemplar_id not in (None, present):
        raise InvalidParameter("exemplar_id", f"the item is about the exemplar {present!r}")
    return present


def _into_pool(
    runtime: Runtime, item: Item, embedding: Embedding, body: DecideBody, exemplar_id: str
) -> list[Add | Move | Enable]:
    """What puts an image into a pool, moves it there from another one, or ends its quarantine."""
    view = runtime.published.get(item.collection)
    move = Move(item.collection, exemplar_id, body.label)
    if item.origin == "flood":
        return [move, Enable(item.collection, exemplar_id)]
    try:
        if view.exemplar(exemplar_id).sha256 == item.image_sha256:
            return [move]
    except UnknownExemplar:
        pass
    present = runtime.published.encoder
    encoder = replace(present, fingerprint=str(item.evidence.get("encoder_fingerprint", present.fingerprint)))
    exemplar = Exemplar(exemplar_id, body.label, item.image_sha256, f"review {item.id}")
    return [Add(item.collection, exemplar, embedding, encoder, body.note)]


async def _reported(runtime: Runtime, body: FeedbackBody) -> Found:
    """The verdict that a report is about."""
    await runtime.settle(SETTLE_S)  # the verdict may have been answered a moment ago
    find = partial(find_decisions, request_id=body.request_id, sha256=body.sha256, limit=2)
    found = await runtime.require_editor().read(find)
    if not found:
        by, value = ("sha256", body.sha256) if body.request_id is None else ("request_id", body.request_id)
        raise UnknownDecision(by, value or "")
    if body.sha256 is None and len(found) > 1:
        raise InvalidParameter("sha256", "the request had several images: say which one is meant")
    if found[0].seen.verdict is _RIGHT[body.kind]:
        raise InvalidParameter("kind", f"the verdict was {found[0].seen.verdict}, which is no {body.kind}")
    return found[0]


async def _answer(request: Request, item: Item) -> ReviewAnswer:
    kept = await kept_among(request, [item.image_sha256])
    return ReviewAnswer(request_id=request_id_of(request), review=_shown(item, bool(kept)))


def _shown(item: Item, image_kept: bool) -> ReviewItem:
    return ReviewItem(
        id=item.id,
        time=text_of(item.time),
        origin=item.origin,
        state=item.state,
        collection=item.collection,
        image_sha256=item.image_sha256,
        verdict=item.verdict,
        evidence=dict(item.evidence),
        comment=item.comment,
        request_id=item.request_id,
        reporter=item.reporter,
        claimed_by=item.claimed_by,
        claimed_until=None if item.claimed_until is None else text_of(item.claimed_until),
        decided_by=item.decided_by,
        decided_at=None if item.decided_at is None else text_of(item.decided_at),
        decision=item.decision,
        exemplar_id=item.exemplar_id,
        seen=item.seen,
        image_kept=image_kept,
    )
