"""What an attacker of one image each maximises, as functions of the embeddings.

An objective carries what it compares each image of the batch with, and `rows` narrows it to a part of the batch, since
images leave an attack as soon as they are fooled. Those over logits take zero-shot classifiers and plain ones alike:
a plain classifier's "embeddings" are its logits.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from offline.errors import PlanError

LOGIT_SCALE = 100.0
_TINY = 1e-12

Head = Callable[[Tensor], Tensor]
"""(b, d) unit embeddings -> (b,) or (b, 1) logits of a detector."""


class Objective(Protocol):
    """A differentiable figure per image, to be maximised."""

    @property
    def needs_random_start(self) -> bool:
        """Whether its gradient vanishes at the clean image, so that an attack from there would not move at all."""

    def __call__(self, embeddings: Tensor) -> Tensor:
        """(b, d) unit embeddings of the perturbed images -> (b,)."""

    def rows(self, index: Tensor) -> Self:
        """The objective of the images `index`, (k,) int64 rows of this batch."""


# --- over embeddings -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EmbeddingShift:
    """Eq. 6: `|phi(x + delta) - phi(x)|^2` of unit embeddings: as far from the clean image as possible, in [0, 4].

    Attributes:
        clean: (b, d) unit embeddings of the clean images.
    """

    needs_random_start: ClassVar[bool] = True
    clean: Tensor

    def __call__(self, embeddings: Tensor) -> Tensor:
        """See `Objective`."""
        return (embeddings - self.clean).square().sum(dim=1)

    def rows(self, index: Tensor) -> Self:
        """See `Objective`."""
        return type(self)(_take(self.clean, index))


@dataclass(frozen=True)
class TargetSet:
    """Eq. 5: `<phi(x + delta), m / |m|>` with m the mean of the targets' unit embeddings: close to all of a set Y.

    The sum `-sum_{y in Y} |phi(x + delta) - y|^2` that the equation writes is `2 |Y| (<phi(x + delta), m> - 1)`, which
    has the same maxima.

    Attributes:
        means: (b, d) m / |m| of each image's set; see `of`.
    """

    needs_random_start: ClassVar[bool] = False
    means: Tensor

    @classmethod
    def of(cls, targets: Tensor, images: int) -> Self:
        """The same set for all of `images` images: (t, d) embeddings of any norm but zero.

        Raises:
            PlanError: there are no targets, one is zero or not finite, or they cancel out.
        """
        norms = targets.norm(dim=1, keepdim=True)
        if not (len(targets) and bool((torch.isfinite(norms) & (norms > 0)).all())):
            raise PlanError(f"a target set needs embeddings that are finite and not zero, got {len(targets)} targets")
        mean = (targets / norms).mean(dim=0)
        if not float(mean.norm()) > _TINY:
            raise PlanError(f"the {len(targets)} targets cancel out: their mean has no direction")
        return cls((mean / mean.norm()).expand(images, -1))

    def __call__(self, embeddings: Tensor) -> Tensor:
        """See `Objective`."""
        return (embeddings * self.means).sum(dim=1)

    def rows(self, index: Tensor) -> Self:
        """See `Objective`."""
        return type(self)(_take(self.means, index))


@dataclass(frozen=True)
class TwoAfcCrossEntropy:
    """`-log softmax([<phi(x + delta), l>, <phi(x + delta), r>])[y]`: the cosines as they are, without a temperature.

    The reference is perturbed, the candidates are not.

    Attributes:
        left, right: l, r, (b, d) unit embeddings of the clean candidates.
        labels: y, (b,) int64: 0 where the left one is closer, 1 for the right one.
    """

    needs_random_start: ClassVar[bool] = False
    left: Tensor
    right: Tensor
    labels: Tensor

    def __call__(self, embeddings: Tensor) -> Tensor:
        """See `Objective`."""
        cosines = torch.stack([(embeddings * side).sum(dim=1) for side in (self.left, self.right)], dim=1)
        return F.cross_entropy(cosines, self.labels, reduction="none")

    def rows(self, index: Tensor) -> Self:
        """See `Objective`."""
        return type(self)(_take(self.left, index), _take(self.right, index), _take(self.labels, index))


@dataclass(frozen=True)
class HeadLogit:
    """`s f(phi(x + delta))` of a detector head f: the attacker knows both encoder and head.

    Attributes:
        head: f; its logit rises with what it detects.
        signs: s, (b,) 1 where the detector shall fire, -1 where it shall not.
    """

    needs_random_start: ClassVar[bool] = False
    head: Head
    signs: Tensor

    def __call__(self, embeddings: Tensor) -> Tensor:
        """See `Objective`.

        Raises:
            PlanError: the head does not return one logit an image.
        """
        return self.signs * head_logits(self.head, embeddings)

    def rows(self, index: Tensor) -> Self:
        """See `Objective`."""
        return type(self)(self.head, _take(self.signs, index))


@dataclass(frozen=True)
class PoolMargin:
    """`max_{g in wanted} <phi(x + delta), g> - max_{g in true} <phi(x + delta), g>`: the attacker knows the pools.

    It is positive exactly where 1-NN among these two pools answers as the attacker wants; in [-2, 2].

    Attributes:
        gallery: (n, d) unit embeddings of all pools' exemplars.
        pools: (n,) int64, the exemplars' pools.
        wanted, true: (b,) int64, the pool that each image shall be taken for, and the one that it belongs to.
        left_out: (b, n) bool, exemplars that do not count for an image, such as views of itself; None for none.
    """

    needs_random_start: ClassVar[bool] = False
    gallery: Tensor
    pools: Tensor
    wanted: Tensor
    true: Tensor
    left_out: Tensor | None = None

    def __post_init__(self) -> None:
        """Check that there is something to be close to.

        Raises:
            PlanError: a pool is empty.
        """
        for name, asked in (("wanted", self.wanted), ("true", self.true)):
            has_any = torch.isin(asked, self.pools)
            if self.left_out is not None:
                has_any = ((self.pools == asked[:, None]) & ~self.left_out).any(dim=1)
            missing = asked[~has_any]
            if len(missing):
                raise PlanError(f"the {name} pool {int(missing[0])} has no exemplar")

    def __call__(self, embeddings: Tensor) -> Tensor:
        """See `Objective`."""
        similarities = embeddings @ self.gallery.T
        if self.left_out is not None:
            similarities = similarities.masked_fill(self.left_out, -torch.inf)
        wanted, true = (
            similarities.masked_fill(self.pools != pool[:, None], -torch.inf).amax(dim=1)
            for pool in (self.wanted, self.true)
        )
        return wanted - true

    def rows(self, index: Tensor) -> Self:
        """See `Objective`."""
        left_out = None if self.left_out is None else _take(self.left_out, index)
        return replace(self, wanted=_take(self.wanted, index), true=_take(self.true, index), left_out=left_out)


# --- over logits -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogitObjective:
    """What the objectives over logits z share; y is an image's label.

    Attributes:
        class_embeddings: T, (c, d) unit embeddings of a zero-shot classifier, whose logits are `100 * phi @ T^T`; None
            for a plain classifier, which returns its logits itself.
        labels: y, (b,) int64 in [0, c).
    """

    needs_random_start: ClassVar[bool] = False
    class_embeddings: Tensor | None
    labels: Tensor

    def logits(self, embeddings: Tensor) -> Tensor:
        """(b, d) -> (b, c)."""
        return embeddings if self.class_embeddings is None else LOGIT_SCALE * embeddings @ self.class_embeddings.T

    def rows(self, index: Tensor) -> Self:
        """See `Objective`."""
        return replace(self, labels=_take(self.labels, index))

    def _true_logit(self, logits: Tensor) -> Tensor:
        return _pick(logits, self.labels)

    def _largest_other(self, logits: Tensor) -> Tensor:
        return logits.scatter(1, self.labels[:, None], -torch.inf).amax(dim=1)


@dataclass(frozen=True)
class CrossEntropy(LogitObjective):
    """`-log softmax(z)[y]`."""

    def __call__(self, embeddings: Tensor) -> Tensor:
        """See `Objective`."""
        return F.cross_entropy(self.logits(embeddings), self.labels, reduction="none")


@dataclass(frozen=True)
class Margin(LogitObjective):
    """`max_{i != y} z_i - z_y`: positive exactly where the classifier errs."""

    def __call__(self, embeddings: Tensor) -> Tensor:
        """See `Objective`."""
        logits = self.logits(embeddings)
        return self._largest_other(logits) - self._true_logit(logits)


@dataclass(frozen=True)
class Dlr(LogitObjective):
    """`-(z_y - max_{i != y} z_i) / (z_(1) - z_(3) + 1e-12)`, z_(k) the k-th largest: blind to the logits' scale."""

    def __call__(self, embeddings: Tensor) -> Tensor:
        """See `Objective`.

        Raises:
            PlanError: fewer than three classes.
        """
        logits = self.logits(embeddings)
        largest = _largest(logits, 3, "DLR")
        margin = self._true_logit(logits) - self._largest_other(logits)
        return -margin / (largest[:, 0] - largest[:, 2] + _TINY)

    def runners_up(self, embeddings: Tensor, count: int) -> Tensor:
        """See `offline.attacks.targeted.Targetable`."""
        others = self.logits(embeddings).scatter(1, self.labels[:, None], -torch.inf)
        return others.topk(min(count, others.shape[1] - 1), dim=1).indices

    def toward(self, targets: Tensor) -> "TargetedDlr":
        """The objective of being taken for `targets`, (b,) int64."""
        return TargetedDlr(self.class_embeddings, self.labels, targets)


