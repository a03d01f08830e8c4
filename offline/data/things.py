"""Reader of THINGS odd-one-out: triplets of concept images, and which of the three people call the odd one.

Owns the published layouts (methods 6.3): the table of 4.7M choices with the list of one image a concept, and DreamSim's
list of triplets. Decodes no image and knows no encoder.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from offline.data.files import inside, require_files
from offline.errors import DataError

Variant = Literal["triplets", "dreamsim"]
CONCEPTS = 1854
TABLE_NAME = "triplets_large_final_correctednc_correctedorder.csv"
LIST_NAME, VALSET_NAME = "things_first_imgs_idx.txt", "things_valset.txt"
LAYOUT = (
    f"{TABLE_NAME} (OSF project f5rn6, folder data/triplet_dataset; here, in triplet_dataset/ "
    f"or in data/triplet_dataset/), {LIST_NAME} (text of {CONCEPTS} paths, in line i the image of concept i) and "
    "Images/<path> (the images of the dataset THINGS, OSF project jum2f)"
)
DREAMSIM_LAYOUT = (
    f"{VALSET_NAME} (OSF project b2a4j; rows of three names, of which the third is the odd one), and the images as "
    "<name>.png, in Images/ or beside it"
)
_TABLE_FOLDERS = ("", "triplet_dataset", "data/triplet_dataset")
_COLUMNS = ("image1", "image2", "image3", "choice")


@dataclass(frozen=True, eq=False)
class OddOneOutTriplets:
    """Triplets and what people chose.

    Attributes:
        images: files; those of the concepts for the table, of the names in the order of their first appearance for the
            list of DreamSim.
        triplets: (n, 3) int64, rows of `images`; no image is in one twice.
        odd: (n,) int64, which of the three people call the odd one, from 0.
    """

    images: tuple[Path, ...]
    triplets: NDArray[np.int64]
    odd: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.triplets)

    @property
    def used(self) -> NDArray[np.int64]:
        """(m,) rows of the images that the triplets hold, rising."""
        return np.unique(self.triplets)


def read_things(
    folder: Path,
    variant: Variant = "triplets",
    limit: int = 0,
    *,
    table: Path | None = None,
    image_list: Path | None = None,
    images: Path | None = None,
) -> OddOneOutTriplets:
    """Read the triplets; all image files that they need are there.

    Args:
        folder: that holds the data set.
        variant: 'triplets' for the table of THINGS, 'dreamsim' for DreamSim's list.
        limit: the first so many triplets, 5,000 for the paper's figures; 0 for all.
        table, image_list, images: of the table or the list of triplets, the list of images and the folder of images,
            where they are not at their published places below `folder`.

    Raises:
        DataError: something is missing, with the layout that was expected; or a row is malformed, with file, line and
            value.
    """
    if variant not in get_args(Variant):
        raise DataError("THINGS", f"variant must be one of {get_args(Variant)}, got {variant!r}")
    if limit < 0:
        raise DataError("THINGS", f"limit must be at least 0, got {limit}")
    root = images or next((path for path in (folder / "Images", folder / "images") if path.is_dir()), folder)
    if variant == "dreamsim":
        found = _read_valset(table or folder / VALSET_NAME, root, limit)
        layout = DREAMSIM_LAYOUT
    else:
        path = table or _table_in(folder)
        files = _read_list(image_list or folder / LIST_NAME, root)
        found = OddOneOutTriplets(files, *_read_table(path, len(files), limit))
        layout = LAYOUT
    require_files([found.images[row] for row in found.used.tolist()], "THINGS", layout)
    return found


# --- the table -------------------------------------------------------------------------------------------------------


def _table_in(folder: Path) -> Path:
    places = [folder / part / TABLE_NAME for part in _TABLE_FOLDERS]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise DataError("THINGS", f"{places[0]} is not there; expected {LAYOUT}")
    return found


def _read_list(path: Path, root: Path) -> tuple[Path, ...]:
    lines = _lines(path, LAYOUT)
    files = []
    for number, line in enumerate(lines, 1):
        name = line.strip().strip('"')
        if not name:
            raise DataError("THINGS", f"{path}, line {number}: expected the path of an image, got {line!r}")
        files.append(inside(root, name, f"{path}, line {number}"))
    if len(set(files)) < len(files):
        twice = next(file for file in files if files.count(file) > 1)
        raise DataError("THINGS", f"{path} lists {twice.relative_to(root)} twice; expected one image a concept")
    return tuple(files)


def _read_table(path: Path, concepts: int, limit: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(n, 3) rows of images and (n,) which is odd, both from 0."""
    columns, skip = _columns(path)
    values = _parsed_quickly(path, columns, skip, limit)
    if values is None or not _is_sound(values, concepts):
        values = _parsed_by_line(path, columns, skip, limit, concepts)
    if not len(values):
        raise DataError("THINGS", f"{path} holds no triplet")
    return values[:, :3] - 1, values[:, 3] - 1


