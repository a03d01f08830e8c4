"""Readers of NIGHTS and BAPPS: triplets of a reference and two candidates, and which one people say is closer.

Owns the published layouts (methods 6.1 and 6.2). Finds triplets without decoding an image.
"""

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from offline.benchmarks.two_afc import BAPPS_SPLITS, prefers_right
from offline.data.files import inside, require_files
from offline.errors import DataError, PlanError

KINDS = ("nights", "bapps")
NIGHTS_LAYOUT = (
    "the layout of nights.zip of the dataset NIGHTS (DreamSim): data.csv, ref/xxx/yyy.png, distort/xxx/yyy_0.png and "
    "distort/xxx/yyy_1.png; get it with dataset/download_dataset.sh of DreamSim's repository (58 GB)"
)
BAPPS_LAYOUT = (
    "the layout of the 2AFC validation set of BAPPS (dataset of LPIPS): 2afc/val/<split>/{ref,p0,p1}/*.png and "
    f"2afc/val/<split>/judge/*.npy for the splits {', '.join(BAPPS_SPLITS)}; get it with the script "
    "scripts/download_dataset_valonly.sh of LPIPS' repository (PerceptualSimilarity)"
)
MIN_VOTES = 6
"""Raters of NIGHTS who agree with each other, at least, for a triplet to count."""
_ID, _LABEL, _REFERENCE, _LEFT, _RIGHT = 0, 2, 4, 5, 6
_BOOLS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class Triplet:
    """A reference and two candidates.

    Attributes:
        id: unique within the set.
        set: split that it is reported with.
        reference, left, right: image files.
        prefers_right: what most people say.
        judge: the share of people who say so of the right one; None where the data set does not tell.
    """

    id: str
    set: str
    reference: Path
    left: Path
    right: Path
    prefers_right: bool
    judge: float | None = None


def read_triplets(kind: str, folder: Path, limit: int, seed: int) -> list[Triplet]:
    """The triplets of a data set, whose image files are all there.

    Args:
        kind: 'nights', its test split; or 'bapps', its validation set.
        folder: that holds the data set.
        limit: of NIGHTS the first so many of a seeded shuffle; of BAPPS, as the paper has it, the first so many of each
            split by name; 0 for all.
        seed: of the shuffle.

    Raises:
        DataError: the folder has another layout, or files are missing.
        PlanError: there is no such kind.
    """
    if kind == "nights":
        triplets, name, layout = read_nights(folder), "NIGHTS", NIGHTS_LAYOUT
        if limit:
            order = np.random.default_rng(seed).permutation(len(triplets))
            triplets = [triplets[i] for i in order[:limit].tolist()]
    elif kind == "bapps":
        triplets, name, layout = read_bapps(folder, limit), "BAPPS", BAPPS_LAYOUT
    else:
        raise PlanError(f"two-afc reads the kinds {', '.join(KINDS)}, got {kind!r}")
    require_files([path for t in triplets for path in (t.reference, t.left, t.right)], name, layout)
    return triplets


def read_nights(folder: Path, split: str = "test") -> list[Triplet]:
    """The triplets of a split that at least `MIN_VOTES` raters agree on, in the table's order.

    Args:
        folder: with `data.csv`, of whose columns the published readers take id, label and paths by their position.
        split: 'train', 'val' or 'test'.

    Returns:
        The sets are `<split>_imagenet` and `<split>_no_imagenet`.

    Raises:
        DataError: the folder has another layout, or the table no such triplet.
    """
    path = folder / "data.csv"
    try:
        with path.open(encoding="utf8", newline="") as file:
            triplets = list(_nights_rows(csv.reader(file, strict=True), path, split))
    except FileNotFoundError as error:
        raise DataError("NIGHTS", f"{path} is not there; expected {NIGHTS_LAYOUT}") from error
    except (OSError, ValueError, csv.Error) as error:
        raise DataError("NIGHTS", f"{path} cannot be read as a table: {error}") from error
    if not triplets:
        raise DataError("NIGHTS", f"{path} has no triplet of the split {split!r} with at least {MIN_VOTES} votes")
    return triplets


def _nights_rows(rows: Iterator[list[str]], path: Path, split: str) -> Iterator[Triplet]:
    header = next(rows, [])
    if len(header) <= _RIGHT or not {"votes", "split", "is_imagenet"} <= set(header):
        raise DataError(
            "NIGHTS",
            f"{path} must have at least {_RIGHT + 1} columns, among them votes, split and is_imagenet, got {header}",
        )
    for number, row in enumerate(rows, 1):
        try:
            named = dict(zip(header, row, strict=True))
            if int(named["votes"]) < MIN_VOTES or named["split"] != split:
                continue
            part = "imagenet" if _BOOLS[named["is_imagenet"].lower()] else "no_imagenet"
            says_right = {0.0: False, 1.0: True}[float(row[_LABEL])]
        except (ValueError, KeyError) as error:
            raise DataError("NIGHTS", f"{path}, row {number}: {row} is no triplet: {error!r}") from error
        reference, left, right = (inside(path.parent, row[c], str(path)) for c in (_REFERENCE, _LEFT, _RIGHT))
        yield Triplet(row[_ID], f"{split}_{part}", reference, left, right, says_right)


def read_bapps(folder: Path, limit: int = 0) -> list[Triplet]:
    """The validation triplets of all six splits, of each the first `limit` in the order of their names; 0 for all.

    Raises:
        DataError: the folder has another layout, or a judgement is no share of raters.
    """
    triplets = []
    for split in BAPPS_SPLITS:
        root = folder / "2afc" / "val" / split
        names = sorted(path.stem for path in (root / "ref").glob("*.png"))
        if not names:
            raise DataError("BAPPS", f"{root / 'ref'} holds no *.png; expected {BAPPS_LAYOUT}")
        kept = names[: limit or None]
        judges = [root / "judge" / f"{name}.npy" for name in kept]
        require_files(judges, "BAPPS", BAPPS_LAYOUT)
        shares = [_judgement(path) for path in judges]
        majority = prefers_right(torch.tensor(shares)).tolist()
        for name, says_right, judge in zip(kept, majority, shares, strict=True):
            reference, left, right = (root / part / f"{name}.png" for part in ("ref", "p0", "p1"))
            triplets.append(Triplet(name, split, reference, left, right, says_right, judge))
    return triplets


def _judgement(path: Path) -> float:
    """The share of raters who prefer p1; files hold one number in an array of any shape."""
    try:
        array = np.load(path)  # which refuses objects unless told otherwise
        share = float(array.item()) if isinstance(array, np.ndarray) and array.size == 1 else math.nan
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise DataError("BAPPS", f"{path} holds no judgement: {error}") from error
    if not 0 <= share <= 1:  # also catches NaN
        raise DataError("BAPPS", f"{path} must hold one share of raters in [0, 1]")
    return share
