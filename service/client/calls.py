"""What is sent: one call for each thing that the service is asked, built without sending anything."""

import base64
import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import quote

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
from service.wire_explain import ExplainAnswer, ExplainParameters

AnswerT = TypeVar("AnswerT", bound=BaseModel)
RAW, JSON = "application/octet-stream", "application/json"


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
        status: of a right answer.
        media_type: of a right answer; where it is not JSON and not written to a file, `answer` is `Content`.
        to: where a right answer is written, with `answer` `Saved`; None where it is JSON.
        repeatable: whether doing it twice comes to the same as doing it once. Otherwise it is not sent again where an
            attempt without an answer may have been heard.
    """

    method: str
    path: str
    answer: type[AnswerT]
    params: Mapping[str, Any] = field(default_factory=dict)
    content: bytes | None = field(default=None, repr=False)
    content_type: str | None = None
    files: Sequence[tuple[str, tuple[str, bytes, str]]] | None = field(default=None, repr=False)
    ids: tuple[str, ...] | None = None
    status: int = 200
    media_type: str = JSON
    to: Path | None = None
    repeatable: bool = True


class Saved(BaseModel):
    """A file that the service sent."""

    path: Path
    size_bytes: int


class Content(BaseModel):
    """What the service sent that is no JSON, in memory; of a call with another media type than that."""

    content: bytes


def path_of(*segments: str) -> str:
    """A path below the base URL; segments may hold anything, slashes too.

    Raises:
        ValueError: a segment is empty or cannot be encoded.
    """
    if not all(segments):
        raise ValueError("a name or id is empty")
    return "".join(f"/{_quoted(segment)}" for segment in segments)


def _quoted(segment: str) -> str:
    # Alone they would be steps through the path, and be gone before anything is sent.
    return segment.replace(".", "%2E") if segment in (".", "..") else quote(segment, safe="")


def json_call(
    method: str,
    path: str,
    answer: type[AnswerT],
    body: BaseModel,
    *,
    params: Mapping[str, Any] | None = None,
    status: int = 200,
    repeatable: bool = True,
) -> Call[AnswerT]:
    """A call with a body of JSON; what is None or default in it is left out."""
    content = body.model_dump_json(exclude_defaults=True, exclude_none=True).encode()
    return Call(
        method, path, answer, params or {}, content=content, content_type=JSON, status=status, repeatable=repeatable
    )


def file_call(path: str, to: Path, media_type: str, params: Mapping[str, Any]) -> Call[Saved]:
    """A call whose answer becomes a new file.

    Raises:
        FileExistsError: there is one.
    """
    if os.path.lexists(to):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(to))
    return Call("GET", path, Saved, params, media_type=media_type, to=to)


def given(**params: Any) -> dict[str, Any]:
    """Parameters of a query string, less those that are None."""
    return {name: value for name, value in params.items() if value is not None}


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
    return Call("POST", "/similar", SimilarAnswer, params, content=body, content_type=JSON, ids=("0",))


def explain_call(image: LoadedImage, against: Sequence[str], *, attribute: bool, k: int | None) -> Call[ExplainAnswer]:
    """POST /explain.

    Raises:
        ValueError: a parameter is out of range.
    """
    asked = ExplainParameters(against=list(against) or None, attribute=None if attribute else False, k=k)
    return _with_images("/explain", ExplainAnswer, [image], asked.model_dump(exclude_none=True, mode="json"))


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
        return Call("POST", path, answer, params, content=body, content_type=JSON, ids=ids)
    if len(files) == 1:
        return Call("POST", path, answer, params, content=files[0], content_type=RAW, ids=ids)
    parts = [("image", (str(position), data, RAW)) for position, data in enumerate(files)]
    return Call("POST", path, answer, params, files=parts, ids=ids)


def _json_image(id: str, content: bytes | Url) -> bytes:
    return ImageData(id=id, **image_source(content)).model_dump_json(exclude_none=True).encode()


def image_source(content: bytes | Url) -> dict[str, Any]:
    """An image as the members `data` or `url` of a JSON body."""
    return {"url": content.address} if isinstance(content, Url) else {"data": base64.b64encode(content).decode()}
