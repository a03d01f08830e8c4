"""What is not fetched: no connection is tried to an address that is not public, and bad servers are typed errors."""

import asyncio
import gzip
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import pytest

from perception.errors import ImageTooLarge
from service.errors import FetchDisabled, FetchFailed, FetchTimeout, UrlRefused
from service.fetch import Fetcher, Guard, rules_of
from service.settings import Settings
from tests.service.fetching import (
    IMAGE,
    LONG_S,
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
    Names,
    RecordingNetwork,
    Server,
    file_of,
    head,
    redirects,
    sends,
    silent,
)
from tests.service.refused_urls import REFUSED_ADDRESSES, REFUSED_URLS

# --- what is not -----------------------------------------------------------------------------------------------------


def test_nothing_is_fetched_unless_it_is_turned_on() -> None:
    with pytest.raises(FetchDisabled):
        fetch(file_of(IMAGE), rules=rules_of(Settings()))


@pytest.mark.parametrize("url", REFUSED_URLS)
def test_refused_urls_are_neither_looked_up_nor_connected_to(url: str) -> None:
    network, resolver = RecordingNetwork({"127.0.0.1": file_of(IMAGE), "::1": file_of(IMAGE)}), names()
    with pytest.raises(UrlRefused):
        run(fetch_through(network, url, RULES, resolver))
    assert (network.attempts, resolver.asked) == ([], [])


@pytest.mark.parametrize("address", REFUSED_ADDRESSES)
@pytest.mark.parametrize("beside", [[], [PUBLIC], [PUBLIC_V6]])
def test_a_name_with_an_address_that_is_not_public_is_not_connected_to(address: str, beside: list[str]) -> None:
    for answers in ([address, *beside], [*beside, address]):
        network = RecordingNetwork({address: file_of(IMAGE), PUBLIC: file_of(IMAGE), PUBLIC_V6: file_of(IMAGE)})
        with pytest.raises(UrlRefused, match="has an address that is not public") as caught:
            run(fetch_through(network, URL, RULES, names(answers)))
        assert network.attempts == []
        assert address not in str(caught.value)  # nor does a caller learn it


def test_a_name_that_changes_its_meaning_is_looked_up_once_a_connection() -> None:
    """DNS rebinding: the address that was checked is the one that is connected to, and each redirect is a new check."""
    network = RecordingNetwork({PUBLIC: file_of(IMAGE), "127.0.0.1": file_of(b"secret")})
    resolver = names([PUBLIC], ["127.0.0.1"])
    assert run(fetch_through(network, URL, RULES, resolver)) == IMAGE
    assert resolver.asked == ["images.example.org"]
    with pytest.raises(UrlRefused, match="not public"):
        fetch(redirects("/again"), resolver=names([PUBLIC], ["127.0.0.1"]))


@pytest.mark.parametrize("answer", ["", "localhost", "127.0.0.1:80", "8.8.8.8 ", "0x7f.1", "8.8.8"])
def test_what_a_resolver_answers_besides_addresses_is_refused(answer: str) -> None:
    with pytest.raises(UrlRefused):
        fetch(file_of(IMAGE), resolver=names([answer]))


def test_a_name_with_very_many_addresses_is_refused() -> None:
    with pytest.raises(UrlRefused, match="more than 32 addresses"):
        fetch(file_of(IMAGE), resolver=names([f"8.8.8.{i}" for i in range(33)]))


@pytest.mark.parametrize("resolver", [Names({}), names([])])
def test_a_name_without_an_address_is_a_failure(resolver: Names) -> None:
    with pytest.raises(FetchFailed):
        fetch(file_of(IMAGE), resolver=resolver)


def test_local_sockets_are_refused() -> None:
    network = RecordingNetwork()
    with pytest.raises(UrlRefused):
        run(Guard(names(), network, LONG_S).connect_unix_socket("/run/docker.sock"))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "0x7f.1", "evil.example.org", "169.254.169.254"])
