"""Classify: one image, its verdict, and why; and what may be done about it."""

import hashlib
from dataclasses import dataclass
from typing import cast, get_args

from fastapi import Request
from fastapi.responses import Response

from service.client.clients import Wrong
from service.console.additions import add_exemplar, added_place
from service.console.errors import FormRefused
from service.console.explaining import Explained, explained, in_words
from service.console.gate import Visit, image_of, visit_of
from service.console.pictures import kept_pictures, preview_of
from service.console.places import LINKS
from service.console.rendering import page, redirect
from service.console.routes import console_router
from service.console.why import Why, frame_to_add, neighbors_to_show, why
from service.errors import InvalidParameter
from service.intake import Form
from service.wire import ClassifyAnswer, ClassifyItem, NeighborItem

PAGE = "/console/classify"
router = console_router()


@dataclass(frozen=True)
class Result:
    """What the page shows of one image.

    Attributes:
        name: of the file, as the browser gave it.
        sha256: of the file.
        answer: of /classify.
        item: of the image, in it.
        why: its arithmetic.
        picture: a `data:` URI of something made from the pixels; None where that failed.
        explained: what /explain says, or why it says nothing.
        frame: to add, by position among the examined ones.
        kept: SHA-256 by the id of neighbours that a picture is kept of.
    """

    name: str
    sha256: str
    answer: ClassifyAnswer
    item: ClassifyItem
    why: Why
    picture: str | None
    explained: Explained
    frame: int
    kept: dict[str, str]

    @property
    def by_pool(self) -> list[NeighborItem]:
        """The neighbours, those of one pool together, the pool with the nearest first."""
        ranks = {near.pool: rank for rank, near in enumerate(self.why.best)}
        return sorted(self.item.neighbors, key=lambda near: ranks[near.pool])


@router.get(PAGE)
async def form(request: Request) -> Response:
    """The form to send an image."""
    async with visit_of(request, "classify") as visit:
        return _page(visit, None)


@router.post(PAGE)
async def classify(request: Request) -> Response:
    """The form again, and the verdict on what was sent."""
    async with visit_of(request, "classify") as visit:
        sent = await visit.form()
        name, content = image_of(sent)
        return _page(visit, await _result(visit, sent, name, content))


@router.post(f"{PAGE}/add")
async def add(request: Request) -> Response:
    """Make the image that was judged an exemplar."""
    async with visit_of(request, "pools:write") as visit:
        sent = await visit.form()
        _, content = image_of(sent)
        if hashlib.sha256(content).hexdigest() != sent.fields.get("sha256"):
            raise FormRefused("another file was chosen than the one that was judged; classify it first")
        answer = await add_exemplar(visit, "pools", sent)
        return redirect(*added_place(answer))


@router.post(f"{PAGE}/report")
async def report(request: Request) -> Response:
    """Say that a verdict was wrong."""
    async with visit_of(request, "classify") as visit:
        fields = (await visit.form()).fields
        kind = fields.get("kind", "")
        if kind not in get_args(Wrong):
            raise InvalidParameter("kind", f"it must be one of {', '.join(get_args(Wrong))}")
        await visit.client.feedback(
            cast(Wrong, kind), request_id=fields.get("request_id", ""), comment=fields.get("comment", "")
        )
        return redirect(PAGE, "reported")


def _page(visit: Visit, result: Result | None) -> Response:
    return page(visit, "classify.html", result=result, in_words=in_words, **LINKS)


async def _result(visit: Visit, sent: Form, name: str, content: bytes) -> Result:
    runtime = visit.runtime
    shown = neighbors_to_show(runtime.policy, runtime.settings.max_neighbors)
    answer = await visit.client.classify(content, k=shown)
    [item] = answer.results
    assert isinstance(item, ClassifyItem)  # the error of an only image is raised
    found = await explained(visit, content, answer, asked="explain" in sent.fields)
    return Result(
        name,
        hashlib.sha256(content).hexdigest(),
        answer,
        item,
        why(item, answer.policy),
        await preview_of(visit, content, item.frame.index),
        found,
        frame_to_add(item),
        await kept_pictures(visit, "pools", item.neighbors),
    )
