"""The objectives of adversarial fine-tuning, FARE and TeCoA, as small classes with one loss for attack and update.

Each has a `target`, computed once a batch without gradient and used by the inner attack and the update alike, and a
loss per image, which the attack maximises and the update minimises. Knows nothing of optimisers or attacks.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from offline.errors import PlanError
from offline.objectives import LOGIT_SCALE


class FinetuneObjective(Protocol):
    """What the trained tower's embeddings should be."""

    def target(self, original_features: Tensor, labels: Tensor) -> Tensor:
        """What `per_image` compares with.

        Args:
            original_features: (b, d) un-normalised embeddings of the clean images under the original encoder.
            labels: (b,) int64, -1 where there is none.
        """

    def per_image(self, features: Tensor, target: Tensor) -> Tensor:
        """Loss of each image: (b, d) un-normalised embeddings of the trained tower -> (b,)."""


class Fare:
    """FARE: `sum_d (phi_orig(x)_d - phi(x + delta)_d)^2` on un-normalised embeddings, not divided by d (3.1)."""

    def target(self, original_features: Tensor, labels: Tensor) -> Tensor:
        """See `FinetuneObjective`: the original embeddings themselves; labels are not used."""
        return original_features

    def per_image(self, features: Tensor, target: Tensor) -> Tensor:
        """See `FinetuneObjective`."""
        return (features - target).square().sum(dim=-1)


class Tecoa:
    """TeCoA: cross-entropy of `100 * normalize(phi(x + delta)) @ T^T` (methods 3.1)."""

    def __init__(self, class_embeddings: Tensor) -> None:
        """Keep T.

        Args:
            class_embeddings: (c, d) unit text embeddings of the original text tower.
        """
        self.class_embeddings = class_embeddings

    def target(self, original_features: Tensor, labels: Tensor) -> Tensor:
        """See `FinetuneObjective`: the labels.

        Raises:
            PlanError: an image has no label.
        """
        if bool((labels < 0).any()):
            raise PlanError("TeCoA needs a class for every image; a source holds images without one")
        return labels

    def logits(self, features: Tensor) -> Tensor:
        """(b, d) un-normalised embeddings -> (b, c), in fp32 even under autocast: bf16 has 8 bits for 100 x cosine."""
        with torch.autocast(features.device.type, enabled=False):
            return LOGIT_SCALE * F.normalize(features.float(), dim=-1) @ self.class_embeddings.T

    def per_image(self, features: Tensor, target: Tensor) -> Tensor:
        """See `FinetuneObjective`."""
        return F.cross_entropy(self.logits(features), target, reduction="none")


def combined(clean: Tensor | None, adversarial: Tensor, clean_weight: float) -> Tensor:
    """`w * mean(clean) + (1 - w) * mean(adversarial)`; `clean` (b,) may be None where w is 0."""
    total = (1 - clean_weight) * adversarial.mean()
    return total if clean is None else total + clean_weight * torch.mean(clean)
