"""What fetching does: requests, redirects, how many at a time, giving up, settings, and TLS over loopback."""

import asyncio
import logging
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from perception.errors import ImageTooLarge
from service.addresses import UrlRules
from service.errors import FetchFailed, FetchTimeout, Overloaded, SettingsError
from service.fetch import Fetcher, FetchRules, SystemResolver, rules_of
from service.settings import Settings
from tests.service.fetching import (
    IMAGE,
    NO_TLS,
    OTHER,
    PUBLIC,
    PUBLIC_V6,
    RULES,
    SHORT_S,
    URL,
    dripping,
    endless,
    fetch,
    fetch_through,
    names,
    run,
)
from tests.service.recording_network import (
    RecordingNetwork,
    Rerouted,
    Server,
    file_of,
    head,
    loopback,
    sends,
    silent,
)

T = TypeVar("T")


# --- what is fetched -------------------------------------------------------------------------------------------------


def test_a_file_arrives_as_it_was_sent() -> None:
    assert fetch(file_of(IMAGE)) == IMAGE


def test_a_file_in_chunks_or_without_a_length_arrives_too() -> None:
    chunks = [b"%x\r\n%b\r\n" % (len(part), part) for part in (IMAGE[:1000], IMAGE[1000:])]
    assert fetch(sends(head("200 OK", "Transfer-Encoding: chunked"), *chunks, b"0\r\n\r\n")) == IMAGE
    assert fetch(sends(head("200 OK"), IMAGE[:7], IMAGE[7:])) == IMAGE


def test_exactly_the_limit_is_allowed() -> None:
    assert fetch(file_of(IMAGE), rules=replace(RULES, max_bytes=len(IMAGE))) == IMAGE


