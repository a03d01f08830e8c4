"""Pictures that pages show: small ones made from the pixels, never the bytes that somebody has uploaded."""

import asyncio
import base64
from collections.abc import Sequence

from perception.errors import PerceptionError
from service.client import NotFound
from service.console.gate import Visit
from service.errors import ServiceError
from service.wire import NeighborItem

_AT_A_TIME = 8


def data_uri(media_type: str, data: bytes) -> str:
    """A picture that is in the page itself."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


async def preview_of(visit: Visit, content: bytes, frame: int) -> str | None:
    """A small JPEG of one frame of an image file that has a verdict already, as a `data:` URI.

    Args:
        visit: who looks at it.
        content: of the file.
        frame: 0-based number in the file, of one that was examined.

    Returns:
        None where it cannot be made now: the verdict stands without it.
    """
    until_s = asyncio.get_running_loop().time() + visit.runtime.settings.deadline_s
    try:
        preview = await visit.runtime.classifier.preview(content, frame, until_s)
    except (PerceptionError, ServiceError):
        return None
    return data_uri("image/jpeg", preview.jpeg)


async def kept_pictures(visit: Visit, collection: str, neighbors: Sequence[NeighborItem]) -> dict[str, str]:
    """Of which exemplars there is a picture that the visitor may look at.

    Args:
        visit: who asks; without the scope to look at exemplars there is nothing.
        collection: of the exemplars.
        neighbors: that are shown.

    Returns:
        SHA-256 of the image file by id.
    """
    if not visit.may("pools:write") or visit.runtime.settings.keep_images == "none":
        return {}
    places = asyncio.Semaphore(_AT_A_TIME)

    async def sha256_of(id: str) -> tuple[str, str]:
        async with places:
            try:
                item = (await visit.client.collections.exemplar(collection, id)).item
            except NotFound:  # deleted meanwhile
                return id, ""
        return id, item.sha256 if item.image_kept else ""

    found = await asyncio.gather(*(sha256_of(near.id) for near in neighbors))
    return {id: sha256 for id, sha256 in found if sha256}
