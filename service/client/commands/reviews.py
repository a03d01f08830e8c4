"""hardlook reviews and hardlook feedback: what a person should look at, and what becomes of it."""

from typing import Annotated, Literal

from cyclopts import App, Parameter

from service.client.clients import Wrong
from service.client.commands.options import HERE, SOME_ERRORS, Json, Reason, Service
from service.client.commands.output import print_json, print_line
from service.wire_reviews import CLAIM_S, Choice, Origin, ReviewAnswer, ReviewItem, State

Id = Annotated[str, Parameter(help="Of the item.")]
OnlyOrigin = Annotated[Origin | None, Parameter(help="Only items of this origin.")]


def mount(app: App) -> None:
    """Add the commands."""
    reviews = App(name="reviews", help="The review queue: list, claim, decide, skip.")
    reviews.command(_list, name="list")
    reviews.command(_show, name="show")
    reviews.command(_claim, name="claim")
    reviews.command(_decide, name="decide")
    reviews.command(_skip, name="skip")
    reviews.command(_release, name="release")
    app.command(reviews)
    app.command(_feedback, name="feedback")


def _list(
    *,
    state: Annotated[State | Literal["all"], Parameter(help="Only items in this state.")] = "open",
    origin: OnlyOrigin = None,
    json: Json = False,
    service: Service = HERE,
) -> None:
    """List the queue, the oldest item first."""
    with service.client() as client:
        for item in client.reviews.list(state=None if state == "all" else state, origin=origin, page_size=200):
            if json:
                print_json(item)
            else:
                _print_item(item)


def _show(id: Id, *, json: Json = False, service: Service = HERE) -> None:
    """Show one item with the evidence that its verdict was made from."""
    with service.client() as client:
        _print_answer(client.reviews.get(id), json)


def _claim(
    id: Annotated[str | None, Parameter(help="Of the item; the oldest open one where absent.")] = None,
    *,
    for_s: Annotated[float, Parameter(help="Seconds to have it to oneself.")] = CLAIM_S,
    origin: OnlyOrigin = None,
    reason: Reason = "",
    json: Json = False,
    service: Service = HERE,
) -> int:
    """Have an item to oneself for a while. Exits with 1 where there is none to claim."""
    if id is not None and origin is not None:
        raise ValueError("--origin is for claiming the oldest item")
    with service.client() as client:
        if id is None:
            answer = client.reviews.claim_next(origin=origin, for_s=for_s, reason=reason)
        else:
            answer = client.reviews.claim(id, for_s=for_s, reason=reason)
    if answer is None:
        print_line("nothing is open")
        return SOME_ERRORS
    _print_answer(answer, json)
    return 0


def _decide(
    id: Id,
    label: Annotated[Choice, Parameter(help="The pool that the image goes into; 'dismiss' where none.")],
    *,
    exemplar_id: Annotated[str | None, Parameter(help="Made of the hash of the image by default.")] = None,
    note: Annotated[str, Parameter(help="Of the exemplar.")] = "",
    reason: Reason = "",
    json: Json = False,
    service: Service = HERE,
) -> None:
    """Put the image into a pool and close the item, or dismiss it."""
    with service.client() as client:
        answer = client.reviews.decide(id, label, exemplar_id=exemplar_id, note=note, reason=reason)
    if json:
        print_json(answer)
        return
    _print_item(answer.review)
    print_line(f"decided: {answer.collection}", answer.version, f"revision {answer.revision}")
    if answer.retroactive is not None and answer.retroactive.changed:
        print_line(f"{answer.retroactive.changed} of {answer.retroactive.compared} recent verdicts would be others now")


def _skip(id: Id, *, reason: Reason = "", json: Json = False, service: Service = HERE) -> None:
    """Put an item aside; it can still be decided."""
    with service.client() as client:
        _print_answer(client.reviews.skip(id, reason=reason), json)


def _release(id: Id, *, reason: Reason = "", json: Json = False, service: Service = HERE) -> None:
    """End one's own claim before its time."""
    with service.client() as client:
        _print_answer(client.reviews.release(id, reason=reason), json)


def _feedback(
    kind: Annotated[Wrong, Parameter(help="What the verdict was.")],
    *,
    request_id: Annotated[str | None, Parameter(help="Of the answer with the verdict.")] = None,
    sha256: Annotated[str | None, Parameter(help="Of the image file; where the request had several images.")] = None,
    comment: Annotated[str, Parameter(help="For the reviewer.")] = "",
    json: Json = False,
    service: Service = HERE,
) -> None:
    """Report that a verdict was wrong; a person will look at it."""
    with service.client() as client:
        answer = client.feedback(kind, request_id=request_id, sha256=sha256, comment=comment)
    if json:
        print_json(answer)
    else:
        print_line(f"review {answer.review_id}")


def _print_answer(answer: ReviewAnswer, json: bool) -> None:
    if json:
        print_json(answer)
        return
    _print_item(answer.review)
    for near in answer.review.evidence.get("neighbors", ()):
        if isinstance(near, dict):
            print_line("  near", near.get("pool"), near.get("id"), near.get("similarity"))


def _print_item(item: ReviewItem) -> None:
    by = f"{item.claimed_by} until {item.claimed_until}" if item.claimed_by else item.decided_by
    print_line(
        item.id,
        f"{item.state:<8}",
        f"{item.origin:<14}",
        item.verdict,
        item.image_sha256,
        f"seen {item.seen} times" if item.seen > 1 else None,
        item.decision,
        by,
        item.comment,
    )
