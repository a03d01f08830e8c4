"""Pools: what there is to compare with, and the search through it by an image or in words."""

from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from service.console.gate import Visit, image_of, visit_of
from service.console.pictures import kept_pictures
from service.console.places import LINKS, POOLS_PAGE
from service.console.rendering import page
from service.console.routes import console_router
from service.errors import InvalidParameter
from service.wire import FOUND_NEIGHBORS, ItemError, SimilarAnswer, SimilarItem

_POOL, _GALLERY = "pool:", "gallery:"
_MOST_DIGITS = 4
router = console_router()


@dataclass(frozen=True)
class Where:
    """What a search looks through.

    Attributes:
        within: as the form says it: empty for all pools, 'pool:NAME' or 'gallery:NAME'.
        k: the most exemplars.
    """

    within: str = ""
    k: int = FOUND_NEIGHBORS

    @property
    def collection(self) -> str:
        """In which the exemplars are that are found."""
        return self.within.removeprefix(_GALLERY) if self.within.startswith(_GALLERY) else "pools"

    @property
    def parameters(self) -> dict[str, Any]:
        """Arguments for the client."""
        if self.within.startswith(_GALLERY):
            return {"gallery": self.collection, "k": self.k}
        return {"pool": self.within.removeprefix(_POOL) or None, "k": self.k}


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        subject: that was searched with, in words: a text, or the name of a file.
        by_text: whether it is a text.
        answer: of /similar.
        item: its only one.
        kept: SHA-256 by the id of exemplars that a picture is kept of.
    """

    subject: str
    by_text: bool
    answer: SimilarAnswer
    item: SimilarItem
    kept: dict[str, str]


@router.get(POOLS_PAGE)
async def overview(request: Request) -> Response:
    """All collections, and what a text finds in them."""
    async with visit_of(request, "pools:write") as visit:
        query = request.query_params
        where = _where(query.get("within", ""), query.get("k", ""))
        text = query.get("text")
        found = None
        if text is not None:
            answer = await visit.client.similar(text=text, **where.parameters)
            found = await _found(visit, where, text, answer, by_text=True)
        return await _overview(visit, where, text or "", found)


@router.post(POOLS_PAGE)
async def search(request: Request) -> Response:
    """All collections, and what an image finds in them."""
    async with visit_of(request, "pools:write") as visit:
        sent = await visit.form()
        where = _where(sent.fields.get("within", ""), sent.fields.get("k", ""))
        name, content = image_of(sent)
        answer = await visit.client.similar(content, **where.parameters)
        found = await _found(visit, where, name, answer, by_text=False)
        return await _overview(visit, where, "", found)


async def _found(visit: Visit, where: Where, subject: str, answer: SimilarAnswer, *, by_text: bool) -> Found:
    [item] = answer.results
    assert not isinstance(item, ItemError)  # the error of an only image is raised
    return Found(subject, by_text, answer, item, await kept_pictures(visit, where.collection, item.neighbors))


async def _overview(visit: Visit, where: Where, text: str, found: Found | None) -> Response:
    return page(
        visit,
        "pools.html",
        pools=await visit.client.pools(),
        where=where,
        text=text,
        found=found,
        most=visit.runtime.settings.max_neighbors,
        **LINKS,
    )


def _where(within: str, k: str) -> Where:
    """Raise InvalidParameter for what no form of the page asks for; whether there is such a pool, the API says."""
    if within and not within.startswith((_POOL, _GALLERY)):
        raise InvalidParameter("within", "it is neither pool:NAME nor gallery:NAME")
    if not k:
        return Where(within)
    if not (k.isascii() and k.isdecimal() and len(k) <= _MOST_DIGITS):
        raise InvalidParameter("k", "it is no number")
    return Where(within, int(k))
