"""What the client takes as an image, and how it becomes bytes. Reading is bounded and never waits for a pipe."""

import io
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from service.client.errors import ImageUnreadable
from service.wire import MAX_URL_CHARS

URL_SCHEMES = ("http://", "https://")


@dataclass(frozen=True)
class Url:
    """An image that the service fetches; only where its HARDLOOK_FETCH is on.

    Raises:
        ValueError: not http or https, or longer than the service takes.
    """

    address: str

    def __post_init__(self) -> None:
        if not self.address.lower().startswith(URL_SCHEMES):
            raise ValueError("a Url must start with https:// or http://")
        if len(self.address) > MAX_URL_CHARS:
            raise ValueError(f"a Url has at most {MAX_URL_CHARS} characters, this one {len(self.address)}")


Source: TypeAlias = bytes | bytearray | memoryview | Path | BinaryIO | Url
Named: TypeAlias = tuple[str, Source]
Images: TypeAlias = Source | Named | Sequence[Source | Named]


@dataclass(frozen=True)
class LoadedImage:
    """One image that is ready to be sent.

    Attributes:
        id: the caller's, else the name of the file, else the position.
        content: the file's bytes, or where the service is to fetch them.
        named: whether the id is the caller's.
    """

    id: str
    content: bytes | Url = field(repr=False)
    named: bool = False


def load_images(images: Images, max_image_bytes: int) -> list[LoadedImage]:
    """Read everything that one request is to send.

    Args:
        images: one image or several.
        max_image_bytes: of each.

    Raises:
        ImageUnreadable: see `load_image`.
        TypeError: something else than an image; a str above all, which could be a path, a URL or data.
        ValueError: an empty sequence.
    """
    each: Sequence[Source | Named] = each_of(images)
    return [load_named(item, position, max_image_bytes) for position, item in enumerate(each)]


def each_of(items: Any) -> Sequence[Any]:
    """One thing or several as several; what each is remains to be found out.

    Raises:
        ValueError: an empty sequence.
    """
    several = isinstance(items, list) or (isinstance(items, tuple) and not _is_named(items))
    if several and not items:
        raise ValueError("there are no images to send")
    return items if several else [items]


def _is_named(item: object) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)


def load_named(item: Source | Named, position: int, max_image_bytes: int) -> LoadedImage:
    """Read one image of several; errors are those of `load_images`."""
    if isinstance(item, tuple):
        if not _is_named(item):
            raise TypeError("a named image is a pair (id, image) with a str as id")
        return LoadedImage(item[0], load_image(item[1], max_image_bytes), named=True)
    name = item.name if isinstance(item, Path) else str(position)
    return LoadedImage(name, load_image(item, max_image_bytes))


def load_image(source: Source, max_image_bytes: int) -> bytes | Url:
    """The bytes of one image; a `Url` stays what it is.

    Raises:
        ImageUnreadable: no such file, not a regular file, too large, or the system refuses.
        TypeError: not an image.
    """
    if isinstance(source, Url):
        return source
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
    elif isinstance(source, Path):
        data = read_file(source, max_image_bytes)
    elif hasattr(source, "read"):
        data = source.read(max_image_bytes + 1)
        if not isinstance(data, bytes):
            raise TypeError("open image files in binary mode")
    else:
        raise TypeError(
            f"an image is bytes, a Path, a binary file or a Url, got {type(source).__name__}; "
            "a str says not which: use Path(...) or Url(...)"
        )
    if len(data) > max_image_bytes:
        raise ImageUnreadable(f"image too large: more than {max_image_bytes} bytes")
    return data


def read_file(path: Path, max_bytes: int) -> bytes:
    """The bytes of a regular file.

    Raises:
        ImageUnreadable: no such file, not a regular file, too large, or the system refuses.
    """
    try:
        with io.BufferedReader(io.FileIO(path, opener=_not_waiting)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ImageUnreadable(f"{path} is not a regular file")
            if status.st_size > max_bytes:
                raise ImageUnreadable(f"{path} has {status.st_size} bytes, the limit is {max_bytes}")
            return file.read(max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ImageUnreadable(f"{path} cannot be read: {reason}") from error


def _not_waiting(path: str, flags: int) -> int:
    """Opens; a named pipe would otherwise wait for its writer."""
    return os.open(path, flags | os.O_NONBLOCK)
