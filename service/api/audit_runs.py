"""Robustness audits: which there are, whether they are of what is deployed, and thresholds tried on them."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Path, Request
from fastapi.responses import Response
from sqlalchemy import Connection

from indexer.catalog import chain
from indexer.catalog.entry import Entry
from indexer.catalog.ledger import CHANGES
from indexer.contents import POOLS
from perception.policy_file import Measured
from perception.replay import RECORDED_DECIMALS, AttackSetting
from perception.verdict import DecisionPolicy
from service.api.documentation import json_request_body
from service.audit_fit import POOL_CHANGES, DefenseParameters, Deployed, PoolChange, fits
from service.audit_reading import AuditRun, failed_checks
from service.audit_records import Images
from service.intake import read_json
from service.runtime import Runtime, caller_of, request_id_of, runtime_of
from service.schemas import problem_responses
from service.schemas_audits import audits_answer, curve_point, date_text, fit_item, setting_item, tried_policy
from service.thresholds import Point, curve, require_neighbors, tried
from service.wire_audits import AuditsAnswer, ReplayAnswer, ReplayBody

router = APIRouter()
HTML = "text/html"
# A report needs no script and nothing from elsewhere. Whatever lies in the folder in its place gets no more than that:
# no scripts, no forms, and an origin of its own, so that it is nobody on this site.
REPORT_POLICY = (
    "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
REPORT_HEADERS = {
    "Content-Security-Policy": REPORT_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "private, no-cache",
}
_CHANGES_LOOKED_AT = 1000
_MAX_ID_CHARS = 128
AuditId = Annotated[str, Path(max_length=_MAX_ID_CHARS, description="Name of its folder.", examples=["audit_demo"])]


@router.get("/audits", summary="Which robustness audits are there?", responses=problem_responses(401, 403, 500, 503))
async def audits(request: Request) -> AuditsAnswer:
    """Runs of `hardlook-lab audit` in the folder HARDLOOK_AUDITS, newest first, compared with what is deployed."""
    await caller_of(request, "pools:write", images=0)
    runtime = runtime_of(request)
    listing = await asyncio.to_thread(runtime.audits.runs.listed)
    deployed = await _deployed(runtime)
    return audits_answer(request_id_of(request), listing, deployed, configured=runtime.settings.audits is not None)


@router.get(
    "/audits/{id}/report",
    summary="The report of an audit",
    responses={
        **problem_responses(400, 401, 403, 404, 409, 500, 503),
        200: {"content": {HTML: {"schema": {"type": "string"}}}},
    },
    response_class=Response,
)
async def report(request: Request, id: AuditId) -> Response:
    """The page that the audit left: it has its pictures in itself, and may load and run nothing."""
    await caller_of(request, "pools:write", images=0)
    page = await asyncio.to_thread(runtime_of(request).audits.runs.page, id)
    return Response(page, media_type=HTML, headers=REPORT_HEADERS)


@router.post(
    "/audits/{id}/replay",
    summary="What would another policy have answered?",
    responses=problem_responses(400, 401, 403, 404, 408, 409, 413, 415, 422, 500, 503),
    openapi_extra=json_request_body(ReplayBody),
)
async def replay(request: Request, id: AuditId) -> ReplayAnswer:
    """Try a decision policy on the images of an audit, clean and attacked, beside the policy that serves.

    Every verdict is made by the code that serves, from the neighbours that the audit wrote down. Attacked images were
    made against the audited policy: under any other one, rates on them are lower bounds.
    """
    await caller_of(request, "pools:write", images=0)
    runtime = runtime_of(request)
    with runtime.admission.enter():
        body = await read_json(request, ReplayBody, runtime.settings)
        policy, setting = _policy(body), _setting(body)
        run = await asyncio.to_thread(runtime.audits.runs.get, id)
        images = await asyncio.to_thread(runtime.audits.records.of, run, body.system)
        require_neighbors(policy, images.recorded)
        chosen = images.chosen(setting, run.headline)
        found = await asyncio.to_thread(_tried, images, chosen, policy, runtime.rule)
        deployed = await _deployed(runtime)
    return _answer(request_id_of(request), run, body.system, found, deployed)


@dataclass(frozen=True)
class _Found:
    """What came of a policy on the images of one setting, beside the policy that serves."""

    images: Images
    setting: AttackSetting
    policy: DecisionPolicy
    measured: Measured
    present: DecisionPolicy
    of_present: Measured | None
    points: tuple[Point, ...]


def _policy(body: ReplayBody) -> DecisionPolicy:
    return DecisionPolicy(**body.policy.model_dump())


def _setting(body: ReplayBody) -> AttackSetting | None:
    asked = body.setting
    return None if asked is None else AttackSetting(asked.norm, asked.eps, asked.steps)


def _tried(images: Images, setting: AttackSetting, policy: DecisionPolicy, present: DecisionPolicy) -> _Found:
    chosen = images.by_setting[setting]
    of_present = tried(chosen, present) if present.neighbors_needed <= images.recorded else None
    return _Found(images, setting, policy, tried(chosen, policy), present, of_present, tuple(curve(chosen, policy)))


def _answer(request_id: str, run: AuditRun, name: str, found: _Found, deployed: Deployed) -> ReplayAnswer:
    system = run.system(name)
    assert system is not None  # else there were no images
    assert system.noted is not None
    assert system.noted.policy_version is not None
    return ReplayAnswer(
        request_id=request_id,
        id=run.id,
        date=date_text(run.date),
        system=name,
        setting=setting_item(found.setting),
        settings=[setting_item(setting) for setting in found.images.by_setting],
        recorded=found.images.recorded,
        fit=fit_item(fits(run, system, deployed)),
        attacked_under=system.noted.policy_version,
        deployed=None if found.of_present is None else tried_policy(found.present, found.of_present),
        tried=tried_policy(found.policy, found.measured),
        curve=[curve_point(point) for point in found.points],
        notes=list(_notes(run, system.noted.policy_version, found)),
    )


def _notes(run: AuditRun, attacked_under: str, found: _Found) -> Iterator[str]:
    """What to know before relying on the rates."""
    if found.policy.version != attacked_under:
        yield (
            f"The attacked images were made against policy {attacked_under}, and an attack stops where it has fooled "
            "that one. Rates of any other policy on them are lower bounds: audit again with it before relying on them."
        )
    if found.of_present is None:
        yield (
            f"The deployed policy has {found.present.neighbors_needed} voters, the audit recorded "
            f"{found.images.recorded} neighbours of each pool: it cannot be replayed."
        )
    failed = sum(1 for _ in failed_checks(run))
    if failed:
        yield (
            f"{failed} of {len(run.checks)} checks for masked gradients did not pass: the attacks may have been weaker "
            "than they should be, and the true rates on attacked images higher."
        )
    yield (
        f"Similarities are recorded with {RECORDED_DECIMALS} decimals: a verdict whose margin is as near to a "
        "threshold as that may fall on its other side when it serves."
    )


async def _deployed(runtime: Runtime) -> Deployed:
    """What answers now, and what was done to its pools."""
    view = runtime.published.snapshots.get(POOLS)
    pools = await asyncio.to_thread(runtime.audits.pools.of, view)
    changes: list[PoolChange] = []
    if runtime.books is not None:
        read = partial(_read_changes, limit=_CHANGES_LOOKED_AT)
        changes = [PoolChange(datetime.fromisoformat(e.time), e.kind) for e in await runtime.books.editor.read(read)]
    return Deployed(
        encoder=runtime.model.name,
        fingerprint=runtime.model.fingerprint,
        precision=runtime.model.precision,
        pools=pools,
        policy_version=runtime.policy.version,
        defense=DefenseParameters.deployed(runtime.settings),
        changes=tuple(changes),
        all_changes=len(changes) < _CHANGES_LOOKED_AT,
    )


def _read_changes(connection: Connection, limit: int) -> list[Entry]:
    return chain.read(connection, CHANGES, collection=POOLS, kinds=POOL_CHANGES, newest_first=True, limit=limit)
