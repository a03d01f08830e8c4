"""The application: routes, what surrounds them, and their life from start-up to the last answer."""

import asyncio
import gc
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from http import HTTPStatus
from typing import TypeVar, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from indexer.errors import IndexerError
from perception.errors import PerceptionError
from service.api import (
    adapters,
    audit,
    audit_runs,
    classify,
    curation,
    exemplars,
    explain,
    health,
    images,
    jobs,
    metrics,
    pools,
    reviews,
    similar,
    versions,
)
from service.api.documentation import document
from service.bookkeeping import keep_compact
from service.console.routes import add_console
from service.editing import Editor, adopt_with
from service.errors import ServiceError
from service.intake import invalid_parameter
from service.keys import KeyRing
from service.memory import trim_when_idle
from service.problems import MEDIA_TYPE, extra_headers, http_problem, problem_response
from service.provenance import write_down_keys
from service.request_log import RequestLog
from service.runtime import request_id_of, state_of
from service.settings import Settings
from service.shedding import Shedding
from service.startup import Loaded, load, product_version, start
from service.telemetry import Metrics
from service.tracing import flush_tracing, telemetry_config

T = TypeVar("T")
_ROUTES = (
    classify, similar, explain, pools, exemplars, versions, curation, reviews, images, jobs, audit, audit_runs,
    adapters, metrics, health,
)  # fmt: skip
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_log = logging.getLogger("hardlook.app")
_DESCRIPTION = """Nearest neighbours of adversarially robust image embeddings decide, and are shown with the decision.

Every error is an RFC 9457 problem (`application/problem+json`). Every answer names its request id, which is also in the
header `X-Request-ID`, taken from the request where it has one."""


def create_app(
    settings: Settings, loaded: Loaded | None = None, *, failed: Callable[[Exception], object] | None = None
) -> FastAPI:
    """Put the service together.

    Args:
        settings: of the service.
        loaded: what `load` returned. Where None, it is loaded while the service already answers that it is starting.
        failed: called where that loading fails, from the event loop; the service then never becomes ready.
    """
    counters = Metrics()

    app = FastAPI(
        title="hardlook",
        version=product_version(),
        description=_DESCRIPTION,
        lifespan=_life(settings, loaded, counters, failed),
        redirect_slashes=False,
        # The interactive pages would load scripts from a foreign host.
        docs_url=None,
        redoc_url=None,
        telemetry=telemetry_config(),
    )
    app.state.metrics, app.state.settings, app.state.draining = counters, settings, False
    counters.watch_state(lambda: state_of(app))
    for routes in _ROUTES:
        app.include_router(routes.router)
    add_console(app, settings)
    app.add_middleware(Shedding)
    app.add_middleware(RequestLog, metrics=counters)
    for error_type in (PerceptionError, IndexerError, ServiceError):
        app.add_exception_handler(error_type, _answer_expected)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(RequestValidationError, _answer_validation)
    document(app, settings)
    return app


def _life(
    settings: Settings, loaded: Loaded | None, counters: Metrics, failed: Callable[[Exception], object] | None
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """From start-up to the last answer; arguments are those of `create_app`."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        app.state.draining = False
        async with AsyncExitStack() as stack:
            chores: list[asyncio.Task[None]] = []

            async def open_up() -> None:
                parts = await _in_daemon_thread(lambda: load(settings)) if loaded is None else loaded
                if loaded is None:
                    stack.callback(parts.close)
                runtime = await start(settings, parts, counters, stack)
                adopt = None if runtime.editor is None else adopt_with(runtime.editor)
                chores.append(asyncio.create_task(parts.published.watch(settings.pools_reload_s, adopt)))
                chores.append(asyncio.create_task(_watch(parts.keys, settings.pools_reload_s, runtime.editor)))
                if runtime.editor is not None:
                    chores.append(asyncio.create_task(keep_compact(settings, runtime.editor, parts.published)))
                if runtime.jobs is not None:
                    chores.append(asyncio.create_task(runtime.jobs.run()))
                if runtime.books is not None and runtime.books.webhooks is not None:
                    chores.append(asyncio.create_task(runtime.books.webhooks.run()))
                chores.append(asyncio.create_task(trim_when_idle(runtime.admission.idle_since_work)))
                app.state.runtime = runtime
                _log.info("started")

            async def load_and_open_up() -> None:
                await open_up()
                # What is there now stays: looking through it again and again would stop all answers for a moment.
                gc.collect()
                gc.freeze()

            if loaded is None:
                chores.append(asyncio.create_task(_reported(load_and_open_up(), failed)))
            else:
                await open_up()
            try:
                yield
            finally:
                app.state.draining = True
                for chore in chores:
                    chore.cancel()
                await asyncio.gather(*chores, return_exceptions=True)
        app.state.runtime = None
        await asyncio.to_thread(flush_tracing)

    return life


async def _watch(keys: KeyRing, every_s: float, editor: Editor | None) -> None:
    """Take up keys that are created or revoked while the service runs, and log that; until cancelled."""
    while True:
        await asyncio.sleep(every_s)
        try:
            if await asyncio.to_thread(keys.reload_if_changed) and editor is not None:
                await write_down_keys(editor, keys.records)
        except Exception:
            _log.exception("a bug")


async def _reported(opening: Awaitable[None], failed: Callable[[Exception], object] | None) -> None:
    try:
        await opening
    except Exception as error:
        if failed is None:
            _log.exception("the service cannot start")
        else:
            failed(error)


async def _in_daemon_thread(work: Callable[[], T]) -> T:
    """Loading may hang on a network; a thread of the default executor would then hold up the end of the process."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def report(outcome: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(cast(T, outcome))

    def run() -> None:
        try:
            outcome, error = work(), None
        except Exception as raised:
            outcome, error = None, raised
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(report, outcome, error)

    threading.Thread(target=run, name="loading", daemon=True).start()
    return await future


async def _answer_expected(request: Request, error: Exception) -> JSONResponse:
    response = problem_response(error, request_id_of(request))
    if response.status_code == 500:
        _log.error("a bug", exc_info=error)
    return response


async def _answer_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    body = http_problem(error.status_code, str(error.detail), request_id_of(request))
    headers = {**extra_headers(error.status_code), **(error.headers or {})}
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = _allowed_methods(request)
    return JSONResponse(body, status_code=error.status_code, media_type=MEDIA_TYPE, headers=headers)


def _allowed_methods(request: Request) -> str:
    """Every method of a path; the router itself names those of the first route that has the path."""
    routes = request.app.routes

    def allowed(method: str) -> bool:
        scope = {**request.scope, "method": method}
        return any(route.matches(scope)[0] is Match.FULL for route in routes)

    return ", ".join(method for method in _METHODS if allowed(method))


async def _answer_validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return problem_response(invalid_parameter(error.errors()), request_id_of(request))
