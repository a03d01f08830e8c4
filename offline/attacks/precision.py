"""Gradients in bfloat16, which on GPUs take about half the time."""

from dataclasses import dataclass

import torch
from torch import Tensor

from offline.attacks.base import Attacked


@dataclass(frozen=True)
class Bf16Gradients:
    """An encoder whose passes that ask for a gradient run in bfloat16, and all others in the encoder's own precision.

    An attack believes that an image is fooled only after a pass of the second kind. The verdict remains the caller's,
    in the precision that serves.

    Attributes:
        encoder: what is attacked, on the device of the pixels.
    """

    encoder: Attacked

    def encode(self, pixels: Tensor) -> Tensor:
        """See `Attacked`."""
        if not torch.is_grad_enabled():
            return self.encoder.encode(pixels)
        with torch.autocast(pixels.device.type, dtype=torch.bfloat16):
            return self.encoder.encode(pixels).float()
