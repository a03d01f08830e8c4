"""Services on a free port of loopback: the real command in a process of its own, or the application in a thread."""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from service.app import create_app
from service.startup import load
from service.testing import decode_processes, toy_settings
from tests.journeys.toy_server import Slow

ROOT = Path(__file__).parents[2]


@dataclass
class Server:
    """A running service: the process that it runs in, and an HTTP client of it."""

    pid: int
    client: httpx.Client
    process: "subprocess.Popen[str] | None" = None
    others: frozenset[int] = frozenset()

    def processes(self) -> list[int]:
        """Process ids of the service and its decoding workers, without those that were there before it."""
        return [self.pid, *sorted(decode_processes(self.pid) - self.others)]

    def resident_bytes(self) -> int:
        """Of all its processes."""
        total = 0
        for pid in self.processes():
            try:
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
            except OSError:
                continue
        return total

    def classify(self, data: bytes, **parameters: Any) -> httpx.Response:
        """POST /classify with a raw body."""
        headers = {"content-type": "application/octet-stream"}
        return self.client.post("/classify", content=data, headers=headers, params=parameters)

    def connect(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection((self.client.base_url.host, self.client.base_url.port), timeout=10)


@contextmanager
def running(
    pools: Path,
    log_folder: Path,
    batch_s: float = 0.0,
    load_s: float = 0.0,
    *,
    wait: bool = True,
    command: Sequence[str] | None = None,
    **settings: Any,
) -> Iterator[Server]:
    """hardlook-serve over ToyEncoder, in a process of its own, killed at the end.

    Args:
        pools: published.
        log_folder: where its log goes, as server.log.
        batch_s: that every batch takes.
        load_s: that loading takes.
        wait: until it has started.
        command: what to run in its place, as arguments of Python.
        settings: besides those of a test.
    """
    environment = {name: value for name, value in os.environ.items() if not name.upper().startswith("HARDLOOK_")}
    environment |= {"HARDLOOK_POOLS": str(pools), "HARDLOOK_PORT": "0", "HARDLOOK_POOLS_RELOAD_S": "0.1"}
    environment |= {f"HARDLOOK_{name.upper()}": str(value) for name, value in settings.items()}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    toy = ("-m", "tests.journeys.toy_server", str(batch_s), str(load_s))
    log = log_folder / "server.log"
    with log.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, *(command or toy)], stderr=sink, env=environment, text=True, cwd=log_folder
        )
    client = httpx.Client(timeout=60, trust_env=False)
    try:
        client.base_url = httpx.URL(_address(process, log))
        while wait and client.get("/startupz").status_code != 200:
            assert process.poll() is None, log.read_text()
            time.sleep(0.02)
        yield Server(process.pid, client, process)
    finally:
        client.close()
        process.send_signal(signal.SIGKILL)
        process.wait()


def _address(process: "subprocess.Popen[str]", log: Path) -> str:
    """Wait for the line in which uvicorn says where it listens."""
    while process.poll() is None:
        for line in log.read_text().splitlines():
            try:
                event = str(json.loads(line)["event"])
            except ValueError:  # not written to its end yet
                continue
            if found := re.search(r"running on (http://\S+)", event):
                return found[1]
        time.sleep(0.05)
    raise AssertionError(f"the service ended with {process.returncode}: {log.read_text()}")


@contextmanager
def running_here(pools: Path, batch_s: float = 0.0, **changes: Any) -> Iterator[Server]:
    """The application in a thread of this process, over a real socket."""
    others = decode_processes(os.getpid())
    settings = toy_settings(pools, **changes)
    app = create_app(settings, load(settings, Slow(batch_s)))
    listener = socket.create_server(("127.0.0.1", 0))
    # Not uvloop: beside asyncio's loops in one process it may never learn that a decoding process has ended.
    server = uvicorn.Server(
        uvicorn.Config(app, loop="asyncio", log_config=None, access_log=False, timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    host, port = listener.getsockname()
    with httpx.Client(base_url=f"http://{host}:{port}", timeout=60, trust_env=False) as client:
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield Server(os.getpid(), client, others=others)
        finally:
            server.should_exit = True
            thread.join()
            listener.close()
