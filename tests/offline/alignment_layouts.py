"""Small zips in the layouts of the cue-conflict images, the near-duplicates and the sample triplets."""

import csv
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from perception.testing import encoded, synthetic_image

CUE_COLUMNS = ("file", "shape_class", "texture_class", "human_responses")
GROUP_COLUMNS = ("file", "group", "variant", "repo", "path")
Row = Sequence[str]


def table_zip(
    path: Path, table: str, columns: Sequence[str], rows: Sequence[Row], files: Mapping[str, bytes] | None = None
) -> Path:
    """A zip with a table; without `files`, the n-th row's first column names picture n."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(rows)
    pictures = {row[0]: encoded(synthetic_image(n)) for n, row in enumerate(rows)} if files is None else files
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in pictures.items():
            archive.writestr(name, data)
        archive.writestr(table, text.getvalue())
    return path


def cue_row(file: str, shape: str, texture: str, answers: Mapping[str, int]) -> Row:
    return (file, shape, texture, json.dumps(answers))


def cue_zip(path: Path, rows: Sequence[Row], files: Mapping[str, bytes] | None = None) -> Path:
    return table_zip(path, "labels.csv", CUE_COLUMNS, rows, files)


def groups_zip(path: Path, rows: Sequence[tuple[str, str]], files: Mapping[str, bytes] | None = None) -> Path:
    """Rows are (group, variant)."""
    table = [(f"{group}/{variant}.png", group, variant, "owner/repo", "path") for group, variant in rows]
    return table_zip(path, "groups.csv", GROUP_COLUMNS, table, files)


def colour(red: int, green: int, blue: int) -> bytes:
    """A PNG of one colour."""
    return encoded(Image.new("RGB", (16, 16), (red, green, blue)))
