"""Fetching images by URL, so that a caller cannot make this service talk to what only this service can reach.

A URL is checked as text (`service.addresses`); its host is resolved once, every address is checked, and the connection
goes to an address that was checked, so that a name cannot change its meaning in between. Every redirect is a new URL on
a new connection. Nothing of the environment, of a caller or of an earlier fetch goes into a request.
"""

# ruff: noqa: ASYNC109 - the signatures with `timeout` are those of httpcore's network backends

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import httpcore

from perception.errors import ImageTooLarge
from service.addresses import Address, CheckedUrl, UrlRules, check_redirect, check_url, literal_address, refuse_reason
from service.errors import FetchDisabled, FetchFailed, FetchTimeout, Overloaded, SettingsError, UrlRefused
from service.settings import Settings, variable

# (host, port) -> addresses, in the order in which they should be tried. Raises OSError where there are none.
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

# Answers from DNS are written by strangers too.
_MAX_ADDRESSES = 32
# Of the time for a fetch that one address may take to answer, so that there is time for another.
_CONNECT_SHARE = 0.4
# For all that comes before a body: interim answers and headers. The parser refuses headers over 100 KiB, and would read
# interim answers for ever.
_MAX_HEAD_BYTES = 128 * 1024
# Every piece of a body costs the event loop some microseconds, however small it is: so many small ones are read.
_FREE_PIECES, _SMALL_PIECE_BYTES = 1000, 512
_PIECES_AT_A_TIME = 64
_REDIRECTS = (301, 302, 303, 307, 308)
# Says nothing of versions: who looks for a known hole learns nothing here.
_HEADERS = (
    ("User-Agent", "hardlook"),
    ("Accept", "image/*, */*;q=0.8"),
    ("Accept-Encoding", "identity"),
    ("Connection", "close"),
)


@dataclass(frozen=True)
class FetchRules:
    """What is fetched, and what a fetch may cost.

    Attributes:
        enabled: whether anything is.
        urls: which URLs are.
        timeout_s: for one fetch: name resolution, connections, redirects and body together.
        max_redirects: that are followed; 0 or more.
        max_bytes: of a file.
        at_a_time: fetches in progress; times `max_bytes` it bounds their memory.
        max_waiting: fetches that wait for a place, each at most `timeout_s`.
    """

    enabled: bool = False
    urls: UrlRules = field(default_factory=UrlRules)
    timeout_s: float = 5.0
    max_redirects: int = 3
    max_bytes: int = 20 * 1024 * 1024
    at_a_time: int = 16
    max_waiting: int = 64


def rules_of(settings: Settings) -> FetchRules:
    """The operator's rules.

    Raises:
        SettingsError: a host that is not one; names the variable.
    """
    try:
        urls = UrlRules(settings.fetch_http, settings.fetch_hosts)
    except ValueError as error:
        raise SettingsError(f"{variable('fetch_hosts')}: {error}") from error
    return FetchRules(
        enabled=settings.fetch,
        urls=urls,
        timeout_s=settings.fetch_timeout_s,
        max_redirects=settings.fetch_max_redirects,
        max_bytes=settings.max_image_bytes,
    )


