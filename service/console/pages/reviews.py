"""The review queue: what waits for a person, one item at a time, and what becomes of it.

Who may do what to an item is the API's to say. The pages show its rules: a claim keeps others away, nobody needs one
to decide what is free, and what is decided stays so.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast
from urllib.parse import urlencode

from fastapi import Request
from fastapi.responses import Response

from indexer.catalog.clock import now, parse_time
from service.client import Conflict
from service.client.calls import Call, given
from service.console.asking import answer_to_call
from service.console.gate import Visit, visit_of
from service.console.pages.review_order import item_before
from service.console.places import exemplar_place
from service.console.rendering import page, redirect
from service.console.routes import console_router
from service.intake import Form
from service.runtime import actor_of
from service.wire_collections import CaughtItem, Retroactive
from service.wire_reviews import Choice, DecidedAnswer, Origin, ReviewItem, ReviewsAnswer, State

router = console_router()
PAGE = 50
PATH = "/console/reviews"
ORIGINS: tuple[Origin, ...] = ("verdict", "false-positive", "false-negative", "flood", "retroactive")
STATES: tuple[State, ...] = ("open", "claimed", "skipped", "decided")
ANY = "all"


@dataclass(frozen=True)
class Wanted:
    """Which part of the queue somebody leafs through.

    Attributes:
        state: as in the address; `ANY`, or empty for what is open.
        origin: empty for any.
    """

    state: str
    origin: str

    @classmethod
    def of(cls, fields: Mapping[str, str]) -> "Wanted":
        """From the parameters of an address, or the fields of a form."""
        return cls(fields.get("state", ""), fields.get("origin", ""))

    @property
    def params(self) -> dict[str, Any]:
        """For the API, which refuses what is no state or origin."""
        state = self.state or "open"
        return given(state=None if state == ANY else state, origin=self.origin or None)

    def address(self, path: str = PATH, **more: str) -> str:
        """A page of the console that goes on with the same part."""
        fields = {"state": self.state, "origin": self.origin, **more}
        query = urlencode({name: value for name, value in fields.items() if value})
        return f"{path}?{query}" if query else path


@dataclass(frozen=True)
class Lock:
    """Who has an item.

    Attributes:
        by: None where nobody has.
        mine: whether it is the visitor.
        seconds: for how long.
    """

    by: str | None
    mine: bool
    seconds: int

    @property
    def others(self) -> bool:
        """Whether somebody else has it."""
        return self.by is not None and not self.mine


@router.get(PATH)
async def queue(request: Request) -> Response:
    """A page of the queue."""
    async with visit_of(request, "review") as visit:
        return await _queue_page(visit, Wanted.of(request.query_params), request.query_params.get("after", ""))


@router.post(f"{PATH}/next")
async def claim_next(request: Request) -> Response:
    """Claim the oldest item that is free, and go there."""
    async with visit_of(request, "review") as visit:
        wanted = Wanted.of((await visit.form()).fields)
        answer = await visit.client.reviews.claim_next(origin=cast(Origin | None, wanted.origin or None))
        if answer is None:
            return redirect(wanted.address(), "nothing-open")
        return redirect(wanted.address(f"{PATH}/{answer.review.id}"), "claimed")


@router.get(f"{PATH}/{{id}}")
async def item(request: Request, id: str) -> Response:
    """One item."""
    async with visit_of(request, "review") as visit:
        answer = await visit.client.reviews.get(id)
        return await _item_page(visit, answer.review, Wanted.of(request.query_params))


@router.post(f"{PATH}/{{id}}/claim")
async def claim(request: Request, id: str) -> Response:
    """Have an item to oneself, or for some more time."""

    async def step(visit: Visit, form: Form, wanted: Wanted) -> Response:
        await visit.client.reviews.claim(id, reason=form.fields.get("reason", ""))
        return redirect(wanted.address(f"{PATH}/{id}"), "claimed")

    return await _stepped(request, id, step)


@router.post(f"{PATH}/{{id}}/release")
async def release(request: Request, id: str) -> Response:
    """Give one's claim back."""

    async def step(visit: Visit, form: Form, wanted: Wanted) -> Response:
        await visit.client.reviews.release(id, reason=form.fields.get("reason", ""))
        return redirect(wanted.address(f"{PATH}/{id}"), "released")

    return await _stepped(request, id, step)


@router.post(f"{PATH}/{{id}}/skip")
async def skip(request: Request, id: str) -> Response:
    """Put an item aside, and go on."""

    async def step(visit: Visit, form: Form, wanted: Wanted) -> Response:
        await visit.client.reviews.skip(id, reason=form.fields.get("reason", ""))
        return await _onwards(visit, wanted, id, "skipped")

    return await _stepped(request, id, step)


@router.post(f"{PATH}/{{id}}/decide")
async def decide(request: Request, id: str) -> Response:
    """Decide an item, and go on; on the way, what the new exemplar would have caught of late is shown."""

    async def step(visit: Visit, form: Form, wanted: Wanted) -> Response:
        said = form.fields
        answer = await visit.client.reviews.decide(
            id,
            cast(Choice, said.get("label", "")),
            exemplar_id=said.get("exemplar_id") or None,
            note=said.get("note", ""),
            reason=said.get("reason", ""),
        )
        return await _decided(visit, answer, wanted)

    return await _stepped(request, id, step)


