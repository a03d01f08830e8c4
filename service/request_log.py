"""What surrounds every request: its id, its log line, and the last resort for bugs.

Log lines are JSON objects, one a line, and never hold anything of an image or a prompt.
"""

import json
import logging
import re
import time
from datetime import UTC, datetime
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.problems import MEDIA_TYPE, problem

REQUEST_ID_HEADER = "X-Request-ID"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_CLIENT_GONE = 499  # as nginx logs it; never sent
_log = logging.getLogger("hardlook.requests")


class RequestLog:
    """ASGI middleware: gives a request its id, logs its end, and turns a bug into a problem."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _accepted(Headers(scope=scope).get(REQUEST_ID_HEADER)) or uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started_s = time.perf_counter()
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = _CLIENT_GONE
        except Exception as error:
            _log.exception("a bug", extra={"fields": {"request_id": request_id}})
            if status is not None:  # half an answer is out: only the server can end it
                raise
            body = problem(error, request_id)
            response = JSONResponse(body, status_code=body["status"], media_type=MEDIA_TYPE)
            await response(scope, receive, send_with_id)
        finally:
            fields = {
                "request_id": request_id,
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "duration_ms": round(1000 * (time.perf_counter() - started_s), 1),
            }
            _log.info("request", extra={"fields": fields})


def _accepted(request_id: str | None) -> str | None:
    return request_id if request_id and _REQUEST_ID.fullmatch(request_id) else None


class JsonFormatter(logging.Formatter):
    """One JSON object a line; what a log call passes as `extra={"fields": {...}}` becomes members."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging(level: str) -> None:
    """Send all log lines of the process to stderr as JSON; libraries only from warnings up."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("hardlook", "uvicorn"):
        logging.getLogger(name).setLevel(level)
