"""One image file of a set that is nothing without it: here an image that cannot be read ends the reading."""

from pathlib import Path

from PIL.Image import Image

from offline.data.examples import first_view, read_range
from offline.errors import DataError, DataMissing
from perception.errors import ImageError


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
        DataError: files are missing; names one of them, and the layout that was expected.
    """
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(data, f"{len(missing)} of {len(paths)} files are missing, e.g. {missing[0]}; expected {layout}")
