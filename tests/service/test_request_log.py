"""Ids, log lines and the last resort around every request."""

import asyncio
import json
import logging
import sys
from typing import Any

import pytest
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.request_log import JsonFormatter, RequestLog, configure_logging


def call(app: ASGIApp, headers: list[tuple[bytes, bytes]] | None = None, path: str = "/x") -> list[Message]:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Scope = {"type": "http", "method": "GET", "path": path, "headers": headers or []}
    asyncio.run(_run(RequestLog(app), scope, receive, send))
    return sent


async def _run(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)


def raising(error: Exception, started: bool = False) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if started:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise error

    return app


def line_of(caplog: pytest.LogCaptureFixture) -> dict[str, Any]:
    [record] = [r for r in caplog.records if r.getMessage() == "request"]
    return dict(json.loads(JsonFormatter().format(record)))


def test_one_json_line_a_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    sent = call(PlainTextResponse("ok", 201), [(b"x-request-id", b"abc")], path='/a"\n{')
    line = line_of(caplog)
    assert (line["request_id"], line["method"], line["path"], line["status"]) == ("abc", "GET", '/a"\n{', 201)
    assert line["duration_ms"] >= 0
    assert line["level"] == "INFO"
    assert (b"x-request-id", b"abc") in sent[0]["headers"]
    assert "\n" not in JsonFormatter().format(caplog.records[0])


def test_who_hangs_up_is_logged_and_not_answered(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert call(raising(ClientDisconnect())) == []
    assert line_of(caplog)["status"] == 499


def test_a_bug_is_answered_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    start, body = call(raising(ValueError("secret")))
    assert start["status"] == 500
    assert b"secret" not in body["body"]
    assert line_of(caplog)["status"] == 500
    with pytest.raises(ValueError, match="secret"):
        call(raising(ValueError("secret"), started=True))


def test_what_is_not_http_passes() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    async def nothing(*_: object) -> Any:
        raise AssertionError("not called")

    asyncio.run(_run(RequestLog(app), {"type": "lifespan"}, nothing, nothing))
    assert seen == ["lifespan"]


def test_lines_of_a_log_call_with_an_exception() -> None:
    try:
        raise RuntimeError("inside")
    except RuntimeError:
        record = logging.LogRecord("n", logging.ERROR, "f", 1, "an %s", ("event",), sys.exc_info())
    line = json.loads(JsonFormatter().format(record))
    assert line["event"] == "an event"
    assert "RuntimeError: inside" in line["exception"]


@pytest.fixture
def root_logger() -> Any:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield root
    root.handlers, root.level = handlers, level
    for name in ("hardlook", "uvicorn"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def test_the_process_logs_json_and_libraries_only_warnings(
    root_logger: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure_logging("INFO")
    logging.getLogger("hardlook.x").info("told")
    logging.getLogger("somebody").info("not told")
    logging.getLogger("somebody").warning("warned")
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == ["told", "warned"]
