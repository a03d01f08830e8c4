"""The objectives of fine-tuning as small classes: FARE and TeCoA, and the hinge on two-alternative forced choices.

FARE and TeCoA have one loss for attack and update. Each has a `target`, computed once a batch without gradient and used
by the inner attack and the update alike, and a loss per image, which the attack maximises and the update minimises.
Knows nothing of optimisers or attacks.
"""

from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from offline.errors import DataError, PlanError
from offline.objectives import LOGIT_SCALE
from perception.similarity import cosine_similarity


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


class TwoAfcHinge:
    """The hinge on human choices: `max(0, margin - (d0 - d1) * s)`, s = +1 where people prefer the right image or -1.

    `d0` and `d1` are the distances 1 - cosine of the left and the right image from the reference (methods 4).
    """

    def __init__(self, margin: float = 0.05, reduction: Literal["mean", "sum"] = "mean") -> None:
        """Choose the loss.

        Args:
            margin: 0.05 as DreamSim has it; LipSim's second stage takes 0.2 or 0.5, and the sum (methods 8.1).
            reduction: of a batch.

        Raises:
            PlanError: a margin that is not finite or not above 0, or another reduction.
        """
        if not 0 < margin < float("inf"):
            raise PlanError(f"margin must be finite and above 0, got {margin}")
        if reduction not in ("mean", "sum"):
            raise PlanError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        self.margin, self.reduction = margin, reduction

    def of_distances(self, left: Tensor, right: Tensor, prefers_right: Tensor) -> Tensor:
        """Loss of each triplet.

        Args:
            left, right: (b,) distances of either image from the reference.
            prefers_right: (b,) bool.

        Returns:
            (b,) at least 0.

        Raises:
            DataError: other shapes, or preferences that are not bool.
        """
        if prefers_right.dtype != torch.bool or not left.shape == right.shape == prefers_right.shape:
            shapes = ", ".join(str(tuple(x.shape)) for x in (left, right, prefers_right))
            raise DataError("2AFC", f"expected two (b,) distances and (b,) bool, got {shapes} {prefers_right.dtype}")
        difference = left - right
        return (self.margin - torch.where(prefers_right, difference, -difference)).clamp_min(0)

    def __call__(self, reference: Tensor, left: Tensor, right: Tensor, prefers_right: Tensor) -> Tensor:
        """Loss of a batch, a scalar, from embeddings (b, d) of any norm but zero and preferences (b,) bool."""
        to_left, to_right = (1 - cosine_similarity(reference, image) for image in (left, right))
        losses = self.of_distances(to_left, to_right, prefers_right)
        return losses.mean() if self.reduction == "mean" else losses.sum()
