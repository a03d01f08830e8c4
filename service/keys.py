"""API keys: who a caller is, and what a caller may do.

A key is the text `hlk_<id>_<secret>`: the id is public and names the key in lists and logs, the secret is 256 random
bits. `service.key_file` keeps the SHA-256 of the whole text alone. No log line, message or repr holds any of a secret.
"""

import base64
import binascii
import hashlib
import hmac
import ipaddress
import logging
import os
import re
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from starlette.datastructures import Headers

from service.errors import Forbidden, SettingsError, Unauthenticated
from service.key_file import KeyRecord, read_key_file
from service.settings import Scope, Settings, variable

OPEN_SCOPES: frozenset[Scope] = frozenset({"classify", "similar", "metrics"})
MAX_PRESENTED_CHARS = 200
_KEY = re.compile(r"hlk_([0-9a-f]{12})_[A-Za-z0-9_-]{43}")
_ANONYMOUS = "anonymous:"
_REFUSED = "the API key is unknown, expired or revoked"
_NO_KEY = "send an API key as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'"
_log = logging.getLogger("hardlook.keys")


@dataclass(frozen=True)
class Caller:
    """Who sent a request.

    Attributes:
        id: of the key, or 'anonymous:' and the address.
        name: of the key, for people; 'anonymous' without one.
        scopes: what the caller may do.
        rate_limit: in place of the default; None for the default, empty for none.
    """

    id: str
    name: str
    scopes: frozenset[Scope]
    rate_limit: str | None = None

    @property
    def anonymous(self) -> bool:
        """Whether there was no key."""
        return self.id.startswith(_ANONYMOUS)

    def require(self, scope: Scope) -> None:
        """Return where the caller has a scope.

        Raises:
            Forbidden: the key has it not.
            Unauthenticated: there is no key, and it takes one.
        """
        if scope not in self.scopes and "admin" not in self.scopes:
            self._refuse(scope)

    def require_any(self) -> None:
        """Return where the caller has any scope; errors are those of `require`."""
        if not self.scopes:
            self._refuse("any")

    def _refuse(self, scope: str) -> None:
        if self.anonymous:
            raise Unauthenticated(_NO_KEY)
        raise Forbidden(scope)


_Signature = tuple[int, int, int, int]


