"""Client of the service, for Python programs; needs nothing but httpx and pydantic. docs/client.md shows how.

from service.client import HardlookClient
with HardlookClient("http://127.0.0.1:8000") as client:
    print(client.classify(Path("photo.jpg")).results[0].verdict)
"""

from service.client.clients import AsyncHardlookClient, HardlookClient
from service.client.errors import (
    AnswerNotUnderstood,
    ConnectionFailed,
    Forbidden,
    HardlookError,
    ImageUnreadable,
    ProblemError,
    RateLimited,
    Unauthenticated,
    Unavailable,
)
from service.client.images import Url

__all__ = [
    "AnswerNotUnderstood",
    "AsyncHardlookClient",
    "ConnectionFailed",
    "Forbidden",
    "HardlookClient",
    "HardlookError",
    "ImageUnreadable",
    "ProblemError",
    "RateLimited",
    "Unauthenticated",
    "Unavailable",
    "Url",
]