class Fetcher:
    """Fetches files by URL, a bounded number at a time; to be entered before use.

    Args:
        rules: of the operator.
        resolve: looks names up; by default the system does, in threads of its own.
        network: opens connections to addresses that were checked; by default to the network.
        tls: trusted authorities; by default the system's and certifi's.
    """

    def __init__(
        self,
        rules: FetchRules,
        *,
        resolve: Resolve | None = None,
        network: httpcore.AsyncNetworkBackend | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._rules = rules
        self._resolve, self._network, self._tls = resolve, network or httpcore.AnyIOBackend(), tls
        self._places, self._held = asyncio.Semaphore(rules.at_a_time), 0
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        if self._rules.enabled:
            self._tls = self._tls or httpcore.default_ssl_context()
            if self._resolve is None:
                system = SystemResolver(self._rules.at_a_time)
                self._stack.callback(system.close)
                self._resolve = system
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def fetch(self, url: str) -> bytes:
        """The file behind a URL, undecoded.

        Args:
            url: as a caller wrote it.

        Raises:
            FetchDisabled: the operator has not turned fetching on.
            UrlRefused: the URL, a redirect, or an address behind them is not one that is fetched.
            FetchFailed: its server could not be reached, or did not answer with a file.
            FetchTimeout: it did so too slowly.
            ImageTooLarge: the file has more than `max_bytes`; what was declared, or had arrived by then.
            Overloaded: no place came free.
        """
        if not self._rules.enabled:
            raise FetchDisabled
        checked = check_url(url, self._rules.urls)
        async with self._place():
            try:
                async with asyncio.timeout(self._rules.timeout_s):
                    return await self._follow(checked)
            except TimeoutError as error:
                raise FetchTimeout(self._rules.timeout_s) from error

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        """Hold one of the places; the time spent waiting for it is not the server's fault."""
        limit = self._rules.at_a_time + self._rules.max_waiting
        if self._held >= limit:
            raise Overloaded("fetches", limit)
        self._held += 1
        try:
            try:
                async with asyncio.timeout(self._rules.timeout_s):
                    await self._places.acquire()
            except TimeoutError as error:
                raise Overloaded("fetches", self._rules.at_a_time) from error
            try:
                yield
            finally:
                self._places.release()
        finally:
            self._held -= 1

    async def _follow(self, url: CheckedUrl) -> bytes:
        for _ in range(self._rules.max_redirects + 1):
            try:
                answer = await self._get(url)
            except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError, OSError) as error:
                raise FetchFailed(_failure(error)) from error
            if isinstance(answer, bytes):
                return answer
            url = answer
        raise UrlRefused(f"it redirects more than {self._rules.max_redirects} times")

    async def _get(self, url: CheckedUrl) -> bytes | CheckedUrl:
        """One request on one connection of its own: the file, or where else to look for it."""
        if self._resolve is None:
            raise RuntimeError("a Fetcher must be entered before use")
        guard = Guard(self._resolve, self._network, self._rules.timeout_s * _CONNECT_SHARE)
        origin = httpcore.Origin(url.scheme.encode(), url.host.encode(), url.port)
        connection = httpcore.AsyncHTTPConnection(origin, self._tls, network_backend=guard)
        parts = httpcore.URL(scheme=origin.scheme, host=origin.host, port=origin.port, target=url.target.encode())
        try:
            async with connection.stream("GET", parts, headers=[("Host", url.authority), *_HEADERS]) as response:
                guard.head_is_over()
                if response.status in _REDIRECTS:
                    return check_redirect(url, _location(response), self._rules.urls)
                if response.status != 200:
                    raise FetchFailed(f"its server answered with status {response.status}")
                return await self._read_body(response)
        finally:
            await guard.aclose()

    async def _read_body(self, response: httpcore.Response) -> bytes:
        limit = self._rules.max_bytes
        if any(coding.strip().lower() not in (b"", b"identity") for coding in _values(response, b"content-encoding")):
            raise FetchFailed("its server compressed the file, which it was asked not to do")
        for declared in _values(response, b"content-length"):  # digits: the parser has seen to it
            if int(declared) > limit:
                raise ImageTooLarge("bytes", limit, int(declared))
        body, pieces = bytearray(), 0
        async for piece in response.aiter_stream():
            body += piece
            pieces += 1
            if len(body) > limit:
                raise ImageTooLarge("bytes", limit, len(body))
            if pieces > _FREE_PIECES + len(body) // _SMALL_PIECE_BYTES:
                raise FetchFailed("its server sends the file in too small pieces")
            if pieces % _PIECES_AT_A_TIME == 0:  # what has arrived is parsed without a pause: let others run
                await asyncio.sleep(0)
        return bytes(body)


