"""Two demonstration triplets: which of two images an encoder takes to be closer to a reference.

Owns the zip of the images that come with LPIPS (a patch, blurred or warped) and with DreamSim (three crabs). Their
authors publish no vote of people on them, so there is no right answer here, only distances.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL.Image import Image
from torch import Tensor

from offline.data.archives import open_archive
from offline.data.files import read_image_member
from perception.encoder import Encoder
from perception.preprocess import to_pixels
from perception.similarity import pseudo_distance

ARCHIVE = Path("perceptual/sample_triplets.zip")
TRIPLETS = {
    "lpips": ("lpips_example/ex_ref.png", "lpips_example/ex_p0.png", "lpips_example/ex_p1.png"),
    "dreamsim": ("dreamsim_example/ref_1.jpg", "dreamsim_example/img_a_1.jpg", "dreamsim_example/img_b_1.jpg"),
}
"""Reference, candidate 0 and candidate 1 by triplet."""


@dataclass(frozen=True)
class TripletDistances:
    """One triplet under one encoder.

    Attributes:
        distance: 'cosine', the pseudo-distance sqrt(1 - similarity), in [0, sqrt 2]; or 'l2', the squared distance of
            features, of encoders whose authors compare images so (LPIPS).
        d0, d1: of the candidates from the reference; down is closer.
    """

    encoder: str
    triplet: str
    distance: Literal["cosine", "l2"]
    d0: float
    d1: float

    @property
    def choice(self) -> int | None:
        """The closer candidate, 0 or 1; None where they are equally far."""
        return None if self.d0 == self.d1 else int(self.d1 < self.d0)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "choice": self.choice}


class TripletBenchmark:
    """Runs on the zip of the two triplets."""

    def __init__(self, path: Path) -> None:
        """Read the six images.

        Raises:
            DataMissing: the zip is not there.
            DataError: it lacks one of them, or one cannot be read.
        """
        self._images: dict[str, tuple[Image, ...]] = {}
        with open_archive(path) as archive:
            for name, files in TRIPLETS.items():
                self._images[name] = tuple(read_image_member(archive, file) for file in files)

    def run(self, encoder: Encoder) -> Iterator[TripletDistances]:
        """Yield both triplets' distances."""
        kind: Literal["cosine", "l2"] = "l2" if getattr(encoder, "metric", "cosine") == "l2" else "cosine"
        for name, images in self._images.items():
            pixels = to_pixels([encoder.preprocess.apply(image) for image in images])
            d0, d1 = distances(encoder, pixels, kind)
            yield TripletDistances(encoder.name, name, kind, d0, d1)


@torch.inference_mode()
def distances(encoder: Encoder, pixels: Tensor, kind: Literal["cosine", "l2"]) -> tuple[float, float]:
    """Distances of the second and the third image of (3, 3, h, w) pixels from the first.

    Args:
        kind: see `TripletDistances.distance`; 'l2' needs an encoder with `features`.
    """
    if kind == "l2":
        features: Tensor = getattr(encoder, "features")(pixels)  # noqa: B009 - the protocol has `encode` alone
        squared = (features[1:] - features[0]).double().square().sum(dim=1)
        return float(squared[0]), float(squared[1])
    units = encoder.encode(pixels).double()
    cosine = pseudo_distance(units[0], units[1:])
    return float(cosine[0]), float(cosine[1])
