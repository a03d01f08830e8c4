"""Where ROxford5k and RParis6k are, and whether they are whole (methods 6.4); decodes no image and knows no encoder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from offline.benchmarks.retrieval import GroundTruth
from offline.data.files import inside, require_files
from offline.errors import DataError

RevisitedSet = Literal["roxford", "rparis"]
IMAGES = "jpg"
_NAMES: dict[str, str] = {"roxford": "roxford5k", "rparis": "rparis6k"}
_ARCHIVES = {"roxford": "oxbuild_images", "rparis": "paris_1 and paris_2, whose sub-folders are to be flattened"}


@dataclass(frozen=True)
class RevisitedFolder:
    """A revisited set, all of whose files are there.

    Attributes:
        folder: that holds it.
        ground_truth_name: of the file in it.
        truth: what that file says.
    """

    folder: Path
    ground_truth_name: str
    truth: GroundTruth


def layout(which: RevisitedSet) -> str:
    """What a folder must hold, and where it comes from."""
    name = _NAMES[which]
    return (
        f"gnd_{name}.pkl of the revisited benchmark (revisitop; a JSON file of the same fields and stem will do), and "
        f"{IMAGES}/<name>.jpg for all names of its imlist and qimlist (the images of {_ARCHIVES[which]})"
    )


def default_folder(which: RevisitedSet, data: Path) -> Path:
    """Where a set is looked for below the data folder: under the name of the set, else of the benchmark."""
    named = data / _NAMES[which]
    return named if named.is_dir() else data / which


def open_revisited_folder(which: RevisitedSet, folder: Path) -> RevisitedFolder:
    """Read the ground truth, as plain data, and look for every image.

    Raises:
        DataError: the folder, its ground truth or images are missing or malformed; says which, and what was expected.
    """
    if which not in get_args(RevisitedSet):
        raise DataError("revisited sets", f"there are {', '.join(get_args(RevisitedSet))}, got {which!r}")
    names = [f"gnd_{_NAMES[which]}{suffix}" for suffix in (".pkl", ".json")]
    name = next((name for name in names if (folder / name).is_file()), None)
    if name is None:
        raise DataError(_NAMES[which], f"{folder / names[0]} is not there; expected {layout(which)}")
    truth = GroundTruth.load(folder / name)
    asked = [query.image for query in truth.queries]
    if not truth.images or not asked:
        raise DataError(_NAMES[which], f"{folder / name} has {len(truth.images)} images and {len(asked)} queries")
    files = [inside(folder / IMAGES, f"{image}.jpg", str(folder / name)) for image in (*truth.images, *asked)]
    require_files(files, _NAMES[which], layout(which))
    return RevisitedFolder(folder, name, truth)
