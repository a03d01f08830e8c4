"""Conversions of verdicts to what other programs expect (`service.wire_adapters`)."""

from collections.abc import Sequence
from typing import Any

from perception.verdict import PoolLabel, VerdictLabel
from service.problems import TYPE_PREFIX, http_problem
from service.wire import ClassifyItem, Policy
from service.wire_adapters import (
    OPENAI_CATEGORIES,
    OPENAI_IMAGE_CATEGORIES,
    ModerationDetails,
    ModerationResult,
    OpenAIError,
)

REJECTED = 422
_CAUTION = {VerdictLabel.SAFE: 0, VerdictLabel.REVIEW: 1, VerdictLabel.UNSAFE: 2}
_OWN_CATEGORIES = ("unsafe", "review")
# What clients of OpenAI look for; other codes are the last part of the problem's type.
_CODES = {"unauthenticated": "invalid_api_key", "rate-limited": "rate_limit_exceeded"}


def most_cautious_verdict(items: Sequence[ClassifyItem]) -> VerdictLabel:
    """Unsafe before review before safe. Raises ValueError for no items: nothing judged is never `safe`."""
    return max((item.verdict for item in items), key=_CAUTION.__getitem__)


def moderation_result(details: ModerationDetails, flag_review: bool) -> ModerationResult:
    """The one result over all images of a request, which `details` has."""
    items = details.images
    scores = dict.fromkeys((*OPENAI_CATEGORIES, *_OWN_CATEGORIES), 0.0)
    named: set[str] = set()
    for item in items:
        score = unsafe_score(item)
        scores["unsafe"] = max(scores["unsafe"], score)
        if item.verdict is VerdictLabel.REVIEW:
            scores["review"] = 1.0
        for name in categories_of(item, details.policy):
            named.add(name)
            scores[name] = max(scores[name], score)
    if details.verdict is VerdictLabel.UNSAFE:
        named.add("unsafe")
    if scores["review"]:
        named.add("review")
    applied = {*_OWN_CATEGORIES, *(named & OPENAI_IMAGE_CATEGORIES)}
    return ModerationResult(
        flagged="unsafe" in named or (flag_review and "review" in named),
        categories={name: name in named for name in scores},
        category_scores=scores,
        category_applied_input_types={name: ["image"] if name in applied else [] for name in scores},
        hardlook=details,
    )


def unsafe_score(item: ClassifyItem) -> float:
    """In [0, 1] and monotone in the margin: 0.5 where the verdict tips, at least that much for every `unsafe`.

    No probability: margins are differences of cosines. Without a margin, in a coarse answer, the verdict alone counts.
    """
    if item.verdict is VerdictLabel.REVIEW:
        return 0.5
    distance = 0.5 if item.margin is None else min(0.5, max(0.0, item.margin / 2))
    return 0.5 + distance if item.verdict is VerdictLabel.UNSAFE else 0.5 - distance


def categories_of(item: ClassifyItem, policy: Policy) -> frozenset[str]:
    """OpenAI's categories that the exemplars which made an image `unsafe` have as their metadata `category`."""
    if item.verdict is not VerdictLabel.UNSAFE or not item.neighbors:
        return frozenset()
    voters = policy.k if policy.rule == "vote" else 1
    least = item.neighbors[:voters][-1].similarity
    deciding = [n for n in item.neighbors if n.pool == PoolLabel.UNSAFE and n.similarity >= least]
    return frozenset(n.metadata.get("category", "") for n in deciding) & frozenset(OPENAI_CATEGORIES)


def with_openai_error(body: dict[str, Any], param: str | None) -> dict[str, Any]:
    """A problem with the member that clients of OpenAI read."""
    slug, status = str(body["type"]).removeprefix(TYPE_PREFIX), int(body["status"])
    kind = "server_error" if status >= 500 else "requests" if status == 429 else "invalid_request_error"
    error = OpenAIError(
        message=str(body["detail"]), type=kind, param=param, code=_CODES.get(slug, slug.replace("-", "_"))
    )
    return {**body, "error": error.model_dump()}


def rejection(item: ClassifyItem, request_id: str) -> dict[str, Any]:
    """The problem of an image that could be judged and is not accepted."""
    detail = f"the image is not accepted, its verdict is {item.verdict}: {item.reason}"
    return {
        **http_problem(REJECTED, detail, request_id),
        "type": f"{TYPE_PREFIX}image-rejected",
        "title": "The image is not accepted",
        "verdict": str(item.verdict),
        "reason": item.reason,
    }
