"""Similarities and distances between unit embeddings.

`similarity` is up-is-closer (cosine, in [-1, 1]); `distance` is down-is-closer. Never called a score.
"""

import torch
from torch import Tensor


def cosine_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the angle between embeddings, row by row.

    Args:
        a: (..., d) embeddings, of any norm but zero.
        b: (..., d), broadcast against `a`.

    Returns:
        (...) in [-1, 1].
    """
    return torch.nn.functional.cosine_similarity(a, b, dim=-1).clamp(-1.0, 1.0)


def pseudo_distance(a: Tensor, b: Tensor) -> Tensor:
    """Perceptual pseudo-metric `d = sqrt(1 - similarity)`, in [0, sqrt 2].

    Obeys the triangle inequality, which `1 - similarity` does not; `d = 0` does not imply equal images. Do not
    differentiate through the root at 0: attacks use the similarity.
    """
    return (1.0 - cosine_similarity(a, b)).clamp_min(0.0).sqrt()


def two_afc_choice(reference: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Two-alternative forced choice: which image is closer to the reference?

    Args:
        reference, left, right: (b, d) embeddings.

    Returns:
        (b,) int64: 0 for left, 1 for right; an exact tie goes to the left, as in the paper's protocol.
    """
    return (cosine_similarity(reference, right) > cosine_similarity(reference, left)).long()
