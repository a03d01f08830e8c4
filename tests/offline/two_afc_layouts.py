"""NIGHTS and BAPPS in their published layouts, of a few drawn images."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from offline.benchmarks.two_afc import BAPPS_SPLITS
from perception.testing import encoded, synthetic_image

COLUMNS = (
    "id",
    "left_vote",
    "right_vote",
    "votes",
    "ref_path",
    "left_path",
    "right_path",
    "prompt",
    "is_imagenet",
    "split",
)


@dataclass(frozen=True)
class Row:
    """One line of NIGHTS' table; the reference is picture n, its candidates n + 100 and n + 200."""

    number: int
    right: int
    imagenet: bool = True
    votes: int = 10
    split: str = "test"


def write(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(image))


def nights(folder: Path, rows: Sequence[Row], size_px: tuple[int, int] = (48, 40)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "data.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in rows:
            stem = f"{row.number // 10:03d}/{row.number:03d}"
            files = [f"ref/{stem}.png", f"distort/{stem}_0.png", f"distort/{stem}_1.png"]
            for i, name in enumerate(files):
                write(folder / name, synthetic_image(row.number + 100 * i, size_px))
            values = [
                row.number,
                1 - row.right,
                row.right,
                row.votes,
                *files,
                "a, quoted\nprompt",
                row.imagenet,
                row.split,
            ]
            writer.writerow(values)
    return folder


def bapps(folder: Path, judges: Sequence[float], *, equal: int | None = None) -> Path:
    """The same judgements in each of the six splits; of triplet `equal` both candidates are one image."""
    for s, split in enumerate(BAPPS_SPLITS):
        root = folder / "2afc" / "val" / split
        (root / "judge").mkdir(parents=True)
        for n, judge in enumerate(judges):
            for i, part in enumerate(("ref", "p0", "p1")):
                same = equal == n and part == "p1"
                write(root / part / f"{n:06d}.png", synthetic_image(10 * s + n + 100 * (1 if same else i), (64, 64)))
            np.save(root / "judge" / f"{n:06d}.npy", np.array([judge], dtype=np.float32))
    return folder
