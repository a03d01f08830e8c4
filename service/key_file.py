"""The file of API keys: read by the service, changed by `hardlook-serve keys`.

Only the SHA-256 of a key is stored. Salted and slow hashes protect passwords, which can be guessed; of 256 random bits
there is nothing to guess and no two are equal, and a fast hash keeps a flood of wrong keys cheap to refuse.
"""

import hashlib
import logging
import os
import secrets
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from indexer.durable import exclusive, sync_folder
from service.errors import SettingsError
from service.rate_limits import parse_limits
from service.settings import Scope

_SECRET_BYTES = 32
_MAX_FILE_BYTES = 16 * 1024 * 1024
_log = logging.getLogger("hardlook.keys")


class KeyRecord(BaseModel):
    """One key, as the file has it; times are UTC."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
    name: Annotated[str, Field(min_length=1, max_length=100)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", repr=False)]
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)]
    rate_limit: str | None = None
    created_at: AwareDatetime
    expires_at: AwareDatetime | None = None
    revoked_at: AwareDatetime | None = None

    @field_validator("name")
    @classmethod
    def _printable(cls, name: str) -> str:
        if not name.isprintable():
            raise ValueError("a name has printable characters only")
        return name

    @field_validator("rate_limit")
    @classmethod
    def _parsable(cls, rate_limit: str | None) -> str | None:
        try:
            parse_limits(rate_limit or "", "rate_limit")
        except SettingsError as error:
            raise ValueError(str(error)) from error
        return rate_limit

    def state(self, now: datetime) -> Literal["active", "expired", "revoked"]:
        """Whether the key holds at a time."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and now >= self.expires_at else "active"


class KeyFile(BaseModel):
    """The file of all keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    format: Literal["hardlook-keys/1"]
    keys: tuple[KeyRecord, ...]

    @model_validator(mode="after")
    def _unique(self) -> Self:
        twice = [key_id for key_id, times in Counter(key.id for key in self.keys).items() if times > 1]
        if twice:
            raise ValueError(f"key ids occur twice: {', '.join(twice)}")
        return self


def read_key_file(path: Path) -> tuple[KeyFile, os.stat_result]:
    """Read and check a key file.

    Hashes of 256 random bits help nobody, so that it may be readable by others, which is warned of; whoever can write
    it makes keys, and so only the owner may.

    Returns:
        Its content, and its status at that time.

    Raises:
        SettingsError: it cannot be read, is damaged, too large, or may be written by others than its owner.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"key file {path}: cannot be read: {error.strerror}") from error
    if len(data) > _MAX_FILE_BYTES:
        raise SettingsError(f"key file {path}: has more than {_MAX_FILE_BYTES} bytes")
    mode = stat.S_IMODE(status.st_mode)
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise SettingsError(f"key file {path}: others than its owner may write it (mode {mode:04o}): chmod go-w it")
    if mode & stat.S_IROTH:
        _log.warning("key file %s: everybody may read it (mode %04o); chmod o-r it", path, mode)
    try:
        return KeyFile.model_validate_json(data), status
    except ValidationError as error:
        raise SettingsError(f"key file {path}: is damaged: {_reasons(error)}") from None


def create_key(
    path: Path, name: str, scopes: tuple[Scope, ...], rate_limit: str | None, expires_at: datetime | None
) -> tuple[str, KeyRecord]:
    """Add a key to a file, which is made where there is none.

    Returns:
        The key, which is stored nowhere, and its record.

    Raises:
        SettingsError: the file is damaged or cannot be written, or a value does not fit.
    """
    with _changed(path, create=True) as keys:
        key_id = secrets.token_hex(6)
        while key_id in keys:
            key_id = secrets.token_hex(6)
        text = f"hlk_{key_id}_{secrets.token_urlsafe(_SECRET_BYTES)}"
        try:
            keys[key_id] = KeyRecord(
                id=key_id,
                name=name,
                sha256=hashlib.sha256(text.encode()).hexdigest(),
                scopes=tuple(dict.fromkeys(scopes)),
                rate_limit=rate_limit,
                created_at=datetime.now(UTC).replace(microsecond=0),
                expires_at=expires_at,
            )
        except ValidationError as error:
            raise SettingsError(_reasons(error)) from None
    return text, keys[key_id]


def revoke_key(path: Path, key_id: str) -> KeyRecord:
    """Revoke a key; one that is revoked already stays as it is.

    Raises:
        SettingsError: there is no such key, or the file is damaged or cannot be written.
    """
    with _changed(path, create=False) as keys:
        if key_id not in keys:
            raise SettingsError(f"key file {path}: has no key {key_id[:40]!r}")
        if keys[key_id].revoked_at is None:
            keys[key_id] = keys[key_id].model_copy(update={"revoked_at": datetime.now(UTC).replace(microsecond=0)})
    return keys[key_id]


@contextmanager
def _changed(path: Path, *, create: bool) -> Iterator[dict[str, KeyRecord]]:
    """The keys of a file by id, to be changed in place; written back where nothing is raised. Others wait."""
    path = path.resolve()  # a link stays one
    try:
        with exclusive(path.with_name(f".{path.name}.lock"), wait=True):
            status: os.stat_result | None = None
            keys: dict[str, KeyRecord] = {}
            if not create or path.exists():
                file, status = read_key_file(path)
                keys = {key.id: key for key in file.keys}
            before = dict(keys)
            yield keys
            if keys != before:
                _replace(path, KeyFile(format="hardlook-keys/1", keys=tuple(keys.values())), status)
    except OSError as error:
        raise SettingsError(f"key file {path}: cannot be written: {error.strerror}") from error


def _replace(path: Path, content: KeyFile, status: os.stat_result | None) -> None:
    """Put a new file in place of an old one, of the same owner and mode: the service may run as another user.

    As `indexer.durable.replace_file`, but at no time readable for more than its owner and who could read the old one.
    """
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        if status is not None:
            if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(file.fileno(), status.st_uid, status.st_gid)
            os.fchmod(file.fileno(), stat.S_IMODE(status.st_mode))
        file.write(content.model_dump_json(indent=2).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def _reasons(error: ValidationError) -> str:
    """What is wrong, and where. Without the values: somebody may have put a key where its hash belongs."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    reasons = [f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg'].removeprefix('Value error, ')}" for e in found[:3]]
    return "; ".join(reasons)
