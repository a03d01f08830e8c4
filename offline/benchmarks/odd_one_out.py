"""THINGS odd-one-out: which of three images is the odd one, against what people say (methods 6.3, table XII).

Owns the rule. All answers are look-ups in one table of the images' similarities, so that 4.7M triplets take seconds.
Knows no files, no encoders and no attacks.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offline.benchmarks.intervals import Accuracy
from offline.errors import DataError

_COLUMNS = 8192  # of embeddings that are summed in float64 at a time
_LOOKED_UP = 2**20  # triplets at a time


def choose(similarities: Tensor) -> Tensor:
    """The odd one of three images is the one outside the most similar pair.

    Args:
        similarities: (n, 3); column i is of the pair without image i. Up is closer: a distance is passed negated.

    Returns:
        (n,) int64 in {0, 1, 2}. Where no pair is more similar than both others, the first image, as in the paper's run.

    Raises:
        DataError: not (n, 3), or one is not finite, which would count as a choice of the first.
    """
    if similarities.ndim != 2 or similarities.shape[1] != 3:
        raise DataError("odd-one-out", f"similarities must be (n, 3), got {tuple(similarities.shape)}")
    bad = ~torch.isfinite(similarities).all(dim=1)
    if bool(bad.any()):
        raise DataError("odd-one-out", f"similarities of rows {torch.nonzero(bad).flatten().tolist()[:5]} not finite")
    first, second, third = similarities.unbind(dim=1)
    chosen = torch.zeros(len(similarities), dtype=torch.int64, device=similarities.device)
    chosen[(second > first) & (second > third)] = 1
    chosen[(third > first) & (third > second)] = 2
    return chosen


def similarity_table(embeddings: Tensor, metric: str = "cosine") -> Tensor:
    """The similarities of all pairs of images, in float32 from sums in float64.

    Equal embeddings have equal similarities to any other: rounding hides the order of the sums.

    Args:
        embeddings: (n, d) of any norm but zero.
        metric: 'cosine', or 'l2' for the negated squared distance, by which LPIPS compares; see `TowerEncoder.metric`.

    Returns:
        (n, n), symmetric.

    Raises:
        DataError: an embedding is not finite, or is zero where the metric is the cosine; or there is no such metric.
    """
    gram = torch.zeros(len(embeddings), len(embeddings), dtype=torch.float64, device=embeddings.device)
    for part in embeddings.split(_COLUMNS, dim=1):
        gram += part.double() @ part.double().T
    squares = gram.diagonal()
    if not bool(torch.isfinite(squares).all()) or (metric == "cosine" and not bool((squares > 0).all())):
        raise DataError("odd-one-out", "an embedding is not finite, or is zero")
    if metric == "cosine":
        table = gram / (squares[:, None] * squares[None]).sqrt()
    elif metric == "l2":
        table = 2 * gram - squares[:, None] - squares[None]
        step = float(squares.max()) * 2.0**-40  # what is left of large sums that cancel is noise
        table = (table / step).round() * step if step else table
    else:
        raise DataError("odd-one-out", f"metric must be cosine or l2, got {metric!r}")
    return torch.triu(table).float() + torch.triu(table, 1).float().T


def choices(table: Tensor, triplets: NDArray[np.int64]) -> Tensor:
    """The odd one of each triplet, by `choose`.

    Args:
        table: (m, m) of `similarity_table`.
        triplets: (n, 3) rows of the table.

    Returns:
        (n,) int64 in {0, 1, 2}, on the table's device.
    """
    chosen = []
    for part in torch.from_numpy(triplets).split(_LOOKED_UP):
        first, second, third = part.to(table.device).unbind(dim=1)
        pairs = (table[second, third], table[first, third], table[first, second])
        chosen.append(choose(torch.stack(pairs, dim=1)))
    return torch.cat(chosen) if chosen else torch.zeros(0, dtype=torch.int64)


def accuracy(chosen: Tensor, odd: NDArray[np.int64]) -> Accuracy:
    """How often the chosen image (n,) is the one that people call odd (n,).

    Raises:
        DataError: the lengths differ, or are 0.
    """
    if chosen.shape != odd.shape:
        raise DataError("odd-one-out", f"{len(chosen)} choices for {len(odd)} judgements")
    return Accuracy(int((chosen.cpu().numpy() == odd).sum()), len(odd))
