"""ManifestSource: the images that a CSV file lists."""

import csv
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TextIO

from indexer.contents import POOL_LABELS, Kind
from indexer.errors import ManifestError, SourceError
from indexer.sources.item import Skipped, SourceItem, as_text, read_regular_file, stamp_of
from perception.image import ImageLimits

_REQUIRED = ("path", "label")


class ManifestSource:
    """Reads a UTF-8 CSV with a header: `path` and `label`, optionally `id`; all other columns become metadata.

    Paths are relative to the CSV's folder, or absolute. The id is the path where there is no column `id`. The whole
    list is checked before anything is encoded: a wrong line is the operator's mistake and stops the build, unlike an
    image that cannot be read.
    """

    def __init__(self, path: Path, kind: Kind, max_bytes: int = ImageLimits.max_bytes) -> None:
        """Read and check the list.

        Args:
            path: the CSV file.
            kind: of the collection that is built.
            max_bytes: larger image files are skipped unread.

        Raises:
            SourceError: the file cannot be read.
            ManifestError: a line is wrong; names it.
        """
        self._path, self._kind, self._max_bytes = path, kind, max_bytes
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                self._items = tuple(self._parse(file))
        except OSError as error:
            raise SourceError(path, f"cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise SourceError(path, f"is not UTF-8: {error.reason} at byte {error.start}") from error

    @property
    def identity(self) -> str:
        """See `Source.identity`."""
        return f"manifest {as_text(os.path.realpath(self._path))}"

    def count(self) -> int:
        """See `Source.count`."""
        return len(self._items)

    def __iter__(self) -> Iterator[SourceItem | Skipped]:
        """See `Source.__iter__`."""
        return iter(self._items)

    def _parse(self, file: TextIO) -> Iterator[SourceItem]:
        reader = csv.reader(file, strict=True)
        first_line_of: dict[str, int] = {}
        try:
            header = next(reader, [])
            self._check_header(header)
            for cells in reader:
                if not cells:  # a blank line
                    continue
                item = self._item(header, cells, reader.line_num)
                if item.id in first_line_of:
                    reason = f"id {item.id!r} is already on line {first_line_of[item.id]}"
                    raise ManifestError(self._path, reader.line_num, reason)
                first_line_of[item.id] = reader.line_num
                yield item
        except csv.Error as error:
            raise ManifestError(self._path, reader.line_num, str(error)) from error

    def _check_header(self, header: list[str]) -> None:
        missing = [name for name in _REQUIRED if name not in header]
        if missing:
            raise ManifestError(self._path, 1, f"column {', '.join(missing)} missing; found: {', '.join(header)}")
        if len(set(header)) != len(header):
            raise ManifestError(self._path, 1, f"a column occurs twice: {', '.join(header)}")

    def _item(self, header: list[str], cells: list[str], line: int) -> SourceItem:
        if len(cells) != len(header):
            raise ManifestError(self._path, line, f"{len(cells)} cells, the header has {len(header)}")
        row = dict(zip(header, cells, strict=True))
        path, label = row.pop("path"), row.pop("label")
        if not path:
            raise ManifestError(self._path, line, "the path is empty")
        if not label:
            raise ManifestError(self._path, line, "the label is empty")
        if self._kind == "pools" and label not in POOL_LABELS:
            raise ManifestError(self._path, line, f"label {label!r} is not one of {', '.join(POOL_LABELS)}")
        id = row.pop("id", path)
        if not id:
            raise ManifestError(self._path, line, "the id is empty")
        file = self._path.parent / path
        return SourceItem(id, label, path, row, stamp_of(file), partial(read_regular_file, file, self._max_bytes))
