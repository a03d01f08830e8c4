"""Client of the service, for Python programs; needs nothing but httpx and pydantic. docs/client.md shows how.

from service.client import HardlookClient
with HardlookClient("http://127.0.0.1:8000") as client:
    print(client.classify(Path("photo.jpg")).results[0].verdict)
"""

from service.client.clients import AsyncHardlookClient, HardlookClient
from service.client.errors import (
    AnswerNotUnderstood,
    Conflict,
    ConnectionFailed,
    Forbidden,
    HardlookError,
    ImageUnreadable,
    JobUnfinished,
    NotFound,
    ProblemError,
    RateLimited,
    Unauthenticated,
    Unavailable,
)
from service.client.images import Url
from service.client.webhooks import WebhookMessage, WebhookRejected, verify_webhook
from service.wire_collections import NewExemplar

__all__ = [
    "AnswerNotUnderstood",
    "AsyncHardlookClient",
    "Conflict",
    "ConnectionFailed",
    "Forbidden",
    "HardlookClient",
    "HardlookError",
    "ImageUnreadable",
    "JobUnfinished",
    "NewExemplar",
    "NotFound",
    "ProblemError",
    "RateLimited",
    "Unauthenticated",
    "Unavailable",
    "Url",
    "WebhookMessage",
    "WebhookRejected",
    "verify_webhook",
]
