"""Rendering: templates into pages, with the headers that keep a page from doing what it should not.

Every page is whole: htmx takes from it what it needs, so that what a browser without scripts shows is the same.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from service.console.gate import COOKIE, COOKIE_PATH, FORM_TOKEN, Visit, may, scopes_in_words, sessions_of
from service.console.sessions import Session
from service.keys import Caller
from service.settings import Scope

_HERE = Path(__file__).parent
# No inline script or style: what a hostile name or note gets into a page is text. Pictures of a page are its own, or
# are in the page itself.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_MEDIA_TYPES = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}
_FOREVER = "public, max-age=31536000, immutable"
NOTICES: Mapping[str, str] = MappingProxyType(
    {
        "signed-out": "You have signed out.",
        "added": "The exemplar was added. Every verdict from now on knows it.",
        "unchanged": "Nothing was changed: it is so already.",
        "changed": "The change is in force.",
        "copies-deleted": "The copies were deleted. Versions from before still have them.",
        "deleted": "The exemplar was deleted. Versions from before still have it.",
        "decided": "The item was decided. Every verdict from now on knows it.",
        "dismissed": "The item was dismissed; no pool was changed.",
        "claimed": "The item is yours for a while.",
        "released": "The item was given back.",
        "skipped": "The item was put aside.",
        "nothing-open": "Nothing is open: there is no item to take.",
        "published": "The present state is a version now.",
        "rolled-back": "The earlier state is the present one again.",
        "reported": "The verdict was reported; a reviewer will look at it.",
    }
)
"""What a page may say of what has just been done; pages name one by its code, so that no address can put words here."""


@dataclass(frozen=True)
class Place:
    """A page of the navigation: its path, its name, and the scopes of which one opens it; none for any."""

    path: str
    name: str
    scopes: tuple[Scope, ...]

    def open_to(self, held: frozenset[Scope]) -> bool:
        """Whether somebody with these scopes may see it."""
        return may(held, self.scopes)


PLACES = (
    Place("/console/classify", "Classify", ("classify",)),
    Place("/console/reviews", "Reviews", ("review",)),
    Place("/console/pools", "Pools", ("pools:write",)),
    Place("/console/versions", "Versions", ("pools:write",)),
    Place("/console/thresholds", "Thresholds", ("pools:write",)),
    Place("/console/audits", "Robustness", ("pools:write",)),
    Place("/console/audit-log", "Audit log", ("admin",)),
    Place("/console/health", "Health", ()),
)
"""Pages in the order of the navigation."""


@dataclass(frozen=True)
class Asset:
    """A file that pages load, as it is sent."""

    content: bytes
    media_type: str
    version: str


@cache
def assets() -> Mapping[str, Asset]:
    """All files that pages may load, by name: those that came with the package, and no others."""
    found = {}
    for path in sorted((_HERE / "static").iterdir()):
        if path.suffix in _MEDIA_TYPES:
            content = path.read_bytes()
            found[path.name] = Asset(content, _MEDIA_TYPES[path.suffix], hashlib.sha256(content).hexdigest()[:16])
    return MappingProxyType(found)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["asset"] = lambda name: f"/console/static/{name}?v={assets()[name].version}"
    environment.filters["similarity"] = lambda value: "–" if value is None else f"{value:+.4f}"
    environment.filters["percent"] = lambda value: "–" if value is None else f"{100 * value:.1f} %"
    environment.filters["when"] = lambda text: str(text).replace("T", " ")[:19] + " UTC"
    return environment


def page(visit: Visit, template: str, *, status: int = 200, **context: Any) -> Response:
    """A page for somebody who has been let in.

    Args:
        visit: of whom.
        template: file in templates/.
        status: of the answer.
        context: what the template shows; every value is escaped.
    """
    html = _rendered(visit.request, template, visit.caller, visit.session, visit=visit, **context)
    response = _page_response(html, status)
    if visit.fresh:
        remember(visit.request, response, visit.session)
    return response


def bare_page(
    request: Request,
    template: str,
    *,
    status: int = 200,
    session: Session | None = None,
    caller: Caller | None = None,
    **context: Any,
) -> Response:
    """A page that nobody has to be let in for: to sign in, or to say what went wrong.

    Args:
        request: that is answered.
        template: file in templates/.
        status: of the answer.
        session: whose forms the page has; None where it has none.
        caller: who has signed in, where somebody has.
        context: as of `page`.
    """
    response = _page_response(_rendered(request, template, caller, session, **context), status)
    if session is not None:
        remember(request, response, session)
    return response


def redirect(path: str, notice: str | None = None) -> Response:
    """Send the browser to another page of the console, by GET.

    Args:
        path: that starts with /console.
        notice: one of `NOTICES`.
    """
    assert notice is None or notice in NOTICES
    separator = "&" if "?" in path else "?"
    return RedirectResponse(path + (f"{separator}notice={notice}" if notice else ""), status_code=303)


def remember(request: Request, response: Response, session: Session) -> None:
    """Have the browser keep a session, for the console alone, away from scripts and from other sites."""
    sessions = sessions_of(request)
    response.set_cookie(
        COOKIE,
        sessions.cookie(session),
        max_age=int(sessions.lasts_s),
        path=COOKIE_PATH,
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )


def asset_response(name: str) -> Response | None:
    """A file that pages load; None where there is none of that name."""
    asset = assets().get(name)
    if asset is None:
        return None
    return Response(asset.content, media_type=asset.media_type, headers={"Cache-Control": _FOREVER})


def _rendered(request: Request, template: str, caller: Caller | None, session: Session | None, **context: Any) -> str:
    """The HTML of a page, with what all of them have around it."""
    scopes = frozenset[Scope]() if caller is None else caller.scopes
    return (
        _environment()
        .get_template(template)
        .render(
            path=request.url.path,
            places=[place for place in PLACES if place.open_to(scopes)],
            notice=NOTICES.get(request.query_params.get("notice", "")),
            token_field=Markup() if session is None else _token_field(sessions_of(request).form_token(session)),
            who="" if caller is None else f"{caller.name} ({scopes_in_words(scopes)})",
            signed_in=caller is not None and not caller.anonymous,
            **context,
        )
    )


def _token_field(token: str) -> Markup:
    return Markup('<input type="hidden" name="{}" value="{}">').format(FORM_TOKEN, token)


def _page_response(html: str, status: int) -> Response:
    headers = {
        "Content-Security-Policy": PAGE_POLICY,
        "Cross-Origin-Opener-Policy": "same-origin",  # scripts of other sites get no hold of the window either
        "Referrer-Policy": "same-origin",  # with none at all, browsers send forms from the origin 'null'
    }
    return HTMLResponse(html, status_code=status, headers=headers)
