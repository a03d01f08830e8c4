"""Exemplar: everything that is known of one, and everything that may be done to it."""

import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime

from fastapi import Request
from fastapi.responses import Response

from service.console.additions import line_of, text_of
from service.console.errors import FormRefused
from service.console.gate import Visit, visit_of
from service.console.places import LINKS, POOLS_PAGE, collection_place, exemplar_place
from service.console.rendering import page, redirect
from service.console.routes import console_router
from service.errors import InvalidParameter
from service.intake import Form
from service.wire_collections import ChangedAnswer, ExemplarItem

MOST_EDITABLE_CHARS = 16_000
"""Of the metadata that fit into a form."""
_COUNT_DIGITS = 9
router = console_router()
Action = Callable[[Visit, str, str, Form], Awaitable[ChangedAnswer]]


@router.get(f"{POOLS_PAGE}/{{name}}/{{id:path}}")
async def exemplar(request: Request, name: str, id: str) -> Response:
    """One exemplar; its collection where the id is empty."""
    async with visit_of(request, "pools:write") as visit:
        return await exemplar_page(visit, name, id) if id else redirect(collection_place(name))


@router.post(f"{POOLS_PAGE}/{{name}}/{{id:path}}")
async def act(request: Request, name: str, id: str) -> Response:
    """Do something to one exemplar."""
    async with visit_of(request, "pools:write") as visit:
        return await exemplar_action(visit, name, id)


async def exemplar_page(visit: Visit, collection: str, id: str) -> Response:
    """The page of one exemplar."""
    answer = await visit.client.collections.exemplar(collection, id)
    metadata = json.dumps(answer.item.metadata, ensure_ascii=False, indent=1)
    return page(
        visit,
        "exemplar.html",
        name=collection,
        item=answer.item,
        version=answer.version,
        place=exemplar_place(collection, id),
        labels=("safe", "buffer", "unsafe") if collection == "pools" else None,
        metadata=metadata if len(metadata) <= MOST_EDITABLE_CHARS else None,
        seen=_seen(answer.item),
        effect=_effect(visit.request.query_params),
        **LINKS,
    )


async def exemplar_action(visit: Visit, collection: str, id: str) -> Response:
    """Do what the form asks for, and show the exemplar again, or its collection where it is gone."""
    form = await visit.form()
    action = _ACTIONS.get(form.fields.get("action", ""))
    if action is None:
        raise InvalidParameter("action", f"it must be one of {', '.join(_ACTIONS)}")
    answer = await action(visit, collection, id, form)
    if action is _delete:
        return redirect(collection_place(collection), "deleted")
    return redirect(exemplar_place(collection, id), "changed" if answer.changed else "unchanged")


async def _move(visit: Visit, collection: str, id: str, form: Form) -> ChangedAnswer:
    label = line_of(form, "label")
    if not label:
        raise InvalidParameter("label", "it does not say where the exemplar is to be moved")
    return await visit.client.collections.move(collection, id, label, reason=text_of(form, "reason"))


async def _disable(visit: Visit, collection: str, id: str, form: Form) -> ChangedAnswer:
    until, reason = _moment(line_of(form, "until")), text_of(form, "reason")
    return await visit.client.collections.disable(collection, id, until=until, reason=reason)


async def _enable(visit: Visit, collection: str, id: str, form: Form) -> ChangedAnswer:
    return await visit.client.collections.enable(collection, id, reason=text_of(form, "reason"))


async def _annotate(visit: Visit, collection: str, id: str, form: Form) -> ChangedAnswer:
    await _require_unchanged(visit, collection, id, form)
    return await visit.client.collections.change(
        collection, id, note=text_of(form, "note"), source=line_of(form, "source"), reason=text_of(form, "reason")
    )


async def _describe(visit: Visit, collection: str, id: str, form: Form) -> ChangedAnswer:
    await _require_unchanged(visit, collection, id, form)
    metadata = _metadata(text_of(form, "metadata"))
    return await visit.client.collections.change(collection, id, metadata=metadata, reason=text_of(form, "reason"))


async def _delete(visit: Visit, collection: str, id: str, form: Form) -> ChangedAnswer:
    if form.fields.get("sure") != "yes":
        raise InvalidParameter("sure", "the box is not ticked")
    return await visit.client.collections.delete(collection, id, reason=text_of(form, "reason"))


_ACTIONS: Mapping[str, Action] = {
    "move": _move,
    "disable": _disable,
    "enable": _enable,
    "annotate": _annotate,
    "describe": _describe,
    "delete": _delete,
}


async def _require_unchanged(visit: Visit, collection: str, id: str, form: Form) -> None:
    """Raise FormRefused where somebody has changed what the form would overwrite."""
    present = (await visit.client.collections.exemplar(collection, id)).item
    if form.fields.get("seen") != _seen(present):
        raise FormRefused("the exemplar was changed meanwhile; reload its page and look again")


def _seen(item: ExemplarItem) -> str:
    """Identifies the texts of an exemplar, which forms overwrite."""
    texts = json.dumps([item.note, item.source, sorted(item.metadata.items())])
    return hashlib.sha256(texts.encode()).hexdigest()[:16]


def _moment(text: str) -> datetime | None:
    """What a field for date and time says, in UTC; None where it is empty.

    Raises:
        InvalidParameter: it is no date and time.
    """
    if not text:
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidParameter("until", "it is no date and time such as 2026-11-21T09:30") from error
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found


def _metadata(text: str) -> dict[str, str]:
    """The metadata that somebody has typed.

    Raises:
        InvalidParameter: they are no JSON object of texts.
    """
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise InvalidParameter("metadata", f"they are no JSON: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise InvalidParameter("metadata", 'they are no JSON object of texts, such as {"category": "violence"}')
    return found


def _effect(query: Mapping[str, str]) -> tuple[int, int] | None:
    """Of the recent verdicts that an addition was compared with: how many would differ, and how many there were."""
    texts = query.get("differ", ""), query.get("of", "")
    if not all(text.isascii() and text.isdecimal() and len(text) <= _COUNT_DIGITS for text in texts):
        return None
    return int(texts[0]), int(texts[1])