class Guard(httpcore.AsyncNetworkBackend):
    """Opens one connection, to a public address only, and closes it whatever happens.

    Names are resolved here and nowhere else, so there is no address that was not checked.

    Args:
        resolve: looks names up.
        network: opens connections to addresses.
        connect_s: for connecting to one address.
    """

    def __init__(self, resolve: Resolve, network: httpcore.AsyncNetworkBackend, connect_s: float) -> None:
        self._resolve, self._network, self._connect_s = resolve, network, connect_s
        self._opened: list[httpcore.AsyncNetworkStream] = []
        self._head_bytes_left: int | None = _MAX_HEAD_BYTES

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to an address of a host.

        Raises:
            UrlRefused: one of its addresses is not public. One is enough: what a public name has to do with a private
                address is nothing that we want to take part in.
            FetchFailed: it has none.
            httpcore.ConnectError, httpcore.ConnectTimeout: none of them answers.
        """
        failure: Exception = httpcore.ConnectError("no address")
        for address in _one_of_each_family(await self._public_addresses(host, port)):
            try:
                stream = await self._network.connect_tcp(
                    str(address), port, self._connect_s, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
            else:
                self._opened.append(stream)
                return _Counted(stream, self._count_head)
        raise failure

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Never.

        Raises:
            UrlRefused: always.
        """
        raise UrlRefused("local sockets are not fetched from")

    async def sleep(self, seconds: float) -> None:
        """Between attempts to connect, of which httpcore is asked to make one."""
        await asyncio.sleep(seconds)

    def head_is_over(self) -> None:
        """From here on the body is counted instead."""
        self._head_bytes_left = None

    async def aclose(self) -> None:
        """Close the connection. httpcore forgets one that is cancelled during its TLS handshake; this does not."""
        for stream in self._opened:
            await stream.aclose()

    async def _public_addresses(self, host: str, port: int) -> list[Address]:
        literal = literal_address(host)
        try:
            found = [host] if literal else await self._resolve(host, port)
        except OSError as error:
            raise FetchFailed("its host has no address") from error
        if len(found) > _MAX_ADDRESSES:
            raise UrlRefused(f"its host has more than {_MAX_ADDRESSES} addresses")
        addresses = [literal_address(text) for text in found]
        # Which address it is stays here: a caller could map an internal network by asking.
        if any(address is None or refuse_reason(address) for address in addresses):
            raise UrlRefused("its host has an address that is not public")
        return [address for address in addresses if address is not None]

    def _count_head(self, arrived_bytes: int) -> None:
        if self._head_bytes_left is not None:
            self._head_bytes_left -= arrived_bytes
            if self._head_bytes_left < 0:
                raise FetchFailed(f"its server sends more than {_MAX_HEAD_BYTES} bytes before the file")


class _Counted(httpcore.AsyncNetworkStream):
    """A stream that tells how many bytes it reads."""

    def __init__(self, stream: httpcore.AsyncNetworkStream, count: Callable[[int], None]) -> None:
        self._stream, self._count = stream, count

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data = await self._stream.read(max_bytes, timeout)
        self._count(len(data))
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        return _Counted(await self._stream.start_tls(ssl_context, server_hostname, timeout), self._count)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class SystemResolver:
    """Looks names up as the system does, in threads of its own.

    A lookup cannot be cancelled, and a name whose server is silent holds its thread for as long as the system waits. In
    the event loop's own threads, a few such names would hold up whatever else runs there.

    Args:
        threads: lookups at a time; others wait, within the time of their fetch.
    """

    def __init__(self, threads: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="resolve")

    async def __call__(self, host: str, port: int) -> list[str]:
        """Addresses of a name, in the order of RFC 6724; OSError where there are none."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, _look_up, host, port)

    def close(self) -> None:
        """Take no more; lookups that go on are left to themselves."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _look_up(host: str, port: int) -> list[str]:
    # With the dot the name is absolute: a search domain, such as a cluster's, does not get to answer for it.
    answers = socket.getaddrinfo(f"{host}.", port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in answers))


def _one_of_each_family(addresses: Sequence[Address]) -> list[Address]:
    """The first address of IPv4 and of IPv6, in the order given: where a family does not work, the other may."""
    return list({address.version: address for address in reversed(addresses)}.values())[::-1]


def _values(response: httpcore.Response, name: bytes) -> list[bytes]:
    return [value for key, value in response.headers if key.lower() == name]


def _location(response: httpcore.Response) -> str:
    locations = _values(response, b"location")
    if len(locations) != 1 or not locations[0]:
        raise FetchFailed(f"its server redirects (status {response.status}) without one location")
    try:
        return locations[0].decode()
    except UnicodeDecodeError as error:
        raise UrlRefused("it redirects to what is not a URL") from error


def _failure(error: Exception) -> str:
    """What to tell a caller: never the words of the error, which may be those of the other side."""
    if isinstance(error.__cause__, ssl.SSLCertVerificationError):
        return "its certificate is not valid for its host"
    if isinstance(error, ssl.SSLError) or isinstance(error.__cause__, ssl.SSLError):
        return "no TLS connection to its server"
    if isinstance(error, httpcore.ConnectError | httpcore.TimeoutException):
        return "no connection to its server"
    if isinstance(error, httpcore.ProtocolError):
        return "its server does not keep to HTTP, or broke off"
    return "its server broke off"