def test_the_request_says_no_more_than_it_must(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the environment nor an earlier answer adds a proxy, credentials or cookies."""
    (tmp_path / ".netrc").write_text("machine images.example.org login somebody password s3cr3t")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:3128")
    cookie = head("302 Found", "Location: /b", "Set-Cookie: session=1", "Content-Length: 0")
    answers = [cookie, head("200 OK", "Content-Length: 1")]

    async def serve(request: str) -> AsyncIterator[bytes]:
        yield answers.pop(0)
        yield b"x" if not answers else b""

    network = RecordingNetwork({PUBLIC: serve})
    assert run(fetch_through(network, URL, RULES, names())) == b"x"
    assert network.attempts == [(PUBLIC, 443), (PUBLIC, 443)]
    first, second = (stream.request.decode() for stream in network.streams)
    assert first == (
        "GET /cat.jpg?sig=s3cr3t HTTP/1.1\r\nHost: images.example.org\r\nUser-Agent: hardlook\r\n"
        "Accept: image/*, */*;q=0.8\r\nAccept-Encoding: identity\r\nConnection: close\r\n\r\n"
    )
    assert second == first.replace("/cat.jpg?sig=s3cr3t", "/b")


def test_the_connection_goes_to_the_address_and_tls_to_the_name() -> None:
    network = RecordingNetwork({PUBLIC: file_of(IMAGE)})
    resolver = names()
    run(fetch_through(network, "https://Images.Example.org./a", RULES, resolver))
    assert network.attempts == [(PUBLIC, 443)]
    assert network.streams[0].server_name == "images.example.org"
    assert resolver.asked == ["images.example.org"]


@pytest.mark.parametrize("host", [PUBLIC, f"[{PUBLIC_V6}]"])
def test_an_address_in_a_url_is_not_looked_up(host: str) -> None:
    network, resolver = RecordingNetwork({PUBLIC: file_of(IMAGE), PUBLIC_V6: file_of(IMAGE)}), names()
    assert run(fetch_through(network, f"https://{host}/a", RULES, resolver)) == IMAGE
    assert resolver.asked == []
    assert network.streams[0].server_name == host.strip("[]")
    assert f"\r\nHost: {host}\r\n" in network.streams[0].request.decode()


@pytest.mark.parametrize("answers", [[PUBLIC_V6, PUBLIC_V6[:-1] + "2", PUBLIC], [PUBLIC, PUBLIC_V6]])
def test_where_one_family_does_not_answer_the_other_is_tried(answers: list[str]) -> None:
    network = RecordingNetwork({PUBLIC: file_of(IMAGE)})
    assert run(fetch_through(network, URL, RULES, names(answers))) == IMAGE
    assert network.attempts == [(address, 443) for address in (answers[0], PUBLIC)][answers[0] == PUBLIC :]


def test_redirects_are_followed_on_new_connections() -> None:
    places = {"/a": "https://other.example.org/b", "/b": "//images.example.org/c", "/c": "d?x=1"}

    async def serve(request: str) -> AsyncIterator[bytes]:
        path = request.split()[1]
        yield head("307 Temporary Redirect", f"Location: {places[path]}") if path in places else head()
        yield IMAGE

    network, resolver = RecordingNetwork({PUBLIC: serve, OTHER: serve}), names()
    assert run(fetch_through(network, "http://images.example.org/a", RULES, resolver)) == IMAGE
    assert network.attempts == [(PUBLIC, 80), (OTHER, 443), (PUBLIC, 443), (PUBLIC, 443)]
    assert resolver.asked == ["images.example.org", "other.example.org", "images.example.org", "images.example.org"]
    assert network.streams[-1].request.startswith(b"GET /d?x=1 ")


# --- how many, and who gives up --------------------------------------------------------------------------------------


async def until(condition: Callable[[], bool]) -> None:
    """Tasks that are ready run in turn, so what they wait for comes true after a few of these."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("the condition did not come true")


def test_a_bounded_number_is_fetched_and_waits() -> None:
    async def work() -> None:
        gate = asyncio.Event()

        async def gated(request: str) -> AsyncIterator[bytes]:
            await gate.wait()
            yield head("200 OK", "Content-Length: 1") + b"x"

        network = RecordingNetwork({PUBLIC: gated})
        async with Fetcher(RULES, resolve=names(), network=network, tls=NO_TLS) as fetcher:
            fetches = [asyncio.create_task(fetcher.fetch(URL)) for _ in range(3)]
            await until(lambda: len(network.streams) == 2)
            with pytest.raises(Overloaded) as caught:
                await fetcher.fetch(URL)
            assert (caught.value.queue, caught.value.limit) == ("fetches", 3)
            assert len(network.streams) == 2
            gate.set()
            assert await asyncio.gather(*fetches) == [b"x"] * 3
            assert await fetcher.fetch(URL) == b"x"  # every place is free again

    run(work())


def test_who_waits_too_long_for_a_place_is_told_that_we_are_busy() -> None:
    async def work() -> None:
        network = RecordingNetwork({PUBLIC: silent})
        ours = replace(RULES, timeout_s=SHORT_S, at_a_time=1)
        async with Fetcher(ours, resolve=names(), network=network, tls=NO_TLS) as fetcher:
            fetcher_places = fetcher._places
            await fetcher_places.acquire()
            with pytest.raises(Overloaded):
                await fetcher.fetch(URL)
            assert network.attempts == []

    run(work())


@pytest.mark.parametrize("stage", ["handshake", "answer", "body"])
def test_giving_up_closes_the_connection(stage: str) -> None:
    async def half(request: str) -> AsyncIterator[bytes]:
        if stage == "body":
            yield head("200 OK", "Content-Length: 100") + b"x"
        reached.set()
        await asyncio.Event().wait()

    async def work() -> None:
        network = RecordingNetwork({PUBLIC: half}, hold_tls=asyncio.Event() if stage == "handshake" else None)
        async with Fetcher(RULES, resolve=names(), network=network, tls=NO_TLS) as fetcher:
            task = asyncio.create_task(fetcher.fetch(URL))
            await (network.connected if stage == "handshake" else reached).wait()
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert [stream.closed for stream in network.streams] == [True]
            assert fetcher._held == 0

    reached = asyncio.Event()
    run(work())


def test_lookups_have_threads_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are absolute, so that no search domain answers; an address comes once, in the system's order."""
    asked: list[tuple[str, int, str]] = []

    def getaddrinfo(host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        asked.append((host, port, threading.current_thread().name))
        found = [(PUBLIC_V6, port, 0, 0), (PUBLIC, port), (PUBLIC, port)]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in found]

    async def work() -> list[str]:
        resolver = SystemResolver(1)
        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        try:
            return await resolver("images.example.org", 443)
        finally:
            monkeypatch.undo()
            resolver.close()

    assert run(work()) == [PUBLIC_V6, PUBLIC]
    assert [(host, port) for host, port, _ in asked] == [("images.example.org.", 443)]
    assert asked[0][2].startswith("resolve")


# --- settings, secrets, and the real thing ---------------------------------------------------------------------------


def test_rules_come_from_the_settings() -> None:
    settings = Settings(fetch=True, fetch_http=True, fetch_hosts=("CDN.example.org",), fetch_timeout_s=1.5,
                        fetch_max_redirects=0, max_image_bytes=7)  # fmt: skip
    assert rules_of(settings) == FetchRules(
        enabled=True, urls=UrlRules(True, ("cdn.example.org",)), timeout_s=1.5, max_redirects=0, max_bytes=7
    )
    with pytest.raises(SettingsError, match=r"HARDLOOK_FETCH_HOSTS: '\*\.example\.org'"):
        rules_of(Settings(fetch_hosts=("*.example.org",)))


def over_loopback(
    server: Server,
    work: Callable[[Fetcher], Awaitable[T]],
    ours: FetchRules = RULES,
    trusted: bool = True,
) -> tuple[T, list[str]]:
    """Work with a fetcher whose public address is a TLS server on loopback; also the requests that arrived there."""

    async def all_of_it() -> tuple[T, list[str]]:
        async with loopback(server) as there:
            network, tls = Rerouted(PUBLIC, there.port), there.tls if trusted else None
            async with Fetcher(ours, resolve=names(), network=network, tls=tls) as fetcher:
                try:
                    return await work(fetcher), there.requests
                finally:
                    if there.requests:  # TLS came about, so the server is to see the connection close
                        await there.gone.wait()

    return run(all_of_it())


def test_over_tls_on_loopback(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    body, requests = over_loopback(file_of(IMAGE), lambda fetcher: fetcher.fetch(URL))
    assert body == IMAGE
    assert [request.split("\r\n")[:2] for request in requests] == [
        ["GET /cat.jpg?sig=s3cr3t HTTP/1.1", "Host: images.example.org"]
    ]
    assert "s3cr3t" not in caplog.text


def test_a_certificate_must_be_of_the_name_and_trusted() -> None:
    async def by_address(fetcher: Fetcher) -> bytes:
        return await fetcher.fetch(f"https://{PUBLIC}/")

    with pytest.raises(FetchFailed, match="certificate is not valid for its host"):
        over_loopback(file_of(IMAGE), by_address)
    with pytest.raises(FetchFailed, match="certificate is not valid for its host"):
        over_loopback(file_of(IMAGE), lambda fetcher: fetcher.fetch(URL), trusted=False)


@pytest.mark.parametrize("server", [silent, dripping, endless])
def test_a_real_connection_is_closed_in_time(server: Server) -> None:
    with pytest.raises((FetchTimeout, ImageTooLarge)):
        over_loopback(server, lambda fetcher: fetcher.fetch(URL), replace(RULES, timeout_s=5 * SHORT_S))
