"""The console's routes, and what becomes of everything that goes wrong on the way to a page: a page that says so."""

import logging
import secrets
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from indexer.errors import IndexerError
from perception.errors import PerceptionError
from service.client import AnswerNotUnderstood, ConnectionFailed, ProblemError
from service.client.errors import one_line
from service.console.errors import FormRefused, SignInNeeded
from service.console.gate import caller_of_session, session_of
from service.console.rendering import asset_response, bare_page, redirect
from service.console.sessions import MIN_SECRET_BYTES, Sessions
from service.errors import ServiceError
from service.problems import extra_headers, kind_of, problem
from service.runtime import request_id_of
from service.secret_file import read_secret
from service.settings import Settings

_SECRET_BYTES = 32
_log = logging.getLogger("hardlook.console")


class ConsoleRoute(APIRoute):
    """A route whose errors are pages, in place of the API's JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See FastAPI."""
        handler = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handler(request)
            except (HTTPException, ClientDisconnect):
                raise
            except Exception as error:
                return answer_to(error, request)

        return answer


def console_router() -> APIRouter:
    """A router for pages; they are not part of the API, and not in its description."""
    return APIRouter(route_class=ConsoleRoute, include_in_schema=False)


def answer_to(error: Exception, request: Request) -> Response:
    """The page that an error becomes; what is not expected is raised again."""
    if isinstance(error, SignInNeeded):
        return redirect("/console/sign-in")
    if isinstance(error, FormRefused):
        return _error_page(request, 403, "The form was refused", error.reason)
    if isinstance(error, ProblemError):
        said = error.problem
        return _error_page(request, error.status, said.title, said.detail, request_id=said.request_id)
    if isinstance(error, ConnectionFailed | AnswerNotUnderstood):
        _log.error("the API did not answer the console: %s", error)
        return _error_page(request, 503, "The service did not answer", one_line(error))
    if isinstance(error, PerceptionError | IndexerError | ServiceError):
        told = problem(error, request_id_of(request))
        if told["status"] == 500:
            _log.error("a bug", exc_info=error)
        return _error_page(request, told["status"], kind_of(error).title, told["detail"], error)
    if isinstance(error, ValueError):  # of the client: what nobody can ask for
        return _error_page(request, 400, "This cannot be asked for", one_line(error))
    raise error


def _error_page(
    request: Request, status: int, title: str, detail: str, error: Exception | None = None, request_id: str = ""
) -> Response:
    session = session_of(request)
    runtime = getattr(request.app.state, "runtime", None)
    response = bare_page(
        request,
        "problem.html",
        status=status,
        session=session,
        caller=None if session is None or runtime is None else caller_of_session(request, runtime, session),
        title=title,
        detail=detail,
        request_id=request_id or request_id_of(request),
        problem_status=status,
    )
    response.headers.update({k: v for k, v in extra_headers(status, error).items() if k != "WWW-Authenticate"})
    return response


router = console_router()


@router.get("/console/static/{name}")
async def static(name: str) -> Response:
    """A script, a style sheet or a picture that came with the package."""
    found = asset_response(name)
    if found is None:
        raise HTTPException(404)
    return found


def add_console(app: FastAPI, settings: Settings) -> None:
    """Serve the console, where the settings ask for it.

    Raises:
        SettingsError: the file with the secret cannot be read, or holds too little.
    """
    # Here, since pages are made of the routes above.
    from service.console.pages import ROUTERS

    if not settings.console:
        return
    file = settings.console_secret_file
    secret = (
        secrets.token_bytes(_SECRET_BYTES)
        if file is None
        else read_secret("console_secret_file", file, MIN_SECRET_BYTES)
    )
    app.state.console_sessions = Sessions(secret, settings.console_session_s)
    for pages in (router, *ROUTERS):
        app.include_router(pages)