def _columns(path: Path) -> tuple[tuple[int, int, int, int], int]:
    """Where image1, image2, image3 and choice stand, and how many lines the header has.

    Names count whatever their case, quotes and underscores. A table that begins with four numbers has no header.
    """
    try:
        with path.open(encoding="latin-1", newline="") as file:
            fields = file.readline(65536).removeprefix("\xef\xbb\xbf").rstrip("\r\n").split("\t")
    except OSError as error:
        raise DataError("THINGS", f"{path} cannot be read: {error}; expected {LAYOUT}") from error
    if len(fields) >= 4 and all(field.strip().isdecimal() for field in fields[:4]):
        return (0, 1, 2, 3), 0
    names = [field.strip().strip('"').lower().replace("_", "").replace(" ", "") for field in fields]
    if not all(names.count(name) == 1 for name in _COLUMNS):
        expected = ", ".join(_COLUMNS)
        raise DataError("THINGS", f"{path}, line 1: expected a TAB-separated header with {expected}, got {fields[:8]}")
    first, second, third, choice = (names.index(name) for name in _COLUMNS)
    return (first, second, third, choice), 1


def _parsed_quickly(path: Path, columns: tuple[int, ...], skip: int, limit: int) -> NDArray[np.int64] | None:
    """(n, 4) as they stand; None where a row is not four numbers, which `_parsed_by_line` then names."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of a number with a point, and of no rows
            return np.loadtxt(
                path,
                dtype=np.int64,
                comments=None,
                delimiter="\t",
                skiprows=skip,
                usecols=columns,
                ndmin=2,
                encoding="latin-1",
                max_rows=limit or None,
            )
    except (ValueError, Warning):
        return None


def _is_sound(values: NDArray[np.int64], concepts: int) -> bool:
    ids, choices = values[:, :3], values[:, 3]
    within = ids.min() >= 1 and ids.max() <= concepts and choices.min() >= 1 and choices.max() <= 3
    return bool(within) and not bool(_twice(ids).any())


def _twice(ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(n,) whether a triplet (n, 3) holds an image more than once."""
    same: NDArray[np.bool_] = (ids[:, 0] == ids[:, 1]) | (ids[:, 0] == ids[:, 2]) | (ids[:, 1] == ids[:, 2])
    return same


def _parsed_by_line(path: Path, columns: tuple[int, ...], skip: int, limit: int, concepts: int) -> NDArray[np.int64]:
    """The same, slowly; raises for the first row that is malformed."""
    rows: list[list[int]] = []
    with path.open(encoding="latin-1", newline="") as file:
        for number, line in enumerate(file, 1):
            if number <= skip or not line.strip():
                continue
            rows.append(_row(line.rstrip("\r\n").split("\t"), columns, concepts, f"{path}, line {number}"))
            if len(rows) == limit:
                break
    return np.array(rows, dtype=np.int64).reshape(-1, 4)


def _row(fields: list[str], columns: tuple[int, ...], concepts: int, at: str) -> list[int]:
    if len(fields) <= max(columns):
        raise DataError("THINGS", f"{at}: expected at least {max(columns) + 1} TAB-separated columns, got {fields}")
    row = []
    for name, column in zip(_COLUMNS, columns, strict=True):
        text, most = fields[column].strip(), 3 if name == "choice" else concepts
        if not (text.isascii() and text.isdecimal() and len(text) <= 9 and 1 <= int(text) <= most):
            raise DataError("THINGS", f"{at}: {name} must be a whole number from 1 to {most}, got {fields[column]!r}")
        row.append(int(text))
    if len(set(row[:3])) < 3:
        raise DataError("THINGS", f"{at}: expected three different images, got {row[:3]}")
    return row


# --- DreamSim's list -------------------------------------------------------------------------------------------------


def _read_valset(path: Path, root: Path, limit: int) -> OddOneOutTriplets:
    rows: dict[str, int] = {}
    files: list[Path] = []
    triplets = []
    for number, line in enumerate(_lines(path, DREAMSIM_LAYOUT), 1):
        names, at = line.split(), f"{path}, line {number}"
        if len(names) != 3 or len(set(names)) != 3:
            raise DataError("THINGS", f"{at}: expected three different names, got {line!r}")
        for name in names:
            if name not in rows:
                rows[name] = len(files)
                files.append(inside(root, f"{name}.png", at))
        triplets.append([rows[name] for name in names])
        if len(triplets) == limit:
            break
    return OddOneOutTriplets(tuple(files), np.array(triplets, dtype=np.int64), np.full(len(triplets), 2))


def _lines(path: Path, layout: str) -> list[str]:
    """Of a text file that holds at least one; blank ones at its end are none."""
    try:
        lines = path.read_text("utf-8-sig").rstrip().splitlines()
    except FileNotFoundError as error:
        raise DataError("THINGS", f"{path} is not there; expected {layout}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("THINGS", f"{path} cannot be read as text: {error}") from error
    if not lines:
        raise DataError("THINGS", f"{path} is empty; expected {layout}")
    return lines
