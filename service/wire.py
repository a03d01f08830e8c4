"""What goes over the wire, with examples: the models that the service answers with and the client reads.

Light on purpose: the client must not pay for torch or a web framework. Conversions from the values of the service are
in `service.schemas`.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from perception.verdict import PoolLabel, VerdictLabel

MAX_K = 1000
MAX_TEXT_CHARS = 4000
MAX_ID_CHARS = 256
MAX_URL_CHARS = 2048
SHOWN_NEIGHBORS = 3
FOUND_NEIGHBORS = 10
# The same as perception.encoder.Precision and perception.policy_file.Norm, which a test holds them to.
Precision = Literal["fp32", "bf16"]
Norm = Literal["linf", "l2"]
_FINGERPRINT = "9f2c1d52a1f0c9e6b7a83d4e5f60718293a4b5c6d7e8f9010203040506070809"
_REQUEST_ID = "b0c7a1e2d3f44556a7b8c9d0e1f20314"
_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"


class Request(BaseModel):
    """What a caller sends: unknown members are refused."""

    model_config = ConfigDict(extra="forbid")


class Answer(BaseModel):
    """What the service answers."""

    # Unknown members are ignored, so that a client reads what a newer service answers.
    model_config = ConfigDict(frozen=True, extra="ignore")


class ClassifyParameters(Request):
    """Parameters of /classify; in the query string, or in a JSON or multipart body."""

    k: int | None = Field(
        None,
        ge=1,
        le=MAX_K,
        description=f"Neighbours of each pool to show, {SHOWN_NEIGHBORS} by default; at most HARDLOOK_MAX_NEIGHBORS. "
        "The verdict does not depend on it.",
    )


class SimilarParameters(Request):
    """Parameters of /similar; in the query string, or in a JSON or multipart body."""

    gallery: str | None = Field(
        None, max_length=64, description="Collection to search; the moderation pools where absent."
    )
    pool: PoolLabel | None = Field(None, description="Search only this one of the moderation pools.")
    k: int | None = Field(
        None,
        ge=1,
        le=MAX_K,
        description=f"The most neighbours, {FOUND_NEIGHBORS} by default; at most HARDLOOK_MAX_NEIGHBORS.",
    )
    min_similarity: float | None = Field(
        None, ge=-1, le=1, allow_inf_nan=False, description="Leave out what is less similar; -1 by default."
    )


def _present(name: str, absent: str) -> dict[str, Any]:
    return {"required": [name], "properties": {name: {"type": "string"}, absent: {"type": "null"}}}


class ImageData(Request):
    """One image in a JSON body: its file, or where to fetch it."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [_present("data", absent="url"), _present("url", absent="data")],
            "examples": [{"id": "avatar", "data": _PIXEL}, {"id": "banner", "url": "https://example.org/banner.webp"}],
        }
    )
    id: str | None = Field(None, max_length=MAX_ID_CHARS, description="Repeated in the answer; the position if absent.")
    data: str | None = Field(None, description="The image file in base64, or a `data:` URI with base64.")
    url: str | None = Field(
        None,
        max_length=MAX_URL_CHARS,
        description="Where to fetch the file; only where the service has HARDLOOK_FETCH on.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.data is None) == (self.url is None):
            found = "neither" if self.data is None else "both"
            raise ValueError(f"give either data or url; found {found}")
        return self


class ClassifyBody(ClassifyParameters):
    """JSON body of /classify."""

    model_config = ConfigDict(
        strict=True, json_schema_extra={"examples": [{"images": [{"id": "avatar", "data": _PIXEL}]}]}
    )
    images: list[ImageData] = Field(min_length=1)


class SimilarBody(SimilarParameters):
    """JSON body of /similar: images or a text."""

    model_config = ConfigDict(
        strict=True,
        json_schema_extra={
            "examples": [{"text": "a dog on a beach", "k": 5}, {"images": [{"data": _PIXEL}], "pool": "unsafe"}]
        },
    )
    images: list[ImageData] | None = Field(None, min_length=1)
    text: str | None = Field(None, max_length=MAX_TEXT_CHARS, description="What the images should show.")


class Problem(Answer):
    """RFC 9457 problem details; some types have members of their own."""

    model_config = ConfigDict(
        frozen=True,
        extra="allow",
        json_schema_extra={
            "examples": [
                {
                    "type": "urn:hardlook:problem:corrupt-image",
                    "title": "The image cannot be decoded",
                    "status": 422,
                    "detail": "image cannot be decoded: PNG: OSError: unrecognized data stream contents",
                    "instance": f"urn:hardlook:request:{_REQUEST_ID}",
                    "request_id": _REQUEST_ID,
                    "reason": "PNG: OSError: unrecognized data stream contents",
                }
            ]
        },
    )
    type: str
    title: str
    status: int
    detail: str
    instance: str
    request_id: str


class Model(Answer):
    """The encoder that answers."""

    name: str = Field(examples=["hf-hub:chs20/FARE4-convnext_base_w-laion2B-s13B-b82K-augreg"])
    fingerprint: str = Field(examples=[_FINGERPRINT])
    precision: Precision
    defense: str | None = Field(
        None,
        description="Version of the defence that images go through before they are encoded; null without one. Equal "
        "images get equal embeddings under one fingerprint and one version. Keys of caches need both.",
        examples=[None],
    )


class SnapshotVersion(Answer):
    """The state of a collection that was searched."""

    collection: str = Field(examples=["pools"])
    version: str = Field(
        examples=["4b1f0c9d2e8a7356"], description="Every state has its own; equal ones have equal exemplars."
    )
    revision: int = Field(0, description="Entry of the audit log that made it; 0 without a log.", examples=[17])
    created_at: str = Field(examples=["2026-11-21T09:30:00+00:00"])


class Policy(Answer):
    """The decision rule and its parameters; equal versions decide equally. The last three are of a calibrated one."""

    version: str = Field(examples=["nearest-3f5a9c0e1b2d"])
    rule: Literal["nearest", "vote"]
    k: int
    min_similarity: float
    min_margin: float
    min_margin_unsafe: float
    name: str | None = Field(description="Null where the policy is not from a file.", examples=[None])
    sha256: str | None = Field(description="Of the policy file's content, as recorded in it.", examples=[None])
    audited_gallery: str | None = Field(
        description="sha256 of the pools that it was audited with, as `hardlook-index export` writes them.",
        examples=[None],
    )


class Image(Answer):
    """The image as decoded; width and height are upright."""

    format: str = Field(examples=["JPEG"])
    width_px: int = Field(examples=[1024])
    height_px: int = Field(examples=[768])
    frames_in_file: int = Field(examples=[1])


class DecidingFrame(Answer):
    """The frame that decided: of an animation, or of an image that looks different on light and dark pages."""

    index: int = Field(description="0-based.", examples=[0])
    background: Literal["white", "black"] | None = Field(description="What transparency was laid on.", examples=[None])
    frames_examined: int = Field(description="Frames and backgrounds that have a verdict.", examples=[1])


class FlipRateItem(Answer):
    """How often verdicts with such a margin flipped when the policy was audited, under one attack."""

    norm: Norm
    eps: float = Field(description="Radius of the attack, in [0, 1] pixel units.", examples=[0.03137254901960784])
    steps: int = Field(description="Updates of its gradient attacks.", examples=[200])
    value: float = Field(description="Share of the verdicts that flipped.", examples=[0.12])
    interval95: tuple[float, float] = Field(description="Wilson's interval.", examples=[[0.056, 0.238]])
    n: int = Field(description="Audited verdicts with such a margin.", examples=[50])


class NeighborItem(Answer):
    """One exemplar near the image."""

    id: str = Field(examples=["dog-0017"])
    pool: str = Field(description="The pool or the gallery that it lies in.", examples=["safe"])
    label: str = Field(description="Of the exemplar; in the moderation pools the pool.", examples=["safe"])
    similarity: float = Field(description="Cosine in [-1, 1], higher is closer.", examples=[0.871])
    source: str = Field(examples=["photos/dog-0017.jpg"])
    metadata: dict[str, str] = Field(examples=[{}])


class SuppressedItem(Answer):
    """An exemplar that is no evidence here, since the image is near a suppress item."""

    id: str = Field(examples=["dog-0017"])
    by: str = Field(description="The suppress item.", examples=["suppress-81f0"])
    similarity: float = Field(description="Cosine of the image and the suppress item.", examples=[0.97])


class ItemError(Answer):
    """One image of several that could not be answered."""

    id: str
    status: Literal["error"] = "error"
    error: Problem


class ClassifyItem(Answer):
    """The verdict on one image."""

    id: str = Field(examples=["avatar"])
    status: Literal["ok"] = "ok"
    detail: Literal["full", "coarse"] = Field(
        "full",
        description="coarse: verdict only (no pool, no margin, no neighbours), since the caller sent many "
        "near-duplicates of this image.",
    )
    verdict: VerdictLabel
    pool: PoolLabel | None = Field(description="The pool that won; null where there was nothing to compare with.")
    margin: float | None = Field(
        description="Best similarity of the winning pool minus the best of the others.", examples=[0.134]
    )
    reason: str = Field(examples=["nearest exemplar is 'dog-0017' in the safe pool (similarity 0.8710)"])
    frame: DecidingFrame
    image: Image
    neighbors: list[NeighborItem] = Field(description="The nearest of each pool, most similar first.")
    suppressed: list[SuppressedItem] = Field(
        default_factory=list, description="What suppress items took away from the evidence."
    )
    flip_rate_at_eps: list[FlipRateItem] | None = Field(
        description="How often verdicts with such a margin flipped in the audit of the calibrated policy, for each "
        "attack; null without such a policy, for `review`, where several frames were examined, and where no audited "
        "verdict had a margin near this one."
    )
    certified_radius_l2: float | None = Field(
        None,
        ge=0,
        description="No change of the pixels at the encoder's input, after decoding and resizing, in [0, 1] and of at "
        "most this L2 norm, changes the verdict; proven for this state of the pools. 0: nothing is proven. Null where "
        "the encoder has no proven Lipschitz constant, for `review` by a threshold, and in coarse answers.",
        examples=[None],
    )


class SimilarItem(Answer):
    """What is similar to one image or prompt."""

    id: str
    status: Literal["ok"] = "ok"
    detail: Literal["full", "coarse"] = Field(
        "full",
        description="coarse: similarities are rounded to one decimal, since the caller sent many near-duplicates of "
        "this image.",
    )
    image: Image | None = Field(description="Null for a prompt.")
    neighbors: list[NeighborItem] = Field(description="Most similar first.")


class ClassifyAnswer(Answer):
    """Answer of /classify: one result or error an image, in the order of the request."""

    request_id: str = Field(examples=[_REQUEST_ID])
    model: Model
    snapshot: SnapshotVersion
    policy: Policy
    results: list[Annotated[ClassifyItem | ItemError, Field(discriminator="status")]]


class SimilarAnswer(Answer):
    """Answer of /similar: one result or error an image, in the order of the request."""

    request_id: str = Field(examples=[_REQUEST_ID])
    model: Model
    snapshot: SnapshotVersion
    policy: Policy
    results: list[Annotated[SimilarItem | ItemError, Field(discriminator="status")]]


class Collection(Answer):
    """One published collection."""

    name: str = Field(examples=["pools"])
    kind: Literal["pools", "gallery"]
    version: str = Field(examples=["4b1f0c9d2e8a7356"])
    revision: int = Field(0, examples=[17])
    created_at: str = Field(examples=["2026-11-21T09:30:00+00:00"])
    counts: dict[str, int] = Field(
        description="Exemplars that searches find, by label.", examples=[{"buffer": 40, "safe": 900, "unsafe": 310}]
    )


class PoolsAnswer(Answer):
    """Answer of /pools."""

    request_id: str = Field(examples=[_REQUEST_ID])
    model: Model
    policy: Policy
    collections: list[Collection]


class Alive(Answer):
    """Answer of /healthz."""

    status: Literal["alive"] = "alive"


class Started(Answer):
    """Answer of /startupz."""

    status: Literal["started"] = "started"


class Ready(Answer):
    """Answer of /readyz."""

    status: Literal["ready"] = "ready"
    model: Model
    snapshot: SnapshotVersion