def test_the_guard_checks_even_what_never_passed_as_a_url(host: str) -> None:
    network = RecordingNetwork({"127.0.0.1": file_of(IMAGE)})
    resolver = Names({name: [["127.0.0.1"]] for name in ("localhost", "0x7f.1", "evil.example.org")})
    with pytest.raises(UrlRefused):
        run(Guard(resolver, network, LONG_S).connect_tcp(host, 443))
    assert network.attempts == []


# --- redirects to where nothing is fetched ---------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "location",
    ["https://127.0.0.1/", "https://evil.example.org/", "//evil.example.org/x", "//169.254.169.254/latest/meta-data/",
     "https://[::1]/", "https://[::ffff:127.0.0.1]/", "https://2130706433/", "https://localhost/", "file:///etc/passwd",
     "gopher://images.example.org/", "https://user:pw@images.example.org/", "https://images.example.org:8443/", "//[",
     "http://images.example.org/", "https://images.example.org/a b", "https://\xff.example.org/",
     "https://metadata.google.internal/"],
)  # fmt: skip
def test_redirects_are_checked_like_the_first_url(status: int, location: str) -> None:
    with pytest.raises(UrlRefused) as caught:
        fetch(redirects(location, f"{status} Elsewhere"))
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize(
    "url", [url for url in REFUSED_URLS if url.isascii() and url.isprintable() and "://" in url and url == url.strip()]
)
def test_no_refused_url_is_reached_by_a_redirect(url: str) -> None:
    """White space around it is not part of a header. A relative reference stays on the host, and is then a loop."""
    with pytest.raises(UrlRefused):
        fetch(redirects(url), "http://images.example.org/")


def test_redirects_end() -> None:
    async def serve(request: str) -> AsyncIterator[bytes]:
        count = int(request.split()[1].removeprefix("/"))
        yield head("302 Found", f"Location: /{count - 1}") if count else head()
        yield IMAGE

    url = "https://images.example.org/"
    assert fetch(serve, f"{url}3") == IMAGE
    with pytest.raises(UrlRefused, match="more than 3 times"):
        fetch(serve, f"{url}4")
    with pytest.raises(UrlRefused, match="more than 3 times"):
        fetch(redirects("https://images.example.org/loop"))
    assert fetch(serve, f"{url}0", replace(RULES, max_redirects=0)) == IMAGE
    with pytest.raises(UrlRefused, match="more than 0 times"):
        fetch(serve, f"{url}1", replace(RULES, max_redirects=0))


# --- servers that do not deliver -------------------------------------------------------------------------------------

CHUNKED = head("200 OK", "Transfer-Encoding: chunked")


