"""What goes over the wire about collections that change: exemplars, versions, dry runs, shadows.

As light as `service.wire`, and for the same readers.
"""

from typing import Annotated, Literal, Self

from pydantic import AwareDatetime, ConfigDict, Field, model_validator

from perception.verdict import VerdictLabel
from service.wire import (
    _FINGERPRINT,
    _PIXEL,
    _REQUEST_ID,
    MAX_ID_CHARS,
    MAX_URL_CHARS,
    Answer,
    Request,
)

MAX_TEXT_CHARS = 4000
MAX_ITEMS = 1000
PAGE = 100
Text = Annotated[str, Field(max_length=MAX_TEXT_CHARS)]
ExemplarId = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)]
Reason = Annotated[
    str, Field("", max_length=MAX_TEXT_CHARS, description="Why; kept in the audit log.", examples=["reported in #214"])
]
Metadata = Annotated[dict[Text, Text], Field(max_length=64)]
Page = Annotated[int, Field(ge=1, le=1000, description="The most that are listed.")]
# PostgreSQL neither stores NUL nor looks for it.
Asked = Annotated[str, Field(max_length=MAX_TEXT_CHARS, pattern=r"^[^\x00]*$")]
_TIME = "2026-11-21T09:30:00.000000+00:00"
_VERSION = "4b1f0c9d2e8a7356"


class ExemplarsQuery(Request):
    """Query of the list of exemplars."""

    label: Asked | None = Field(None, description="Only these.")
    after: Asked = Field("", description="The `next` of the page before.")
    limit: Page = PAGE


class ReasonQuery(Request):
    """Query of what is done without a body."""

    reason: Asked = Field("", description="Why; kept in the audit log.", examples=["reported in #214"])


class VersionsQuery(Request):
    """Query of the list of versions."""

    before: int | None = Field(None, ge=1, le=2**53, description="The `next` of the page before.")
    limit: Page = PAGE


class DiffQuery(Request):
    """The two versions to compare."""

    before: str = Field(max_length=64, description="A version of the collection.", examples=[_VERSION])
    after: str = Field(max_length=64, description="Another.", examples=[_VERSION])


class _Subject(Request):
    """An image, where to fetch it, or its embedding."""

    data: str | None = Field(None, description="The image file in base64, or a `data:` URI with base64.")
    url: str | None = Field(None, max_length=MAX_URL_CHARS, description="Where to fetch the file.")
    embedding: list[float] | None = Field(
        None, min_length=1, max_length=65_536, description="In place of an image: what this service's encoder made."
    )
    fingerprint: str | None = Field(
        None, max_length=256, description="Of the encoder that made `embedding`.", examples=[_FINGERPRINT]
    )
    frame: int = Field(0, ge=0, le=1000, description="Which of the examined frames of an animation is meant.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("data", "url", "embedding") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of data, url and embedding; found {', '.join(given) or 'none'}")
        if (self.embedding is None) != (self.fingerprint is None):
            raise ValueError("embedding and fingerprint go together")
        return self


class NewExemplar(_Subject):
    """An exemplar to add."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"examples": [{"label": "unsafe", "data": _PIXEL}]}
    )
    id: ExemplarId | None = Field(None, description="By default made of the hash of the image file.")
    label: str = Field(max_length=MAX_TEXT_CHARS, description="The pool; in a gallery a class.", examples=["unsafe"])
    source: Text = Field("", examples=["report 214"])
    metadata: Metadata = Field(default_factory=dict, examples=[{"category": "violence"}])
    note: Text = Field("", examples=["cropped from the original"])
    disabled_until: AwareDatetime | None = Field(None, description="Takes part in searches from then on.", strict=False)


class AddBody(Request):
    """Exemplars to add; all or none."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [{"items": [{"label": "unsafe", "data": _PIXEL}], "reason": "reported in #214"}]
        },
    )
    items: list[NewExemplar] = Field(min_length=1, max_length=MAX_ITEMS)
    reason: Reason


