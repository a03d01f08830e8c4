"""What goes over the wire to programs that were not written for hardlook: clients of OpenAI, and pict-rs.

As light as `service.wire`, and for the same readers.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from perception.verdict import VerdictLabel
from service.wire import _PIXEL, _REQUEST_ID, Answer, ClassifyItem, Model, Policy, Request, SnapshotVersion

MAX_PARTS = 256
# Of OpenAI's omni-moderation models. Clients that were generated from its description need all of them.
OPENAI_CATEGORIES = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/instructions",
    "self-harm/intent",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)
# Those that OpenAI applies to images; strict clients accept "image" under no other.
OPENAI_IMAGE_CATEGORIES = frozenset(
    name for name in OPENAI_CATEGORIES if name.startswith(("self-harm", "violence"))
) | {"sexual"}
_IMAGE_URL = f"data:image/png;base64,{_PIXEL}"


class ModerationParameters(Request):
    """Parameters of /v1/moderations, in the query string; OpenAI's endpoint has none."""

    text: Literal["refuse", "ignore"] = Field(
        "refuse", description="What to do with text beside images, which is not judged: answer 400, or leave it out."
    )


class TextPart(Request):
    """A text, which is not judged."""

    type: Literal["text"]
    text: str


class ImageUrl(Request):
    """Where an image is."""

    url: str = Field(
        description="A `data:` URI with base64, or where to fetch the file if the service has HARDLOOK_FETCH on.",
        examples=[_IMAGE_URL],
    )


class ImagePart(Request):
    """An image."""

    type: Literal["image_url"]
    image_url: ImageUrl


def _kind_of_input(value: object) -> str | None:
    return "parts" if isinstance(value, list) else "text" if isinstance(value, str) else None


def _kind_of_part(value: object) -> str | None:
    if isinstance(value, str):
        return "string"
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return kind if isinstance(kind, str) else None


Part = Annotated[
    Annotated[str, Tag("string")] | Annotated[TextPart, Tag("text")] | Annotated[ImagePart, Tag("image_url")],
    Discriminator(
        _kind_of_part, custom_error_type="part", custom_error_message="a part has the type 'image_url' or 'text'"
    ),
]


class ModerationBody(Request):
    """JSON body of /v1/moderations, as clients of OpenAI send it. There must be an image in it."""

    model_config = ConfigDict(
        strict=True,
        json_schema_extra={
            "examples": [
                {
                    "model": "omni-moderation-latest",
                    "input": [{"type": "image_url", "image_url": {"url": _IMAGE_URL}}],
                }
            ]
        },
    )
    input: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[Part], Tag("parts"), Field(min_length=1, max_length=MAX_PARTS)],
        Discriminator(
            _kind_of_input, custom_error_type="input", custom_error_message="input is a list of parts, or a text"
        ),
    ] = Field(description="All parts together get one result.")
    model: str | None = Field(
        None,
        max_length=256,
        description="Accepted for OpenAI's sake; the service has one model, which the answer names.",
    )


class ModerationDetails(Answer):
    """What hardlook has to say beyond OpenAI's shape."""

    request_id: str = Field(examples=[_REQUEST_ID])
    verdict: VerdictLabel = Field(description="The most cautious over all images.")
    model: Model
    snapshot: SnapshotVersion
    policy: Policy
    images: list[ClassifyItem] = Field(description="In order; `id` is the position in `input`.")
    not_judged: list[str] = Field(description="Parts that nobody looked at.", examples=[["input[0]"]])


class ModerationResult(Answer):
    """The one result of a request: over all of its images."""

    flagged: bool = Field(
        description="A verdict is `unsafe`, or `review` where the service has HARDLOOK_MODERATIONS_FLAG_REVIEW on."
    )
    categories: dict[str, bool] = Field(
        description="`unsafe`, `review`, and OpenAI's categories, which are true only where the unsafe exemplars that "
        "decided have that name as their metadata `category`: false says nothing.",
        examples=[{"sexual": False, "violence": True, "unsafe": True, "review": False}],
    )
    category_scores: dict[str, float] = Field(
        description="In [0, 1], no probabilities: 0.5 is where a verdict tips, and half the margin is added or taken.",
        examples=[{"sexual": 0.0, "violence": 0.567, "unsafe": 0.567, "review": 0.0}],
    )
    category_applied_input_types: dict[str, list[Literal["image"]]] = Field(
        description="`image` where something was said about it.",
        examples=[{"sexual": [], "violence": ["image"], "unsafe": ["image"], "review": ["image"]}],
    )
    hardlook: ModerationDetails


class ModerationAnswer(Answer):
    """Answer of /v1/moderations."""

    id: str = Field(examples=[f"modr-{_REQUEST_ID}"])
    model: str = Field(examples=["hf-hub:chs20/FARE4-convnext_base_w-laion2B-s13B-b82K-augreg"])
    results: list[ModerationResult] = Field(description="One.")


class OpenAIError(BaseModel):
    """The member `error` of a problem of /v1/moderations, as clients of OpenAI read it."""

    message: str
    type: str
    param: str | None
    code: str


class ValidationParameters(Request):
    """Parameters of /adapters/pict-rs, in the query string."""

    review: Literal["accept", "reject"] = Field(
        "reject", description="What to answer where `safe` and `unsafe` cannot be told."
    )


class ValidationAnswer(Answer):
    """Answer of /adapters/pict-rs to what is accepted; pict-rs reads the status alone."""

    request_id: str = Field(examples=[_REQUEST_ID])
    accepted: Literal[True] = True
    verdict: VerdictLabel
    reason: str = Field(examples=["nearest exemplar is 'cat-0017' in the safe pool (similarity 0.8710)"])
