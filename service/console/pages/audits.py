"""Robustness: the newest audit of what is deployed, whether it still is that, and all others."""

from dataclasses import dataclass

from fastapi import Request
from fastapi.responses import Response

from service.api.audit_runs import REPORT_HEADERS
from service.console.gate import visit_of
from service.console.rendering import page
from service.console.routes import console_router
from service.wire_audits import AuditedSystemItem, AuditItem, AuditsAnswer

PATH = "/console/audits"
router = console_router()


@dataclass(frozen=True)
class Shown:
    """The audit on top of the page.

    Attributes:
        audit: it.
        system: of it, the one that fits, or fits most nearly.
    """

    audit: AuditItem
    system: AuditedSystemItem | None

    @property
    def fits(self) -> bool:
        """Whether it is an audit of what is deployed."""
        return self.audit.state == "finished" and self.system is not None and self.system.fit.whole


@router.get(PATH)
async def audits(request: Request) -> Response:
    """The list."""
    async with visit_of(request, "pools:write") as visit:
        answer = await visit.client.audits.list()
        return page(visit, "audits.html", answer=answer, shown=_shown(answer), fitting=_fitting)


@router.get(f"{PATH}/{{id}}/report")
async def report(request: Request, id: str) -> Response:
    """The report itself: no page of the console, so that it may load and run nothing, and has an origin of its own."""
    async with visit_of(request, "pools:write") as visit:
        content = await visit.client.audits.report(id)
    return Response(content, media_type="text/html", headers=REPORT_HEADERS)


def _shown(answer: AuditsAnswer) -> Shown | None:
    """The newest that fits; else the one that fits most nearly, else the newest finished one; None where none is."""
    chosen = answer.newest_fitting or answer.calibration
    for audit in answer.audits:
        if chosen is not None and audit.id == chosen.id:
            return Shown(audit, next((s for s in audit.systems if s.name == chosen.system), None))
    finished = [audit for audit in answer.audits if audit.state == "finished"]
    return Shown(finished[0], finished[0].systems[0] if finished[0].systems else None) if finished else None


def _fitting(audit: AuditItem) -> list[str]:
    """Names of the systems of an audit that are what is deployed."""
    return [system.name for system in audit.systems if system.fit.whole and audit.state == "finished"]
