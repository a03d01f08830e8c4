"""The project's own client, on the API of this process, in the name of a caller who is known already."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from fastapi import Request
from starlette.types import Receive, Scope, Send

from service.client import AsyncHardlookClient
from service.keys import Caller
from service.runtime import VOUCHED_FOR, runtime_of

_BASE_URL = "http://console.invalid"  # never looked up: the transport calls the application
_GRACE_S = 5.0


@asynccontextmanager
async def client_of(request: Request, caller: Caller) -> AsyncIterator[AsyncHardlookClient]:
    """A client whose calls go through the whole application, limits, log and audit log included.

    Args:
        request: that the calls are made for.
        caller: in whose name.
    """
    app = request.app

    async def vouched_for(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, VOUCHED_FOR: caller}, receive, send)

    address = (request.client.host, request.client.port) if request.client else ("127.0.0.1", 0)
    settings = runtime_of(request).settings
    client = AsyncHardlookClient(
        _BASE_URL,
        timeout_s=settings.deadline_s + _GRACE_S,
        max_attempts=1,  # a person is waiting, and can see that the service is busy
        max_image_bytes=settings.max_image_bytes,
        transport=httpx.ASGITransport(vouched_for, client=address),
    )
    async with client:
        yield client
