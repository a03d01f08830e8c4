"""What teacher and student of a distillation see: the view of an image, and its jittered twin (methods 8.1, stage 1).

Knows nothing of networks. Every random choice is a function of the seeds that come in.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor

from offline.finetune.distill_plan import Geometry
from perception.preprocess import PreprocessSpec


@dataclass(frozen=True)
class View:
    """From an image to the square that both networks see; see `offline.data.batches.Transform`.

    Attributes:
        size_px: its side.
        geometry: see `DistillPlan`.
    """

    size_px: int
    geometry: Geometry

    def apply(self, image: Image) -> NDArray[np.uint8]:
        """One RGB image -> (3, size_px, size_px) uint8; a crop of a smaller image is black around it."""
        if self.geometry != "crop":
            return PreprocessSpec(self.size_px, self.size_px, self.geometry).apply(image)
        left, top = (round((side - self.size_px) / 2) for side in image.size)
        cropped = image.crop((left, top, left + self.size_px, top + self.size_px))
        return np.ascontiguousarray(np.asarray(cropped).transpose(2, 0, 1))


def resized(pixels: Tensor, size_px: int) -> Tensor:
    """(b, 3, s, s) in [0, 1] -> (b, 3, size_px, size_px); bicubic and antialiased, like Pillow's."""
    if pixels.shape[-1] == size_px:
        return pixels
    return F.interpolate(pixels, (size_px, size_px), mode="bicubic", antialias=True).clamp(0, 1)


@dataclass(frozen=True)
class ColourJitter:
    """The second view: brightness, contrast, saturation and hue in random order, or grey.

    Attributes:
        strengths: factors of the first three are uniform in `1 +- strength`, not below 0; the hue turns by at most the
            fourth, in turns.
        probability, grey_probability: of the jitter and, after it, of losing all colour.
    """

    strengths: tuple[float, float, float, float]
    probability: float
    grey_probability: float

    def __call__(self, pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        """Jitter each image by its own seed.

        Args:
            pixels: (b, 3, h, w) in [0, 1].
            seeds: b non-negative integers.

        Returns:
            (b, 3, h, w) in [0, 1].
        """
        return torch.stack([self._one(image, seed) for image, seed in zip(pixels, seeds, strict=True)])

    def _one(self, image: Tensor, seed: int) -> Tensor:
        from torchvision.transforms import functional

        rng = np.random.default_rng(seed)
        operations = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
        jittered, grey = rng.random() < self.probability, rng.random() < self.grey_probability
        factors = [rng.uniform(max(0.0, 1 - strength), 1 + strength) for strength in self.strengths[:3]]
        turn = rng.uniform(-self.strengths[3], self.strengths[3])
        for number in rng.permutation(4).tolist() if jittered else ():
            image = operations[number](image, factors[number]) if number < 3 else functional.adjust_hue(image, turn)
        if grey:
            image = functional.rgb_to_grayscale(image, num_output_channels=3)
        return image.clamp(0, 1)
