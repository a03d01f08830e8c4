"""What every family of encoders shares: an image tower with its normalisation inside.

Owns the contract of `features`, `encode` and `export`. Knows no file format; the families do.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from perception.encoder import ImageSource, Precision, fingerprint, image_similarity, unit_embeddings
from perception.errors import CheckpointError
from perception.preprocess import PreprocessSpec
from perception.text import TextEncoder

PRECISIONS: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Parts(Protocol):
    """A checkpoint taken apart: what a family's readers return, not yet built.

    Readers are functions of the family's module: `read_folder(folder, preprocess=None)` for the folder that `export`
    writes, and `read_visual(architecture, path, preprocess=None)` for the layout in which it was published; a
    `preprocess` overrides what the files say.
    """

    @property
    def preprocess(self) -> PreprocessSpec:
        """How images become pixels."""

    def build(self, name: str, precision: Precision, device: str) -> "TowerEncoder":
        """Assemble the encoder; see `perception.load_encoder`."""


class TowerEncoder(nn.Module, ABC):
    """An image tower; an `Encoder` (see there for the contract of `encode`).

    Normalisation by mean and std happens inside, so that perturbations are measured on [0, 1] pixels.

    It can be deep-copied, and the copy's `visual` be trained. The fingerprint is that of the weights as they were
    loaded: a trained copy keeps its origin's until it is exported and loaded under a name of its own.

    Attributes:
        name: the name under which it was loaded.
        dim: d, the length of an embedding.
        fingerprint: see `perception.encoder.Encoder`.
        preprocess: how images become pixels.
        precision: of weights and activations.
        visual: normalised pixels (b, 3, h, w) -> embeddings (b, d); frozen and in eval mode.
        lipschitz: a proven bound of `|features(x) - features(y)|_2 / |x - y|_2` over pixels in [0, 1]; None where there
            is none.
        bias_dim: the last of `features` is a constant, which no change of the image moves.
        metric: how its authors compare two images: 'cosine' of `features`, or 'l2', the squared distance of `features`
            (LPIPS). Pools are always searched by the cosine.
    """

    lipschitz: float | None = None
    bias_dim: bool = False
    metric: ClassVar[Literal["cosine", "l2"]] = "cosine"

    def __init__(
        self,
        name: str,
        visual: nn.Module,
        *,
        architecture: Mapping[str, Any],
        dim: int,
        preprocess: PreprocessSpec,
        precision: Precision,
        device: str,
    ) -> None:
        """Take a tower in fp32 into service.

        Args:
            architecture: what decides an embedding besides weights, preprocessing and precision; plain values.

        Raises:
            CheckpointError: no such precision.
        """
        super().__init__()
        if precision not in PRECISIONS:
            raise CheckpointError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        self.name, self.dim, self.precision, self.preprocess = name, dim, precision, preprocess
        self.fingerprint = fingerprint(architecture, preprocess, precision, visual.state_dict())
        self.visual = visual.to(device=device, dtype=PRECISIONS[precision]).eval().requires_grad_(False)
        if any(isinstance(m, nn.Conv2d) for m in visual.modules()):
            self.visual.to(memory_format=torch.channels_last)
        self.register_buffer("mean", torch.tensor(preprocess.mean, device=device).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(preprocess.std, device=device).view(1, 3, 1, 1))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.visual.parameters()).device

    def features(self, pixels: Tensor) -> Tensor:
        """Embeddings before normalisation, which FARE's loss is defined on.

        Args:
            pixels: (b, 3, h, w) float RGB in [0, 1].

        Returns:
            (b, d) float32, differentiable.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"pixels must be (b, 3, h, w), got {tuple(pixels.shape)}")
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        normalised = (pixels.to(self.device) - mean) / std
        output: Tensor = self.visual(normalised.to(PRECISIONS[self.precision]))
        return output.float()

    def forward(self, pixels: Tensor) -> Tensor:
        """The same as `features`: what a wrapper such as DistributedDataParallel calls."""
        return self.features(pixels)

    def encode(self, pixels: Tensor) -> Tensor:
        """See `perception.encoder.Encoder.encode`."""
        return unit_embeddings(self.features(pixels))

    def similarity(self, a: ImageSource, b: ImageSource) -> float:
        """Cosine similarity of two image files, in [-1, 1]."""
        return image_similarity(self, a, b)

    @property
    def text(self) -> TextEncoder:
        """The text tower of the same checkpoint.

        Raises:
            CheckpointError: the checkpoint has none.
        """
        raise CheckpointError(f"{self.name} has no text tower")

    @abstractmethod
    def export(self, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write the weights as they are now, in the family's published format.

        `load_encoder(f"local-dir:{folder}")` reads them back. Each file replaces its predecessor atomically.

        Args:
            folder: made where it does not exist.
            dtype: of the floating-point tensors.

        Raises:
            CheckpointError: a value is not finite, in `dtype`; nothing is written.
        """
