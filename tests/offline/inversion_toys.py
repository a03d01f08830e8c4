"""Encoders and images of which the inversion tests know everything."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from offline.inversion.problem import Target
from offline.inversion.sources import ImageSources, SourceImage
from perception.encoder import unit_embeddings
from perception.testing import ToyEncoder, synthetic_image


class LinearEncoder:
    """`unit(A (z - .5))` in float64, A with orthonormal rows: moving z by r moves A z by r at most, to any side."""

    def __init__(self, dim: int = 6, size_px: int = 8, seed: int = 0) -> None:
        made = torch.Generator().manual_seed(seed)
        square = torch.randn(3 * size_px**2, dim, generator=made, dtype=torch.float64)
        self.rows: Tensor = torch.linalg.qr(square).Q.T.contiguous()

    def features(self, pixels: Tensor) -> Tensor:
        features: Tensor = (pixels.double().flatten(1) - 0.5) @ self.rows.T
        return features

    def encode(self, pixels: Tensor) -> Tensor:
        features = self.features(pixels)
        units: Tensor = features / features.norm(dim=1, keepdim=True)
        return units


def unit(*shape: int, seed: int = 0) -> Tensor:
    return unit_embeddings(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def targets(count: int, dim: int = 16, seed: int = 0) -> list[Target]:
    return [Target(f"t{i}", row, None, f"target {i}") for i, row in enumerate(unit(count, dim, seed=seed))]


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


def sources(count: int = 3) -> ImageSources:
    return ImageSources(tuple(SourceImage(f"image {i}.png", synthetic_image(i)) for i in range(count)))


def toys(*seeds: int, size_px: int = 16) -> list[ToyEncoder]:
    return [ToyEncoder(seed=seed, size_px=size_px) for seed in seeds]


def write_images(folder: Path, names: Sequence[str]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        synthetic_image(i).save(folder / name)
    return [folder / name for name in names]
