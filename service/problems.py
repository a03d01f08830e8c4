"""Problems: the one table from exceptions to RFC 9457 problem details.

Every leaf of the three exception trees has its row here; a test walks the trees. A row names the members that may be
shown: what is not named stays in the log.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse

from indexer import errors as indexer
from perception import errors as perception
from service import errors as service

TYPE_PREFIX = "urn:hardlook:problem:"
MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 1


@dataclass(frozen=True)
class ProblemKind:
    """What all problems of one type share.

    Attributes:
        status: HTTP status.
        slug: last part of the problem's type.
        title: the same for every occurrence.
        members: attributes of the exception that the problem carries.
        shows_detail: whether the exception's message may be shown to a caller.
    """

    status: int
    slug: str
    title: str
    members: tuple[str, ...] = ()
    shows_detail: bool = True


_INTERNAL = ProblemKind(500, "internal", "The service has a bug", shows_detail=False)
# Errors of building, publishing and starting: a request that meets one has met a bug.
_NOT_OF_REQUESTS: tuple[type[Exception], ...] = (
    perception.UnknownEncoder,
    perception.CheckpointError,
    perception.HubUnreachable,
    perception.GalleryError,
    perception.PolicyError,
    indexer.DuplicateId,
    indexer.SnapshotError,
    indexer.UnknownVersion,
    indexer.SourceError,
    indexer.ManifestError,
    indexer.BuildError,
    service.SettingsError,
    service.DecoderUnavailable,
)
_TOO_MANY_PIXELS = ProblemKind(422, "too-many-pixels", "The image has too many pixels", ("quantity", "limit", "actual"))
KINDS: Mapping[type[Exception], ProblemKind] = {
    **dict.fromkeys(_NOT_OF_REQUESTS, _INTERNAL),
    perception.UnsupportedFormat: ProblemKind(
        415, "unsupported-format", "The image format is not accepted", ("found", "accepted")
    ),
    perception.CorruptImage: ProblemKind(422, "corrupt-image", "The image cannot be decoded", ("reason",)),
    perception.ImageTooLarge: ProblemKind(
        413, "image-too-large", "The image file has too many bytes", ("quantity", "limit", "actual")
    ),
    perception.NonFiniteEmbedding: ProblemKind(
        422, "no-embedding", "The encoder finds nothing in the image to compare", shows_detail=False
    ),
    indexer.UnknownCollection: ProblemKind(
        404, "unknown-gallery", "There is no published gallery of that name", ("name", "known")
    ),
    indexer.InvalidName: ProblemKind(404, "unknown-gallery", "There is no published gallery of that name", ("name",)),
    indexer.InvalidLabel: ProblemKind(422, "invalid-label", "The collection has no such label", ("label", "allowed")),
    indexer.ContentsError: ProblemKind(422, "invalid-exemplar", "The exemplar cannot be taken as it is"),
    perception.FingerprintMismatch: ProblemKind(
        409, "other-encoder", "Another encoder made it than the one that serves", ("expected", "found")
    ),
    indexer.CatalogError: ProblemKind(
        503, "catalog-unavailable", "The catalogue cannot be reached", shows_detail=False
    ),
    indexer.UnknownExemplar: ProblemKind(404, "unknown-exemplar", "There is no exemplar of that id", ("id",)),
    indexer.ExemplarExists: ProblemKind(409, "exemplar-exists", "An exemplar of that id is there already", ("id",)),
    indexer.EditRefused: ProblemKind(409, "edit-refused", "The collection cannot be changed so", ("reason",)),
    indexer.UnknownReview: ProblemKind(404, "unknown-review", "The review queue has no such item", ("id",)),
    indexer.ReviewTaken: ProblemKind(409, "review-taken", "The item is somebody else's, or decided", ("id", "reason")),
    indexer.UnknownJob: ProblemKind(404, "unknown-job", "There is no such job", ("id",)),
    indexer.PoolFileError: ProblemKind(422, "invalid-pool-file", "The file is no sound pool file", ("reason",)),
    service.UnknownDecision: ProblemKind(
        404, "unknown-decision", "No recent verdict of that request or image is kept", ("by", "value")
    ),
    service.UnknownItem: ProblemKind(404, "unknown-item", "There is nothing of that name", ("kind", "name")),
    service.AuditUnusable: ProblemKind(409, "audit-unusable", "The audit cannot be used for this", ("id", "reason")),
    service.EditingDisabled: ProblemKind(409, "editing-disabled", "This service changes no collections"),
    service.MalformedBody: ProblemKind(400, "malformed-body", "The request body is malformed", ("reason",)),
    service.InvalidParameter: ProblemKind(
        400, "invalid-parameter", "A parameter is unknown or out of range", ("name", "reason")
    ),
    service.UnsupportedBody: ProblemKind(
        415, "unsupported-body", "The content type of the body is not accepted", ("found", "accepted")
    ),
    service.BodyTooLarge: ProblemKind(413, "body-too-large", "The request body is too large", ("limit", "actual")),
    service.TooManyImages: ProblemKind(413, "too-many-images", "The request has too many images", ("limit",)),
    service.BodyTimeout: ProblemKind(408, "body-timeout", "The request body did not arrive in time", ("limit_s",)),
    service.TextUnsupported: ProblemKind(422, "text-unsupported", "The encoder cannot search by text", ("encoder",)),
    service.Unauthenticated: ProblemKind(401, "unauthenticated", "A valid API key is needed", ("reason",)),
    service.Forbidden: ProblemKind(403, "forbidden", "The API key does not allow this", ("scope",)),
    service.RateLimited: ProblemKind(429, "rate-limited", "Too many images for this caller", ("limit",)),
    service.FetchDisabled: ProblemKind(422, "fetch-disabled", "This service fetches no URLs"),
    service.UrlRefused: ProblemKind(422, "url-refused", "The URL is not one that is fetched", ("reason",)),
    service.FetchFailed: ProblemKind(422, "fetch-failed", "The URL cannot be fetched", ("reason",)),
    service.FetchTimeout: ProblemKind(422, "fetch-timeout", "The URL's server is too slow", ("limit_s",)),
    service.DecodeLimitExceeded: ProblemKind(
        422, "decode-limit", "Decoding the image takes too much time or memory", ("quantity", "limit")
    ),
    service.DecoderCrashed: ProblemKind(422, "decoder-crashed", "Decoding the image ended the decoder"),
    service.AttributionFailed: ProblemKind(
        422, "no-attribution", "The similarity cannot be attributed to parts of the image", ("reason",)
    ),
    service.NotReady: ProblemKind(503, "not-ready", "The service is not ready", ("reason",)),
    service.Overloaded: ProblemKind(503, "overloaded", "The service is at its capacity", ("queue", "limit")),
    service.WaitTooLong: ProblemKind(503, "wait-too-long", "The answer would come too late", ("expected_s", "limit_s")),
    service.DeadlineExceeded: ProblemKind(504, "deadline-exceeded", "The answer took too long", ("limit_s",)),
}
# What the web framework answers by itself: unknown routes and methods, and the few others it can raise.
_HTTP_SLUGS = {400: "malformed-request", 404: "not-found", 405: "method-not-allowed", 408: "body-timeout"}


def kind_of(error: Exception) -> ProblemKind:
    """The row of an exception; bugs and what is not in the table are internal."""
    if isinstance(error, perception.ImageTooLarge) and error.quantity != "bytes":
        return _TOO_MANY_PIXELS
    return next((KINDS[cls] for cls in type(error).__mro__ if cls in KINDS), _INTERNAL)


def problem(error: Exception, request_id: str) -> dict[str, Any]:
    """The problem details of an exception, ready for JSON."""
    kind = kind_of(error)
    members = {name: _plain(getattr(error, name)) for name in kind.members}
    detail = str(error) if kind.shows_detail else f"{kind.title}; the log has more under this request id"
    return {**members, **_standard(kind.slug, kind.title, kind.status, detail, request_id)}


def http_problem(status: int, detail: str, request_id: str) -> dict[str, Any]:
    """The problem details of an error that the web framework raised."""
    title = HTTPStatus(status).phrase
    return _standard(_HTTP_SLUGS.get(status, "http-error"), title, status, detail, request_id)


def problem_response(error: Exception, request_id: str) -> JSONResponse:
    """The whole answer to an exception."""
    body = problem(error, request_id)
    status = int(body["status"])
    return JSONResponse(body, status_code=status, media_type=MEDIA_TYPE, headers=extra_headers(status, error))


def extra_headers(status: int, error: Exception | None = None) -> dict[str, str]:
    """Headers that go with a status, and with the exception behind it."""
    if status == HTTPStatus.UNAUTHORIZED:
        return {"WWW-Authenticate": "Bearer"}
    if status in (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.TOO_MANY_REQUESTS):
        return {"Retry-After": str(math.ceil(getattr(error, "retry_after_s", RETRY_AFTER_S)))}
    return {}


def _standard(slug: str, title: str, status: int, detail: str, request_id: str) -> dict[str, Any]:
    return {
        "type": TYPE_PREFIX + slug,
        "title": title,
        "status": status,
        "detail": detail,
        "instance": f"urn:hardlook:request:{request_id}",
        "request_id": request_id,
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
