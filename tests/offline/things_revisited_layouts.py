"""THINGS, ROxford5k and RParis6k in their published layouts, of drawn images.

`python -m tests.offline.things_revisited_layouts FOLDER` makes a small tree of each in FOLDER, for a look by hand:
`hardlook-lab benchmark things --folder FOLDER/things --encoder bundled/clean`, and likewise roxford and rparis.
"""

import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from perception.testing import encoded, synthetic_image

HEADER = "image1\timage2\timage3\tchoice\tRT\tnoise_ceiling\tsubject_id\tHIT_nr\ttrial_nr\tage\tgender\tdate\ttime"
EXTRA = ("1834", "NaN", "17", "402", "11", "34", "female", "10-Oct-2017", "23:51:07")
TABLE = "triplet_dataset/triplets_large_final_correctednc_correctedorder.csv"

RANKING = [7, 3, 5, 1, 9, 2, 0, 4, 6, 8]
"""Methods 6.4: a query whose database is ranked so, with positives 1, 2, 3 and junk 7, 9, has an AP of .763889."""
EASY, HARD, JUNK = [1], [2, 3], [7, 9]
MEDIUM_AP, WITH_JUNK_AP = 0.763889, 0.372222
QUERIES = ("all_souls_000013", "all_souls_000026")
SIDE_PX = 96


# --- THINGS ----------------------------------------------------------------------------------------------------------


def concept(number: int) -> str:
    """The path of a concept's image, from 1."""
    return f"concept{number:04d}/concept{number:04d}_01b.jpg"


def things(folder: Path, concepts: int, rows: Sequence[Sequence[int]]) -> Path:
    """The table, whose rows are (image1, image2, image3, choice), the list, and one picture a concept."""
    (folder / "triplet_dataset").mkdir(parents=True)
    lines = [HEADER, *("\t".join([*map(str, row), *EXTRA]) for row in rows)]
    (folder / TABLE).write_text("\n".join(lines) + "\n")
    names = [concept(number) for number in range(1, concepts + 1)]
    (folder / "things_first_imgs_idx.txt").write_text("\n".join(names) + "\n")
    for number, name in enumerate(names, 1):
        _write(folder / "Images" / name, synthetic_image(number))
    return folder


def dreamsim_things(folder: Path, rows: Sequence[Sequence[str]]) -> Path:
    """DreamSim's list and its pictures."""
    folder.mkdir(parents=True)
    (folder / "things_valset.txt").write_text("".join(" ".join(row) + "\n" for row in rows))
    for number, name in enumerate(sorted({name for row in rows for name in row})):
        (folder / f"{name}.png").write_bytes(encoded(synthetic_image(number)))
    return folder


# --- revisited sets --------------------------------------------------------------------------------------------------


def revisited(folder: Path, which: str = "roxford5k", *, protocol: int = 2, arrays: bool = True) -> Path:
    """A set of ten images and two queries: within its box the first ranks them as `RANKING`; the second has no answer.

    Around the box is what the database is as well, in another order: uncropped, the first query ranks them otherwise.
    """
    asked, noise = _pixels(1), _pixels(2)
    images = [f"place_{number:06d}" for number in range(len(RANKING))]
    for place, row in enumerate(RANKING):
        part = 0.05 + 0.09 * place
        _write(folder / "jpg" / f"{images[row]}.jpg", _image(asked * (1 - part) + noise * part))
    framed = np.tile(noise, (3, 3, 1))
    framed[SIDE_PX : 2 * SIDE_PX, SIDE_PX : 2 * SIDE_PX] = asked
    _write(folder / "jpg" / f"{QUERIES[0]}.jpg", _image(framed))
    _write(folder / "jpg" / f"{QUERIES[1]}.jpg", _image(noise))
    box = [float(SIDE_PX), float(SIDE_PX), 2.0 * SIDE_PX, 2.0 * SIDE_PX]
    gnd = [entry(box, EASY, HARD, JUNK, arrays=arrays), entry([0.0, 0.0, 9.5, 9.5], [], [], [0], arrays=arrays)]
    truth = {"gnd": gnd, "imlist": images, "qimlist": list(QUERIES)}
    (folder / f"gnd_{which}.pkl").write_bytes(pickle.dumps(truth, protocol))
    return folder


def entry(
    box: list[float], easy: list[int], hard: list[int], junk: list[int], *, arrays: bool = True
) -> dict[str, Any]:
    """A query's ground truth; empty arrays are of float64, as numpy makes them."""
    rows: dict[str, Any] = {"easy": easy, "hard": hard, "junk": junk}
    return {"bbx": box, **({name: np.array(value) for name, value in rows.items()} if arrays else rows)}


def _pixels(seed: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.asarray(synthetic_image(seed, (SIDE_PX, SIDE_PX)), dtype=np.float64)


def _image(pixels: np.ndarray[Any, np.dtype[np.float64]]) -> Image.Image:
    return Image.fromarray(pixels.round().astype(np.uint8))


def _write(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(image, "JPEG", quality=95))


def main(folder: Path) -> None:
    """A tree of each set."""
    rng = np.random.default_rng(0)
    rows = [[*(rng.permutation(30)[:3] + 1).tolist(), int(rng.integers(1, 4))] for _ in range(500)]
    things(folder / "things", 30, rows)
    dreamsim_things(folder / "things_dreamsim", [("aardvark_01b", "abacus_01b", "accordion_01b")])
    revisited(folder / "roxford5k")
    revisited(folder / "rparis6k", "rparis6k")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
