"""Explaining: what /explain says of an image, ready for a page; or why it says nothing."""

from collections.abc import Mapping
from dataclasses import dataclass

from service.client import ProblemError
from service.client.errors import HardlookError, one_line
from service.console.gate import Visit
from service.console.heat_map import HeatMap, heat_map
from service.wire import ClassifyAnswer, ClassifyItem
from service.wire_explain import AttributionItem, ExplainAnswer


@dataclass(frozen=True)
class Explained:
    """Where in the image the similarities come from.

    Attributes:
        reason: why that is not told; empty where it is.
        answer: of /explain; None where there is none.
        maps: of its attributions, by the id of the exemplar.
        other_pools: whether the pools were changed between the verdict and the explanation.
    """

    reason: str
    answer: ExplainAnswer | None = None
    maps: Mapping[str, HeatMap] | None = None
    other_pools: bool = False


async def explained(visit: Visit, content: bytes, judged: ClassifyAnswer, *, asked: bool) -> Explained:
    """Ask for the attributions of an image that has a verdict. Whatever goes wrong, the verdict stands.

    Args:
        visit: in whose name.
        content: of the file.
        judged: the answer with the verdict, the only one in it.
        asked: whether the visitor wants it; it takes many times as long as the verdict.
    """
    [item] = judged.results
    if not visit.may("review"):
        return Explained("your key has not the scope review")
    if not asked:
        return Explained("it was not asked for")
    if isinstance(item, ClassifyItem) and not item.neighbors:
        return Explained("there is no exemplar in the answer to compare with")
    try:
        answer = await visit.client.explain(content)
        maps = {each.exemplar: heat_map(each.grid) for each in answer.attributions}
    except ProblemError as error:
        return Explained(f"{error.problem.title}: {error.detail}")
    except (HardlookError, ValueError) as error:
        return Explained(one_line(error))
    return Explained("", answer, maps, other_pools=answer.snapshot.version != judged.snapshot.version)


def in_words(item: AttributionItem) -> str:
    """One sentence with the sums of an attribution."""
    gained = item.similarity - item.baseline_similarity
    return (
        f"Plain grey has a similarity of {item.baseline_similarity:+.4f} to it, this image {item.similarity:+.4f}; "
        f"the cells share out the {gained:+.4f} between them, with an error of {item.completeness_error:.4f}."
    )
