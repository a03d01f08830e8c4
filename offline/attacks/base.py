"""What every attack takes and returns."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from offline.criteria import Criterion
from offline.objectives import Objective
from offline.threat import ThreatModel


class Attacked(Protocol):
    """As much of an encoder as an attack uses."""

    def encode(self, pixels: Tensor) -> Tensor:
        """(b, 3, h, w) in [0, 1] -> (b, d) unit embeddings, differentiable; images do not influence each other."""


@dataclass(frozen=True)
class AttackResult:
    """The perturbed images, on the device of the originals.

    Attributes:
        adversarial: (b, 3, h, w) in the threat model: the image that fooled, else the one of the highest objective.
        fooled: (b,) bool, by the attack's own forward pass; a benchmark judges `adversarial` anew.
        objective: (b,) the highest objective that was seen.
        updates: (b,) int64, updates of each image, over all restarts, until it fooled or the attack ended.
    """

    adversarial: Tensor
    fooled: Tensor
    objective: Tensor
    updates: Tensor


class Attack(Protocol):
    """Perturbs a batch of images, each for itself."""

    def attack(
        self,
        encoder: Attacked,
        objective: Objective,
        criterion: Criterion | None,
        pixels: Tensor,
        threat: ThreatModel,
        *,
        generator: torch.Generator,
    ) -> AttackResult:
        """Attack.

        Args:
            encoder: its parameters get no gradient.
            objective, criterion: of the whole batch; without a criterion nothing counts as fooled, and the search goes
                on to the end.
            pixels: (b, 3, h, w) in [0, 1].
            threat: what perturbations are allowed.
            generator: of the random starts, drawn for the whole batch.
        """
