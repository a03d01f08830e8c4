"""A server on loopback that answers with given bytes, cuts connections or keeps them waiting, and notes what came."""

import contextlib
import json
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from service.wire import (
    ClassifyAnswer,
    ClassifyItem,
    DecidingFrame,
    Image,
    Model,
    Policy,
    PoolsAnswer,
    Problem,
    SnapshotVersion,
)

CUT, HANG = b"CUT", b"HANG"
MODEL = Model(name="toy", fingerprint="f" * 8, precision="fp32")
POLICY = Policy(
    version="nearest-1", rule="nearest", k=1, min_similarity=-1, min_margin=0, min_margin_unsafe=0, name=None,
    sha256=None, audited_gallery=None,
)  # fmt: skip
SNAPSHOT = SnapshotVersion(collection="pools", version="1", created_at="2026-01-01T00:00:00+00:00")


@dataclass
class Received:
    """One request."""

    line: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Scripted:
    """What is answered: for each path replies in turn, the last one again and again.

    A reply is the bytes of a response, CUT to close the connection without one, or HANG to say nothing until the end.
    """

    replies: Mapping[str, Sequence[bytes]]
    url: str = ""
    received: list[Received] = field(default_factory=list)
    hanging: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    def of(self, path: str) -> list[Received]:
        """The requests to one path."""
        return [request for request in self.received if request.line.split()[1].partition("?")[0] == path]

    def serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError), connection.makefile("rb") as file:
            line = file.readline().decode().strip()
            if not line:
                return
            headers = {}
            while raw := file.readline().decode("latin-1").strip():
                name, _, value = raw.partition(":")
                headers[name.lower()] = value.strip()
            body = file.read(int(headers.get("content-length", 0)))
            self.received.append(Received(line, headers, body))
            path = line.split()[1].partition("?")[0]
            replies = self.replies[path]
            reply = replies[min(len(self.of(path)), len(replies)) - 1]
            if reply == HANG:
                self.hanging.set()
                self.ended.wait()
            elif reply != CUT:
                connection.sendall(reply)


@contextmanager
def scripted(**replies: Sequence[bytes]) -> Iterator[Scripted]:
    """Serve; the name of an argument is the path."""
    server = Scripted({f"/{path}": list(each) for path, each in replies.items()})
    listener = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=server.serve, args=(connection,))
            thread.start()
            threads.append(thread)

    accepting = threading.Thread(target=accept)
    accepting.start()
    server.url = "http://{}:{}".format(*listener.getsockname())
    try:
        yield server
    finally:
        server.ended.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for thread in (accepting, *threads):
            thread.join()


def response(status: int, body: bytes, media: str = "application/json", **headers: str) -> bytes:
    """The bytes of a response that ends its connection; underscores in names of headers are hyphens."""
    fields = {"content-type": media, "content-length": str(len(body)), "connection": "close"}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status} Whatever\r\n{head}\r\n".encode() + body


def problem(status: int, slug: str = "overloaded", *, body_status: int | None = None, **headers: str) -> bytes:
    """A problem as the service answers with it."""
    body = Problem(
        type=f"urn:hardlook:problem:{slug}", title="A title", status=body_status or status, detail="a detail",
        instance="urn:hardlook:request:r", request_id="r",
    )  # fmt: skip
    return response(status, body.model_dump_json().encode(), "application/problem+json", **headers)


def verdicts(*given: str) -> bytes:
    """A right answer of /classify with these verdicts."""
    return response(200, json.dumps(verdicts_body(*given)).encode())


def verdicts_body(*given: str) -> dict[str, Any]:
    results = [
        ClassifyItem.model_validate(
            {
                "id": str(i), "verdict": verdict, "pool": None, "margin": 0.5, "reason": "a reason",
                "frame": DecidingFrame(index=0, background=None, frames_examined=1),
                "image": Image(format="PNG", width_px=1, height_px=1, frames_in_file=1),
                "neighbors": [], "flip_rate_at_eps": None,
            }
        )
        for i, verdict in enumerate(given)
    ]  # fmt: skip
    answer = ClassifyAnswer(request_id="r", model=MODEL, snapshot=SNAPSHOT, policy=POLICY, results=list(results))
    return answer.model_dump(mode="json")


def pools() -> bytes:
    """A right answer of /pools."""
    answer = PoolsAnswer(request_id="r", model=MODEL, policy=POLICY, collections=[])
    return response(200, answer.model_dump_json().encode())