class SuppressBody(_Subject):
    """A suppress item: near it, some exemplars are no evidence."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"examples": [{"suppresses": ["dog-0017"], "min_similarity": 0.9, "data": _PIXEL}]},
    )
    id: ExemplarId | None = None
    suppresses: list[ExemplarId] = Field(min_length=1, max_length=100, description="Exemplars that are no evidence.")
    min_similarity: float = Field(
        0.95, gt=0, le=1, allow_inf_nan=False, description="Cosine from which on an image is near the item."
    )
    source: Text = ""
    metadata: Metadata = Field(default_factory=dict)
    note: Text = ""
    reason: Reason


class ChangeBody(Request):
    """What is to change of an exemplar; what is absent stays. All or nothing."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"examples": [{"label": "buffer", "reason": "not clear"}]}
    )
    label: str | None = Field(None, max_length=MAX_TEXT_CHARS, description="Moves it into another pool.")
    note: Text | None = None
    source: Text | None = None
    metadata: Metadata | None = Field(None, description="In place of all that there is.")
    disabled: bool | None = Field(None, description="True takes it out of searches, false takes it in again.")
    disabled_until: AwareDatetime | None = Field(
        None, description="When it takes part again by itself; with `disabled` true.", strict=False
    )
    reason: Reason

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.model_fields_set - {"reason"}:
            raise ValueError("nothing is to change")
        if self.disabled_until is not None and not self.disabled:
            raise ValueError("disabled_until goes with disabled: true")
        return self


class PublishBody(Request):
    """A name for the present state."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"examples": [{"name": "before the festival"}]}
    )
    name: Annotated[str, Field(min_length=1, max_length=200, pattern=r"\S", examples=["before the festival"])]
    reason: Reason


class CreateBody(Request):
    """An empty collection."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [{"name": "landmarks"}]})
    name: str = Field(max_length=64, examples=["landmarks"])
    reason: Reason


class RollbackBody(Request):
    """The state to go back to."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [{"version": _VERSION}]})
    version: str | None = Field(None, max_length=64, description="Any version that the collection ever had.")
    revision: int | None = Field(None, ge=1, le=2**53)
    reason: Reason

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.version is None) == (self.revision is None):
            raise ValueError("give either version or revision")
        return self


class CandidateBody(Request):
    """A candidate to compare with what serves."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [{"version": _VERSION}]})
    version: str | None = Field(None, max_length=64, description="A version of the collection.")
    encoder: Literal["shadow"] | None = Field(None, description="The candidate encoder, with its own pools.")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.version is None) == (self.encoder is None):
            raise ValueError("give either version or encoder")
        return self


class DryRunBody(CandidateBody):
    """What to compare with what serves, on how many recent verdicts."""

    limit: int = Field(10_000, ge=1, le=1_000_000, description="Verdicts, newest first.")


