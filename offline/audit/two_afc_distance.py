"""Two-alternative forced choice by the squared L2 distance of features, as LPIPS and R-LPIPS decide (methods 8.2).

With f the reference's features and x, y those of the left and the right candidate,
`|f - y|^2 - |f - x|^2 = <(f, 1), w>` for `w = (2 (x - y), |y|^2 - |x|^2)`: the choice is linear in the features with a
constant 1 appended, which is what `DistanceView` encodes to. Features of LPIPS have 485,000 dimensions at 224 px, so
that the candidates are kept as pixels, and a few of their `w` at a time.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from offline.audit.embeddings import require_finite
from offline.audit.record import Judgement
from offline.audit.task import Item
from offline.criteria import Criterion
from offline.errors import PlanError
from offline.objectives import Objective
from perception.encoders.tower import TowerEncoder
from perception.preprocess import to_pixels

SIDES = ("left", "right")
GROUP, GROUPS_HELD = 32, 8
"""Pairs that are always encoded together, so that a run that goes on finds the same bits; and how many groups stay."""


class DistanceView:
    """An encoder that compares by distance, as something that encodes to (b, d + 1): its features, and the constant 1.

    It is an `Encoder` but for the norm of its rows, which 2AFC does not ask for.
    """

    metric: ClassVar[str] = "l2"

    def __init__(self, encoder: TowerEncoder) -> None:
        self._encoder = encoder
        self.name, self.fingerprint, self.preprocess = encoder.name, encoder.fingerprint, encoder.preprocess
        self.dim = encoder.dim + 1

    def encode(self, pixels: Tensor) -> Tensor:
        """(b, 3, h, w) in [0, 1] -> (b, d + 1), differentiable.

        Raises:
            NonFiniteEmbedding: the network returned NaN or infinity.
        """
        features = self._encoder.features(pixels)
        require_finite(features.detach())
        return torch.cat([features, features.new_ones(len(features), 1)], dim=1)


class CandidatePairs:
    """The two candidates of each triplet, from which `directions` are made when they are asked for."""

    def __init__(self, encoder: DistanceView) -> None:
        self._encoder = encoder
        self._left: list[NDArray[np.uint8]] = []
        self._right: list[NDArray[np.uint8]] = []
        self._held: OrderedDict[int, Tensor] = OrderedDict()

    def add(self, left: Sequence[NDArray[np.uint8]], right: Sequence[NDArray[np.uint8]]) -> tuple[str, str]:
        """Take in pairs of (3, h, w) uint8; returns the sha256 of the pixels of either side."""
        self._left += left
        self._right += right
        self._held.clear()
        left_hash, right_hash = (hashlib.sha256(b"".join(image.tobytes() for image in side)) for side in (left, right))
        return left_hash.hexdigest(), right_hash.hexdigest()

    def directions(self, rows: Tensor) -> Tensor:
        """(b, d + 1) float32, w of the triplets `rows`: 0 where both candidates are one image."""
        wanted = rows.tolist()
        groups = {number: self._group(number) for number in sorted({row // GROUP for row in wanted})}
        while len(self._held) > GROUPS_HELD:
            self._held.popitem(last=False)
        return torch.stack([groups[row // GROUP][row % GROUP] for row in wanted])

    def _group(self, number: int) -> Tensor:
        if number not in self._held:
            part = slice(number * GROUP, (number + 1) * GROUP)
            left, right = self._left[part], self._right[part]
            with torch.no_grad():
                x, y = (self._encoder.encode(to_pixels(side))[:, :-1] for side in (left, right))
            same = torch.tensor([np.array_equal(a, b) for a, b in zip(left, right, strict=True)], device=x.device)
            y = torch.where(same[:, None], x, y)
            constant = ((y - x).double() * (y + x).double()).sum(dim=1, keepdim=True)
            self._held[number] = torch.cat([2 * (x - y), constant.float()], dim=1)
        self._held.move_to_end(number)
        return self._held[number]


class DistanceTwoAfcTask:
    """See `offline.audit.task.Task`; the attacker of a reference wants the other candidate chosen."""

    def __init__(self, items: Sequence[Item], candidates: CandidatePairs, identity: Mapping[str, str]) -> None:
        """Hold the triplets.

        Args:
            items: the references, labelled 'left' or 'right'.
            candidates: one pair an item.
            identity: see `Task.identity`.
        """
        self.items, self.identity, self._candidates = items, identity, candidates
        self._labels = torch.tensor([SIDES.index(item.label) for item in items])

    def judge(self, rows: Tensor, embeddings: Tensor) -> list[Judgement]:
        """See `Task.judge`; the margin is the right candidate's squared distance minus the left one's."""
        embeddings = embeddings.detach()
        require_finite(embeddings)
        margins = _margins(embeddings, self._candidates.directions(rows)).tolist()
        labels = self._labels[rows].tolist()
        return [
            Judgement(SIDES[margin < 0], (margin < 0) == label, {"margin": margin})
            for margin, label in zip(margins, labels, strict=True)
        ]

    def severity(self, row: int, judgement: Judgement) -> float:
        """See `Task.severity`: 1 for the wrong choice."""
        return float(self.at_goal(row, judgement))

    def at_goal(self, row: int, judgement: Judgement) -> bool:
        """See `Task.at_goal`."""
        return judgement.answer != self.items[row].label

    def criterion(self, rows: Tensor) -> Criterion:
        """See `Task.criterion`."""
        return DistanceWrong(*self._of(rows))

    def objective(self, attack: str, rows: Tensor, clean: Tensor) -> Objective:
        """See `Task.objective`.

        Raises:
            PlanError: there is no such attack.
        """
        if attack not in ("two-afc", "square"):
            raise PlanError(f"two-afc knows the attack two-afc, got {attack!r}")
        return DistanceCrossEntropy(*self._of(rows))

    def _of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        directions = self._candidates.directions(rows)
        return directions, self._labels[rows].to(directions.device)


@dataclass(frozen=True)
class DistanceWrong:
    """The reference is closer to the other candidate than people say; an exact tie goes to the left.

    Attributes:
        directions: w, (b, d + 1).
        labels: (b,) int64: 0 where the left one is closer, 1 for the right one.
    """

    directions: Tensor
    labels: Tensor

    def __call__(self, embeddings: Tensor) -> Tensor:
        """See `offline.criteria.Criterion`."""
        return (_margins(embeddings, self.directions) < 0).long() != self.labels

    def rows(self, index: Tensor) -> Self:
        """See `offline.criteria.Criterion`."""
        index = index.to(self.labels.device)
        return type(self)(self.directions[index], self.labels[index])


@dataclass(frozen=True)
class DistanceCrossEntropy:
    """`-log softmax([-|f - x|^2, -|f - y|^2])[label]`, which is a softplus of the margin.

    Attributes:
        directions, labels: as in `DistanceWrong`.
    """

    needs_random_start: ClassVar[bool] = False
    directions: Tensor
    labels: Tensor

    def __call__(self, embeddings: Tensor) -> Tensor:
        """See `offline.objectives.Objective`."""
        return F.softplus((2 * self.labels - 1) * _margins(embeddings, self.directions))

    def rows(self, index: Tensor) -> Self:
        """See `offline.objectives.Objective`."""
        index = index.to(self.labels.device)
        return type(self)(self.directions[index], self.labels[index])


def _margins(embeddings: Tensor, directions: Tensor) -> Tensor:
    return (embeddings * directions).sum(dim=1)
