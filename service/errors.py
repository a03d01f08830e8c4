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
    │   ├── TextUnsupported        a text prompt for an encoder without a text tower
    │   ├── Unauthenticated        no key, or none that is known and in force
    │   ├── UnknownDecision        no recent verdict of that request or image is kept
    │   ├── UnknownItem            no exemplar, version or candidate of that name
    │   ├── AuditUnusable          a robustness audit is damaged, unfinished, or not of what was asked
    │   ├── EditingDisabled        the service runs without a catalogue
    │   ├── Forbidden              the key has not the scope
    │   └── RateLimited            more than the key may ask for; later it may again
    ├── FetchError                 an image that was to be fetched from a URL
    │   ├── FetchDisabled          the operator has not turned fetching on
    │   ├── UrlRefused             not a URL that is fetched: scheme, host, address, port, redirects
    │   ├── FetchFailed            its server did not deliver
    │   └── FetchTimeout           its server did not deliver in time
    ├── DecodingError              one image stopped its decoder; the image is at fault
    │   ├── DecodeLimitExceeded    more time or memory than one image may take
    │   └── DecoderCrashed         the decoding process died
    ├── AttributionFailed          no finite attribution of a similarity to the parts of an image
    └── Unavailable                the caller may try again
        ├── NotReady               no pools, or shutting down
        ├── Overloaded             a bounded queue is full
        ├── WaitTooLong            the answer would not be there in time, so the work is not begun
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


class Unauthenticated(RequestError):
    """The request has no API key, or one that is unknown, revoked or expired; `reason` never holds any of it."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"not authenticated: {reason}")


class Forbidden(RequestError):
    """The API key does not allow what was asked for."""

    def __init__(self, scope: str) -> None:
        self.scope = scope
        super().__init__(f"not allowed: the scope {scope!r} is needed")


class RateLimited(RequestError):
    """More images in a time than the caller may send; `retry_after_s` says when there is room again."""

    def __init__(self, limit: str, retry_after_s: float) -> None:
        self.limit, self.retry_after_s = limit, retry_after_s
        super().__init__(f"rate limit exceeded: the limit is {limit}, try again in {retry_after_s:.0f} s")


class UnknownDecision(RequestError):
    """No recent verdict of that request or image is kept; there may have been one."""

    def __init__(self, by: str, value: str) -> None:
        self.by, self.value = by, value
        super().__init__(f"no recent verdict is kept by {by} {value!r}")


class UnknownItem(RequestError):
    """Nothing of that kind has that name."""

    def __init__(self, kind: str, name: str) -> None:
        self.kind, self.name = kind, name
        super().__init__(f"no {kind} {name!r}")


class AuditUnusable(RequestError):
    """A robustness audit is damaged, unfinished, or has not what was asked for."""

    def __init__(self, id: str, reason: str) -> None:
        self.id, self.reason = id, reason
        super().__init__(f"audit {id!r} cannot be used: {reason}")


class EditingDisabled(RequestError):
    """The service runs without a catalogue, so that nothing can be changed or looked up in it."""

    def __init__(self) -> None:
        super().__init__("the service runs with HARDLOOK_CATALOG=off: collections change by publishing them")


class FetchError(ServiceError):
    """An image could not be fetched from its URL. No message holds the URL's path or query."""


class FetchDisabled(FetchError):
    """This service fetches nothing."""

    def __init__(self) -> None:
        super().__init__("this service fetches no URLs: send the image itself")


class UrlRefused(FetchError):
    """The URL, an address that its host resolves to, or a redirect of it is not one that is fetched."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"URL refused: {reason}")


class FetchFailed(FetchError):
    """The URL's server could not be reached or did not answer with a file."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"URL cannot be fetched: {reason}")


class FetchTimeout(FetchError):
    """The URL's server did not deliver in time."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        super().__init__(f"URL not fetched within {limit_s} s")


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


class AttributionFailed(ServiceError):
    """What a similarity is made of cannot be told: the encoder gives no finite gradients for this image."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"the similarity cannot be attributed to parts of the image: {reason}")


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


class WaitTooLong(Unavailable):
    """What is in progress already would take longer than the deadline allows."""

    def __init__(self, expected_s: float, limit_s: float) -> None:
        self.expected_s, self.limit_s = round(expected_s, 1), limit_s
        self.retry_after_s = max(1.0, expected_s - limit_s)
        super().__init__(f"overloaded: an answer would take about {expected_s:.1f} s, the limit is {limit_s} s")


class DeadlineExceeded(Unavailable):
    """The answer was not there in time."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        super().__init__(f"no answer within {limit_s} s")
