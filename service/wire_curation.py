"""What goes over the wire about looking collections through: duplicates, contradictions, probes, pool files.

As light as `service.wire`, and for the same readers.
"""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from service.wire import _REQUEST_ID, MAX_TEXT_CHARS, Answer, Request
from service.wire_collections import Asked, ReasonQuery

MAX_PROMPTS = 16
MAX_CANDIDATES = 1000
MAX_LISTED = 1000
LISTED = 100
_VERSION = "4b1f0c9d2e8a7356"
Prompt = Annotated[str, Field(min_length=1, max_length=MAX_TEXT_CHARS, pattern=r"\S")]


class LabelQuery(Request):
    """Query of a collection, or of a part of it."""

    label: Asked | None = Field(None, description="Only this pool or class.")


class ContradictionsQuery(Request):
    """Query of the contradictions."""

    limit: int = Field(LISTED, ge=1, le=MAX_LISTED, description="The most that are listed.")


class DuplicatesQuery(LabelQuery, ContradictionsQuery):
    """Query of the near-duplicates."""

    min_similarity: float = Field(0.95, ge=0.8, le=1, allow_inf_nan=False, description="Cosine from which they are.")


class ImportQuery(ReasonQuery):
    """Query of a pool file that is taken in."""

    on_conflict: Literal["skip", "refuse", "replace"] = Field(
        "refuse", description="What to do about ids that are there with something else: keep that, refuse all, replace."
    )


class ProbeBody(Request):
    """Texts that describe what is looked for in a collection."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"examples": [{"prompts": ["a photo of a rifle"], "negatives": ["a photo of a toy"]}]},
    )
    prompts: list[Prompt] = Field(min_length=1, max_length=MAX_PROMPTS, description="What to look for.")
    negatives: list[Prompt] = Field(
        default_factory=list,
        max_length=MAX_PROMPTS,
        description="Exemplars that one of these describes at least as well are left out.",
    )
    k: int = Field(20, ge=1, le=MAX_CANDIDATES, description="The most candidates of each prompt.")
    min_similarity: float = Field(
        -1.0, ge=-1, le=1, allow_inf_nan=False, description="Leave out what is less similar to the prompt."
    )


class CuratedItem(Answer):
    """One exemplar that was looked at."""

    # Snapshots that were built offline may have longer ids than what people add may have.
    id: str = Field(examples=["dog-0017"], max_length=MAX_TEXT_CHARS)
    label: str = Field(description="Of the exemplar; in the moderation pools the pool.", examples=["safe"])
    sha256: str = Field(description="Of the image file; empty where unknown.", examples=[""])
    source: str = Field(examples=["photos/dog-0017.jpg"])


class DuplicateItem(CuratedItem):
    """One exemplar of a group of near-duplicates."""

    similarity: float = Field(description="Cosine to the one to keep.", examples=[0.982])
    same_file: bool = Field(description="Whether its image file is that of the one to keep, byte for byte.")
    suggestion: Literal["keep", "delete", "look"] = Field(
        description="look: it is near another of the group, but not to the one to keep."
    )


class DuplicateGroup(Answer):
    """Near-duplicates: each is near another of them."""

    size: int = Field(description="All members; `members` may be the first of them.", examples=[2])
    members: list[DuplicateItem] = Field(description="The one to keep first, then the most similar to it.")


class CuratedState(Answer):
    """Which state of a collection was looked through."""

    request_id: str = Field(examples=[_REQUEST_ID])
    collection: str = Field(examples=["pools"])
    version: str = Field(examples=[_VERSION])
    revision: int = Field(examples=[17])


class DuplicatesAnswer(CuratedState):
    """Groups of near-duplicates, largest first."""

    total: int = Field(description="All groups; `groups` may be the first of them.", examples=[1])
    groups: list[DuplicateGroup]


class NearItem(Answer):
    """The nearest exemplar of some pools."""

    id: str = Field(examples=["dog-0018"])
    pool: str = Field(examples=["safe"])
    similarity: float = Field(description="Cosine.", examples=[0.941])


class ContradictionItem(CuratedItem):
    """An exemplar whose nearest neighbour lies in another pool."""

    own: NearItem | None = Field(description="The nearest other exemplar of its own pool; null where there is none.")
    other: NearItem = Field(description="The nearest exemplar of the other pools.")
    margin: float = Field(description="How much nearer the other pool is.", examples=[0.12])
    suggestion: Literal["look", "move"]
    to: str | None = Field(description="Pool to move it to; null with `look`.", examples=["buffer"])
    reason: str = Field(examples=["one of the two is mislabelled: look at both"])


class ContradictionsAnswer(CuratedState):
    """Contradictions between pools, worst first."""

    total: int = Field(description="All of them; `items` may be the first.", examples=[1])
    items: list[ContradictionItem]


class CandidateItem(CuratedItem):
    """An exemplar that a prompt describes."""

    prompt: str = Field(examples=["a photo of a rifle"])
    similarity: float = Field(description="Cosine to the prompt.", examples=[0.291])
    contrast: float | None = Field(
        description="Similarity to the prompt minus the highest to a negative; null without negatives.",
        examples=[0.043],
    )
    known: NearItem | None = Field(
        description="The exemplar of a pool that shows the same image; null where none does."
    )


class ProbeAnswer(CuratedState):
    """Candidates for a pool, best first."""

    items: list[CandidateItem]


class ImportAnswer(CuratedState):
    """What became of a pool file."""

    changed: bool = Field(description="False where all was so already.")
    exemplars: int = Field(description="In the file.", examples=[312])
