"""For receivers of the service's webhooks: is this message from the service, unchanged and recent?

message = verify_webhook(request.headers, request.body, secret)
"""

import hmac
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from service.client.errors import HardlookError
from service.webhook_signing import ID_HEADER, SIGNATURE_HEADER, TIMESTAMP_HEADER, signature, signing_key

TOLERANCE_S = 300.0
_SECONDS = re.compile(r"[0-9]{1,15}")


class WebhookRejected(HardlookError):
    """A message that is not to be believed; says why, and nothing of the secret."""


@dataclass(frozen=True)
class WebhookMessage:
    """What the service says.

    Attributes:
        id: the same each time the message is sent: who has seen it can ignore it.
        type: such as 'verdict.unsafe'.
        timestamp: of the event, ISO 8601.
        data: what happened.
    """

    id: str
    type: str
    timestamp: str
    data: Mapping[str, Any]


def verify_webhook(
    headers: Mapping[str, str], body: bytes, secret: str, tolerance_s: float = TOLERANCE_S
) -> WebhookMessage:
    """Verify and read a message.

    Args:
        headers: of the request; case does not matter.
        body: of the request, exactly as it arrived.
        secret: the one in the service's webhooks file.
        tolerance_s: how long ago, or ahead of this clock, it may have been sent.

    Raises:
        WebhookRejected: no signature fits, it was sent at another time, or it is none of the service's.
        ValueError: the secret is none.
    """
    key = signing_key(secret)
    given = {name.lower(): value for name, value in headers.items()}
    missing = [name for name in (ID_HEADER, TIMESTAMP_HEADER, SIGNATURE_HEADER) if name not in given]
    if missing:
        raise WebhookRejected(f"the message has no header {', '.join(missing)}")
    id, timestamp = given[ID_HEADER], given[TIMESTAMP_HEADER]
    if not _SECONDS.fullmatch(timestamp):
        raise WebhookRejected(f"{TIMESTAMP_HEADER} is not a number of seconds")
    expected = signature(key, id, int(timestamp), body).encode()
    offered = given[SIGNATURE_HEADER].encode(errors="replace").split(b" ")  # several while a secret is replaced
    if not any(hmac.compare_digest(expected, one) for one in offered):
        raise WebhookRejected("no signature of the message fits: another secret, or it was changed")
    if abs(time.time() - int(timestamp)) > tolerance_s:
        raise WebhookRejected(f"the message was sent more than {tolerance_s:g} s ago or ahead of this clock")
    try:
        said = json.loads(body)
        message = WebhookMessage(said["id"], said["type"], said["timestamp"], said["data"])
    except (ValueError, KeyError, TypeError) as error:
        raise WebhookRejected("the message is none of this service's") from error
    if message.id != id:
        raise WebhookRejected(f"the message's id is not that of {ID_HEADER}")
    return message
