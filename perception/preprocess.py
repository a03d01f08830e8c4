"""From a decoded image to the pixels that an encoder takes.

Owns resizing and cropping, with Pillow alone, so that decoding workers need no torch. Knows nothing of models:
normalisation by mean and std happens inside the encoder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

_INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class PreprocessSpec:
    """How an image becomes pixels; part of the encoder's fingerprint.

    Attributes:
        size_px: height and width of the result.
        resize_px: what the resize goes to, before the centre crop to `size_px` (ConvNeXt: 256, then 224).
        resize_mode: 'shortest' keeps the aspect ratio and crops the centre; 'squash' ignores it (methods 1.3).
        interpolation: of the resize; Pillow's, which is antialiased.
        mean, std: per RGB channel, of pixels in [0, 1]; applied inside the encoder.
    """

    size_px: int
    resize_px: int
    resize_mode: Literal["shortest", "squash"] = "shortest"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        if not 1 <= self.size_px <= self.resize_px:
            raise ValueError(f"size_px must be in [1, resize_px={self.resize_px}], got {self.size_px}")
        if self.resize_mode not in ("shortest", "squash"):
            raise ValueError(f"resize_mode must be 'shortest' or 'squash', got {self.resize_mode!r}")
        if self.interpolation not in _INTERPOLATIONS:
            raise ValueError(f"interpolation must be one of {sorted(_INTERPOLATIONS)}, got {self.interpolation!r}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for manifests and fingerprints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> "PreprocessSpec":
        """What `as_dict` gave, also after a way through JSON.

        Raises:
            ValueError: not such a table.
        """
        try:
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
            return cls(**fields)
        except (AttributeError, TypeError) as error:
            raise ValueError(str(error)) from error

    def apply(self, image: Image.Image) -> NDArray[np.uint8]:
        """Resize and crop one RGB image.

        The same pixels as open_clip's evaluation transform, which rounds sizes and offsets as torchvision does.

        Returns:
            (3, size_px, size_px) uint8 RGB.
        """
        if image.mode != "RGB":
            raise ValueError(f"expected an RGB image, got mode {image.mode}")
        width, height = image.size
        if self.resize_mode == "squash":
            target = (self.resize_px, self.resize_px)
        elif width <= height:
            target = (self.resize_px, max(self.resize_px, int(self.resize_px * height / width)))
        else:
            target = (max(self.resize_px, int(self.resize_px * width / height)), self.resize_px)
        if self.resize_mode == "shortest":
            image, target = _drop_what_the_crop_drops(image, target, self.size_px)
        if image.size != target:
            image = image.resize(target, _INTERPOLATIONS[self.interpolation])
        left, top = (round((side - self.size_px) / 2) for side in target)
        cropped = image.crop((left, top, left + self.size_px, top + self.size_px))
        return np.ascontiguousarray(np.asarray(cropped).transpose(2, 0, 1))


def _drop_what_the_crop_drops(
    image: Image.Image, target: tuple[int, int], size_px: int, max_aspect: int = 64
) -> tuple[Image.Image, tuple[int, int]]:
    """Bound the memory of an extreme aspect ratio: a 1 x 50,000 strip must not become 224 x 11,200,000.

    Only beyond an aspect ratio of `max_aspect` is the long side cut, symmetrically, before the resize.
    """
    width, height = image.size
    short, long = min(width, height), max(width, height)
    if long <= max_aspect * short:
        return image, target
    keep = max_aspect * short
    start = (long - keep) // 2
    box = (start, 0, start + keep, height) if width > height else (0, start, width, start + keep)
    scale = min(target) / short
    resized = max(size_px, int(keep * scale))
    return image.crop(box), (resized, min(target)) if width > height else (min(target), resized)


def to_pixels(images: Sequence[NDArray[np.uint8]]) -> "Tensor":
    """Stack preprocessed images.

    Args:
        images: b arrays (3, h, w) uint8.

    Returns:
        (b, 3, h, w) float32 in [0, 1], not normalised.
    """
    import torch

    return torch.from_numpy(np.stack(images)).float().div_(255.0)
