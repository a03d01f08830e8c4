"""Kept pictures: what reviewers and operators look at. There are none unless the operator has turned that on."""

from collections.abc import Iterable
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response

from service.errors import UnknownItem
from service.image_keeping import ImageKeeper
from service.runtime import caller_of, runtime_of
from service.schemas import problem_responses

router = APIRouter()
JPEG = "image/jpeg"
ImageSha256 = Annotated[
    str,
    Path(
        pattern=r"^[0-9a-f]{64}$",
        description="SHA-256 of the image file.",
        examples=["9f2c1d52a1f0c9e6b7a83d4e5f60718293a4b5c6d7e8f9010203040506070809"],
    ),
]
_FILE: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}


@router.get(
    "/images/{sha256}",
    summary="What does this image look like?",
    responses={**problem_responses(400, 401, 403, 404, 500, 503), 200: {"content": {JPEG: _FILE}}},
    response_class=Response,
)
async def image(request: Request, sha256: ImageSha256) -> Response:
    """A small picture of an image that is in the review queue, or is an exemplar, for people to look at.

    At most 512 pixels wide and high, upright, without metadata, and never the file that was sent. Pictures are kept
    only where HARDLOOK_KEEP_IMAGES says so. Takes the scope `review` or `pools:write`.
    """
    caller = await caller_of(request, None, images=0)
    if "pools:write" not in caller.scopes:
        caller.require("review")
    keeper = keeper_of(request)
    found = None if keeper is None else await keeper.read(sha256)
    if found is None:
        raise UnknownItem("kept image", sha256)
    headers = {"Cache-Control": "no-store", "Content-Disposition": f"inline; filename={sha256}.jpg"}
    return Response(found, media_type=JPEG, headers=headers)


def keeper_of(request: Request) -> ImageKeeper | None:
    """What keeps pictures; None where nothing does."""
    books = runtime_of(request).books
    return None if books is None else books.images


async def kept_among(request: Request, sha256s: Iterable[str]) -> frozenset[str]:
    """Of which of some image files there are pictures."""
    keeper = keeper_of(request)
    return frozenset() if keeper is None else await keeper.kept(sha256s)
