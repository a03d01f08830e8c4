"""An encoder of images at their own small size: the enlargement happens inside, and is attacked through (methods 6.9).

CIFAR and STL-10 are attacked at 32 and 96 px, so that a radius is one of their own pixels.
"""

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from perception.encoder import fingerprint
from perception.encoders.tower import TowerEncoder
from perception.text import TextEncoder


class NativeResolution:
    """See `Encoder`; takes square images of one size, and enlarges them bicubically to what the tower takes.

    As the published evaluation does, straight to the tower's size, without a crop, and without clipping what bicubic
    interpolation overshoots by. It is torch's antialiased one, whose kernel is Pillow's.
    """

    def __init__(self, encoder: TowerEncoder, size_px: int) -> None:
        """Wrap an encoder.

        Args:
            size_px: of the images, at most what the encoder takes.
        """
        self._encoder, self._target_px = encoder, encoder.preprocess.size_px
        self.name, self.dim = encoder.name, encoder.dim
        self.preprocess = replace(encoder.preprocess, size_px=size_px, resize_px=size_px)
        inside = {"inside": encoder.fingerprint, "bicubic_to_px": self._target_px}
        self.fingerprint = fingerprint(inside, self.preprocess, encoder.precision, {})

    @property
    def text(self) -> TextEncoder:
        """The encoder's own text tower; raises as there."""
        return self._encoder.text

    def encode(self, pixels: Tensor) -> Tensor:
        """See `perception.encoder.Encoder.encode`; differentiable through the enlargement."""
        size = (self._target_px, self._target_px)
        return self._encoder.encode(F.interpolate(pixels, size=size, mode="bicubic", antialias=True))
