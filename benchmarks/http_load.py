"""Load on a running service: raw HTTP/1.1 over asyncio, so that the caller takes little of the machine.

    python benchmarks/http_load.py PORT FOLDER --connections 32 --seconds 10      as many at a time as connections
    python benchmarks/http_load.py PORT FOLDER --rate 200 --seconds 60            as many a second, answered or not

Sends the files of a folder in turn to POST /classify and prints one JSON object: per status the count, and the
milliseconds to the answer (p50, p99, most); the answers a second; how many 503 had no Retry-After.
"""

import argparse
import asyncio
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEAD = b"POST /classify HTTP/1.1\r\nHost: load\r\nContent-Type: application/octet-stream\r\nContent-Length: %d\r\n\r\n"


class Tally:
    """Statuses and times of answers."""

    def __init__(self) -> None:
        self.times_ms: dict[int, list[float]] = defaultdict(list)
        self.without_retry_after = 0
        self.began_s = time.perf_counter()

    def add(self, status: int, head: bytes, seconds: float) -> None:
        """One answer."""
        self.times_ms[status].append(1000 * seconds)
        self.without_retry_after += status == 503 and b"\r\nretry-after: " not in head

    def summary(self) -> dict[str, Any]:
        """As printed."""
        elapsed_s = time.perf_counter() - self.began_s
        statuses = {}
        for status, times in sorted(self.times_ms.items()):
            ordered = sorted(times)
            statuses[str(status)] = {
                "count": len(ordered),
                "p50_ms": round(ordered[len(ordered) // 2], 1),
                "p99_ms": round(ordered[max(0, -(-99 * len(ordered) // 100) - 1)], 1),
                "most_ms": round(ordered[-1], 1),
            }
        good = len(self.times_ms.get(200, []))
        return {
            "seconds": round(elapsed_s, 2),
            "good_per_s": round(good / elapsed_s, 2),
            "statuses": statuses,
            "503_without_retry_after": self.without_retry_after,
        }


class Connection:
    """One connection, opened when it is needed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, data: bytes, tally: Tally) -> None:
        """Send one image; a connection that breaks counts as status 0.

        One that was idle may have been closed by the other side meanwhile; then there is a second try.
        """
        if not await self._try(data, tally, last=self._streams is None):
            await self._try(data, tally, last=True)

    async def _try(self, data: bytes, tally: Tally, last: bool) -> bool:
        began_s = time.perf_counter()
        try:
            if self._streams is None:
                self._streams = await asyncio.open_connection("127.0.0.1", self._port)
            reader, writer = self._streams
            writer.write(_HEAD % len(data) + data)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(int(head.partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0]))
        except (OSError, EOFError):
            self.close()
            if last:
                tally.add(0, b"", time.perf_counter() - began_s)
            return last
        tally.add(int(head[9:12]), head, time.perf_counter() - began_s)
        if b"\r\nconnection: close" in head:
            self.close()
        return True

    def close(self) -> None:
        """Forget the connection."""
        if self._streams is not None:
            self._streams[1].close()
        self._streams = None


async def closed_loop(port: int, files: Iterator[bytes], connections: int, seconds: float, requests: int) -> Tally:
    """Each connection sends the next image when the last is answered."""
    tally = Tally()
    until_s = time.perf_counter() + seconds
    left = itertools.count(requests, -1) if requests else itertools.repeat(1)

    async def caller() -> None:
        connection = Connection(port)
        while time.perf_counter() < until_s and next(left) > 0:
            await connection.send(next(files), tally)
        connection.close()

    await asyncio.gather(*(caller() for _ in range(connections)))
    return tally


async def open_loop(port: int, files: Iterator[bytes], rate: float, seconds: float) -> Tally:
    """Images are sent at a fixed rate, whether or not others are answered; idle connections are used again."""
    tally = Tally()
    idle: list[Connection] = []
    sent: set[asyncio.Task[None]] = set()

    async def one() -> None:
        connection = idle.pop() if idle else Connection(port)
        await connection.send(next(files), tally)
        idle.append(connection)

    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, tally.began_s + number / rate - time.perf_counter()))
        task = asyncio.create_task(one())
        sent.add(task)
        task.add_done_callback(sent.discard)
    await asyncio.gather(*sent)
    return tally


def main() -> None:
    """Send and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--requests", type=int, default=0, help="stop after so many; 0 for no bound")
    options = parser.parse_args()
    contents = [path.read_bytes() for path in sorted(options.folder.iterdir())]
    files = itertools.cycle(contents)
    if options.rate:
        tally = asyncio.run(open_loop(options.port, files, options.rate, options.seconds))
    else:
        tally = asyncio.run(closed_loop(options.port, files, options.connections, options.seconds, options.requests))
    print(json.dumps(tally.summary()))


if __name__ == "__main__":
    main()
