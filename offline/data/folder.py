"""FolderImages: image files below a folder, labelled by their first sub-folder."""

import os
from collections.abc import Iterator
from pathlib import Path

from PIL.Image import Image

from offline.data.classes import Naming, index_classes, name_classes
from offline.data.examples import IndexedImages, first_view, read_range
from offline.errors import DataMissing
from perception.image import IMAGE_EXTENSIONS


class FolderImages(IndexedImages):
    """The files with an image's extension, in name order; the id is the path relative to the folder, with '/'.

    The class is the first sub-folder; a file beside the sub-folders is unlabelled. Links to files within the folder
    are followed; all others, and links to folders, are left out.
    """

    def __init__(self, root: Path, naming: Naming, name: str) -> None:
        """List the folder.

        Raises:
            DataMissing: it is not a folder.
            DataError: it holds no image.
            PlanError: the naming does not fit the sub-folders.
        """
        if not root.is_dir():
            raise DataMissing(root)
        self._root = os.path.realpath(root)
        problems: list[str] = []
        ids = list(_walk(self._root, problems))
        folders = (id.partition("/") for id in ids)
        labels, found = index_classes([first if slash else None for first, slash, _ in folders])
        super().__init__(name, ids, labels, name_classes(found, naming), problems)

    def _image(self, index: int) -> Image:
        return first_view(read_range(f"{self._root}/{self._ids[index]}"))


def _walk(root: str, problems: list[str]) -> Iterator[str]:
    """Relative paths of the images; a stack, since a tree can be deeper than Python's."""
    pending = [""]
    while pending:
        relative = pending.pop()
        if relative and not relative.endswith("/"):
            yield relative
            continue
        try:
            with os.scandir(f"{root}/{relative}") as entries:
                listed = sorted(entries, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            problems.append(f"{relative or '.'}: cannot be listed: {error.strerror}")
            continue
        for entry in listed:
            name = f"{relative}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                pending.append(f"{name}/")
            elif (reason := _unusable(entry, root)) is None:
                if Path(entry.name).suffix[1:].lower() in IMAGE_EXTENSIONS:
                    pending.append(name)
            else:
                problems.append(f"{name}: {reason}")


def _unusable(entry: os.DirEntry[str], root: str) -> str | None:
    """Why an entry is not a regular file of this folder, or None."""
    try:
        if entry.is_symlink():
            target = os.path.realpath(entry.path, strict=True)
            if os.path.commonpath((target, root)) != root:
                return "symbolic link out of the folder"
            if entry.is_dir():
                return "symbolic link to a folder"
        return None if entry.is_file() else "not a regular file"
    except OSError as error:
        return f"cannot be examined: {error.strerror}"
