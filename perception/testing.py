"""Test help that ships with the product: a tiny encoder, synthetic images, and the benign test hits."""

import io
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from perception.encoder import Precision, fingerprint, unit_embeddings
from perception.preprocess import PreprocessSpec
from perception.verdict import PoolLabel


class ToyEncoder(torch.nn.Module):
    """A seeded linear map of 8 x 8 pixels: an Encoder that is built in a millisecond.

    Args:
        dim: length of an embedding.
        seed: of the weights; another seed is another encoder with another fingerprint.
        size_px: image size that it takes.
    """

    def __init__(self, dim: int = 16, seed: int = 0, size_px: int = 16) -> None:
        super().__init__()
        self.name = f"toy/{seed}"
        self.dim = dim
        self.preprocess = PreprocessSpec(size_px=size_px, resize_px=size_px, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(dim, 3 * 8 * 8, generator=generator))
        self.precision: Precision = "fp32"
        self.fingerprint = fingerprint({"toy": dim}, self.preprocess, self.precision, {"weight": self.weight})

    def features(self, pixels: Tensor) -> Tensor:
        """Embeddings before normalisation: (b, 3, h, w) in [0, 1] -> (b, d)."""
        small = torch.nn.functional.adaptive_avg_pool2d((pixels - 0.5) / 0.5, 8)
        return small.flatten(1) @ self.weight.T + 1e-3

    def encode(self, pixels: Tensor) -> Tensor:
        """See `perception.encoder.Encoder.encode`."""
        return unit_embeddings(self.features(pixels))


def synthetic_image(seed: int, size_px: tuple[int, int] = (48, 40)) -> Image.Image:
    """A seeded RGB image of coloured blobs; `size_px` is (width, height)."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size_px, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


@dataclass(frozen=True)
class BenignHit:
    """A drawn, harmless image that is an exemplar of a demo pool.

    Attributes:
        id: its id within the demo pools.
        pool: the pool that it belongs to, buffer or unsafe.
        file: encoded bytes, PNG.
    """

    id: str
    pool: PoolLabel
    file: bytes


def benign_hits() -> list[BenignHit]:
    """The benign test hits, sorted by id."""
    folder = Path(str(resources.files("perception"))) / "benign_hits"
    return [
        BenignHit(f"benign_hits/{path.name}", PoolLabel(path.name.split("-")[0]), path.read_bytes())
        for path in sorted(folder.glob("*.png"))
    ]