class ShadowBody(Request):
    """The version that is to see the traffic."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [{"version": _VERSION}]})
    version: str = Field(max_length=64)
    reason: Reason


class ExemplarItem(Answer):
    """One exemplar of a collection."""

    id: str = Field(examples=["dog-0017"])
    label: str = Field(description="'suppress' for a suppress item.", examples=["unsafe"])
    sha256: str = Field(description="Of the image file; empty where unknown.")
    source: str
    metadata: dict[str, str]
    note: str
    state: Literal["active", "disabled", "quarantined"]
    disabled_until: str | None = Field(None, examples=[_TIME])
    suppresses: list[str] = Field(default_factory=list)
    min_similarity: float | None = None
    image_kept: bool = Field(False, description="Whether `GET /images/{sha256}` has a picture of it.")


class State(Answer):
    """Where a collection is after a change."""

    collection: str = Field(examples=["pools"])
    version: str = Field(examples=[_VERSION])
    revision: int = Field(examples=[17])


class CaughtItem(Answer):
    """A recent request that would now get another verdict."""

    request_id: str = Field(examples=[_REQUEST_ID])
    sha256: str
    time: str = Field(examples=[_TIME])
    similarity: float = Field(description="Cosine to the exemplar that was added.")
    was: VerdictLabel
    would_be: VerdictLabel


class Retroactive(Answer):
    """What the added exemplars would have changed in recent traffic."""

    compared: int = Field(description="Recent verdicts that were looked at.")
    changed: int = Field(description="Of them, those that would be others now.")
    requests: list[CaughtItem] = Field(description="The most similar first, at most 100.")
    complete: bool = Field(True, description="Whether all that can have changed were judged again; else the nearest.")


class ChangedAnswer(State):
    """A change that was made; `changed` is false where all was so already."""

    request_id: str = Field(examples=[_REQUEST_ID])
    changed: bool
    items: list[ExemplarItem] = Field(description="As they are now.")
    retroactive: Retroactive | None = Field(None, description="For additions to the moderation pools.")


class ExemplarAnswer(State):
    """One exemplar."""

    request_id: str = Field(examples=[_REQUEST_ID])
    item: ExemplarItem


class ExemplarsAnswer(State):
    """A page of exemplars, in the order of their ids."""

    request_id: str = Field(examples=[_REQUEST_ID])
    items: list[ExemplarItem]
    next: str | None = Field(description="Give it as `after` for the next page; null at the end.")


class VersionItem(Answer):
    """A state that was published, came from an offline publication, or was gone back to."""

    version: str = Field(examples=[_VERSION])
    revision: int
    time: str = Field(examples=[_TIME])
    kind: Literal["publish", "base", "rollback", "compact"]
    name: str = Field(examples=["before the festival"])
    actor: str = Field(examples=["key:0a1b2c3d4e5f"])
    reason: str


class VersionsAnswer(State):
    """The versions of a collection, newest first; the present state first of all, published or not."""

    request_id: str = Field(examples=[_REQUEST_ID])
    versions: list[VersionItem]
    next: int | None = Field(description="Give it as `before` for the next page; null at the end.")


class VersionAnswer(State):
    """A version that was published or gone back to."""

    request_id: str = Field(examples=[_REQUEST_ID])
    changed: bool


class MovedItem(Answer):
    """An exemplar that lies in another pool."""

    id: str
    was: str
    now: str


class DiffAnswer(Answer):
    """What it takes to get from one version to another; at most 1,000 ids of each kind."""

    request_id: str = Field(examples=[_REQUEST_ID])
    collection: str
    before: str = Field(examples=[_VERSION])
    after: str = Field(examples=[_VERSION])
    counts: dict[str, int]
    added: list[str]
    removed: list[str]
    moved: list[MovedItem]
    changed: list[str]


class FlipItem(Answer):
    """A recent request on which the candidate disagrees."""

    request_id: str
    sha256: str
    time: str
    was: VerdictLabel
    would_be: VerdictLabel


class DryRunAnswer(Answer):
    """How a candidate would have judged recent traffic."""

    request_id: str = Field(examples=[_REQUEST_ID])
    candidate: str
    compared: int
    changed: int
    rate: float | None = Field(description="changed / compared; null where nothing was compared.")
    interval95: tuple[float, float] | None = Field(description="Wilson's interval of the rate.")
    confusion: dict[str, dict[str, int]] = Field(description="By present verdict, then by the candidate's.")
    flips: list[FlipItem] = Field(description="The gravest first, at most 100.")


class ShadowItem(Answer):
    """A candidate that sees live traffic without being heard."""

    candidate: str = Field(examples=[f"version {_VERSION}"])
    compared: int = Field(description="Verdicts since it runs, the last 1,000 at most.")
    rate: float | None = Field(description="Of disagreement among them.")
    dropped: int = Field(0, description="Images that it did not see, since it could not keep up.")


class ShadowAnswer(Answer):
    """The candidates that run now."""

    request_id: str = Field(examples=[_REQUEST_ID])
    candidates: list[ShadowItem]
