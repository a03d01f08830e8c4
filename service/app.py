"""The application: routes, what surrounds them, and their life from start-up to the last answer."""

import asyncio
import gc
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from typing import TypeVar, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from indexer.errors import IndexerError
from perception.errors import PerceptionError
from service.api import classify, health, metrics, pools, similar
from service.api.documentation import document
from service.errors import ServiceError
from service.intake import invalid_parameter
from service.keys import KeyRing
from service.memory import trim_when_idle
from service.problems import MEDIA_TYPE, extra_headers, http_problem, problem_response
from service.request_log import RequestLog
from service.runtime import request_id_of, state_of
from service.settings import Settings
from service.shedding import Shedding
from service.startup import Loaded, load, product_version, start
from service.telemetry import Metrics
from service.tracing import flush_tracing, telemetry_config

T = TypeVar("T")
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
    for routes in (classify, similar, pools, metrics, health):
        app.include_router(routes.router)
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
                runtime = await start(settings, parts, counters, stack)
                chores.append(asyncio.create_task(parts.published.watch(settings.pools_reload_s)))
                chores.append(asyncio.create_task(_watch(parts.keys, settings.pools_reload_s)))
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


async def _watch(keys: KeyRing, every_s: float) -> None:
    """Take up keys that are created or revoked while the service runs; until cancelled."""
    while True:
        await asyncio.sleep(every_s)
        try:
            await asyncio.to_thread(keys.reload_if_changed)
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
    return JSONResponse(body, status_code=error.status_code, media_type=MEDIA_TYPE, headers=headers)


async def _answer_validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return problem_response(invalid_parameter(error.errors()), request_id_of(request))
