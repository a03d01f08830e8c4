"""What is inverted: images from files, a folder, or the public photographs inside two packages."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from offline.data.examples import first_view, read_range
from offline.data.folder import FolderImages
from offline.errors import DataError, PlanError
from offline.inversion.problem import Target, require_unique
from perception.encoder import Encoder
from perception.errors import ImageError
from perception.preprocess import to_pixels

# (package, folder, files) of public photographs, without people's names or a licence that forbids showing them.
PHOTOGRAPHS = (
    ("skimage", "data", ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")),
    ("sklearn", "datasets/images", ("china.jpg", "flower.jpg")),
)


class Sources(Protocol):
    """What is inverted: it becomes targets under each encoder."""

    @property
    def kind(self) -> str:
        """'image' or 'text'."""

    @property
    def ids(self) -> Sequence[str]:
        """Unique; those of the targets, in their order."""

    def as_dict(self) -> dict[str, Any]:
        """What decides the targets, besides the encoder, as plain values for plan.json."""

    def targets(self, encoder: Encoder) -> list[Target]:
        """The targets under an encoder.

        Raises:
            PerceptionError: it cannot embed them.
        """


@dataclass(frozen=True, eq=False)
class SourceImage:
    """One image: RGB, with an id that is also its label."""

    id: str
    image: Image.Image

    @property
    def digest(self) -> str:
        """SHA-256 of the decoded pixels and their shape."""
        return hashlib.sha256(str(self.image.size).encode() + self.image.tobytes()).hexdigest()


@dataclass(frozen=True)
class ImageSources:
    """Images to invert; see `Sources`.

    A target's picture is the square that its encoder sees, for that is what its embedding is of.

    Raises:
        PlanError: there is none, or two have the same id.
    """

    images: tuple[SourceImage, ...]
    kind = "image"

    def __post_init__(self) -> None:
        require_unique(self.ids)

    @property
    def ids(self) -> tuple[str, ...]:
        """See `Sources`."""
        return tuple(image.id for image in self.images)

    def as_dict(self) -> dict[str, Any]:
        """See `Sources`: the hash of each image's pixels."""
        return {"images": [{"id": image.id, "sha256": image.digest} for image in self.images]}

    def targets(self, encoder: Encoder) -> list[Target]:
        """See `Sources`; encodes one image at a time, so that none depends on the others."""
        found = []
        for source in self.images:
            view = encoder.preprocess.apply(source.image)
            with torch.no_grad():
                embedding = encoder.encode(to_pixels([view]))[0]
            found.append(Target(source.id, embedding, Image.fromarray(view.transpose(1, 2, 0)), source.id))
        return found


def read_images(files: Sequence[Path]) -> ImageSources:
    """Images by file; the id is the file's name.

    Raises:
        DataError: a file is not there, or cannot be decoded; names it.
        PlanError: there is none, or two files have the same name.
    """
    by_name: dict[str, Path] = {}
    for path in files:
        other = by_name.setdefault(path.name, path)
        if other is not path:
            raise PlanError(f"{other} and {path} have the same name, which is the id of an image: rename one of them")
    return ImageSources(tuple(SourceImage(name, _read(path)) for name, path in by_name.items()))


def read_folder(folder: Path) -> ImageSources:
    """All images below a folder; the id is the path relative to it.

    Raises:
        DataMissing: it is not a folder.
        DataError: it holds no image, or one that cannot be decoded; names it.
    """
    listed = FolderImages(folder, None, str(folder))
    if listed.problems:
        raise DataError(str(folder), f"{len(listed.problems)} entries cannot be used, the first: {listed.problems[0]}")
    ids = [listed.id_of(index) for index in range(len(listed))]
    return ImageSources(tuple(SourceImage(id, _read(folder / id)) for id in ids))


def public_photographs() -> ImageSources:
    """Six photographs that ship inside scikit-image and scikit-learn; no network.

    Raises:
        PlanError: one of the packages is not installed.
        DataError: a file is not in them.
    """
    found = []
    for package, folder, names in PHOTOGRAPHS:
        spec = find_spec(package)  # finds the files without importing anything
        if spec is None or spec.origin is None:
            raise PlanError(
                f"the photographs are inside the package {package}, which is not installed: install hardlook[demo], "
                "or name images of your own with --image or --folder"
            )
        root = Path(spec.origin).parent / folder
        found += [SourceImage(name, _read(root / name)) for name in names]
    return ImageSources(tuple(found))


def _read(path: Path) -> Image.Image:
    if not path.is_file():
        raise DataError(str(path), "there is no such image file")
    try:
        return first_view(read_range(path))
    except (ImageError, OSError) as error:
        raise DataError(str(path), f"cannot be read as an image: {error}") from error
