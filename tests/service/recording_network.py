"""A network in memory: names that resolve as told, servers that speak HTTP/1.1, and a record of what was asked."""

# ruff: noqa: ASYNC109 - the signatures with `timeout` are those of httpcore's network backends

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpcore
import trustme

# A server: what it sends, given the request's head.
Server = Callable[[str], AsyncIterator[bytes]]


def head(status: str = "200 OK", *lines: str) -> bytes:
    """The head of an answer."""
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode("latin-1")


def sends(*parts: bytes) -> Server:
    """A server that sends these bytes to everybody and closes."""

    async def serve(request: str) -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    return serve


def file_of(body: bytes) -> Server:
    """A server that sends a file."""
    return sends(head("200 OK", f"Content-Length: {len(body)}"), body)


def redirects(location: str, status: str = "302 Found") -> Server:
    """A server that sends everybody elsewhere."""
    return sends(head(status, f"Location: {location}", "Content-Length: 0"))


async def silent(request: str) -> AsyncIterator[bytes]:
    """A server that never answers."""
    await asyncio.Event().wait()
    yield b""


@dataclass
class Names:
    """A resolver that answers as told: one name's answers in turn, the last one from then on."""

    answers: Mapping[str, Sequence[Sequence[str]]]
    asked: list[str] = field(default_factory=list)

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        if host not in self.answers:
            raise OSError("no such name")
        turn = self.asked.count(host) - 1
        return self.answers[host][min(turn, len(self.answers[host]) - 1)]


class Stream(httpcore.AsyncNetworkStream):
    """One connection; it notes the request, the name that TLS asked for, and whether it was closed."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._sending: AsyncIterator[bytes] | None = None
        self._left = b""
        self.request = b""
        self.server_name: str | None = None
        self.closed = False
        self.hold_tls: asyncio.Event | None = None

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        assert b"\r\n\r\n" in self.request
        if self._sending is None:
            self._sending = self._server(self.request.decode("ascii"))
        if not self._left:
            self._left = await anext(self._sending, b"")
        data, self._left = self._left[:max_bytes], self._left[max_bytes:]
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.request += buffer

    async def aclose(self) -> None:
        self.closed = True

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        if self.hold_tls is not None:
            await self.hold_tls.wait()
        self.server_name = server_hostname
        return self

    def get_extra_info(self, info: str) -> Any:
        return None


@dataclass
class RecordingNetwork(httpcore.AsyncNetworkBackend):
    """Connects to servers in memory, by address, and records every attempt."""

    servers: Mapping[str, Server] = field(default_factory=dict)
    attempts: list[tuple[str, int]] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)
    hold_tls: asyncio.Event | None = None
    connected: asyncio.Event = field(default_factory=asyncio.Event)

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        self.attempts.append((host, port))
        if host not in self.servers:
            raise httpcore.ConnectError("refused")
        stream = Stream(self.servers[host])
        stream.hold_tls = self.hold_tls
        self.streams.append(stream)
        self.connected.set()
        return stream

    async def connect_unix_socket(self, path: str, *_: Any, **__: Any) -> httpcore.AsyncNetworkStream:
        raise AssertionError(f"asked for the local socket {path}")

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("asked to try again")


class Rerouted(httpcore.AsyncNetworkBackend):
    """The real network, but one address that was found public is a port of this machine."""

    def __init__(self, address: str, port: int) -> None:
        self._address, self._port, self._real = address, port, httpcore.AnyIOBackend()

    async def connect_tcp(self, host: str, port: int, *arguments: Any, **named: Any) -> httpcore.AsyncNetworkStream:
        assert host == self._address
        return await self._real.connect_tcp("127.0.0.1", self._port, *arguments, **named)


@dataclass
class Loopback:
    """A server on loopback, over TLS as images.example.org."""

    port: int
    tls: ssl.SSLContext
    requests: list[str]
    gone: asyncio.Event


@asynccontextmanager
async def loopback(server: Server) -> AsyncIterator[Loopback]:
    """Serve over TLS on a free port of loopback, with a certificate that is made for the occasion."""
    authority = trustme.CA()
    theirs, ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("images.example.org").configure_cert(theirs)
    authority.configure_trust(ours)
    there = Loopback(0, ours, [], asyncio.Event())

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = (await reader.readuntil(b"\r\n\r\n")).decode("ascii")
            there.requests.append(request)
            sending = asyncio.create_task(_send(server(request), writer))
            await reader.read()  # until the other side closes
            sending.cancel()
        finally:
            there.gone.set()
            writer.close()

    listening = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=theirs)
    there.port = listening.sockets[0].getsockname()[1]
    async with listening:
        yield there


async def _send(parts: AsyncIterator[bytes], writer: asyncio.StreamWriter) -> None:
    async for part in parts:
        writer.write(part)
        await writer.drain()
    writer.write_eof() if writer.can_write_eof() else writer.close()
