"""Kept pictures of images, for the pages that show them."""

from fastapi import Request
from fastapi.responses import Response

from service.api.images import JPEG
from service.console.gate import visit_of
from service.console.routes import console_router

router = console_router()


@router.get("/console/images/{sha256}")
async def image(request: Request, sha256: str) -> Response:
    """The small picture of an image file, by the file's SHA-256."""
    async with visit_of(request, "review", "pools:write") as visit:
        return Response(await visit.client.images.get(sha256), media_type=JPEG)
