"""What an attacker of one image each maximises, as functions of the embeddings.

An objective carries what it compares each image of the batch with, and `rows` narrows it to a part of the batch, since
images leave an attack as soon as they are fooled.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

import torch.nn.functional as F
from torch import Tensor

LOGIT_SCALE = 100.0


class Objective(Protocol):
    """A differentiable figure per image, to be maximised."""

    @property
    def needs_random_start(self) -> bool:
        """Whether its gradient vanishes at the clean image, so that an attack from there would not move at all."""

    def __call__(self, embeddings: Tensor) -> Tensor:
        """(b, d) unit embeddings of the perturbed images -> (b,)."""

    def rows(self, index: Tensor) -> Self:
        """The objective of the images `index`, (k,) int64 rows of this batch."""


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
        return type(self)(self.clean[index.to(self.clean.device)])


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy of the zero-shot logits `100 * phi(x + delta) @ T^T` with the true class.

    Attributes:
        class_embeddings: T, (c, d) unit embeddings.
        labels: (b,) int64 in [0, c).
    """

    needs_random_start: ClassVar[bool] = False
    class_embeddings: Tensor
    labels: Tensor

    def __call__(self, embeddings: Tensor) -> Tensor:
        """See `Objective`."""
        return F.cross_entropy(LOGIT_SCALE * embeddings @ self.class_embeddings.T, self.labels, reduction="none")

    def rows(self, index: Tensor) -> Self:
        """See `Objective`."""
        return type(self)(self.class_embeddings, self.labels[index.to(self.labels.device)])
