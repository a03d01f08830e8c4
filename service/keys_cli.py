"""hardlook-serve keys: create, list and revoke API keys.

Owns arguments and output; `service.key_file` has the rest. A new key goes to stdout, is shown nowhere else and never
again.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from service.errors import ServiceError
from service.key_file import KeyRecord, create_key, read_key_file, revoke_key
from service.settings import Scope, variable

_FAILED = 2
File = Annotated[
    Path, Parameter(env_var=variable("keys_file"), help="The key file; by default the one that the service reads.")
]


def keys_app() -> App:
    """The commands, to be mounted as `hardlook-serve keys`."""
    app = App(name="keys", help="Create, list and revoke API keys.")
    app.command(_create, name="create")
    app.command(_list, name="list")
    app.command(_revoke, name="revoke")
    return app


def _create(
    *,
    file: File,
    name: str,
    scope: Annotated[list[Scope], Parameter(consume_multiple=True, negative=())],
    rate_limit: str | None = None,
    expires_days: float | None = None,
) -> None:
    """Create a key and print it. Keep it now: only its hash is stored.

    Args:
        name: Whose it is, or what for.
        scope: What it may do; 'admin' may do everything.
        rate_limit: Images in a time, in place of HARDLOOK_RATE_LIMIT, such as '100/second;3000/minute'.
        expires_days: For how long it holds; for ever by default.
    """
    with _errors_of_one_line():
        expires_at = None
        if expires_days is not None:
            if not 0 < expires_days <= 36500:
                _fail(f"--expires-days must be above 0 and at most 36500, got {expires_days:g}")
            expires_at = (datetime.now(UTC) + timedelta(days=expires_days)).replace(microsecond=0)
        key, record = create_key(file, name, tuple(scope), rate_limit, expires_at)
    print(f"created {_line(record)}", file=sys.stderr)
    print(key)


def _list(*, file: File) -> None:
    """List all keys, the revoked and expired ones too; one a line, columns separated by tabs."""
    with _errors_of_one_line():
        records = read_key_file(file)[0].keys
    for record in records:
        print(_line(record))


def _revoke(key_id: Annotated[str, Parameter(name="ID")], /, *, file: File) -> None:
    """Revoke a key; a running service refuses it within seconds.

    Args:
        key_id: The twelve characters after 'hlk_'; `list` shows them.
    """
    with _errors_of_one_line():
        record = revoke_key(file, key_id)
    print(f"revoked {_line(record)}", file=sys.stderr)


def _line(record: KeyRecord) -> str:
    until = f"until {record.expires_at:%Y-%m-%dT%H:%M:%SZ}" if record.expires_at else "for ever"
    return "\t".join(
        [
            record.id,
            record.state(datetime.now(UTC)),
            record.name,
            ",".join(record.scopes),
            record.rate_limit or "default rate limit",
            f"created {record.created_at:%Y-%m-%dT%H:%M:%SZ}",
            until,
        ]
    )


@contextmanager
def _errors_of_one_line() -> Iterator[None]:
    try:
        yield
    except ServiceError as error:
        _fail(str(error))


def _fail(reason: str) -> None:
    print(f"hardlook-serve: {' '.join(reason.split())}", file=sys.stderr)
    sys.exit(_FAILED)
