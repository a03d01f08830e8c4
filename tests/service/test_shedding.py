"""What will be refused is refused before anything is done for it."""

import asyncio
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from perception.testing import ToyEncoder
from service.app import create_app
from service.startup import load
from service.testing import publish, toy_pools, toy_settings


class Conversation:
    """One request over bare ASGI, whose body nobody may ask for."""

    def __init__(self, path: str, method: str = "POST") -> None:
        self.scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"image/png"), (b"x-request-id", b"the-id")],
            "client": ("127.0.0.1", 1),
            "server": ("test", 80),
            "scheme": "http",
            "root_path": "",
        }
        self.asked = False
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""

    async def receive(self) -> dict[str, Any]:
        self.asked = True
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.body += message.get("body", b"")


@pytest.mark.parametrize(
    ("path", "method", "shed"),
    [("/classify", "POST", True), ("/similar", "POST", True), ("/pools", "GET", False), ("/classify", "GET", False),
     ("/livez", "GET", False)],
)  # fmt: skip
def test_a_full_service_refuses_without_reading(tmp_path: Path, path: str, method: str, shed: bool) -> None:
    encoder = ToyEncoder()
    publish(tmp_path, encoder, toy_pools())
    settings = toy_settings(tmp_path, max_requests=2, anonymous_scopes=())
    app = create_app(settings, load(settings, encoder))

    async def work() -> Conversation:
        conversation = Conversation(path, method)
        async with app.router.lifespan_context(app):
            with ExitStack() as stack:
                for _ in range(2):
                    stack.enter_context(app.state.runtime.admission.enter())
                await app(conversation.scope, conversation.receive, conversation.send)
        return conversation

    found = asyncio.run(work())
    counted = app.state.metrics.render()[0].decode()
    assert (f'hardlook_requests_total{{method="{method}",route="{path}",status="503"}} 1.0' in counted) is shed
    assert (found.status == 503) is shed
    assert found.headers["x-request-id"] == "the-id"
    assert found.headers["x-content-type-options"] == "nosniff"
    if shed:
        assert not found.asked
        assert found.headers["retry-after"] == "1"
        assert b"urn:hardlook:problem:overloaded" in found.body
