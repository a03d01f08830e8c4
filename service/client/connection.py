"""How httpx is used: where calls go, with which key, and how much is read of what comes back."""

import os
import re
import ssl
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from uuid import uuid4

import httpx
from pydantic import SecretStr

from service.client.answers import PROBLEM, Reply
from service.client.calls import Call, Saved
from service.client.exchange import Failure, Send

_CONNECT_S = 10.0
_KEY = re.compile(r"[!-~]{1,200}")


@dataclass(frozen=True)
class Connection:
    """Where calls go.

    Attributes:
        base_url: of the service, such as 'https://hardlook.example.org'; routes are looked for below its path.
        api_key: None where the service wants none.
        trust_env: use the proxies and certificates that the environment names.
        ssl_context: for certificates of one's own; httpx's default where None.

    Raises:
        ValueError: not an address without credentials, or a key that no header can carry; never quotes either.
    """

    base_url: str
    api_key: SecretStr | None
    trust_env: bool
    ssl_context: ssl.SSLContext | None

    def __post_init__(self) -> None:
        try:
            url = httpx.URL(self.base_url)
        except httpx.InvalidURL as error:
            raise ValueError(f"base_url is not a URL: {error}") from error
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError("base_url must look like https://host or http://host:port")
        if url.userinfo or url.query or url.fragment:
            raise ValueError("base_url must have no credentials, query or fragment; a key is given as api_key")
        if self.api_key is not None and not _KEY.fullmatch(self.api_key.get_secret_value()):
            raise ValueError("api_key must be 1 to 200 visible ASCII characters")

    def arguments(self) -> dict[str, Any]:
        """For httpx.Client and httpx.AsyncClient alike."""
        return {
            "base_url": self.base_url,
            "auth": _Bearer(self.api_key) if self.api_key else None,
            "trust_env": self.trust_env,
            "verify": self.ssl_context or True,
            "follow_redirects": False,  # neither a key nor an image may go where nobody sent it
            "headers": {
                "Accept-Encoding": "identity",  # so that what is read is what was counted
                "User-Agent": "hardlook-client",
            },
        }


class _Bearer(httpx.Auth):
    """Puts the key into a request when it is sent, and nowhere before."""

    def __init__(self, key: SecretStr) -> None:
        self._key = key

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """See httpx."""
        request.headers["Authorization"] = f"Bearer {self._key.get_secret_value()}"
        yield request


def request_arguments(call: Call[Any], step: Send) -> dict[str, Any]:
    """For `stream` of both clients."""
    headers = {"X-Request-ID": step.request_id, "Accept": f"{call.media_type}, {PROBLEM}"}
    if call.content_type is not None:
        headers["Content-Type"] = call.content_type
    remaining_s = max(step.timeout_s, 0.001)
    return {
        "method": call.method,
        "url": call.path,
        "params": dict(call.params),
        "content": call.content,
        "files": call.files,
        "headers": headers,
        "timeout": httpx.Timeout(remaining_s, connect=min(remaining_s, _CONNECT_S)),
    }


class Body(Protocol):
    """The body of one reply as it comes in."""

    def add(self, chunk: bytes) -> bool:
        """Take a piece; False where no more is wanted."""
        ...

    def reply(self, response: httpx.Response) -> Reply:
        """The reply, with what was taken."""
        ...


@contextmanager
def receiving(call: Call[Any], response: httpx.Response, max_bytes: int, until_s: float) -> Iterator[Body]:
    """What takes the body of a reply: memory, or a file where the call asks for one and this is it.

    Args:
        call: that is answered.
        response: its head.
        max_bytes: that are kept in memory.
        until_s: when the whole of it must be there, by the monotonic clock; a file may take longer, as long as it
            keeps coming.

    Raises:
        OSError: the file cannot be written; there is none then.
    """
    media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    encoded = response.headers.get("content-encoding", "identity") != "identity"
    if call.to is None or response.status_code != call.status or media_type != call.media_type or encoded:
        yield _MemoryBody(max_bytes, until_s)
        return
    part = call.to.with_name(f".{call.to.name}.{uuid4().hex[:8]}.part")
    try:
        with part.open("xb") as file:
            yield _FileBody(file, part, call.to)
    finally:
        part.unlink(missing_ok=True)


class _MemoryBody:
    """Up to a limit of bytes and time."""

    def __init__(self, max_bytes: int, until_s: float) -> None:
        self._max_bytes, self._until_s = max_bytes, until_s
        self._chunks: list[bytes] = []
        self._size_bytes = 0

    def add(self, chunk: bytes) -> bool:
        """Take a piece; False where no more is wanted.

        Raises:
            httpx.ReadTimeout: the time is over.
        """
        if time.monotonic() > self._until_s:
            raise httpx.ReadTimeout("the answer did not end in time")
        self._size_bytes += len(chunk)
        self._chunks.append(chunk)
        return self._size_bytes <= self._max_bytes

    def reply(self, response: httpx.Response) -> Reply:
        """With what was taken."""
        body = b"".join(self._chunks) if self._size_bytes <= self._max_bytes else None
        return Reply(response.status_code, dict(response.headers), body, time.time())


class _FileBody:
    """In a file beside the one to be, which is there when it is whole, and never in place of another."""

    def __init__(self, file: BinaryIO, part: Path, to: Path) -> None:
        self._file, self._part, self._to = file, part, to

    def add(self, chunk: bytes) -> bool:
        """Write a piece."""
        self._file.write(chunk)
        return True

    def reply(self, response: httpx.Response) -> Reply:
        """The reply, with the whole file in its place."""
        self._file.flush()
        os.fsync(self._file.fileno())
        size_bytes = self._file.tell()
        os.link(self._part, self._to)
        saved = Saved(path=self._to, size_bytes=size_bytes)
        return Reply(response.status_code, dict(response.headers), None, time.time(), saved)


def failure(error: httpx.TransportError) -> Failure:
    """Why there is no reply. Certificates and configurations do not get better by trying again."""
    causes = list(_causes(error))
    lasting = (httpx.UnsupportedProtocol, httpx.LocalProtocolError, httpx.ProxyError, ssl.SSLCertVerificationError)
    in_vain = any(isinstance(cause, lasting) for cause in causes)
    # The system's own words say most: of asynchronous connections httpx says only that all attempts failed.
    said = next((str(cause) for cause in reversed(causes) if isinstance(cause, OSError)), str(error))
    kind = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).lower()
    unsent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
    return Failure(f"{kind}: {said}".rstrip(": "), retried=not in_vain, sent=not unsent)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
