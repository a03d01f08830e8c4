"""Collection: its exemplars, its suppress items, and what is to be cleaned up in it."""

from collections.abc import Mapping
from typing import cast, get_args
from urllib.parse import urlencode

from fastapi import Request
from fastapi.responses import Response

from service.console.additions import add_exemplar, added_place
from service.console.cleaning import MIN_SIMILARITY, deletable, delete_copies, similarity_of
from service.console.gate import Visit, visit_of
from service.console.listing import State, Wanted, list_exemplars
from service.console.pages.exemplar import exemplar_action, exemplar_page
from service.console.places import LINKS, POOLS_PAGE, collection_place
from service.console.rendering import page, redirect
from service.console.routes import console_router
from service.errors import InvalidParameter
from service.wire import Collection

VIEWS: Mapping[str, str] = {
    "": "Exemplars",
    "suppress": "Suppress items",
    "duplicates": "Duplicates",
    "contradictions": "Contradictions",
}
_POOLS = "pools"
_LISTED = 30  # groups or exemplars that one page is for; the others come up when these are done
router = console_router()


@router.get(f"{POOLS_PAGE}/{{name}}")
async def collection(request: Request, name: str) -> Response:
    """One view of a collection; with an `id`, that exemplar."""
    async with visit_of(request, "pools:write") as visit:
        query = request.query_params
        if query.get("id"):
            return await exemplar_page(visit, name, query["id"])
        view = query.get("view", "")
        if view == "duplicates":
            return await _duplicates(visit, name, query)
        if view == "contradictions" and name == _POOLS:
            return await _contradictions(visit, name)
        if view in ("", "suppress"):
            return await _exemplars(visit, name, query, suppress=view == "suppress")
        raise InvalidParameter(
            "view", f"it must be one of {', '.join(filter(None, VIEWS))}; contradictions are of the pools"
        )


@router.post(f"{POOLS_PAGE}/{{name}}")
async def act(request: Request, name: str) -> Response:
    """Add an exemplar, delete copies, or, with an `id`, what its page can do."""
    async with visit_of(request, "pools:write") as visit:
        if request.query_params.get("id"):
            return await exemplar_action(visit, name, request.query_params["id"])
        sent = await visit.form()
        if sent.fields.get("action") == "add":
            return redirect(*added_place(await add_exemplar(visit, name, sent)))
        if sent.fields.get("action") == "delete-copies":
            place = f"{collection_place(name)}?{_duplicates_query(sent.fields)}"
            left = await delete_copies(visit, name, sent)
            if not left:
                return redirect(place, "copies-deleted")
            return page(visit, "duplicates_left.html", status=409, name=name, left=left, back=place, **LINKS)
        raise InvalidParameter("action", "it must be add or delete-copies")


async def _exemplars(visit: Visit, name: str, query: Mapping[str, str], *, suppress: bool) -> Response:
    described = await _described(visit, name)
    state = query.get("state") or None
    if state is not None and state not in get_args(State):
        raise InvalidParameter("state", f"it must be one of {', '.join(get_args(State))}")
    wanted = Wanted(suppress, query.get("label") or None, cast(State | None, state))
    listed = await list_exemplars(visit, name, wanted, query.get("after", ""))
    kept_on = {"view": "suppress" if suppress else "", "label": wanted.label or "", "state": state or ""}
    onwards = urlencode({k: v for k, v in (kept_on | {"after": listed.next or ""}).items() if v})
    return page(
        visit,
        "pools_collection.html",
        name=name,
        described=described,
        views=_views(name),
        view="suppress" if suppress else "",
        wanted=wanted,
        listed=listed,
        after=query.get("after", ""),
        onwards=onwards,
        states=get_args(State),
        **LINKS,
    )


async def _duplicates(visit: Visit, name: str, query: Mapping[str, str]) -> Response:
    least, label = similarity_of(query.get("min_similarity", "")), query.get("label") or None
    described = await _described(visit, name)
    answer = await visit.client.curation.duplicates(name, min_similarity=least, label=label, limit=_LISTED)
    return page(
        visit,
        "duplicates.html",
        name=name,
        described=described,
        views=_views(name),
        view="duplicates",
        min_similarity=least,
        least=MIN_SIMILARITY,
        label=label or "",
        answer=answer,
        boxes=deletable(answer.groups),
        **LINKS,
    )


async def _contradictions(visit: Visit, name: str) -> Response:
    answer = await visit.client.curation.contradictions(name, limit=_LISTED)
    return page(
        visit,
        "duplicates_contradictions.html",
        name=name,
        views=_views(name),
        view="contradictions",
        answer=answer,
        **LINKS,
    )


async def _described(visit: Visit, name: str) -> Collection | None:
    """What is said of the collection; None where the API will say that there is none."""
    collections = (await visit.client.pools()).collections
    return next((each for each in collections if each.name == name), None)


def _views(name: str) -> dict[str, str]:
    """Paths and names of the views that a collection has."""
    place = collection_place(name)
    return {
        f"{place}?view={view}" if view else place: words
        for view, words in VIEWS.items()
        if view != "contradictions" or name == _POOLS
    }


def _duplicates_query(fields: Mapping[str, str]) -> str:
    """So that one comes back to the list that one came from."""
    asked = {"view": "duplicates", "min_similarity": fields.get("min_similarity", ""), "label": fields.get("label", "")}
    return urlencode({name: value for name, value in asked.items() if value})
