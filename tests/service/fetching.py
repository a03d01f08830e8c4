"""Fetching through a network in memory, and what holds whatever is fetched."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Coroutine, Sequence
from ipaddress import ip_address
from typing import Any, TypeVar

from service.addresses import UrlRules, refuse_reason
from service.fetch import Fetcher, FetchRules
from tests.service.recording_network import Names, RecordingNetwork, Server, head

T = TypeVar("T")
LONG_S = 20.0
SHORT_S = 0.2
PUBLIC, PUBLIC_V6, OTHER = "93.184.215.14", "2606:4700::1111", "8.8.4.4"
IMAGE = bytes(range(256)) * 40
URL = "https://images.example.org/cat.jpg?sig=s3cr3t"
# The network in memory has no TLS; reading the trusted authorities for each test would take most of the time.
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
RULES = FetchRules(
    enabled=True, urls=UrlRules(http=True), timeout_s=LONG_S, max_bytes=20_000, at_a_time=2, max_waiting=1
)


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, LONG_S))


def names(*answers: Sequence[str]) -> Names:
    """images.example.org resolves as told, other.example.org to a public address too, evil.example.org to loopback."""
    return Names(
        {
            "images.example.org": answers or [[PUBLIC]],
            "other.example.org": [[OTHER]],
            "evil.example.org": [["127.0.0.1"]],
        }
    )


async def fetch_through(network: RecordingNetwork, url: str, rules: FetchRules, resolver: Names) -> bytes:
    """Fetch, and whatever comes of it: nothing but public addresses was tried, and every connection is closed."""
    try:
        async with Fetcher(rules, resolve=resolver, network=network, tls=NO_TLS) as fetcher:
            return await fetcher.fetch(url)
    finally:
        assert [host for host, _ in network.attempts if refuse_reason(ip_address(host))] == []
        assert {port for _, port in network.attempts} <= {80, 443}
        assert all(stream.closed for stream in network.streams)


def fetch(server: Server, url: str = URL, rules: FetchRules = RULES, resolver: Names | None = None) -> bytes:
    """Fetch from a server that is behind every public address, and behind loopback too."""
    servers = dict.fromkeys((PUBLIC, PUBLIC_V6, OTHER, "127.0.0.1", "::1", "169.254.169.254"), server)
    return run(fetch_through(RecordingNetwork(servers), url, rules, resolver or names()))


async def endless(request: str) -> AsyncIterator[bytes]:
    yield head()
    while True:
        yield bytes(4096)


async def dripping(request: str) -> AsyncIterator[bytes]:
    yield head("200 OK", "Content-Length: 10000")
    while True:
        await asyncio.sleep(SHORT_S / 20)
        yield b"x"
