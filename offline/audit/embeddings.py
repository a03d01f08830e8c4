"""Embeddings of what an audit's images are compared with, made once."""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from perception.encoder import Encoder
from perception.errors import NonFiniteEmbedding
from perception.preprocess import to_pixels

BATCH = 32
_T = TypeVar("_T")


def encode_stream(encoder: Encoder, images: Iterable[NDArray[np.uint8]]) -> tuple[Tensor, str]:
    """Encode preprocessed images, of which no more than a batch is held at once.

    Returns:
        (n, d) unit embeddings on the encoder's device, which can take part in gradients; and the sha256 of all pixels.
        The pixels' and not the embeddings', whose last bits may change with the number of threads.
    """
    digest = hashlib.sha256()
    rows = []
    for batch in batches(images, BATCH):
        for image in batch:
            digest.update(np.ascontiguousarray(image).tobytes())
        with torch.inference_mode():
            rows.append(encoder.encode(to_pixels(batch)))
    return (torch.cat(rows) if rows else torch.zeros(0, encoder.dim)).clone(), digest.hexdigest()


def batches(values: Iterable[_T], size: int) -> Iterator[list[_T]]:
    """Lists of `size` values, the last one shorter."""
    rest = iter(values)
    while batch := list(islice(rest, size)):
        yield batch


def require_finite(embeddings: Tensor) -> None:
    """Refuse embeddings (b, d) that can be compared with nothing.

    Raises:
        NonFiniteEmbedding: a value is NaN or infinite; names the rows.
    """
    finite = torch.isfinite(embeddings).all(dim=1)
    if not bool(finite.all()):
        raise NonFiniteEmbedding(tuple(torch.nonzero(~finite).flatten().tolist()))
