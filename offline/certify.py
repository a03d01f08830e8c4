"""Certified radii of an audit's images: proofs, which no attack can take away, beside what attacks have found.

Owns who can be certified, and the way from images to radii. The formulas are those of `perception.certificates`, and so
the very ones that serve; which decision is meant is the task's matter.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from offline.audit.record import DECIMALS, Judgement
from perception.certificates import FeatureBound, feature_bound
from perception.counterattack import FeatureEncoder
from perception.encoder import Encoder

Radii = Mapping[str, float] | None


@runtime_checkable
class CertifiedTask(Protocol):
    """A task whose decisions have certificates."""

    def certified(self, rows: Tensor, features: Tensor, bound: FeatureBound) -> Sequence[Radii]:
        """Radii within which the decision on a clean image cannot change.

        Args:
            rows: (b,) int64 on the CPU, indices into the task's items.
            features: (b, d) of those items, not normalised.
            bound: of the features.

        Returns:
            For each image by form of the certificate a radius in pixel L2 units at the encoder's input, at least 0;
            None for an image that takes no part in certified figures.
        """


class Certifier:
    """Certifies the images of one system's audit, each once."""

    def __init__(self, encoder: FeatureEncoder, task: CertifiedTask, bound: FeatureBound) -> None:
        self._encoder, self._task, self._bound = encoder, task, bound
        self._known: dict[int, Radii] = {}

    @classmethod
    def of(cls, encoder: Encoder, task: object) -> "Certifier | None":
        """For an encoder of which a Lipschitz constant is proven, and a task with certificates; else None."""
        bound = feature_bound(encoder)
        if bound is None or not isinstance(encoder, FeatureEncoder) or not isinstance(task, CertifiedTask):
            return None
        return cls(encoder, task, bound)

    def radii(self, rows: Tensor, pixels: Tensor, judged: Sequence[Judgement]) -> list[Radii]:
        """Radii as they are recorded, rounded down; 0 for an image that is wrong without any attack.

        Args:
            rows: (b,) int64 on the CPU, indices into the task's items.
            pixels: (b, 3, h, w) of those items, as they are.
            judged: what the system says of them.
        """
        if not all(row in self._known for row in rows.tolist()):
            with torch.no_grad():
                features = self._encoder.features(pixels)
            found = self._task.certified(rows, features, self._bound)
            for row, radii, judgement in zip(rows.tolist(), found, judged, strict=True):
                self._known[row] = None if radii is None else _recorded(radii, judgement)
        return [self._known[row] for row in rows.tolist()]


def _recorded(radii: Mapping[str, float], judgement: Judgement) -> dict[str, float]:
    unit = 10.0**DECIMALS
    return {form: math.floor(radius * unit) / unit if judgement.correct else 0.0 for form, radius in radii.items()}
