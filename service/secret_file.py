"""Secrets that several instances share: files with bytes that nobody can guess."""

from pathlib import Path

from service.errors import SettingsError
from service.settings import variable


def read_secret(field: str, file: Path, least_bytes: int) -> bytes:
    """The bytes of a file, without white space around them.

    Args:
        field: setting that names the file.
        file: to read.
        least_bytes: that it must hold.

    Raises:
        SettingsError: the file cannot be read, or holds too little.
    """
    try:
        secret = file.read_bytes().strip()
    except OSError as error:
        raise SettingsError(f"{variable(field)}: {file} cannot be read: {error}") from None
    if len(secret) < least_bytes:
        raise SettingsError(
            f"{variable(field)}: {file} holds {len(secret)} bytes, a secret that cannot be guessed has at least "
            f"{least_bytes}"
        )
    return secret
