"""When an image counts as fooled, as functions of the embeddings; see `offline.objectives` for `rows`."""

from dataclasses import dataclass
from typing import Protocol, Self

from torch import Tensor


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
class ArgmaxWrong:
    """Zero-shot classification errs: the most similar class embedding is another class's.

    Attributes:
        class_embeddings: T, (c, d) unit embeddings.
        labels: (b,) int64 in [0, c).
    """

    class_embeddings: Tensor
    labels: Tensor

    def __call__(self, embeddings: Tensor) -> Tensor:
        """See `Criterion`."""
        return (embeddings @ self.class_embeddings.T).argmax(dim=1) != self.labels

    def rows(self, index: Tensor) -> Self:
        """See `Criterion`."""
        return type(self)(self.class_embeddings, self.labels[index.to(self.labels.device)])
