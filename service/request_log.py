"""What surrounds every request: its id, its log line, its count, its headers, and the last resort for bugs.

Log lines are JSON objects, one a line. They never hold a header, a query, a URL, or anything of an image or a prompt.
"""

import json
import logging
import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars, merge_contextvars
from structlog.processors import JSONRenderer, format_exc_info
from structlog.stdlib import ProcessorFormatter
from structlog.typing import EventDict

from service.problems import MEDIA_TYPE, TYPE_PREFIX, problem_response
from service.telemetry import Metrics
from service.tracing import current_trace_id

REQUEST_ID_HEADER = "X-Request-ID"
_ID_HEADER = REQUEST_ID_HEADER.lower().encode()
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_MAX_PATH = 256
_MAX_EXCEPTION = 16_384
_CLIENT_GONE = 499  # as nginx logs it; never sent
_NO_ANSWER = 500  # counted where the request ended without one
_UNMATCHED = "unmatched"
# Answers are data for the program that asked: no page may embed, run or keep them. A route may say otherwise.
_SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_log = logging.getLogger("hardlook.requests")


class RequestLog:
    """ASGI middleware: gives a request its id, logs and counts its end, and turns a bug into a problem.

    Args:
        app: what answers.
        metrics: told of every request and problem; None where nobody counts.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics | None = None) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _given_id(scope) or uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        exchange = _Exchange(request_id, receive, send)
        with bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, exchange.receive, exchange.send)
            except ClientDisconnect:
                exchange.status = _CLIENT_GONE
            except Exception as error:
                _log.exception("a bug")
                if exchange.status is not None:  # half an answer is out: only the server can end it
                    raise
                response = problem_response(error, request_id)
                await response(scope, exchange.receive, exchange.send)
            finally:
                self._report(scope, exchange)

    def _report(self, scope: Scope, exchange: "_Exchange") -> None:
        seconds = time.perf_counter() - exchange.started_s
        state, route = scope["state"], _route(scope)
        fields: dict[str, object] = {
            "method": scope["method"][:16],
            "path": scope["path"][:_MAX_PATH],
            "route": route,
            "status": exchange.status,
            "duration_ms": round(1000 * seconds, 1),
            "bytes_in": exchange.bytes_in,
        }
        if exchange.problem is not None:
            fields["problem"] = exchange.problem
        if "caller_id" in state:
            fields["caller"] = state["caller_id"]
        _log.info("request", extra={"fields": {**state.get("log_fields", {}), **fields}})
        if self._metrics is not None:
            self._metrics.request(route, scope["method"], exchange.status or _NO_ANSWER, seconds)
            if exchange.problem is not None:
                self._metrics.problem(exchange.problem)


class _Exchange:
    """One request and its answer on their way, and what is seen of them."""

    def __init__(self, request_id: str, receive: Receive, send: Send) -> None:
        self.request_id, self._receive, self._send = request_id, receive, send
        self.started_s = time.perf_counter()
        self.status: int | None = None
        self.bytes_in = 0
        self.problem: str | None = None
        self._is_problem = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self.bytes_in += len(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = self._headers(message.get("headers", ()))
        elif self._is_problem and message["type"] == "http.response.body":
            self._is_problem = False
            self.problem = _slug(message.get("body", b""))
        await self._send(message)

    def _headers(self, headers: Any) -> list[tuple[bytes, bytes]]:
        """Those of the route, with what they lack, and our id."""
        given = {name.lower(): value for name, value in headers}
        self._is_problem = given.get(b"content-type", b"").startswith(MEDIA_TYPE.encode())
        return [
            *((name, value) for name, value in headers if name.lower() != _ID_HEADER),
            (_ID_HEADER, self.request_id.encode()),
            *(header for header in _SECURITY_HEADERS if header[0] not in given),
        ]


def _given_id(scope: Scope) -> str | None:
    """The id that the request brings, where it is one."""
    for name, value in scope["headers"]:
        if name == _ID_HEADER:
            return value.decode("ascii") if _REQUEST_ID.fullmatch(value) else None
    return None


def _route(scope: Scope) -> str:
    """The template of the route that was found, so that there are as many values as routes."""
    if template := getattr(scope.get("route"), "path", None):
        return str(template)
    # Routes that the framework adds by itself, such as the OpenAPI description, leave no template but have no parts.
    return str(scope["path"]) if "endpoint" in scope and not scope.get("path_params") else _UNMATCHED


def _slug(body: bytes) -> str | None:
    """Of a problem, which the application has just written: what happened, for log and metrics."""
    try:
        return str(json.loads(body)["type"]).removeprefix(TYPE_PREFIX)
    except (ValueError, KeyError, TypeError):
        return None


def json_formatter() -> logging.Formatter:
    """One JSON object a line, from a log call of any library.

    Members are `time`, `level`, `logger` and `event`; the `request_id` and `trace_id` of the request in whose task the
    call was made; what the call passes as `extra={"fields": {...}}`; and `exception`, a traceback.
    """
    return ProcessorFormatter(
        processors=[
            merge_contextvars,
            _from_record,
            ProcessorFormatter.remove_processors_meta,
            format_exc_info,
            _bounded,
            JSONRenderer(default=str),
        ]
    )


def _from_record(_: object, __: str, event: EventDict) -> EventDict:
    record: logging.LogRecord = event["_record"]
    trace_id = current_trace_id()
    fields: Mapping[str, Any] = getattr(record, "fields", {})
    return {
        "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
        "level": record.levelname,
        "logger": record.name,
        **event,
        **({} if trace_id is None else {"trace_id": trace_id}),
        **fields,
    }


def _bounded(_: object, __: str, event: EventDict) -> EventDict:
    """Of a long traceback the end says what happened; the message of an exception may be of any length."""
    if len(event.get("exception", "")) > _MAX_EXCEPTION:
        event["exception"] = "…" + event["exception"][-_MAX_EXCEPTION:]
    return event


def configure_logging(level: str) -> None:
    """Send all log lines of the process to stderr as JSON; libraries only from warnings up."""
    handler = logging.StreamHandler()
    handler.setFormatter(json_formatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in ("hardlook", "uvicorn"):
        logging.getLogger(name).setLevel(level)
