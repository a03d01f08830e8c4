"""The review queue, and the reports that get into it."""

from typing import Literal

from service.client.calls import Call, given, json_call, path_of
from service.client.errors import Conflict
from service.client.parts import Item, Items, Part, Steps, WayT, ask, asked, listed, stepped
from service.wire_reviews import (
    CLAIM_S,
    Choice,
    ClaimBody,
    DecideBody,
    DecidedAnswer,
    FeedbackAnswer,
    FeedbackBody,
    Origin,
    ReviewAnswer,
    ReviewItem,
    ReviewsAnswer,
    State,
    StepBody,
)

_MAX_AT_ONCE = 20


class Reviews(Part[WayT]):
    """What a person should look at. Needs the scope `review`.

    All raise ConnectionFailed, AnswerNotUnderstood and ProblemError: NotFound where there is no such item, Conflict
    (`review-taken`) where it is somebody else's or decided.
    """

    @listed
    def list(
        self, *, state: State | None = None, origin: Origin | None = None, page_size: int | None = None
    ) -> Items[ReviewItem]:
        """Iterate over the queue, the oldest item first."""
        after: str | None = None
        while True:
            page = yield from ask(_page(state=state, origin=origin, limit=page_size, after=after))
            for item in page.reviews:
                yield Item(item)
            if page.next is None:
                return
            after = page.next

    @stepped
    def counts(self) -> Steps[dict[State, int]]:
        """How many items there are in each state."""
        page = yield from ask(_page(limit=1))
        return page.counts

    @asked
    def get(self, id: str) -> Call[ReviewAnswer]:
        """One item with the evidence that its verdict was made from."""
        return Call("GET", path_of("reviews", id), ReviewAnswer)

    @asked
    def claim(self, id: str, *, for_s: float = CLAIM_S, reason: str = "") -> Call[ReviewAnswer]:
        """Have an item to oneself for some seconds; claiming again is for some more."""
        return _claim(id, for_s, reason)

    @stepped
    def claim_next(
        self, *, origin: Origin | None = None, for_s: float = CLAIM_S, reason: str = ""
    ) -> Steps[ReviewAnswer | None]:
        """Claim the oldest open item that nobody else claims at the same time; None where there is none."""
        after: str | None = None
        while True:
            page = yield from ask(_page(state="open", origin=origin, limit=_MAX_AT_ONCE, after=after))
            for item in page.reviews:
                try:
                    return (yield from ask(_claim(item.id, for_s, reason)))
                except Conflict as error:
                    if error.slug != "review-taken":
                        raise
            if page.next is None:
                return None
            after = page.next

    @asked
    def decide(
        self, id: str, label: Choice, *, exemplar_id: str | None = None, note: str = "", reason: str = ""
    ) -> Call[DecidedAnswer]:
        """Put the image into a pool and close the item, or dismiss it.

        It is not sent again where it may have been heard: the item would seem to be decided by somebody else.

        Args:
            id: of the item.
            label: the pool, or 'dismiss' for none.
            exemplar_id: made of the hash of the image where None.
            note: of the exemplar.
            reason: why; kept in the audit log.
        """
        body = DecideBody(label=label, exemplar_id=exemplar_id, note=note, reason=reason)
        return json_call("POST", path_of("reviews", id, "decide"), DecidedAnswer, body, repeatable=False)

    @asked
    def skip(self, id: str, *, reason: str = "") -> Call[ReviewAnswer]:
        """Put an item aside; it can still be decided."""
        return json_call("POST", path_of("reviews", id, "skip"), ReviewAnswer, StepBody(reason=reason))

    @asked
    def release(self, id: str, *, reason: str = "") -> Call[ReviewAnswer]:
        """End one's own claim before its time."""
        return json_call("POST", path_of("reviews", id, "release"), ReviewAnswer, StepBody(reason=reason))


def feedback_call(
    kind: Literal["false-positive", "false-negative"], request_id: str | None, sha256: str | None, comment: str
) -> Call[FeedbackAnswer]:
    """POST /feedback; every report counts, so it is not sent again where it may have been heard.

    Raises:
        ValueError: a parameter is none.
    """
    body = FeedbackBody(kind=kind, request_id=request_id, sha256=sha256, comment=comment)
    return json_call("POST", "/feedback", FeedbackAnswer, body, repeatable=False)


def _page(
    *,
    state: State | None = None,
    origin: Origin | None = None,
    limit: int | None = None,
    after: str | None = None,
) -> Call[ReviewsAnswer]:
    return Call("GET", "/reviews", ReviewsAnswer, given(state=state, origin=origin, limit=limit, after=after))


def _claim(id: str, for_s: float, reason: str) -> Call[ReviewAnswer]:
    body = ClaimBody(for_s=float(for_s), reason=reason)
    return json_call("POST", path_of("reviews", id, "claim"), ReviewAnswer, body)
