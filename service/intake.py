"""Intake: from the three forms of a request to image bytes, a text and parameters.

The one place where bodies are read, so the one place that counts their bytes. Starlette's own body limit answers in
plain text and without a request id, whatever the application would have said; so the count is here. Nothing of a body
is written to disk.
"""

import asyncio
import base64
import binascii
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import parse_qsl

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from perception.errors import ImageTooLarge
from service.classifier import RemoteImage
from service.errors import (
    BodyTimeout,
    BodyTooLarge,
    InvalidParameter,
    MalformedBody,
    ServiceError,
    TooManyImages,
    UnsupportedBody,
)
from service.settings import Settings
from service.wire import MAX_ID_CHARS, MAX_TEXT_CHARS, ClassifyBody, ImageData, SimilarBody
from service.wire_explain import ExplainBody

JSON, MULTIPART, RAW = "application/json", "multipart/form-data", "application/octet-stream"
URLENCODED = "application/x-www-form-urlencoded"
ACCEPTED_BODIES = (MULTIPART, "image/*", RAW, JSON)
_MAX_FIELDS = 16
_MAX_FORM_FIELDS = 64
_MAX_FIELD_BYTES = 64 * 1024

Body = ClassifyBody | SimilarBody | ExplainBody
ParametersT = TypeVar("ParametersT", bound=BaseModel)


@dataclass(frozen=True)
class Upload:
    """One image of a request.

    Attributes:
        id: the caller's id or file name, else the position.
        content: the file's bytes, where to fetch them, or why there are none.
    """

    id: str
    content: bytes | RemoteImage | ImageTooLarge | MalformedBody


@dataclass(frozen=True)
class Submission:
    """What a request asks about: images, or a text.

    Attributes:
        uploads: images, in order.
        text: a prompt, or None.
        parameters: what the body said besides, as the names and unchecked values of parameters.
    """

    uploads: tuple[Upload, ...]
    text: str | None = None
    parameters: tuple[tuple[str, object], ...] = ()


async def read_submission(request: Request, body_type: type[Body], settings: Settings) -> Submission:
    """Read a request's body in whichever form it comes.

    Args:
        request: with an unread body.
        body_type: of JSON bodies; it also says whether a text is accepted.
        settings: for the limits.

    Raises:
        RequestError: what is wrong with the body as a whole; errors of single images are in their `Upload`.
    """
    # A body without a type is a sequence of bytes (RFC 9110, 8.3); what it is, the decoder finds out.
    content_type = request.headers.get("content-type", RAW).partition(";")[0].strip().lower()
    try:
        async with asyncio.timeout(settings.deadline_s) as timer:
            if content_type == MULTIPART:
                return await _read_multipart(request, body_type, settings)
            if content_type == JSON:
                body = await _read_all(request, settings.max_body_bytes)
                return await asyncio.to_thread(_parse_json, body, body_type, settings)
            if content_type == RAW or content_type.startswith("image/"):
                return Submission((Upload("0", await _read_all(request, settings.max_body_bytes)),))
    except TimeoutError as error:
        if not timer.expired():
            raise
        raise BodyTimeout(settings.deadline_s) from error
    raise UnsupportedBody(content_type, ACCEPTED_BODIES)


@dataclass(frozen=True)
class Form:
    """What a page's form brought.

    Attributes:
        fields: values by name; of several with one name the last.
        files: file name and content, or why there is none, by the name of the field; of several the last. Fields that
            no file was chosen for are left out.
    """

    fields: Mapping[str, str]
    files: Mapping[str, tuple[str, bytes | ImageTooLarge]]


async def read_form(request: Request, settings: Settings) -> Form:
    """Read the body that a browser sends for a form, of either kind.

    Raises:
        RequestError: what is wrong with it.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type not in (URLENCODED, MULTIPART):
        raise UnsupportedBody(content_type, (URLENCODED, MULTIPART))
    try:
        async with asyncio.timeout(settings.deadline_s) as timer:
            if content_type == MULTIPART:
                return await _read_multipart_form(request, settings)
            body = await _read_all(request, min(settings.max_body_bytes, _MAX_FIELD_BYTES))
    except TimeoutError as error:
        if not timer.expired():
            raise
        raise BodyTimeout(settings.deadline_s) from error
    try:
        pairs = parse_qsl(
            body.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=_MAX_FORM_FIELDS
        )
    except ValueError as error:
        raise MalformedBody(f"the form cannot be read: {error}") from error
    return Form(dict(pairs), {})


async def _read_multipart_form(request: Request, settings: Settings) -> Form:
    fields: dict[str, str] = {}
    files: dict[str, tuple[str, bytes | ImageTooLarge]] = {}
    async with _parsed_form(request, settings) as items:
        for name, value in items:
            if not isinstance(value, UploadFile):
                fields[name] = value
            elif value.filename or value.size:  # a browser sends an empty part where no file was chosen
                file_name = (value.filename or "")[:MAX_ID_CHARS]
                files[name] = file_name, await _file_content(value, settings.max_image_bytes)
    return Form(fields, files)


async def read_json(request: Request, body_type: type[ParametersT], settings: Settings) -> ParametersT:
    """Read a request's body, which can only be JSON of one model.

    Raises:
        RequestError: what is wrong with it.
    """
    content_type = request.headers.get("content-type", JSON).partition(";")[0].strip().lower()
    if content_type != JSON:
        raise UnsupportedBody(content_type, (JSON,))
    try:
        async with asyncio.timeout(settings.deadline_s) as timer:
            body = await _read_all(request, settings.max_body_bytes)
    except TimeoutError as error:
        if not timer.expired():
            raise
        raise BodyTimeout(settings.deadline_s) from error
    try:
        return await asyncio.to_thread(body_type.model_validate_json, body)
    except ValidationError as error:
        raise _json_error(error) from error


def image_content(image: ImageData) -> bytes | RemoteImage | MalformedBody:
    """An image's bytes, where to fetch them, or what is wrong with its base64."""
    return RemoteImage(image.url) if image.url is not None else _decode_base64(image.data or "")


