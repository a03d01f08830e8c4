"""Runs the real hardlook-serve over ToyEncoder; the only argument is the time that a batch takes, in seconds."""

import sys
import time

from torch import Tensor

import service.startup
from perception.testing import ToyEncoder
from service.cli import main


class Slow(ToyEncoder):
    """A ToyEncoder that takes its time."""

    def __init__(self, batch_s: float) -> None:
        super().__init__()
        self.batch_s = batch_s

    def encode(self, pixels: Tensor) -> Tensor:
        time.sleep(self.batch_s)
        return super().encode(pixels)


if __name__ == "__main__":
    service.startup._load_encoder = lambda settings, device: Slow(float(sys.argv[1]))
    main([])