@dataclass(frozen=True)
class TargetedDlr(Dlr):
    """`-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12)`.

    Attributes:
        targets: t, (b,) int64 in [0, c).
    """

    targets: Tensor

    def __call__(self, embeddings: Tensor) -> Tensor:
        """See `Objective`.

        Raises:
            PlanError: fewer than four classes.
        """
        logits = self.logits(embeddings)
        largest = _largest(logits, 4, "targeted DLR")
        margin = self._true_logit(logits) - _pick(logits, self.targets)
        return -margin / (largest[:, 0] - (largest[:, 2] + largest[:, 3]) / 2 + _TINY)

    def rows(self, index: Tensor) -> Self:
        """See `Objective`."""
        return replace(self, labels=_take(self.labels, index), targets=_take(self.targets, index))


def head_logits(head: Head, embeddings: Tensor) -> Tensor:
    """A detector's logits, (b,).

    Raises:
        PlanError: the head does not return one logit an image.
    """
    logits = head(embeddings)
    if logits.shape not in ((len(embeddings),), (len(embeddings), 1)):
        raise PlanError(f"a head must return one logit for each of {len(embeddings)} images, got {tuple(logits.shape)}")
    return logits.flatten()


def _largest(logits: Tensor, count: int, name: str) -> Tensor:
    """(b, count) in falling order."""
    if logits.shape[1] < count:
        raise PlanError(f"{name} needs at least {count} classes, got {logits.shape[1]}")
    return logits.topk(count, dim=1).values


def _pick(logits: Tensor, classes: Tensor) -> Tensor:
    """One logit of each image, (b,)."""
    return logits.gather(1, classes[:, None]).squeeze(1)


def _take(of_each: Tensor, index: Tensor) -> Tensor:
    return of_each[index.to(of_each.device)]