@pytest.mark.parametrize(
    "status", [201, 202, 203, 204, 206, 226, 300, 304, 305, 400, 401, 403, 404, 410, 429, 500, 503]
)
def test_only_a_plain_200_is_a_file(status: int) -> None:
    with pytest.raises(FetchFailed, match=str(status)):
        fetch(sends(head(f"{status} Whatever", "Content-Length: 0", "Location: /x")))


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ([], "keep to HTTP"),
        ([b"\x89PNG\r\n\r\n"], "keep to HTTP"),
        ([b"SSH-2.0-x\r\n\r\n"], "keep to HTTP"),
        ([head("101 Switching Protocols", "Upgrade: x")], "keep to HTTP"),
        ([head("200 OK", "Content-Length: 100"), b"short"], "keep to HTTP, or broke off"),
        ([head("200 OK", "Content-Length: -1"), b"x"], "keep to HTTP"),
        ([head("200 OK", "Content-Length: 1", "Content-Length: 2"), b"xx"], "keep to HTTP"),
        ([head("200 OK", "Content-Length: x"), b"x"], "keep to HTTP"),
        ([head("200 OK", "Transfer-Encoding: gzip"), b"x"], "keep to HTTP"),
        ([CHUNKED, b"5\r\nab"], "broke off"),
        ([CHUNKED, b"zz\r\nab"], "keep to HTTP"),
        ([head("200 OK", "Content-Encoding: gzip"), gzip.compress(bytes(10_000_000))], "compressed"),
        ([head("200 OK", "content-encoding: br"), b"x"], "compressed"),
        ([head("200 OK", "Content-Encoding: identity, gzip"), b"x"], "compressed"),
        ([head("302 Found")], "without one location"),
        ([head("302 Found", "Location: ")], "without one location"),
        ([head("302 Found", "Location: /a", "Location: /b")], "without one location"),
        ([head("200 OK", *(f"X-{i}: {'x' * 1000}" for i in range(200))), b"x"], "keep to HTTP"),
        ([head("200 OK", f"X: {'x' * 200_000}"), b"x"], "keep to HTTP"),
        ([b"HTTP/1.1 200 " + b"x" * 200_000], "keep to HTTP"),
        ([head("100 Continue")] * 10_000, "before the file"),
        ([CHUNKED, b"1;" + b"x" * 200_000 + b"\r\nx\r\n"], "keep to HTTP"),
        ([CHUNKED, *[b"1\r\nx\r\n"] * 1500], "too small pieces"),
        ([CHUNKED, b"1\r\nx\r\n" * 10_000], "too small pieces"),
        ([CHUNKED, b"1\r\nx\r\n0\r\n" + b"x: y\r\n" * 50_000], "keep to HTTP"),
    ],
)  # fmt: skip
def test_servers_that_do_not_keep_to_the_protocol_are_failures(parts: list[bytes], why: str) -> None:
    with pytest.raises(FetchFailed, match=why):
        fetch(sends(*parts))


@pytest.mark.parametrize(
    ("server", "actual"),
    [
        (sends(head("200 OK", "Content-Length: 20001"), b"x" * 20_001), 20_001),
        (sends(head("200 OK", "Content-Length: 99999999999999")), 99_999_999_999_999),
        (sends(CHUNKED, b"4e21\r\n" + b"x" * 20_001), 20_001),
        (endless, 20_480),
    ],
)
def test_a_file_over_the_limit_is_not_read_to_its_end(server: Server, actual: int) -> None:
    with pytest.raises(ImageTooLarge) as caught:
        fetch(server)
    assert (caught.value.quantity, caught.value.limit) == ("bytes", 20_000)
    assert caught.value.actual == pytest.approx(actual, rel=0.05)


async def dripping_head(request: str) -> AsyncIterator[bytes]:
    yield b"HTTP/1.1 200 OK\r\n"
    while True:
        await asyncio.sleep(SHORT_S / 20)
        yield b"X: y\r\n"


async def slow_redirects(request: str) -> AsyncIterator[bytes]:
    await asyncio.sleep(SHORT_S / 3)
    yield head("302 Found", "Location: /on")


@pytest.mark.parametrize("server", [silent, dripping, dripping_head, slow_redirects])
def test_one_limit_holds_for_all_that_a_server_does(server: Server) -> None:
    started_s = time.monotonic()
    with pytest.raises(FetchTimeout) as caught:
        fetch(server, rules=replace(RULES, timeout_s=SHORT_S, max_redirects=10))
    assert caught.value.limit_s == SHORT_S
    assert time.monotonic() - started_s < 10 * SHORT_S


def test_the_limit_holds_for_the_lookup_too() -> None:
    async def never(host: str, port: int) -> Sequence[str]:
        await asyncio.Event().wait()
        raise AssertionError

    async def work() -> None:
        async with Fetcher(replace(RULES, timeout_s=SHORT_S), resolve=never, network=RecordingNetwork()) as fetcher:
            await fetcher.fetch(URL)

    with pytest.raises(FetchTimeout):
        run(work())


def test_a_server_that_is_not_there_is_a_failure() -> None:
    with pytest.raises(FetchFailed, match="no connection to its server"):
        run(fetch_through(RecordingNetwork(), URL, RULES, names([PUBLIC, PUBLIC_V6])))
