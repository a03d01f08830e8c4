"""Versions of collections: what was published, what is different, how a candidate would have judged, and going back."""

from typing import Any, cast
from urllib.parse import urlencode

from fastapi import Request
from fastapi.responses import Response

from indexer.contents import POOLS
from perception.verdict import VerdictLabel
from service.client.calls import Call, given, path_of
from service.console.asking import answer_to_call
from service.console.errors import FormRefused
from service.console.gate import Visit, visit_of
from service.console.labels import labels_in_words
from service.console.places import exemplar_place
from service.console.rendering import page, redirect
from service.console.routes import console_router
from service.schemas import described_collection
from service.wire_collections import VersionsAnswer

router = console_router()
PAGE = 20
PATH = "/console/versions"
ENCODER = "encoder"  # in place of a version: the candidate encoder
_MOST_DIGITS = 16


@router.get(PATH)
async def versions(request: Request) -> Response:
    """The versions of a collection, newest first, and what can be done with them."""
    async with visit_of(request, "pools:write") as visit:
        name = request.query_params.get("collection", POOLS)
        answer = await _listed(visit, name, request.query_params.get("before", ""))
        view = visit.runtime.published.get(name)
        shadows = (await visit.client.shadow.show()).candidates if name == POOLS else []
        return page(
            visit,
            "versions.html",
            collections=_collections(visit),
            name=name,
            present=described_collection(view),
            labels=labels_in_words(view.counts),
            answer=answer,
            choices=_choices(answer),
            later=_address(collection=name, before=str(answer.next)) if answer.next else None,
            first=_address(collection=name),
            continued="before" in request.query_params,
            shadows=shadows,
            is_pools=name == POOLS,
        )


@router.post(f"{PATH}/publish")
async def publish(request: Request) -> Response:
    """Give the present state a name."""
    async with visit_of(request, "pools:write") as visit:
        said = (await visit.form()).fields
        name = said.get("collection", "")
        await visit.client.versions.publish(name, said.get("name", ""), reason=said.get("reason", ""))
        return redirect(_address(collection=name), "published")


@router.get(f"{PATH}/diff")
async def diff(request: Request) -> Response:
    """What is different between two versions."""
    async with visit_of(request, "pools:write") as visit:
        asked = request.query_params
        name = asked.get("collection", POOLS)
        before, after = asked.get("before", "").strip(), asked.get("after", "").strip()
        found = await visit.client.versions.diff(name, before, after)
        present = visit.runtime.published.get(name).version
        return page(
            visit,
            "diff.html",
            exemplar_place=exemplar_place,
            name=name,
            found=found,
            present=present,
            counts=await _both_counts(visit, name, before, after),
            back=_address(collection=name),
        )


@router.get(f"{PATH}/roll-back")
async def confirm(request: Request) -> Response:
    """Whether to go back really: what that would change."""
    async with visit_of(request, "pools:write") as visit:
        name = request.query_params.get("collection", POOLS)
        version = request.query_params.get("version", "").strip()
        view = visit.runtime.published.get(name)
        found = await visit.client.versions.diff(name, view.version, version)
        return page(
            visit,
            "versions_roll_back.html",
            exemplar_place=exemplar_place,
            name=name,
            version=version,
            found=found,
            counts=await _both_counts(visit, name, view.version, version),
            back=_address(collection=name),
        )


@router.post(f"{PATH}/roll-back")
async def roll_back(request: Request) -> Response:
    """Make an earlier state the present one."""
    async with visit_of(request, "pools:write") as visit:
        said = (await visit.form()).fields
        name = said.get("collection", "")
        version = said.get("version", "").strip()
        answer = await visit.client.versions.rollback(name, version, reason=said.get("reason", ""))
        return redirect(_address(collection=name), "rolled-back" if answer.changed else "unchanged")


@router.get(f"{PATH}/dry-run")
async def dry_run_form(request: Request) -> Response:
    """Ask for a dry run."""
    async with visit_of(request, "pools:write") as visit:
        chosen = request.query_params.get("version", "")
        return await _dry_run_page(visit, chosen=chosen, limit="10000", found=None)


@router.post(f"{PATH}/dry-run")
async def dry_run(request: Request) -> Response:
    """How a candidate would have judged recent requests."""
    async with visit_of(request, "pools:write") as visit:
        said = (await visit.form()).fields
        chosen, limit = said.get("version", "").strip(), said.get("limit", "").strip()
        candidate = {"encoder": "shadow"} if chosen == ENCODER else {"version": chosen}
        found = await visit.client.versions.dry_run(**cast(dict[str, Any], candidate), limit=_number(limit))
        return await _dry_run_page(visit, chosen=chosen, limit=limit, found=found)


@router.post(f"{PATH}/shadow")
async def start_shadow(request: Request) -> Response:
    """Let a version of the pools see the traffic."""
    async with visit_of(request, "pools:write") as visit:
        said = (await visit.form()).fields
        await visit.client.shadow.start(said.get("version", "").strip(), reason=said.get("reason", ""))
        return redirect(_address(collection=POOLS) + "#shadows", None)


@router.post(f"{PATH}/shadow/stop")
async def stop_shadow(request: Request) -> Response:
    """Let no version see the traffic any more."""
    async with visit_of(request, "pools:write") as visit:
        await visit.form()
        await visit.client.shadow.stop()
        return redirect(_address(collection=POOLS), "changed")


async def _dry_run_page(visit: Visit, **context: Any) -> Response:
    answer = await _listed(visit, POOLS, "")
    labels = [str(label) for label in VerdictLabel]
    return page(
        visit,
        "dry_run.html",
        choices=_choices(answer),
        labels=labels,
        encoder_choice=ENCODER,
        has_encoder=visit.runtime.settings.shadow_encoder is not None,
        back=_address(collection=POOLS),
        **context,
    )


async def _listed(visit: Visit, name: str, before: str) -> VersionsAnswer:
    params = given(before=before or None) | {"limit": PAGE}
    return await answer_to_call(visit, Call("GET", path_of("collections", name, "versions"), VersionsAnswer, params))


def _choices(answer: VersionsAnswer) -> list[tuple[str, str]]:
    """Versions to choose from, with what they are called: the present one first, each once."""
    found = {answer.version: f"{answer.version}, the present one"}
    for item in answer.versions:
        said = item.name or item.kind
        found.setdefault(item.version, f"{item.version}, {said}, {item.time[:16].replace('T', ' ')} UTC")
    return list(found.items())


async def _both_counts(visit: Visit, name: str, *versions: str) -> list[str]:
    """How many exemplars searches find in versions that the API has just compared, by label."""
    candidates = visit.runtime.require_candidates()
    return [labels_in_words((await candidates.view(name, version)).counts) for version in versions]


def _collections(visit: Visit) -> list[str]:
    return sorted(visit.runtime.published.snapshots)


def _address(**params: str) -> str:
    return f"{PATH}?{urlencode(params)}"


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > _MOST_DIGITS:
        raise FormRefused(f"{text!r} is not a number of requests")
    return int(text)
