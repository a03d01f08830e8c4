"""The Encoder protocol: pixels in, unit embeddings out.

Owns the contract, the finiteness check and the fingerprint. The families live in `perception.encoders`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from perception.errors import NonFiniteEmbedding
from perception.image import decode
from perception.preprocess import PreprocessSpec, to_pixels
from perception.similarity import cosine_similarity

Precision = Literal["fp32", "bf16"]
ImageSource = str | Path | bytes | Image.Image


@runtime_checkable
class Encoder(Protocol):
    """Maps images to the unit sphere; differentiable, deterministic in eval mode."""

    @property
    def name(self) -> str:
        """The name under which it was loaded."""

    @property
    def dim(self) -> int:
        """d, the length of an embedding."""

    @property
    def fingerprint(self) -> str:
        """Hash of weights, architecture, preprocessing and precision: equal fingerprints give equal embeddings."""

    @property
    def preprocess(self) -> PreprocessSpec:
        """How images become pixels."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode a batch.

        Args:
            pixels: (b, 3, h, w) float RGB in [0, 1], not normalised.

        Returns:
            (b, d) float32 of unit L2 norm, differentiable with respect to `pixels`.

        Raises:
            NonFiniteEmbedding: the network returned NaN, infinity or zero.
        """


def unit_embeddings(features: Tensor) -> Tensor:
    """Normalise network outputs (b, d) to unit float32 rows.

    Raises:
        NonFiniteEmbedding: a row is not finite, or zero and so without a direction.
    """
    features = features.float()
    norms = features.norm(dim=-1, keepdim=True)
    good = torch.isfinite(norms).squeeze(-1) & (norms.squeeze(-1) > 0)
    if not bool(good.all()):
        raise NonFiniteEmbedding(tuple(int(i) for i in torch.nonzero(~good).flatten()))
    units: Tensor = features / norms
    return units


def fingerprint(
    architecture: Mapping[str, Any], preprocess: PreprocessSpec, precision: str, weights: Mapping[str, Tensor]
) -> str:
    """Hash what decides an embedding.

    Weights enter as float32 values under sorted names, so that the same network has one fingerprint whatever file
    format it came in.
    """
    head = {"architecture": architecture, "preprocess": preprocess.as_dict(), "precision": precision}
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for name in sorted(weights):
        tensor = weights[name].detach().cpu()
        if tensor.is_floating_point():
            tensor = tensor.float()
        digest.update(f"\n{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def open_image(source: ImageSource) -> Image.Image:
    """The first frame of a path, encoded bytes or a Pillow image, as RGB (transparency on white).

    Raises:
        ImageError: it cannot be decoded, or is over the default limits.
        OSError: the file cannot be read.
    """
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    return decode(data).frames[0].image


@torch.inference_mode()
def encode_images(encoder: Encoder, sources: Sequence[ImageSource], batch_size: int = 32) -> Tensor:
    """Encode image files, bytes or Pillow images: (n, d) unit float32.

    Raises:
        ImageError, OSError: see `open_image`; the first bad image ends the call.
    """
    rows = []
    for start in range(0, len(sources), batch_size):
        images = [encoder.preprocess.apply(open_image(s)) for s in sources[start : start + batch_size]]
        rows.append(encoder.encode(to_pixels(images)))
    return torch.cat(rows) if rows else torch.zeros(0, encoder.dim)


def image_similarity(encoder: Encoder, a: ImageSource, b: ImageSource) -> float:
    """Cosine similarity of two images, in [-1, 1]."""
    embeddings = encode_images(encoder, [a, b])
    return float(cosine_similarity(embeddings[0], embeddings[1]))
