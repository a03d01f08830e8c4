"""One image file of a set that is nothing without it: here an image that cannot be read ends the reading."""

import zipfile
import zlib
from pathlib import Path

from PIL.Image import Image

from offline.data.examples import LIMITS, first_view, read_range
from offline.errors import DataError, DataMissing
from perception.errors import ImageError, ImageTooLarge

_NAMED = 3  # of the missing files


def read_image_file(path: Path) -> Image:
    """Decode a file's first frame as RGB.

    Raises:
        DataMissing: it is not there.
        DataError: it cannot be decoded, or is over the limits.
    """
    if not path.is_file():
        raise DataMissing(path)
    try:
        return first_view(read_range(path))
    except (ImageError, OSError) as error:
        raise DataError(str(path), f"cannot be read as an image: {error}") from error


def read_image_member(archive: zipfile.ZipFile, name: str, where: str = "") -> Image:
    """Decode the first frame of a zip's member as RGB.

    Args:
        where: of the table that names it, for messages, such as 'labels.csv, row 7'.

    Raises:
        DataError: it is not there, or cannot be decoded, or is over the limits.
    """
    at = f"{where}: {name}" if where else name
    try:
        size = archive.getinfo(name).file_size
        if size > LIMITS.max_bytes:
            raise ImageTooLarge("bytes", LIMITS.max_bytes, size)  # before it is unpacked into memory
        return first_view(archive.read(name))
    except KeyError as error:
        raise DataError(str(archive.filename), f"{at} is not in the archive") from error
    except (ImageError, OSError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        # RuntimeError is what an encrypted member raises, and NotImplementedError for other compression.
        raise DataError(str(archive.filename), f"{at} cannot be read as an image: {error}") from error


def inside(root: Path, name: str, data: str) -> Path:
    """The file that a table calls by a relative name; a table is data, and may hold '..'.

    Raises:
        DataError: it is not below `root`.
    """
    relative = Path(name)
    if not name or relative.is_absolute() or ".." in relative.parts:
        raise DataError(data, f"names the file {name!r}, which is not below {root}")
    return root / relative


def require_files(paths: list[Path], data: str, layout: str) -> None:
    """Find out what is missing before an hour of work, not after.

    Raises:
        DataError: files are missing; names the first of them, and the layout that was expected.
    """
    missing = [path for path in paths if not path.is_file()]
    if missing:
        first = ", ".join(map(str, missing[:_NAMED]))
        raise DataError(data, f"{len(missing)} of {len(paths)} files are missing, e.g. {first}; expected {layout}")