class KeyRing:
    """The keys that are in force.

    Args:
        path: the key file; None for no keys, so that every key is refused.
        clock: the time, with its zone.

    Raises:
        SettingsError: the file cannot be read, is damaged, or may be written by others than its owner.
    """

    def __init__(self, path: Path | None, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._path, self._clock = path, clock
        self._keys: Mapping[str, KeyRecord] = {}
        self._signature: _Signature | None = None
        self._last_failure = ""
        self._reloading = (
            threading.Lock()
        )  # else what one thread read before a change could replace what another read after
        # What an unknown id is compared with: the hash of nothing that anybody has.
        self._nobody = hashlib.sha256(secrets.token_bytes()).hexdigest()
        if path is not None:
            self._read(path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """The keys of a file; errors are those of the class."""
        return cls(path)

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def records(self) -> tuple[KeyRecord, ...]:
        """All keys of the file, those that are not in force too; they hold hashes, not secrets."""
        return tuple(self._keys.values())

    def authenticate(self, presented: str | None) -> Caller:
        """Find out whose key it is. Every refusal takes the same steps and has the same words.

        Raises:
            Unauthenticated: no key, or none that is in force.
        """
        # No key is that long; hashing takes time by length, which the caller would choose.
        text = presented if presented is not None and len(presented) <= MAX_PRESENTED_CHARS else ""
        match = _KEY.fullmatch(text)
        record = self._keys.get(match[1]) if match else None
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        right = hmac.compare_digest(digest, self._nobody if record is None else record.sha256)
        state = "unknown" if record is None else record.state(self._clock())
        if record is not None and right and state == "active":
            return _caller(record)
        if presented is None:
            raise Unauthenticated(_NO_KEY)
        # An id that is not one of ours may be anything, a part of a secret too.
        known = {"key": None if record is None else record.id}
        _log.warning("API key refused: %s", "wrong secret" if record and not right else state, extra={"fields": known})
        raise Unauthenticated(_REFUSED)

    def caller_of(self, key_id: str) -> Caller | None:
        """Whoever has a key, found by its public id: for those who have shown it before. None where it is not in force.

        Args:
            key_id: as this process wrote it down when it was shown.
        """
        record = self._keys.get(key_id)
        return _caller(record) if record is not None and record.state(self._clock()) == "active" else None

    def reload_if_changed(self) -> bool:
        """Read the file where it has changed; whether it was. Without a good file the last good keys stay in force."""
        if self._path is None:
            return False
        with self._reloading:
            return self._reload(self._path)

    def _reload(self, path: Path) -> bool:
        try:
            if _signature(path.stat()) == self._signature:
                self._last_failure = ""
                return False
            self._read(path)
        except (SettingsError, OSError) as error:
            if str(error) != self._last_failure:  # once for each failure, not once for each look
                _log.error("API keys not reloaded, the last good ones stay in force: %s", error)
            self._last_failure = str(error)
            return False
        self._last_failure = ""
        _log.info("API keys loaded: %d", len(self._keys))
        return True

    def _read(self, path: Path) -> None:
        file, status = read_key_file(path)
        self._keys = {key.id: key for key in file.keys}
        self._signature = _signature(status)


def _caller(record: KeyRecord) -> Caller:
    return Caller(record.id, record.name, frozenset(record.scopes), record.rate_limit)


def _signature(status: os.stat_result) -> _Signature:
    # The change time too: it tells of a change of the mode, and cannot be set back.
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def presented_key(headers: Headers) -> str | None:
    """The key of a request; None where it brings none.

    From `Authorization: Bearer KEY` or `X-API-Key: KEY`. Callers that can be given a URL and no header put it there, as
    `https://KEY@host/` or `https://anything:KEY@host/`, and so send `Authorization: Basic`.

    Raises:
        Unauthenticated: several that differ, or an Authorization that is none of these and no X-API-Key.
    """
    given = set(headers.getlist("X-API-Key"))
    for value in headers.getlist("Authorization"):
        scheme, _, credentials = value.partition(" ")
        if scheme.lower() == "bearer":
            given.add(credentials.strip())
        elif "X-API-Key" in headers:  # the other is for the proxy in front
            continue
        elif scheme.lower() == "basic":
            given.add(_key_of_url(credentials.strip()))
        else:
            raise Unauthenticated("the scheme of Authorization must be Bearer or Basic")
    if len(given) > 1:
        raise Unauthenticated("several API keys that differ")
    return given.pop() if given else None


def _key_of_url(credentials: str) -> str:
    """The password of Basic credentials (RFC 7617), or the user's name where the password is empty.

    Raises:
        Unauthenticated: they are no such credentials.
    """
    try:
        text = base64.b64decode(credentials, validate=True).decode("latin-1")
    except (binascii.Error, ValueError):  # not as its cause, which may show a part of them
        raise Unauthenticated("the credentials of Authorization: Basic are malformed") from None
    user, _, password = text.partition(":")
    return password or user


def anonymous(client_host: str | None, scopes: frozenset[Scope]) -> Caller:
    """A caller without a key, known by address: of IPv6 by its /64, all of which one caller may have.

    Args:
        client_host: IP address as text; whoever has none is one caller together.
        scopes: see `anonymous_scopes`.
    """
    try:
        address = ipaddress.ip_address(client_host or "")
    except ValueError:
        return Caller(f"{_ANONYMOUS}unknown", "anonymous", scopes)
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            prefix = ipaddress.IPv6Address(int(address) >> 64 << 64)
            return Caller(f"{_ANONYMOUS}{prefix}/64", "anonymous", scopes)
        address = address.ipv4_mapped
    return Caller(f"{_ANONYMOUS}{address}", "anonymous", scopes)


def anonymous_scopes(settings: Settings) -> frozenset[Scope]:
    """What callers without a key may do: as set; else nothing where there are keys, and `OPEN_SCOPES` where not."""
    if settings.anonymous_scopes is not None:
        return frozenset(settings.anonymous_scopes)
    return OPEN_SCOPES if settings.keys_file is None else frozenset()


def identify(ring: KeyRing, headers: Headers, client_host: str | None, scopes: frozenset[Scope]) -> Caller:
    """Who sent a request. A key that is not in force is refused even where callers without one are served.

    Args:
        ring: all keys.
        headers: of the request.
        client_host: IP address of the peer.
        scopes: of callers without a key.

    Raises:
        Unauthenticated: several keys, or none that is in force.
    """
    key = presented_key(headers)
    return anonymous(client_host, scopes) if key is None else ring.authenticate(key)


def exposed_without_keys(settings: Settings) -> str | None:
    """Why the service must not start: it would serve everybody who reaches it, and nobody said that it should."""
    if settings.keys_file is not None or settings.anonymous_scopes is not None or _is_loopback(settings.host):
        return None
    return (
        f"{variable('host')} {settings.host!r} is not a loopback address and there are no API keys: name a file of "
        f"keys in {variable('keys_file')} ('hardlook-serve keys create' writes one), or say in "
        f"{variable('anonymous_scopes')} what everybody may do, such as 'classify,similar'"
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
