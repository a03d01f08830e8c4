"""Two-alternative forced choice: which of two images is closer to a reference, against what people say.

Owns the rule and the scores of NIGHTS and BAPPS. Distances are down-is-closer, of any scale; a similarity is passed
negated. People's preferences are for the right image ("p1"): a bool in NIGHTS, a share of raters ("judge") in BAPPS.

Two figures are called 2AFC, and are not to be compared. `accuracy` counts agreement with the majority. `soft_score` is
LPIPS's own for BAPPS, in which an answer earns the share of raters who agree; its ceiling is `human_ceiling`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from offline.benchmarks.intervals import Accuracy
from offline.errors import DataError
from perception.similarity import two_afc_choice

TieRule = Literal["left", "half"]
BAPPS_SPLITS = ("cnn", "color", "deblur", "frameinterp", "superres", "traditional")


def prefers_right(judge: Tensor) -> Tensor:
    """The majority of raters: (n,) bool from the share who prefer the right image; one half is no majority.

    Raises:
        DataError: not (n,), empty, or a share is not in [0, 1].
    """
    return _shares(judge) > 0.5


def choose(left: Tensor, right: Tensor) -> Tensor:
    """Choose by distance: (n,) bool, True where the right image is closer; an exact tie goes to the left.

    Args:
        left, right: (n,) distances of either image from the reference.

    Raises:
        DataError: they are not two (n,) of one length, empty, or not finite, which would count as a choice of the left.
    """
    _require_distances(left, right)
    return right < left


def choose_by_embedding(reference: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Choose by cosine: (n,) bool from (n, d) embeddings, as `choose`; see `perception.two_afc_choice`.

    Raises:
        DataError: the shapes differ, there are no rows, or an embedding is not finite or zero.
    """
    if reference.ndim != 2 or not reference.shape == left.shape == right.shape or not len(reference):
        shapes = ", ".join(str(tuple(x.shape)) for x in (reference, left, right))
        raise DataError("2AFC", f"embeddings must be three (n, d), got {shapes}")
    norms = torch.stack([x.norm(dim=1) for x in (reference, left, right)])
    if not bool((torch.isfinite(norms) & (norms > 0)).all()):
        raise DataError("2AFC", "an embedding is not finite, or is zero")
    return two_afc_choice(reference, left, right).bool()


def accuracy(chosen: Tensor, preferred: Tensor) -> Accuracy:
    """How often a choice is the preferred one: both (n,) bool, True for right.

    Raises:
        DataError: they are not two (n,) bool of one length, or empty.
    """
    if chosen.dtype != torch.bool or preferred.dtype != torch.bool or chosen.ndim != 1:
        raise DataError("2AFC", f"choices must be (n,) bool, got {tuple(chosen.shape)} {chosen.dtype}")
    if chosen.shape != preferred.shape:
        raise DataError("2AFC", f"{len(chosen)} choices for {tuple(preferred.shape)} preferences")
    return Accuracy(int((chosen == preferred).sum()), len(chosen))


def tie_aware_accuracy(left: Tensor, right: Tensor, preferred: Tensor, ties: TieRule = "left") -> float:
    """Accuracy by distance, in [0, 1].

    Args:
        left, right: (n,) distances.
        preferred: (n,) bool, True for right.
        ties: "left", the paper's protocol, answers an exact tie with the left image; "half", DreamSim's, gives it .5.

    Raises:
        DataError: see `choose` and `accuracy`, and there is no such rule.
    """
    if ties not in get_args(TieRule):
        raise DataError("2AFC", f"ties must be one of {get_args(TieRule)}, got {ties!r}")
    by_left = accuracy(choose(left, right), preferred)
    if ties == "left":
        return by_left.value
    tied = left == right  # of which the left rule has got those right that prefer the left
    return (by_left.right + 0.5 * int(tied.sum()) - int((tied & ~preferred).sum())) / by_left.total


def soft_score(left: Tensor, right: Tensor, judge: Tensor) -> float:
    """LPIPS's score, in [0, 1]: an answer earns the share of raters who agree with it, an exact tie one half.

    Args:
        left, right: (n,) distances.
        judge: (n,) shares of raters who prefer the right image.

    Raises:
        DataError: see `choose` and `prefers_right`, and the lengths differ.
    """
    shares = _shares(judge)
    chosen = choose(left, right)
    if chosen.shape != shares.shape:
        raise DataError("2AFC", f"{len(chosen)} distances for {len(shares)} judgements")
    earned = torch.where(chosen, shares, 1 - shares)
    return float(torch.where(left == right, 0.5, earned).mean())


def human_ceiling(judge: Tensor) -> float:
    """What a rater drawn at random scores on average by `soft_score`: the mean of `j^2 + (1 - j)^2`.

    Raises:
        DataError: see `prefers_right`.
    """
    shares = _shares(judge)
    return float((shares.square() + (1 - shares).square()).mean())


def pooled(parts: Sequence[Accuracy]) -> Accuracy:
    """The accuracy over several splits together, as for the two of NIGHTS' test set.

    Raises:
        DataError: there are none.
    """
    return Accuracy(sum(part.right for part in parts), sum(part.total for part in parts))


def size_weighted_mean(values: Sequence[float], sizes: Sequence[int]) -> float:
    """What `pooled` gives, from published figures: their mean, weighted by the sizes of their splits.

    Raises:
        DataError: there are none, a value is not finite, a size is below 1, or there is not one size a value.
    """
    if not values or len(values) != len(sizes) or min(sizes) < 1 or not all(map(math.isfinite, values)):
        raise DataError("2AFC", f"cannot weigh {list(values)} by {list(sizes)}")
    return math.fsum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)


def bapps_mean(by_split: Mapping[str, float]) -> float:
    """The BAPPS figure: the mean of its six splits, each of the same weight whatever its size.

    Raises:
        DataError: the splits are not those six, or a value is not finite.
    """
    if by_split.keys() != set(BAPPS_SPLITS):
        raise DataError("BAPPS", f"splits must be {', '.join(BAPPS_SPLITS)}; got {', '.join(sorted(by_split))}")
    if not all(map(math.isfinite, by_split.values())):
        raise DataError("BAPPS", f"a figure is not finite: {dict(by_split)}")
    return math.fsum(by_split.values()) / len(BAPPS_SPLITS)


def _shares(judge: Tensor) -> Tensor:
    """(n,) float64 in [0, 1]."""
    if judge.ndim != 1 or not len(judge):
        raise DataError("2AFC", f"judgements must be (n,), got {tuple(judge.shape)}")
    shares = judge.double()
    if not bool(((shares >= 0) & (shares <= 1)).all()):  # also catches NaN
        raise DataError("2AFC", "judgements must be shares of raters in [0, 1]")
    return shares


def _require_distances(left: Tensor, right: Tensor) -> None:
    if left.ndim != 1 or left.shape != right.shape or not len(left):
        raise DataError("2AFC", f"distances must be two (n,), got {tuple(left.shape)} and {tuple(right.shape)}")
    bad = ~(torch.isfinite(left) & torch.isfinite(right))
    if bool(bad.any()):
        raise DataError("2AFC", f"distances of rows {torch.nonzero(bad).flatten().tolist()[:5]} are not finite")
