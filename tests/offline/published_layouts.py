"""Synthetic data sets in the exact layouts in which the benchmarks' real ones are published.

    python -m tests.offline.published_layouts FOLDER

writes one of each below FOLDER, for trying the suites by hand. NIGHTS and BAPPS build on `two_afc_layouts`.
"""

import io
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from offline.benchmarks.suite_moderation import NSFW_ROOT, SAFE_WNIDS, UNSAFE_WNIDS
from offline.benchmarks.zero_shot_sets import CLASS_NAMES, SHARDS, TEMPLATES, THIRTEEN, ZeroShotSet
from perception.testing import encoded, synthetic_image
from tests.offline.two_afc_layouts import Row, bapps, nights

COLORS = {"safe": (70, 140, 80), "buffer": (128, 128, 90), "unsafe": (150, 90, 95)}
NSFW_COLORS = {
    "neutral": COLORS["safe"],
    "drawings": COLORS["safe"],
    "sexy": COLORS["buffer"],
    "hentai": COLORS["unsafe"],
    "porn": COLORS["unsafe"],
}
WORDS = ("bee", "cat", "dog", "eel", "fox")
PROMPTS = ("a photo of a {c}.", "a blurry photo of the {c}.")


def night_rows(count: int) -> list[Row]:
    """Test triplets of both kinds, and rows that no test figure may count: other splits, and too few votes."""
    rows = [Row(n, right=n % 2, imagenet=n % 3 > 0) for n in range(count)]
    rows += [Row(count, right=1, votes=5), Row(count + 1, right=0, split="train"), Row(count + 2, right=1, split="val")]
    return rows


def colored(root: Path, color: Sequence[int], count: int, seed: int, suffix: str = "png", spread: float = 20.0) -> None:
    """Noisy images of one colour."""
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        pixels = np.array(color) + rng.normal(0, spread, (16, 16, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / f"{root.name}_{n:04d}.{suffix}")


def nsfw(root: Path, per_class: int) -> Path:
    """What `nsfw_dataset_v1.zip` unpacks to, here with drawn colours."""
    for seed, (name, color) in enumerate(NSFW_COLORS.items()):
        colored(root / NSFW_ROOT / name, color, per_class, seed)
    return root


def dangerous_objects(root: Path, per_class: int, pool: int) -> Path:
    """ImageNet's training classes of the task, and the pools."""
    for label, wnids in (("safe", SAFE_WNIDS), ("unsafe", UNSAFE_WNIDS)):
        for wnid in wnids:
            colored(root / "train" / wnid, COLORS[label], per_class, int(wnid[1:]), "JPEG")
        colored(root / "flickr" / label, COLORS[label], pool, len(label), "jpg")
    return root


def shards(
    root: Path,
    spec: ZeroShotSet,
    *,
    words: Sequence[str] = WORDS,
    per_class: int = 3,
    count: int = 2,
    templates: Sequence[str] = PROMPTS,
) -> Path:
    """One of the wds_* data sets: images go round the classes, in shards of equal parts."""
    folder = root / spec.folders[0]
    (folder / "test").mkdir(parents=True)
    (folder / CLASS_NAMES).write_text("\n".join(words) + "\n")
    (folder / TEMPLATES).write_text("\n".join(templates) + "\n")
    (folder / "dataset_type.txt").write_text("classification\n")
    (folder / "test" / SHARDS).write_text(f"{count}\n")
    total, size = per_class * len(words), (spec.native_px, spec.native_px) if spec.native_px else (48, 40)
    for number in range(count):
        with tarfile.open(folder / "test" / f"{number}.tar", "w") as archive:
            for n in range(number, total, count):
                image = encoded(
                    synthetic_image(7 * (n % len(words)) + n // len(words) % 2, size), "WEBP", lossless=True
                )
                for extension, content in (("cls", str(n % len(words)).encode()), ("webp", image)):
                    member = tarfile.TarInfo(f"s{n:07d}.{extension}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return folder


def imagenet(root: Path, per_class: int = 1) -> Path:
    """ImageNet's validation images, sorted into a thousand folders."""
    for n in range(1000):
        for i in range(per_class):
            path = root / "val" / f"n{10_000_000 + n}" / f"ILSVRC2012_val_{n:05d}{i:03d}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(synthetic_image(n + i, (16, 16)), "JPEG"))
    return root


def main(root: Path) -> None:
    """Write one of each."""
    nights(root / "nights", night_rows(24), (64, 64))
    bapps(root / "bapps", [0.0, 0.2, 0.4, 0.6, 0.8, 1.0], equal=3)
    nsfw(root / "nsfw", 40)
    dangerous_objects(root / "dangerous-objects", 6, 12)
    for spec in THIRTEEN:
        shards(root / "zero-shot", spec, words=WORDS[:2] if spec.short == "pcam" else WORDS)
    imagenet(root / "imagenet")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
