"""When an image counts as fooled, as functions of the embeddings; see `offline.objectives` for `rows`."""

from dataclasses import dataclass, replace
from typing import Protocol, Self

from torch import Tensor

from offline.objectives import Head, head_logits
from perception.similarity import two_afc_choice


class Criterion(Protocol):
    """A yes or no per image."""

    def __call__(self, embeddings: Tensor) -> Tensor:
        """(b, d) unit embeddings of the perturbed images -> (b,) bool, True where the attacker has won."""

    def rows(self, index: Tensor) -> Self:
        """The criterion of the images `index`, (k,) int64 rows of this batch."""


@dataclass(frozen=True)
class NearestNeighborWrong:
    """The most similar item of a clean gallery carries another label; of equally similar ones the first counts.

    Attributes:
        gallery: (n, d) unit embeddings.
        gallery_labels: (n,) int64.
        labels: (b,) int64, the right ones.
    """

    gallery: Tensor
    gallery_labels: Tensor
    labels: Tensor

    def __call__(self, embeddings: Tensor) -> Tensor:
        """See `Criterion`."""
        nearest = (embeddings @ self.gallery.T).argmax(dim=1)
        return self.gallery_labels[nearest] != self.labels

    def rows(self, index: Tensor) -> Self:
        """See `Criterion`."""
        return type(self)(self.gallery, self.gallery_labels, self.labels[index.to(self.labels.device)])


@dataclass(frozen=True)
class NearestNeighborIs:
    """The most similar item of a clean gallery carries the label that the attacker wants; of equals the first counts.

    Attributes:
        gallery: (n, d) unit embeddings.
        gallery_labels: (n,) int64.
        wanted: (b,) int64.
    """

    gallery: Tensor
    gallery_labels: Tensor
    wanted: Tensor

    def __call__(self, embeddings: Tensor) -> Tensor:
        """See `Criterion`."""
        nearest = (embeddings @ self.gallery.T).argmax(dim=1)
        return self.gallery_labels[nearest] == self.wanted

    def rows(self, index: Tensor) -> Self:
        """See `Criterion`."""
        return replace(self, wanted=self.wanted[index.to(self.wanted.device)])


@dataclass(frozen=True)
class ArgmaxWrong:
    """Classification errs: the largest logit is another class's.

    Attributes:
        class_embeddings: T, (c, d) unit embeddings of a zero-shot classifier; None for a plain classifier, which
            returns its logits itself.
        labels: (b,) int64 in [0, c).
    """

    class_embeddings: Tensor | None
    labels: Tensor

    def __call__(self, embeddings: Tensor) -> Tensor:
        """See `Criterion`."""
        logits = embeddings if self.class_embeddings is None else embeddings @ self.class_embeddings.T
        return logits.argmax(dim=1) != self.labels

    def rows(self, index: Tensor) -> Self:
        """See `Criterion`."""
        return type(self)(self.class_embeddings, self.labels[index.to(self.labels.device)])


@dataclass(frozen=True)
class TwoAfcWrong:
    """The reference is closer to the other candidate than people say; an exact tie goes to the left.

    Attributes:
        left, right: (b, d) unit embeddings of the clean candidates.
        labels: (b,) int64: 0 where the left one is closer, 1 for the right one.
    """

    left: Tensor
    right: Tensor
    labels: Tensor

    def __call__(self, embeddings: Tensor) -> Tensor:
        """See `Criterion`."""
        return two_afc_choice(embeddings, self.left, self.right) != self.labels

    def rows(self, index: Tensor) -> Self:
        """See `Criterion`."""
        index = index.to(self.labels.device)
        return type(self)(self.left[index], self.right[index], self.labels[index])


@dataclass(frozen=True)
class HeadDecides:
    """A detector head decides as the attacker wants: it fires where its logit is at least the threshold.

    Attributes:
        head: (b, d) unit embeddings -> (b,) or (b, 1) logits.
        signs: (b,) 1 where the detector shall fire, -1 where it shall not.
        threshold: of the logit; 0 is a probability of one half.
    """

    head: Head
    signs: Tensor
    threshold: float = 0.0

    def __call__(self, embeddings: Tensor) -> Tensor:
        """See `Criterion`.

        Raises:
            PlanError: the head does not return one logit an image.
        """
        return (head_logits(self.head, embeddings) >= self.threshold) == (self.signs > 0)

    def rows(self, index: Tensor) -> Self:
        """See `Criterion`."""
        return replace(self, signs=self.signs[index.to(self.signs.device)])
