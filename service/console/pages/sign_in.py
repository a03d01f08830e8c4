"""Signing in with an API key, and out again."""

from fastapi import Request
from fastapi.responses import Response

from service.console.gate import (
    COOKIE,
    COOKIE_PATH,
    Visit,
    refuse_other_sites,
    require_token,
    session_of,
    sessions_of,
    visit_of,
)
from service.console.rendering import PLACES, bare_page, redirect, remember
from service.console.routes import console_router
from service.errors import Unauthenticated
from service.intake import read_form
from service.runtime import runtime_of

router = console_router()


@router.get("/console")
@router.get("/console/")
async def home(request: Request) -> Response:
    """The first page that the visitor may see."""
    async with visit_of(request) as visit:
        return redirect(_first_place(visit))


@router.get("/console/sign-in")
async def form(request: Request) -> Response:
    """The form to sign in."""
    runtime_of(request)
    session = session_of(request) or sessions_of(request).open(None)
    return bare_page(request, "sign_in.html", session=session, refused="")


@router.post("/console/sign-in")
async def sign_in(request: Request) -> Response:
    """Take a key, and open a session where it is in force. The key itself goes no further than this function."""
    runtime, sessions = runtime_of(request), sessions_of(request)
    before = session_of(request) or sessions.open(None)
    refuse_other_sites(request)
    sent = await read_form(request, runtime.settings)
    require_token(sent, sessions.form_token(before))
    try:
        caller = runtime.keys.authenticate(sent.fields.get("key", "").strip())
    except Unauthenticated as error:
        return bare_page(request, "sign_in.html", status=401, session=before, refused=error.reason)
    request.state.caller_id = caller.id
    sessions.close(before)
    response = redirect("/console")
    remember(request, response, sessions.open(caller.id))
    return response


@router.post("/console/sign-out")
async def sign_out(request: Request) -> Response:
    """End the session."""
    async with visit_of(request) as visit:
        await visit.form()
        sessions_of(request).close(visit.session)
    response = redirect("/console/sign-in", "signed-out")
    response.delete_cookie(COOKIE, path=COOKIE_PATH)
    return response


def _first_place(visit: Visit) -> str:
    return next(place.path for place in PLACES if visit.may(*place.scopes))
