"""The audit log: entries page by page, whether it is whole, and all of it as a file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from fastapi import Request
from fastapi.responses import Response
from sqlalchemy import Connection
from starlette.types import Receive, Scope, Send

from indexer.catalog import chain as chains
from service.client import ConnectionFailed
from service.client.calls import Call, given
from service.console.asking import answer_to_call
from service.console.errors import FormRefused
from service.console.gate import Visit, visit_of
from service.console.rendering import page
from service.console.routes import console_router
from service.keys import Caller
from service.runtime import VOUCHED_FOR, request_id_of
from service.wire_audit import AuditAnswer, AuditEntry

router = console_router()
PAGE = 50
PATH = "/console/audit-log"
CHAINS = ("changes", "decisions")
KINDS = (
    "collection.create",
    "exemplar.add",
    "exemplar.suppress",
    "exemplar.move",
    "exemplar.annotate",
    "exemplar.disable",
    "exemplar.enable",
    "exemplar.quarantine",
    "exemplar.release",
    "exemplar.delete",
    "pool.import",
    "version.base",
    "version.publish",
    "version.rollback",
    "version.compact",
    "review.open",
    "review.claim",
    "review.release",
    "review.skip",
    "review.decide",
    "retroactive.match",
    "flood.report",
    "shadow.start",
    "shadow.stop",
    "settings.set",
    "model.set",
    "policy.set",
    "keys.change",
    "audit.prune",
)
"""Of which the field makes suggestions; any other can be written into it."""
_MOST_BODY_CHARS = 4000
_MOST_DIGITS = 16


@dataclass(frozen=True)
class Asked:
    """Which entries somebody wants to see.

    Attributes:
        chain: of which log.
        collection, kind, subject: only of these; empty for any.
    """

    chain: str
    collection: str
    kind: str
    subject: str

    @classmethod
    def of(cls, fields: Mapping[str, str]) -> "Asked":
        """From the parameters of an address."""
        said = {name: fields.get(name, "").strip() for name in ("collection", "kind", "subject")}
        return cls(fields.get("chain", "") or "changes", **said)

    @property
    def filters(self) -> dict[str, str]:
        """Those that are set."""
        named = {"collection": self.collection, "kind": self.kind, "subject": self.subject}
        return {name: value for name, value in named.items() if value}

    def address(self, **more: str) -> str:
        """A page with the same entries."""
        return f"{PATH}?{urlencode({'chain': self.chain, **self.filters, **more})}"


@router.get(PATH)
async def entries(request: Request) -> Response:
    """A page of entries, the oldest first; `end` asks for the last page, `before` for the one before an entry."""
    async with visit_of(request, "admin") as visit:
        asked = Asked.of(request.query_params)
        if "end" in request.query_params:
            after = await _start_of_page(visit, asked, None)
        elif "before" in request.query_params:
            after = await _start_of_page(visit, asked, _number(request.query_params["before"]))
        else:
            after = _number(request.query_params.get("after", "") or "0")
        answer = await _listed(visit, asked, after)
        first = answer.entries[0].seq if answer.entries else 0
        return page(
            visit,
            "audit_log.html",
            asked=asked,
            answer=answer,
            after=after,
            chains=CHAINS,
            kinds=KINDS,
            collections=sorted(visit.runtime.published.snapshots),
            body_of=body_text,
            following=asked.address(after=str(answer.next)) if answer.next else None,
            previous=asked.address(before=str(first)) if first and after else None,
            start=asked.address(),
            end=asked.address(end="1"),
            export=f"{PATH}/export",
        )


@router.post(f"{PATH}/verify")
async def verify(request: Request) -> Response:
    """Go through the whole log, and say what was found."""
    async with visit_of(request, "admin") as visit:
        await visit.form()
        try:
            found = await visit.client.audit.verify()
        except ConnectionFailed:
            found = None  # of a long log it takes longer than an answer may
        limit_s = visit.runtime.settings.deadline_s
        return page(visit, "audit_log_verify.html", found=found, limit_s=limit_s, back=PATH)


@router.get(f"{PATH}/export")
async def export(request: Request) -> Response:
    """The log as a file, as it is sent by the API: piece by piece, as fast as the browser takes it."""
    async with visit_of(request, "admin") as visit:
        asked = Asked.of(request.query_params)
        # What would be refused becomes a page before the file has begun.
        await answer_to_call(visit, Call("GET", "/audit", AuditAnswer, {"chain": asked.chain, "limit": 1}))
        params = given(chain=asked.chain, embeddings="true" if request.query_params.get("embeddings") else None)
        return _PassedOn(request, visit.caller, "/audit/export", params)


class _PassedOn(Response):
    """The API's own answer to another address, in the name of a caller who is known already; nothing is collected."""

    def __init__(self, request: Request, caller: Caller, path: str, params: Mapping[str, str]) -> None:
        super().__init__()
        self._app, self._caller, self._path, self._params = request.app, caller, path, params
        self._request_id = request_id_of(request)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        kept = ("type", "asgi", "http_version", "method", "scheme", "server", "client")
        asked = {
            **{name: scope[name] for name in kept if name in scope},
            "path": self._path,
            "raw_path": self._path.encode(),
            "root_path": "",
            "query_string": urlencode(self._params).encode(),
            "headers": [(b"x-request-id", self._request_id.encode())],
            VOUCHED_FOR: self._caller,
        }
        await self._app(asked, receive, send)


async def _listed(visit: Visit, asked: Asked, after: int) -> AuditAnswer:
    params: dict[str, Any] = {"chain": asked.chain, "after": after, "limit": PAGE, **asked.filters}
    return await answer_to_call(visit, Call("GET", "/audit", AuditAnswer, params))


async def _start_of_page(visit: Visit, asked: Asked, before: int | None) -> int:
    """The number after which the page begins that ends before an entry; None for the end of the log."""

    def numbers(connection: Connection) -> list[int]:
        found = chains.read(
            connection,
            asked.chain,
            before=before,
            limit=PAGE,
            collection=asked.collection or None,
            kinds=(asked.kind,) if asked.kind else None,
            subject=asked.subject or None,
            newest_first=True,
        )
        return [entry.seq for entry in found]

    if asked.chain not in CHAINS or any("\0" in value for value in asked.filters.values()):
        return 0  # the API says what is wrong with it
    found = await visit.runtime.require_editor().read(numbers)
    return found[-1] - 1 if found else 0


def body_text(entry: AuditEntry) -> tuple[str, int]:
    """What an entry says, as indented JSON, and how many characters of it were left out."""
    text = json.dumps(entry.body, indent=1, ensure_ascii=False, sort_keys=True)
    return text[:_MOST_BODY_CHARS], max(0, len(text) - _MOST_BODY_CHARS)


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > _MOST_DIGITS:
        raise FormRefused(f"{text!r} is not the number of an entry")
    return int(text)
