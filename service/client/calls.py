"""What is sent: one call for each thing that the service is asked, built without sending anything."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from service.client.images import LoadedImage, Url
from service.wire import (
    ClassifyAnswer,
    ClassifyParameters,
    ImageData,
    PoolsAnswer,
    Ready,
    SimilarAnswer,
    SimilarBody,
    SimilarParameters,
)

AnswerT = TypeVar("AnswerT", bound=BaseModel)
_RAW, _JSON = "application/octet-stream", "application/json"


@dataclass(frozen=True)
class Call(Generic[AnswerT]):
    """One question to the service; it can be asked as often as need be.

    Attributes:
        method: of HTTP.
        path: below the base URL.
        answer: what a right answer is parsed as.
        params: of the query string.
        content: the body, with `content_type`; None where there are `files` or no body.
        files: of a multipart body, by position.
        ids: what the results are called, in order; None where the answer has no results.
    """

    method: str
    path: str
    answer: type[AnswerT]
    params: Mapping[str, Any] = field(default_factory=dict)
    content: bytes | None = field(default=None, repr=False)
    content_type: str | None = None
    files: Sequence[tuple[str, tuple[str, bytes, str]]] | None = field(default=None, repr=False)
    ids: tuple[str, ...] | None = None


def classify_call(images: Sequence[LoadedImage], k: int | None) -> Call[ClassifyAnswer]:
    """POST /classify.

    Raises:
        ValueError: a parameter is out of range.
    """
    params = ClassifyParameters(k=k).model_dump(exclude_none=True)
    return _with_images("/classify", ClassifyAnswer, images, params)


def similar_call(
    images: Sequence[LoadedImage] | None,
    text: str | None,
    *,
    gallery: str | None,
    pool: str | None,
    k: int | None,
    min_similarity: float | None,
) -> Call[SimilarAnswer]:
    """POST /similar, with images or a text.

    Raises:
        ValueError: both or neither, or a parameter is out of range.
    """
    if (images is None) == (text is None):
        raise ValueError("give either images or a text")
    parameters = SimilarParameters.model_validate(
        {"gallery": gallery, "pool": pool, "k": k, "min_similarity": min_similarity}
    )
    params = parameters.model_dump(exclude_none=True, mode="json")
    if images is not None:
        return _with_images("/similar", SimilarAnswer, images, params)
    body = SimilarBody(text=text).model_dump_json(exclude_none=True).encode()
    return Call("POST", "/similar", SimilarAnswer, params, content=body, content_type=_JSON, ids=("0",))


def pools_call() -> Call[PoolsAnswer]:
    """GET /pools."""
    return Call("GET", "/pools", PoolsAnswer)


def ready_call() -> Call[Ready]:
    """GET /readyz."""
    return Call("GET", "/readyz", Ready)


def _with_images(
    path: str, answer: type[AnswerT], images: Sequence[LoadedImage], params: Mapping[str, Any]
) -> Call[AnswerT]:
    """Positions are sent in place of ids, so that no id has to survive the quoting of a header."""
    ids = tuple(image.id for image in images)
    contents = [image.content for image in images]
    files = [content for content in contents if isinstance(content, bytes)]
    if len(files) < len(contents):
        entries = [_json_image(str(position), content) for position, content in enumerate(contents)]
        body = b'{"images":[' + b",".join(entries) + b"]}"
        return Call("POST", path, answer, params, content=body, content_type=_JSON, ids=ids)
    if len(files) == 1:
        return Call("POST", path, answer, params, content=files[0], content_type=_RAW, ids=ids)
    parts = [("image", (str(position), data, _RAW)) for position, data in enumerate(files)]
    return Call("POST", path, answer, params, files=parts, ids=ids)


def _json_image(id: str, content: bytes | Url) -> bytes:
    if isinstance(content, Url):
        image = ImageData(id=id, url=content.address)
    else:
        image = ImageData(id=id, data=base64.b64encode(content).decode())
    return image.model_dump_json(exclude_none=True).encode()
