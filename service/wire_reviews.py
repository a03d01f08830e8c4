"""What goes over the wire about reviews: the queue, what is done with its items, and what callers report.

As light as `service.wire`, and for the same readers.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from perception.verdict import VerdictLabel
from service.wire import MAX_ID_CHARS, Answer, Request
from service.wire_collections import Retroactive

MAX_TEXT_CHARS = 4000
PAGE, MAX_PAGE = 50, 200
CLAIM_S, MAX_CLAIM_S = 900.0, 86_400.0
# The same as those of indexer.catalog.reviews, which a test holds them to.
Origin = Literal["verdict", "false-positive", "false-negative", "flood", "retroactive"]
State = Literal["open", "claimed", "decided", "skipped"]
Choice = Literal["safe", "buffer", "unsafe", "dismiss"]
_ID = "00064a1f2b3c4d5e9f2c1d52a1f0c9e6"
_REQUEST_ID = "b0c7a1e2d3f44556a7b8c9d0e1f20314"
_SHA256 = "9f2c1d52a1f0c9e6b7a83d4e5f60718293a4b5c6d7e8f9010203040506070809"
_TIME = "2026-11-21T09:30:00.000000+00:00"
# PostgreSQL stores no NUL.
_Text = Annotated[str, Field(max_length=MAX_TEXT_CHARS, pattern=r"^[^\x00]*$")]
_Reason = Annotated[_Text, Field(description="Why; kept in the audit log.", examples=["reported in #214"])]


class ReviewsQuery(Request):
    """Query of the list of reviews."""

    state: State | None = Field(None, description="Only these; a claim that has run out is `open` again.")
    origin: Origin | None = Field(None, description="Only these.")
    after: str = Field("", pattern=r"^([0-9a-f]{32})?$", description="The `next` of the page before.", examples=[_ID])
    limit: int = Field(PAGE, ge=1, le=MAX_PAGE, description="The most items.")


class ClaimBody(Request):
    """JSON body of a claim; it may be left out."""

    model_config = ConfigDict(strict=True, json_schema_extra={"examples": [{"for_s": 600}]})
    for_s: float = Field(CLAIM_S, ge=1, le=MAX_CLAIM_S, description="Seconds to have the item to oneself.")
    reason: _Reason = ""


class StepBody(Request):
    """JSON body of a release or a skip; it may be left out."""

    model_config = ConfigDict(strict=True, json_schema_extra={"examples": [{"reason": "I cannot tell"}]})
    reason: _Reason = ""


class DecideBody(Request):
    """JSON body of a decision."""

    model_config = ConfigDict(
        strict=True, json_schema_extra={"examples": [{"label": "unsafe", "reason": "shows a weapon"}]}
    )
    label: Choice = Field(
        description="The pool that the image becomes an exemplar of; `dismiss` where none: all stays as it is."
    )
    exemplar_id: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_ID_CHARS,
        pattern=r"^[^\x00]*$",
        description="By default made of the hash of the image. Where the exemplar of that id is this image already, it "
        "is moved.",
    )
    note: _Text = Field("", description="Of the exemplar.", examples=["cropped from the original"])
    reason: _Reason = ""

    @model_validator(mode="after")
    def _nothing_to_dismissed(self) -> Self:
        if self.label == "dismiss" and (self.exemplar_id is not None or self.note):
            raise ValueError("exemplar_id and note are for a pool: dismiss makes no exemplar")
        return self


class FeedbackBody(Request):
    """JSON body of a report that a verdict was wrong: of which request, of which image, or both."""

    model_config = ConfigDict(
        strict=True,
        json_schema_extra={
            "anyOf": [{"required": ["request_id"]}, {"required": ["sha256"]}],
            "examples": [{"kind": "false-negative", "request_id": _REQUEST_ID, "comment": "reported by three users"}],
        },
    )
    kind: Literal["false-positive", "false-negative"] = Field(
        description="A false positive should have been `safe`; a false negative should have been `unsafe`."
    )
    request_id: str | None = Field(
        None, min_length=1, max_length=64, pattern=r"^[^\x00]*$", description="Of the answer.", examples=[_REQUEST_ID]
    )
    sha256: str | None = Field(
        None, pattern=r"^[0-9a-f]{64}$", description="Of the image file; needed where the request had several images."
    )
    comment: _Text = Field("", description="For the reviewer.")

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.request_id is None and self.sha256 is None:
            raise ValueError("give request_id, sha256 or both")
        return self


class ReviewItem(Answer):
    """One item of the review queue."""

    id: str = Field(examples=[_ID])
    time: str = Field(description="When it was opened.", examples=[_TIME])
    origin: Origin = Field(description="A `review` verdict, a report, or what a program noticed.")
    state: State
    collection: str = Field(examples=["pools"])
    image_sha256: str = Field(examples=[_SHA256])
    verdict: str = Field(description="That was answered.", examples=[VerdictLabel.REVIEW])
    evidence: dict[str, Any] = Field(description="That it was answered from: neighbours, version, policy.")
    comment: str = Field(description="Of whoever reported it.")
    request_id: str = Field(description="Of the answer.", examples=[_REQUEST_ID])
    reporter: str = Field(examples=["hardlook-serve", "key:0a1b2c3d4e5f"])
    claimed_by: str | None = Field(examples=["key:0a1b2c3d4e5f"])
    claimed_until: str | None = Field(examples=[_TIME])
    decided_by: str | None = Field(examples=["key:0a1b2c3d4e5f"])
    decided_at: str | None = Field(examples=[_TIME])
    decision: Choice | None
    exemplar_id: str | None = Field(description="That came of it.", examples=[_SHA256[:16]])
    seen: int = Field(description="How often the image came while the item was there.", examples=[1])
    image_kept: bool = Field(False, description="Whether `GET /images/{image_sha256}` has a picture of it.")


class ReviewAnswer(Answer):
    """One item, as it is now."""

    request_id: str = Field(examples=[_REQUEST_ID])
    review: ReviewItem


class DecidedAnswer(ReviewAnswer):
    """An item that was decided, and the collection after it."""

    collection: str = Field(examples=["pools"])
    version: str = Field(examples=["4b1f0c9d2e8a7356"])
    revision: int = Field(examples=[17])
    retroactive: Retroactive | None = Field(None, description="For additions to the moderation pools.")


class ReviewsAnswer(Answer):
    """A page of the queue, the oldest first."""

    request_id: str = Field(examples=[_REQUEST_ID])
    counts: dict[State, int] = Field(description="Items of the whole queue by state.")
    reviews: list[ReviewItem]
    next: str | None = Field(description="Give it as `after` for the next page; null at the end.", examples=[_ID])


class FeedbackAnswer(Answer):
    """A report that was taken."""

    request_id: str = Field(examples=[_REQUEST_ID])
    review_id: str = Field(description="Of the item that a reviewer will see.", examples=[_ID])
