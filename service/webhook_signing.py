"""Signatures of webhooks, by the convention of Standard Webhooks (standardwebhooks.com), version 1.

    signature = "v1," + base64(HMAC-SHA256(key, id + "." + timestamp + "." + body))

The secret is `whsec_` and the key in base64. Light: receivers verify with it through `service.client.webhooks`.
"""

import base64
import binascii
import hashlib
import hmac

ID_HEADER, TIMESTAMP_HEADER, SIGNATURE_HEADER = "webhook-id", "webhook-timestamp", "webhook-signature"
VERSION = "v1"
MIN_KEY_BYTES, MAX_KEY_BYTES = 24, 64
_PREFIX = "whsec_"


def signing_key(secret: str) -> bytes:
    """The key in a secret.

    Raises:
        ValueError: it is none; the message holds nothing of it.
    """
    try:
        if not secret.startswith(_PREFIX):
            raise ValueError(f"a secret begins with {_PREFIX}")
        key = base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except (binascii.Error, UnicodeError):
        raise ValueError(f"a secret is {_PREFIX} and base64") from None
    if not MIN_KEY_BYTES <= len(key) <= MAX_KEY_BYTES:
        raise ValueError(f"a secret has {MIN_KEY_BYTES} to {MAX_KEY_BYTES} bytes in base64, this one has {len(key)}")
    return key


def signature(key: bytes, id: str, timestamp_s: int, body: bytes) -> str:
    """The signature of a message.

    Args:
        key: of `signing_key`.
        id: of the message.
        timestamp_s: when it is sent, in seconds since 1970.
        body: as sent.
    """
    digest = hmac.new(key, f"{id}.{timestamp_s}.".encode() + body, hashlib.sha256).digest()
    return f"{VERSION},{base64.b64encode(digest).decode()}"
