"""Sender: one signed message to one webhook. Owns the connection, its limits, and what an answer means.

Addresses are guarded as those of fetched images are (`service.fetch`), unless the operator allows private ones. Nothing
of the environment goes into a request, redirects are not followed, and of an answer only the head is read.
"""

import asyncio
import ssl
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Self

import httpcore

from service.errors import FetchError
from service.fetch import Guard, Resolve, SystemResolver
from service.webhook_file import Hook
from service.webhook_signing import ID_HEADER, SIGNATURE_HEADER, TIMESTAMP_HEADER, signature

TIMEOUT_S = 10.0
_CONNECT_SHARE = 0.4
_RESOLVING_THREADS = 4
_GONE = 410


class NotSent(Exception):
    """A message has not arrived; the reason holds nothing of the URL or of what the other side wrote.

    Attributes:
        reason: why.
        retry_after_s: what the receiver asks to wait at least; 0 where it says nothing.
        gone: whether the receiver says that it is not there any more.
    """

    def __init__(self, reason: str, retry_after_s: float = 0.0, gone: bool = False) -> None:
        self.reason, self.retry_after_s, self.gone = reason, retry_after_s, gone
        super().__init__(reason)


@dataclass(frozen=True)
class Message:
    """What is sent: its id, and its body as JSON."""

    id: str
    body: str


class Sender:
    """Sends messages; to be entered before use.

    Args:
        timeout_s: for one message, from looking up the name to the head of the answer.
        resolve: looks names up; by default the system does, in threads of its own.
        network: opens connections to addresses; by default to the network.
        tls: trusted authorities; by default the system's and certifi's.
    """

    def __init__(
        self,
        *,
        timeout_s: float = TIMEOUT_S,
        resolve: Resolve | None = None,
        network: httpcore.AsyncNetworkBackend | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._timeout_s, self._resolve, self._tls = timeout_s, resolve, tls
        self._network = network or httpcore.AnyIOBackend()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        if self._tls is None:
            self._tls = await asyncio.to_thread(httpcore.default_ssl_context)
        if self._resolve is None:
            system = SystemResolver(_RESOLVING_THREADS)
            self._stack.callback(system.close)
            self._resolve = system
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def send(self, hook: Hook, message: Message) -> None:
        """Send a message, and return once the receiver has taken it.

        Raises:
            NotSent: it has not.
        """
        try:
            async with asyncio.timeout(self._timeout_s) as timer:
                await self._post(hook, message)
        except TimeoutError as error:
            reason = f"no answer within {self._timeout_s:g} s" if timer.expired() else "its host is too slow"
            raise NotSent(reason) from error
        except FetchError as error:
            raise NotSent(str(error)) from error
        except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError, OSError) as error:
            raise NotSent(f"no answer: {type(error).__name__}") from error

    async def _post(self, hook: Hook, message: Message) -> None:
        if self._resolve is None:
            raise RuntimeError("a Sender must be entered before use")
        guard = Guard(self._resolve, self._network, self._timeout_s * _CONNECT_SHARE)
        origin = httpcore.Origin(hook.scheme.encode(), hook.host.encode(), hook.port)
        backend = self._network if hook.private else guard
        connection = httpcore.AsyncHTTPConnection(origin, self._tls, network_backend=backend)
        url = httpcore.URL(scheme=origin.scheme, host=origin.host, port=origin.port, target=hook.target.encode())
        body = message.body.encode()
        limits = {"connect": self._timeout_s * _CONNECT_SHARE, "read": self._timeout_s, "write": self._timeout_s}
        try:
            async with connection.stream(
                "POST", url, headers=_headers(hook, message.id, body), content=body, extensions={"timeout": limits}
            ) as response:
                _require_taken(response)
        finally:
            await connection.aclose()
            await guard.aclose()


def _headers(hook: Hook, id: str, body: bytes) -> list[tuple[str, str]]:
    at_s = int(time.time())
    return [
        ("Host", hook.authority),
        ("User-Agent", "hardlook"),
        ("Content-Type", "application/json"),
        ("Content-Length", str(len(body))),
        ("Connection", "close"),
        (ID_HEADER, id),
        (TIMESTAMP_HEADER, str(at_s)),
        (SIGNATURE_HEADER, " ".join(signature(key, id, at_s, body) for key in hook.keys)),
    ]


def _require_taken(response: httpcore.Response) -> None:
    if 200 <= response.status < 300:
        return
    values = [value for name, value in response.headers if name.lower() == b"retry-after"]
    wait_s = _seconds(values[0].decode("latin-1")) if values else 0.0
    raise NotSent(f"it answered with status {response.status}", wait_s, response.status == _GONE)


def _seconds(retry_after: str) -> float:
    """What a header Retry-After means: seconds, or a date; 0 where it is neither."""
    if retry_after.isascii() and retry_after.isdecimal() and len(retry_after) < 10:
        return float(retry_after)
    try:
        date = parsedate_to_datetime(retry_after)
        return max(0.0, (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
