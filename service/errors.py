"""Every exception that the service raises, besides those of perception and indexer.

    ServiceError
    ├── SettingsError              the environment does not make valid settings; start-up only
    ├── DecoderUnavailable         decoding processes do not start; start-up only
    ├── RequestError               the request as a whole; the caller's fault
    │   ├── MalformedBody          not the JSON, multipart or base64 that it claims to be
    │   ├── InvalidParameter       a parameter is unknown, out of range or given twice
    │   ├── UnsupportedBody        a content type that is not accepted
    │   ├── BodyTooLarge           more bytes than a request may have
    │   ├── TooManyImages          more images than a request may have
    │   ├── BodyTimeout            the body did not arrive in time
    │   └── TextUnsupported        a text prompt for an encoder without a text tower
    ├── DecodingError              one image stopped its decoder; the image is at fault
    │   ├── DecodeLimitExceeded    more time or memory than one image may take
    │   └── DecoderCrashed         the decoding process died
    └── Unavailable                the caller may try again
        ├── NotReady               no pools, or shutting down
        ├── Overloaded             a bounded queue is full
        └── DeadlineExceeded       the answer was not there in time

Exceptions carry their data; none knows an HTTP status: `service.problems` does.
"""

from collections.abc import Sequence


class ServiceError(Exception):
    """Root of everything that the service raises on purpose."""


class SettingsError(ServiceError):
    """The environment does not make valid settings."""


class DecoderUnavailable(ServiceError):
    """A decoding process does not start."""


class RequestError(ServiceError):
    """The request as a whole cannot be answered as it stands."""


class MalformedBody(RequestError):
    """The body is not what its content type claims."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"malformed request body: {reason}")


class InvalidParameter(RequestError):
    """One parameter is unknown, of the wrong type, out of range or given twice."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(f"invalid parameter {name!r}: {reason}")


class UnsupportedBody(RequestError):
    """The content type of the body is not accepted."""

    def __init__(self, found: str, accepted: Sequence[str]) -> None:
        self.found, self.accepted = found, tuple(accepted)
        super().__init__(f"unsupported content type {found!r}; accepted: {', '.join(self.accepted)}")


class BodyTooLarge(RequestError):
    """The body has more bytes than a request may have; `actual` is what was declared or had arrived by then."""

    def __init__(self, limit: int, actual: int) -> None:
        self.limit, self.actual = limit, actual
        super().__init__(f"request body too large: at least {actual} bytes, the limit is {limit}")


class TooManyImages(RequestError):
    """The request has more images than it may have."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__(f"too many images: the limit is {limit} a request")


class BodyTimeout(RequestError):
    """The body did not arrive in time."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        super().__init__(f"the request body did not arrive within {limit_s} s")


class TextUnsupported(RequestError):
    """The encoder in use has no text tower."""

    def __init__(self, encoder: str) -> None:
        self.encoder = encoder
        super().__init__(f"encoder {encoder!r} has no text tower: search with an image instead")


class DecodingError(ServiceError):
    """One image stopped its decoder."""


class DecodeLimitExceeded(DecodingError):
    """Decoding takes more than one image may take: `quantity` is 'seconds' or 'bytes of memory'."""

    def __init__(self, quantity: str, limit: float) -> None:
        self.quantity, self.limit = quantity, limit
        super().__init__(f"image cannot be decoded within the limit of {limit} {quantity}")


class DecoderCrashed(DecodingError):
    """The decoding process died of the image."""

    def __init__(self, exit_code: int | None) -> None:
        self.exit_code = exit_code
        super().__init__(f"image cannot be decoded: its decoder ended with code {exit_code}")


class Unavailable(ServiceError):
    """No answer now; the same request may succeed later."""


class NotReady(Unavailable):
    """Nothing to compare with yet, or shutting down."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"not ready: {reason}")


class Overloaded(Unavailable):
    """A bounded queue is full."""

    def __init__(self, queue: str, limit: int) -> None:
        self.queue, self.limit = queue, limit
        super().__init__(f"overloaded: {queue} is full, its limit is {limit}")


class DeadlineExceeded(Unavailable):
    """The answer was not there in time."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        super().__init__(f"no answer within {limit_s} s")
