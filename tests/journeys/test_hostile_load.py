"""Hostile, mutated and good files, sixteen at a time: typed answers, right ones for the good, steady memory."""

import base64
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from perception.testing import ToyEncoder, encoded, synthetic_image
from service.testing import publish, toy_pools
from tests.journeys.servers import Server, running
from tests.journeys.test_hostile_files import ARCHIVE, DATA, bombs, corpus

MIB = 1024 * 1024
AT_A_TIME = 16
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")


@dataclass(frozen=True)
class Sent:
    """One file; `nearest` is the exemplar that a good one must find, None for a file that may be refused."""

    name: str
    data: bytes
    nearest: str | None = None


def good() -> list[Sent]:
    """The exemplars of the pools themselves, without loss."""
    images = [(f"{pool}-{i}", image) for pool, group in toy_pools().items() for i, image in enumerate(group)]
    return [Sent(f"{id}.{kind}", encoded(image, kind), id) for id, image in images for kind in ("PNG", "BMP", "TIFF")]


def flipped(data: bytes, hand: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(hand.randint(1, 20)):
        changed[hand.randrange(len(changed))] ^= 1 << hand.randrange(8)
    return bytes(changed)


def truncated(data: bytes, hand: random.Random) -> bytes:
    return data[: hand.randrange(1, len(data))]


def swapped(data: bytes, hand: random.Random) -> bytes:
    """Two stretches exchanged, as blocks that were written in the wrong order."""
    size = hand.randint(1, max(1, len(data) // 4))
    first, second = sorted(hand.randrange(len(data)) for _ in range(2))
    size = min(size, second - first, len(data) - second)
    middle = data[first + size : second]
    return data[:first] + data[second : second + size] + middle + data[first : first + size] + data[second + size :]


def mutated(hand: random.Random) -> Iterator[Sent]:
    images = [synthetic_image(seed, (90, 70)) for seed in range(5)]
    originals = [(kind, encoded(image, kind)) for image in images for kind in FORMATS]
    ways = (flipped, truncated, swapped)
    for number in itertools.count():
        kind, data = hand.choice(originals)
        way = ways[number % 3]
        yield Sent(f"{way.__name__} {kind} {number}", way(data, hand))


def mixture(count: int) -> Iterator[Sent]:
    """Half of it mutated, a quarter collected or made to break decoders, a quarter good; seeded."""
    hand = random.Random(0)
    hostile = [Sent(f"bomb {i}", data) for i, data in enumerate(bombs())]
    if (DATA / ARCHIVE).is_file():
        hostile += [Sent(name, data) for name, data in corpus()]
    hand.shuffle(hostile)
    endless_hostile, endless_good = itertools.cycle(hostile), itertools.cycle(good())
    others = mutated(hand)
    for number in range(count):
        yield next(endless_hostile if number % 4 == 0 else endless_good if number % 4 == 1 else others)


def post(client: httpx.Client, number: int, sent: Sent) -> httpx.Response:
    """In one of the three forms in turn."""
    if number % 3 == 0:
        return client.post("/classify", content=sent.data, headers={"content-type": "application/octet-stream"})
    if number % 3 == 1:
        return client.post("/classify", files={"image": ("image", sent.data)})
    body = {"images": [{"data": base64.b64encode(sent.data).decode()}]}
    return client.post("/classify", json=body)


def fault(sent: Sent, response: httpx.Response) -> str | None:
    """What is wrong with an answer."""
    body: dict[str, Any] = response.json()
    if response.status_code == 200:
        [result] = body["results"]
        if result["verdict"] not in ("safe", "unsafe", "review"):
            return "no verdict"
        if sent.nearest is not None and result["neighbors"][0]["id"] != sent.nearest:
            return f"nearest is {result['neighbors'][0]['id']}"
        return None
    if not 400 <= response.status_code < 500 or not body["type"].startswith("urn:hardlook:problem:"):
        return f"{response.status_code} {body}"
    return "a good one was refused" if sent.nearest is not None else None


def assert_steady(server: Server, count: int, early: int, growth_bytes: int) -> None:
    """Send a mixture, and compare memory after the first `early` requests with memory at the end."""
    lock, statuses, faults = threading.Lock(), Counter[int](), list[str]()
    numbered = enumerate(mixture(count))
    resident: list[int] = []

    def caller() -> None:
        with httpx.Client(base_url=server.client.base_url, timeout=60, trust_env=False) as client:
            while True:
                with lock:
                    number, sent = next(numbered, (0, None))
                    if number == early:
                        resident.append(server.resident_bytes())
                if sent is None:
                    return
                response = post(client, number, sent)
                found = fault(sent, response)
                with lock:
                    statuses[response.status_code] += 1
                    if found is not None:
                        faults.append(f"{sent.name}: {found}")

    with ThreadPoolExecutor(AT_A_TIME) as threads:
        for done in [threads.submit(caller) for _ in range(AT_A_TIME)]:
            done.result()
    assert faults == []
    assert statuses.total() == count
    assert statuses[200] >= count // 4
    time.sleep(2.5)  # a worker that is being replaced; memory that goes back when it is quiet
    resident.append(server.resident_bytes())
    print(f"{dict(statuses)}; MiB resident after {early}: {resident[0] / MIB:.0f}, at the end: {resident[1] / MIB:.0f}")
    assert resident[1] - resident[0] < growth_bytes


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    root = tmp_path / "published"
    publish(root, ToyEncoder(), toy_pools())
    with running(root, tmp_path) as server:
        yield server


@pytest.mark.slow
def test_a_short_mixture(server: Server) -> None:
    assert_steady(server, count=1500, early=500, growth_bytes=100 * MIB)


@pytest.mark.load
@pytest.mark.timeout(1800)
def test_ten_thousand_requests(server: Server) -> None:
    if not (DATA / ARCHIVE).is_file():
        pytest.skip(f"HARDLOOK_DATA has no {ARCHIVE}")
    assert_steady(server, count=10_000, early=1000, growth_bytes=100 * MIB)