def merge_parameters(query: ParametersT, submission: Submission) -> ParametersT:
    """Join the parameters of the query string with those of the body.

    Raises:
        InvalidParameter: one is unknown, out of range, or in both places.
    """
    merged = query.model_dump(exclude_unset=True)
    for name, value in submission.parameters:
        if name in merged:
            raise InvalidParameter(name, "it is given more than once")
        merged[name] = value
    try:
        return type(query).model_validate(merged)
    except ValidationError as error:
        raise invalid_parameter(error.errors(include_url=False)) from error


def invalid_parameter(errors: Sequence[object]) -> InvalidParameter:
    """The first of pydantic's errors as ours."""
    first = errors[0]
    assert isinstance(first, dict)
    name = str(first["loc"][-1]) if first["loc"] else ""
    return InvalidParameter(name[:MAX_ID_CHARS], first["msg"])


async def _counted(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """The body chunk by chunk, up to the limit; chunked bodies have no declared length."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise BodyTooLarge(limit, int(declared))
    actual = 0
    async for chunk in request.stream():
        actual += len(chunk)
        if actual > limit:
            raise BodyTooLarge(limit, actual)
        yield chunk


async def _read_all(request: Request, limit: int) -> bytes:
    return b"".join([chunk async for chunk in _counted(request, limit)])


async def _read_multipart(request: Request, body_type: type[Body], settings: Settings) -> Submission:
    async with _parsed_form(request, settings) as items:
        uploads: list[Upload] = []
        fields: dict[str, str] = {}
        for name, value in items:
            if isinstance(value, UploadFile):
                upload_id = (value.filename or str(len(uploads)))[:MAX_ID_CHARS]
                uploads.append(Upload(upload_id, await _file_content(value, settings.max_image_bytes)))
            elif name in fields:
                raise InvalidParameter(name[:MAX_ID_CHARS], "it is given more than once")
            else:
                fields[name] = value
    text = fields.pop("text", None) if "text" in body_type.model_fields else None
    return _checked(tuple(uploads), text, tuple(fields.items()))


@asynccontextmanager
async def _parsed_form(request: Request, settings: Settings) -> AsyncIterator[list[tuple[str, str | UploadFile]]]:
    """Names and values of a multipart body; its files are closed at the end."""
    parser = MultiPartParser(
        request.headers,
        _counted(request, settings.max_body_bytes),
        max_files=settings.max_images_per_request,
        max_fields=_MAX_FIELDS,
        max_part_size=_MAX_FIELD_BYTES,
    )
    parser.spool_max_size = settings.max_body_bytes  # of this parser alone: files stay in memory
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise TooManyImages(settings.max_images_per_request) from error
        raise MalformedBody(error.message) from error
    try:
        yield form.multi_items()
    finally:
        await form.close()


async def _file_content(file: UploadFile, limit: int) -> bytes | ImageTooLarge:
    if (file.size or 0) > limit:
        return ImageTooLarge("bytes", limit, file.size or 0)
    return await file.read()


def _parse_json(body: bytes, body_type: type[Body], settings: Settings) -> Submission:
    try:
        parsed = body_type.model_validate_json(body)
    except ValidationError as error:
        raise _json_error(error) from error
    images = parsed.images or []
    if len(images) > settings.max_images_per_request:
        raise TooManyImages(settings.max_images_per_request)
    uploads = tuple(
        Upload(str(position) if image.id is None else image.id, image_content(image))
        for position, image in enumerate(images)
    )
    given = parsed.model_dump(exclude_unset=True, exclude={"images", "text"})
    return _checked(uploads, getattr(parsed, "text", None), tuple(given.items()))


def _json_error(error: ValidationError) -> ServiceError:
    """Parameters keep their error whichever way they come; the rest is the body's."""
    first = error.errors(include_url=False)[0]
    location = [str(part) for part in first["loc"]]
    if len(location) == 1 and location != ["images"]:
        return invalid_parameter([first])
    reason = first["msg"].removeprefix("Value error, ")
    return MalformedBody(f"{'.'.join(location)[:MAX_ID_CHARS]}: {reason}".removeprefix(": "))


def _decode_base64(data: str) -> bytes | MalformedBody:
    if data.startswith("data:"):
        header, comma, data = data.partition(",")
        if not comma or not header.endswith(";base64"):
            return MalformedBody("a data: URI must look like data:image/png;base64,...")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        return MalformedBody(f"image data is not base64: {error}")


def _checked(uploads: tuple[Upload, ...], text: str | None, parameters: tuple[tuple[str, object], ...]) -> Submission:
    if text is not None and uploads:
        raise InvalidParameter("text", "send images or a text, not both")
    if text is not None and not text.strip():
        raise InvalidParameter("text", "it is empty")
    if text is not None and len(text) > MAX_TEXT_CHARS:
        raise InvalidParameter("text", f"it has {len(text)} characters, the limit is {MAX_TEXT_CHARS}")
    if text is None and not uploads:
        raise MalformedBody("it has no image")
    return Submission(uploads, text, parameters)
