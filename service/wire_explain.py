"""What goes over the wire about why an image got its verdict.

As light as `service.wire`, and for the same readers.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from perception.verdict import PoolLabel
from service.wire import (
    _PIXEL,
    _REQUEST_ID,
    MAX_TEXT_CHARS,
    Answer,
    ClassifyItem,
    ClassifyParameters,
    ImageData,
    Model,
    NeighborItem,
    Policy,
    SnapshotVersion,
)

MAX_AGAINST = 2


def _listed(value: Any) -> Any:
    """A multipart field has one value."""
    return [value] if isinstance(value, str) else value


ExemplarIds = Annotated[
    list[Annotated[str, Field(max_length=MAX_TEXT_CHARS)]], Field(max_length=MAX_AGAINST), BeforeValidator(_listed)
]


class ExplainParameters(ClassifyParameters):
    """Parameters of /explain; in the query string, or in a JSON or multipart body."""

    against: ExemplarIds | None = Field(
        None,
        description="Ids of exemplars to compare the image with; by default the most similar one of the pool that won, "
        "and of the runner-up.",
    )
    attribute: bool | None = Field(
        None,
        description="false: the decision alone, without attributions, which take many times as long. True by default.",
    )


class ExplainBody(ExplainParameters):
    """JSON body of /explain."""

    model_config = ConfigDict(
        strict=True, json_schema_extra={"examples": [{"images": [{"id": "avatar", "data": _PIXEL}]}]}
    )
    images: list[ImageData] = Field(min_length=1, description="One.")


class PoolStanding(Answer):
    """How one pool did."""

    pool: PoolLabel
    best: NeighborItem | None = Field(description="Its most similar exemplar; null where it has none.")
    votes: int | None = Field(
        description="For it among the k nearest; null where the rule is not `vote`.", examples=[None]
    )


class ThresholdItem(Answer):
    """One threshold of the policy."""

    name: Literal["min_similarity", "min_margin", "min_margin_unsafe"]
    limit: float = Field(description="What the policy asks for.", examples=[0.02])
    value: float | None = Field(description="What the image has; null where there is none.", examples=[0.031])
    applies: bool = Field(description="Whether it is asked of the pool that won.")
    holds: bool = Field(description="False: this makes the verdict `review`.")


class DecisionItem(Answer):
    """The arithmetic of the decision, of the frame that decided."""

    rule: Literal["nearest", "vote"]
    k: int = Field(description="Voters of the rule `vote`.", examples=[5])
    pools: list[PoolStanding] = Field(description="safe, buffer, unsafe.")
    winner: PoolLabel | None = Field(description="Null where nothing could be decided.")
    runner_up: PoolLabel | None = Field(description="The pool with the most similar exemplar among the others.")
    margin: float | None = Field(
        description="Best similarity of the winner minus that of the runner-up.", examples=[0.031]
    )
    thresholds: list[ThresholdItem]
    what_would_change: list[str] = Field(
        description="What holds the verdict where it is, and by how much.",
        examples=[["margin 0.0310 is above min_margin 0.0200 by 0.0110"]],
    )


class CellItem(Answer):
    """One cell of a grid."""

    row: int = Field(ge=1, description="From the top, counted from 1.", examples=[3])
    column: int = Field(ge=1, description="From the left, counted from 1.", examples=[5])
    value: float = Field(examples=[0.021])
    text: str = Field(examples=["row 3, column 5 of 16"])


class AttributionItem(Answer):
    """What the similarity of the image to one exemplar is made of, by integrated gradients from a plain grey image."""

    exemplar: str = Field(description="Its id.", examples=["dog-0017"])
    label: str = Field(description="Of the exemplar; in the moderation pools the pool.", examples=["safe"])
    source: str = Field(examples=["photos/dog-0017.jpg"])
    judged_similarity: float | None = Field(
        description="The cosine by which it was evidence, through the defence where there is one; null if none.",
        examples=[0.871],
    )
    similarity: float = Field(description="The cosine that is attributed: of the encoder itself.", examples=[0.871])
    baseline_similarity: float = Field(description="Of a plain grey image and the exemplar.", examples=[0.139])
    grid: list[list[float]] = Field(
        description="Rows from the top, each from the left: what the part of the image adds to the similarity of the "
        "grey image, or takes from it. The sum of all is `similarity` less `baseline_similarity`.",
        examples=[[[0.02, -0.01], [0.0, 0.001]]],
    )
    completeness_error: float = Field(ge=0, description="How far that sum is from it.", examples=[0.0021])
    steps: int = Field(ge=1, description="Images between grey and this one that were differentiated.", examples=[32])
    supporting: list[CellItem] = Field(description="Cells that add most.")
    opposing: list[CellItem] = Field(description="Cells that take away most.")


class ExplainAnswer(Answer):
    """Answer of /explain."""

    request_id: str = Field(examples=[_REQUEST_ID])
    model: Model
    snapshot: SnapshotVersion
    policy: Policy
    result: ClassifyItem = Field(description="As /classify answers, never coarse.")
    decision: DecisionItem
    input_png: str = Field(
        description="What the encoder saw of the frame that decided, a PNG in base64. The grids lie on it.",
        examples=[_PIXEL],
    )
    undefended: bool = Field(
        description="Whether the attributions are of the encoder without the defence behind which it judged."
    )
    attributions: list[AttributionItem] = Field(description="In the order of `against`.")
