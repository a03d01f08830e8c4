"""Runs the real hardlook-serve over ToyEncoder; arguments: seconds that a batch takes, seconds that loading takes.

An image of nothing but `LOST` breaks the encoder for good, as a lost device does.
"""

import sys
import time

import torch
from torch import Tensor

import service.startup
from perception.testing import ToyEncoder
from service.cli import main
from service.settings import Settings

LOST = (13, 37, 211)


class Slow(ToyEncoder):
    """A ToyEncoder that takes its time."""

    def __init__(self, batch_s: float) -> None:
        super().__init__()
        self.batch_s = batch_s
        self.broken = False

    def encode(self, pixels: Tensor) -> Tensor:
        time.sleep(self.batch_s)
        self.broken |= bool(((255 * pixels - torch.tensor(LOST).view(3, 1, 1)).abs() < 0.5).flatten(1).all(1).any())
        if self.broken:
            raise RuntimeError("device lost")
        return super().encode(pixels)


def slowly_loaded(settings: Settings, device: str) -> Slow:
    time.sleep(float(sys.argv[2]))
    return Slow(float(sys.argv[1]))


if __name__ == "__main__":
    service.startup._load_encoder = slowly_loaded
    main([])
