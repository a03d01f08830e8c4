"""The file of webhooks: whom the service tells of what.

TOML, for people to write:

    [[webhooks]]
    name = "moderators"
    url = "https://hooks.example.org/hardlook"
    secret = "whsec_..."                                # echo "whsec_$(openssl rand -base64 32)"
    events = ["verdict.unsafe", "review.opened"]

It holds secrets, so that only its owner and group may read it. No message or repr holds a secret or a URL.
"""

import os
import stat
import tomllib
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import SplitResult, urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from service.addresses import MAX_URL_BYTES, literal_address, refuse_reason
from service.errors import SettingsError
from service.webhook_signing import signing_key

EventType = Literal[
    "verdict.unsafe",
    "verdict.review",
    "review.opened",
    "review.decided",
    "exemplar.quarantined",
    "retroactive.match",
    "version.publish",
    "version.rollback",
    "job.done",
]
_MAX_FILE_BYTES = 1024 * 1024
_PORTS = {"https": 443, "http": 80}


class Hook(BaseModel):
    """One receiver.

    Attributes:
        name: in logs and metrics; what waits for a hook waits for that name, whatever becomes of its URL.
        url: https, or http where the receiver is on this machine or `allow_private` holds.
        secret: that messages are signed with.
        previous_secret: that they are signed with as well, as long as receivers still verify with it.
        events: that it is told of.
        allow_private: whether addresses that are not public are connected to.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    url: Annotated[str, Field(max_length=MAX_URL_BYTES, repr=False)]
    secret: Annotated[str, Field(repr=False)]
    previous_secret: Annotated[str | None, Field(repr=False)] = None
    events: Annotated[list[EventType], Field(min_length=1)]
    allow_private: bool = False

    @field_validator("secret", "previous_secret")
    @classmethod
    def _secret(cls, secret: str | None) -> str | None:
        if secret is not None:
            signing_key(secret)
        return secret

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if not self.url.isascii() or not self.url.isprintable() or " " in self.url or "\\" in self.url:
            raise ValueError("url: it has spaces, a backslash or characters that are not plain ASCII")
        parts = self._parts
        if parts.scheme not in _PORTS or not self.host:
            raise ValueError("url: it is not of the form https://host/path")
        if parts.username is not None or parts.password is not None or parts.fragment:
            raise ValueError("url: it has a user name, a password or a fragment")
        if parts.scheme == "http" and not self.private:
            raise ValueError("url: it is not https, and its host is neither loopback nor is allow_private set")
        address = literal_address(self.host)
        if not self.private and address is not None and (reason := refuse_reason(address)):
            raise ValueError(f"url: its address is not public ({reason}), and allow_private is not set")
        return self

    @cached_property
    def _parts(self) -> SplitResult:
        try:
            parts = urlsplit(self.url)
            _ = parts.port
        except ValueError:
            raise ValueError("url: it is not a URL") from None
        return parts

    @property
    def scheme(self) -> str:
        """'https' or 'http'."""
        return self._parts.scheme

    @property
    def host(self) -> str:
        """Name or address, without brackets."""
        return self._parts.hostname or ""

    @property
    def port(self) -> int:
        """That is connected to."""
        return self._parts.port or _PORTS[self.scheme]

    @property
    def authority(self) -> str:
        """As the header Host has it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def target(self) -> str:
        """Path and query; may hold secrets."""
        return (self._parts.path or "/") + (f"?{self._parts.query}" if self._parts.query else "")

    @property
    def private(self) -> bool:
        """Whether any address will do: the operator said so, or named this very machine."""
        return self.allow_private or _is_loopback(self.host)

    @property
    def keys(self) -> tuple[bytes, ...]:
        """That messages are signed with."""
        secrets = (self.secret, self.previous_secret)
        return tuple(signing_key(secret) for secret in secrets if secret is not None)


class _WebhookFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    webhooks: Annotated[list[Hook], Field(max_length=100)] = []

    @model_validator(mode="after")
    def _unique(self) -> Self:
        twice = [name for name, times in Counter(hook.name for hook in self.webhooks).items() if times > 1]
        if twice:
            raise ValueError(f"names occur twice: {', '.join(twice)}")
        return self


def read_webhooks(path: Path) -> tuple[Hook, ...]:
    """Read and check a file of webhooks.

    Raises:
        SettingsError: it cannot be read, is damaged or too large, may be read by everybody or written by others than
            its owner, or one of its hooks does not fit.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"webhooks file {path}: cannot be read: {error.strerror}") from error
    if mode & (stat.S_IWGRP | stat.S_IRWXO):
        raise SettingsError(
            f"webhooks file {path}: it holds secrets, and others may read or change it (mode {mode:04o}): "
            "chmod g-w,o-rwx it"
        )
    if len(data) > _MAX_FILE_BYTES:
        raise SettingsError(f"webhooks file {path}: has more than {_MAX_FILE_BYTES} bytes")
    try:
        return tuple(_WebhookFile.model_validate(tomllib.loads(data.decode())).webhooks)
    except UnicodeDecodeError:
        raise SettingsError(f"webhooks file {path}: is not UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"webhooks file {path}: is not TOML: {error}") from None
    except ValidationError as error:
        raise SettingsError(f"webhooks file {path}: {_reasons(error)}") from None


def _is_loopback(host: str) -> bool:
    address = literal_address(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def _reasons(error: ValidationError) -> str:
    """What is wrong, and where, without the values."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    reasons = [f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg'].removeprefix('Value error, ')}" for e in found[:3]]
    return "; ".join(reasons)
