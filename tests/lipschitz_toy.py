"""Encoders of which a Lipschitz constant is known exactly: isometries, on which certificates are tight."""

import torch
from torch import Tensor

from perception.encoder import Precision, fingerprint, unit_embeddings
from perception.preprocess import PreprocessSpec


class IsometricEncoder(torch.nn.Module):
    """A seeded linear map with orthonormal rows: moves of the pixels along them are moves of the features, as long.

    Args:
        dim: length of an embedding, with the bias dimension.
        seed: of the rows.
        size_px: image size that it takes.
        bias_dim: append the constant 1.
        scale: of the rows, and so the Lipschitz constant.
    """

    def __init__(
        self, dim: int = 8, seed: int = 0, size_px: int = 8, *, bias_dim: bool = False, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.name, self.dim, self.bias_dim = f"isometry/{seed}", dim, bias_dim
        self.lipschitz = scale
        self.precision: Precision = "fp32"
        self.preprocess = PreprocessSpec(size_px=size_px, resize_px=size_px, mean=(0.0,) * 3, std=(1.0,) * 3)
        generator = torch.Generator().manual_seed(seed)
        square = torch.randn(3 * size_px * size_px, dim - bias_dim, generator=generator, dtype=torch.float64)
        rows = torch.linalg.qr(square).Q.T.float()
        self.rows = torch.nn.Parameter(scale * rows, requires_grad=False)
        self.fingerprint = fingerprint({"isometry": dim}, self.preprocess, self.precision, {"rows": self.rows})

    def features(self, pixels: Tensor) -> Tensor:
        """See `TowerEncoder.features`."""
        found = (pixels - 0.5).flatten(1) @ self.rows.T
        return torch.nn.functional.pad(found, (0, 1), value=1.0) if self.bias_dim else found

    def encode(self, pixels: Tensor) -> Tensor:
        """See `perception.encoder.Encoder.encode`."""
        return unit_embeddings(self.features(pixels))
