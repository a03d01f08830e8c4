"""A NIGHTS in which a known rule decides, and tiny encoders that do not know it."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from perception.encoders.lipsim import LipsimConfig, LipsimNetwork, LipsimParts, preprocess_of
from perception.testing import encoded
from tests.offline.two_afc_layouts import COLUMNS

LIPSIM = LipsimConfig(image_size=32, channels=4, depth=1, inner_channels=2, pools=(4,), dense_layers=1, dense_width=16,
                      dim=16, bias_dim=True)  # fmt: skip


def drawing(pattern: np.random.Generator, colour: float) -> Image.Image:
    """A pattern in grey under a colour between red (0) and blue (1): (32, 32) px."""
    small = pattern.integers(60, 160, (4, 4, 1))
    tinted = small + np.array([80 * (1 - colour), 0, 80 * colour])
    return Image.fromarray(tinted.astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)


def write_nights(folder: Path, splits: dict[str, int], rule: str = "colour", seed: int = 0) -> Path:
    """NIGHTS in its published layout: people ask for the reference's colour, or its pattern, and mind nothing else."""
    rng, number = np.random.default_rng(seed), 0
    folder.mkdir(parents=True)
    with (folder / "data.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for split, count in splits.items():
            for _ in range(count):
                colour, pattern, other = rng.random(), int(rng.integers(2**31)), int(rng.integers(2**31))
                reference = drawing(np.random.default_rng(pattern), colour)
                of_colour = drawing(np.random.default_rng(other), colour)
                of_pattern = drawing(np.random.default_rng(pattern), (colour + 0.5) % 1.0)
                liked, disliked = (of_colour, of_pattern) if rule == "colour" else (of_pattern, of_colour)
                right = int(rng.integers(2))
                images = (reference, disliked, liked) if right else (reference, liked, disliked)
                stem = f"{number // 100:03d}/{number:03d}"
                files = [f"ref/{stem}.png", f"distort/{stem}_0.png", f"distort/{stem}_1.png"]
                for name, image in zip(files, images, strict=True):
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (folder / name).write_bytes(encoded(image))
                writer.writerow([number, 1 - right, right, 8, *files, "a drawing", number % 2 == 0, split])
                number += 1
    return folder


def write_lipsim(folder: Path, **changes: Any) -> str:
    """A LipSim network of random weights; returns the name to load it by."""
    torch.manual_seed(5)
    config = replace(LIPSIM, **changes)
    state = LipsimNetwork(config).state_dict()
    LipsimParts(config, preprocess_of(config), state, "toy").build("toy", "fp32", "cpu").export(folder)
    return f"local-dir:{folder}"