async def _stepped(request: Request, id: str, step: Callable[[Visit, Form, Wanted], Awaitable[Response]]) -> Response:
    """Take a step with an item; where somebody else has it, or was quicker, say who, and how to go on."""
    async with visit_of(request, "review") as visit:
        form = await visit.form()
        wanted = Wanted.of(form.fields)
        try:
            return await step(visit, form, wanted)
        except Conflict as error:
            if error.slug != "review-taken":
                raise
            present = (await visit.client.reviews.get(id)).review
            mine = present.decided_by == actor_of(visit.caller)
            if mine and present.decision == form.fields.get("label"):  # the button was pressed twice
                return await _onwards(visit, wanted, id, "decided" if present.exemplar_id else "dismissed")
            following = await _following(visit, wanted, id)
            return page(
                visit,
                "review_taken.html",
                exemplar_place=exemplar_place,
                status=error.status,
                item=present,
                mine=mine,
                lock=_lock(visit, present),
                queue=wanted.address(),
                here=wanted.address(f"{PATH}/{id}"),
                following=None if following is None else wanted.address(f"{PATH}/{following.id}"),
            )


async def _decided(visit: Visit, answer: DecidedAnswer, wanted: Wanted) -> Response:
    """Go on; with hits, which no address can carry, the next page is answered at once."""
    done = answer.review
    notice = "decided" if done.exemplar_id else "dismissed"
    hits = _others(answer.retroactive, done.image_sha256)
    if not hits:
        return await _onwards(visit, wanted, done.id, notice)
    assert answer.retroactive is not None
    told = {"caught": hits, "after": done, "complete": answer.retroactive.complete}
    following = await _following(visit, wanted, done.id)
    if following is None:
        return await _queue_page(visit, wanted, "", told)
    return await _item_page(visit, following, wanted, told)


def _others(found: Retroactive | None, sha256: str) -> list[CaughtItem]:
    """Recent requests that the exemplar would have caught, without those of its own image."""
    return [] if found is None else [hit for hit in found.requests if hit.sha256 != sha256]


async def _onwards(visit: Visit, wanted: Wanted, id: str, notice: str) -> Response:
    following = await _following(visit, wanted, id)
    path = PATH if following is None else f"{PATH}/{following.id}"
    return redirect(wanted.address(path), notice)


async def _following(visit: Visit, wanted: Wanted, id: str) -> ReviewItem | None:
    """The next open item after one; behind the last comes the first."""
    for after in (id, ""):
        found = await _listed(visit, Wanted("open", wanted.origin), after, 2)
        for review in found.reviews:
            if review.id != id:
                return review
    return None


async def _queue_page(visit: Visit, wanted: Wanted, after: str, told: Mapping[str, Any] | None = None) -> Response:
    answer = await _listed(visit, wanted, after, PAGE)
    return page(
        visit,
        "reviews.html",
        exemplar_place=exemplar_place,
        answer=answer,
        wanted=wanted,
        states=STATES,
        origins=ORIGINS,
        any_state=ANY,
        after=after,
        told=told,
        following=wanted.address(after=answer.next) if answer.next else None,
        address_of=lambda review: wanted.address(f"{PATH}/{review.id}"),
        nearest_of=nearest_by_pool,
        lock_of=lambda review: _lock(visit, review),
    )


async def _item_page(
    visit: Visit, review: ReviewItem, wanted: Wanted, told: Mapping[str, Any] | None = None
) -> Response:
    """The page of an item; `told` is what a decision a moment ago has come to."""

    async def listed(after: str, limit: int) -> ReviewsAnswer:
        return await _listed(visit, wanted, after, limit)

    following = (await listed(review.id, 1)).reviews
    before = await item_before(review.id, listed)
    return page(
        visit,
        "review.html",
        exemplar_place=exemplar_place,
        item=review,
        told=told,
        wanted=wanted,
        here=wanted.address(f"{PATH}/{review.id}"),
        queue=wanted.address(),
        following=wanted.address(f"{PATH}/{following[0].id}") if following else None,
        before=wanted.address(f"{PATH}/{before}") if before else None,
        lock=_lock(visit, review),
        nearest=nearest_by_pool(review),
        policy=visit.runtime.policy,
        item_path=f"{PATH}/{review.id}",
    )


async def _listed(visit: Visit, wanted: Wanted, after: str, limit: int) -> ReviewsAnswer:
    params = {**wanted.params, **given(after=after or None), "limit": limit}
    return await answer_to_call(visit, Call("GET", "/reviews", ReviewsAnswer, params))


def nearest_by_pool(review: ReviewItem) -> dict[str, list[dict[str, Any]]]:
    """The neighbours that an item's verdict was made from, the most similar first, by pool."""
    found: dict[str, list[dict[str, Any]]] = {}
    for neighbor in review.evidence.get("neighbors", ()):
        found.setdefault(str(neighbor["pool"]), []).append(neighbor)
    return found


def _lock(visit: Visit, review: ReviewItem) -> Lock:
    if review.state != "claimed" or review.claimed_until is None:
        return Lock(None, mine=False, seconds=0)
    mine = review.claimed_by == actor_of(visit.caller)
    return Lock(review.claimed_by, mine, _seconds_until(parse_time(review.claimed_until)))


def _seconds_until(moment: datetime) -> int:
    return max(0, int((moment - now()).total_seconds()))
