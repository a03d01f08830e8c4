"""The training images of the bundled encoder, in memory: tiles and objects with class names, scenes with captions.

Owns what is read, how views are drawn, and in which order, all as functions of (seed, step). Knows nothing of models.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from offline.data.archives import read_labelled_zip, read_mosaic_zip
from offline.data.batches import EpochOrder

PROMPTS = ("a photo of a {}", "{}", "a picture of a {}", "a close-up photo of a {}", "a photo of one {}")
PHOTO_PX = 128
SOURCES = ("tiles", "objects", "scenes")
Images = NDArray[np.uint8]


@dataclass(frozen=True)
class Source:
    """The images of one kind.

    Attributes:
        images: (n, s, s, 3) uint8 RGB.
        labels: (n,) int64 index into the class names, -1 where there is none.
        captions: n lists of captions, or none at all.
    """

    images: Images
    labels: Tensor
    captions: list[list[str]]


def _square(image: Image.Image, size_px: int) -> Images:
    """Shortest side to size_px (bicubic), centre crop: (size_px, size_px, 3) uint8."""
    scale = size_px / min(image.size)
    width, height = (max(size_px, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size_px) // 2, (height - size_px) // 2
    return np.asarray(image.crop((left, top, left + size_px, top + size_px)))


def load_sources(data: Path) -> tuple[dict[str, Source], list[tuple[str, ...]]]:
    """Read the training archives: Tiny-ImageNet tiles (64 px), Caltech-101 `train` and Flickr8k `train` (128 px).

    Returns:
        The sources by name, and the classes, each as the tuple of names that it goes by.

    Raises:
        DataMissing: an archive is not there.
    """
    classes: dict[str, tuple[str, ...]] = {}
    tiles, tile_classes = [], []
    for part in ("a", "b"):
        for example in read_mosaic_zip(data / "train" / f"tiny196_64px_train_{part}.zip"):
            names = tuple(name.strip() for name in example.fields["lemmas"].split(","))
            classes.setdefault(example.fields["wnid"], names)
            tiles.append(np.asarray(example.image))
            tile_classes.append(example.fields["wnid"])
    objects, object_classes = [], []
    for example in read_labelled_zip(data / "train" / "caltech101_128px.zip"):
        if example.fields["suggested_split"] == "train":
            classes.setdefault(f"caltech:{example.label}", (example.label,))
            objects.append(_square(example.image, PHOTO_PX))
            object_classes.append(f"caltech:{example.label}")
    scenes, captions = [], []
    for example in read_labelled_zip(data / "train" / "flickr8k_128px_train_val.zip"):
        if example.fields["split"] == "train":
            scenes.append(_square(example.image, PHOTO_PX))
            captions.append([example.fields[f"caption{i}"] for i in range(5)])
    index = {name: i for i, name in enumerate(classes)}
    none: list[list[str]] = []
    return {
        "tiles": Source(np.stack(tiles), torch.tensor([index[c] for c in tile_classes]), none),
        "objects": Source(np.stack(objects), torch.tensor([index[c] for c in object_classes]), none),
        "scenes": Source(np.stack(scenes), torch.full((len(scenes),), -1), captions),
    }, list(classes.values())


def to_signed(images: Images, size_px: int | None = None) -> Tensor:
    """(b, s, s, 3) uint8 -> (b, 3, size_px, size_px) float32 in [-1, 1]; bicubic where the size differs."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    if size_px is not None and size_px != pixels.shape[-1]:
        pixels = F.interpolate(pixels, (size_px, size_px), mode="bicubic", antialias=True).clamp_(-1, 1)
    return pixels.contiguous(memory_format=torch.channels_last)


def augment(images: Images, size_px: int, min_crop_area: float, rng: np.random.Generator) -> Tensor:
    """Random resized crop (area in [min_crop_area, 1], aspect in [3/4, 4/3]) and flip.

    Args:
        images: (b, s, s, 3) uint8.

    Returns:
        (b, 3, size_px, size_px) float32 in [-1, 1].
    """
    b = len(images)
    area, aspect = rng.uniform(min_crop_area, 1.0, b), np.exp(rng.uniform(-math.log(4 / 3), math.log(4 / 3), b))
    width, height = np.minimum(np.sqrt(area * aspect), 1.0), np.minimum(np.sqrt(area / aspect), 1.0)
    theta = np.zeros((b, 2, 3), dtype=np.float32)
    theta[:, 0, 0] = width * rng.choice([-1.0, 1.0], b)
    theta[:, 1, 1] = height
    theta[:, 0, 2] = rng.uniform(-1, 1, b) * (1 - width)
    theta[:, 1, 2] = rng.uniform(-1, 1, b) * (1 - height)
    grid = F.affine_grid(torch.from_numpy(theta), [b, 3, size_px, size_px], align_corners=False)
    pixels = F.grid_sample(to_signed(images), grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return pixels.clamp_(-1, 1)


def epoch_indices(n: int, batch: int, step: int, seed: int, stream: int) -> NDArray[np.int64]:
    """The step's `batch` indices into a source of n, walking a fresh permutation each epoch."""
    return EpochOrder(n, seed, stream).indices(batch, step)


class TextBank:
    """Tokenised prompts of the classes and captions, so that no step tokenises."""

    def __init__(self, classes: list[tuple[str, ...]], captions: list[list[str]], context_length: int) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        tokenizer = SimpleTokenizer(context_length=context_length)
        self.classes = [tokenizer([p.format(name) for name in names for p in PROMPTS]) for names in classes]
        self.captions = [tokenizer(texts) for texts in captions]

    def class_prompts(self, rng: np.random.Generator) -> Tensor:
        """One random prompt a class, half of the time with its first name: (classes, context_length) int64."""
        rows = []
        for prompts in self.classes:
            among = len(PROMPTS) if rng.random() < 0.5 else len(prompts)
            rows.append(prompts[rng.integers(among)])
        return torch.stack(rows)

    def scene_captions(self, indices: NDArray[np.int64], rng: np.random.Generator) -> Tensor:
        """One random caption a scene: (b, context_length) int64."""
        return torch.stack([self.captions[i][rng.integers(len(self.captions[i]))] for i in indices])

    def used_tokens(self) -> Tensor:
        """The distinct tokens of all prompts and captions, sorted."""
        tokens: Tensor = torch.cat([t.flatten() for t in (*self.classes, *self.captions)]).unique()
        return tokens
