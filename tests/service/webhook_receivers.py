"""A receiver of webhooks: a real HTTP server on loopback that answers as told and notes what it gets."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from service.webhook_file import Hook

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
# What to answer to the n-th request, from 0: a status and further header lines; None for silence.
Answers = Callable[[int], tuple[str, ...] | None]


@dataclass(frozen=True)
class Received:
    """One request."""

    line: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    """Where it listens, and what it got."""

    url: str = ""
    requests: list[Received] = field(default_factory=list)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def has(self, n: int) -> None:
        """Wait until n requests have arrived."""
        async with self.changed:
            await self.changed.wait_for(lambda: len(self.requests) >= n)


def always(*lines: str) -> Answers:
    """The same answer to every request."""
    return lambda n: lines


@asynccontextmanager
async def receiving(answers: Answers) -> AsyncIterator[Receiver]:
    """Serve on a free port of loopback."""
    receiver = Receiver()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("ascii")
            line, *rest = head.strip().split("\r\n")
            headers = {name.lower(): value for name, _, value in (each.partition(": ") for each in rest)}
            body = await reader.readexactly(int(headers["content-length"]))
            said = answers(len(receiver.requests))
            async with receiver.changed:
                receiver.requests.append(Received(line, headers, body))
                receiver.changed.notify_all()
            if said is None:
                await reader.read()
            else:
                writer.write("\r\n".join((f"HTTP/1.1 {said[0]}", *said[1:], "Content-Length: 0", "", "")).encode())
                await writer.drain()
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    receiver.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook?t=1"
    async with server:
        yield receiver


def hook(url: str = "http://127.0.0.1:9/", name: str = "a", **changes: Any) -> Hook:
    """A hook that wants to know of jobs."""
    return Hook(**{"name": name, "url": url, "secret": SECRET, "events": ["job.done"], **changes})
