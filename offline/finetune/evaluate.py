"""The held-out evaluation during a fine-tuning: a few fixed images, clean and under APGD.

It watches a run; it is no benchmark. Where the images have classes and the original encoder a text tower, the attack is
APGD on the cross-entropy of its zero-shot head, and accuracies are reported (methods 3.3); else it is APGD on FARE's
distance to the original embedding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from offline.attacks.apgd import Apgd
from offline.data.batches import Transform
from offline.data.labelled import LabelledImages
from offline.errors import PlanError
from offline.finetune.objectives import Fare, FinetuneObjective, Tecoa
from offline.finetune.plan import FinetunePlan
from offline.folding import fold
from perception.encoders.tower import TowerEncoder
from perception.errors import CheckpointError, ImageError
from perception.preprocess import to_pixels
from perception.text import class_embeddings

_CHUNK = 64


@dataclass(frozen=True)
class Maximised:
    """A fine-tuning objective as an attack wants it: (b, d) embeddings -> (b,).

    Attributes:
        objective: the loss per image.
        target: (b, ...) what it compares with.
    """

    objective: FinetuneObjective
    target: Tensor
    needs_random_start: bool = True

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Loss of each image."""
        return self.objective.per_image(embeddings, self.target)

    def rows(self, index: Tensor) -> "Maximised":
        """The same objective for some of the images."""
        return Maximised(self.objective, self.target[index])


class RawFeatures:
    """An encoder whose embeddings are not normalised, as FARE's loss wants them."""

    def __init__(self, features: Callable[[Tensor], Tensor]) -> None:
        self._features = features

    def encode(self, pixels: Tensor) -> Tensor:
        """(b, 3, h, w) in [0, 1] -> (b, d) un-normalised."""
        return self._features(pixels)


class HeldOut:
    """Fixed held-out images with their embeddings under the original encoder."""

    def __init__(self, plan: FinetunePlan, original: TowerEncoder, images: LabelledImages) -> None:
        """Read the images; unreadable ones are passed over.

        Raises:
            PlanError: none can be read.
        """
        self.plan = plan
        pixels, labels = read_held_out(images, original.preprocess, plan.eval_images, plan.seed)
        self.pixels, self.labels = pixels.to(original.device), labels.to(original.device)
        with torch.no_grad():
            self.original = torch.cat([original.features(part) for part in self.pixels.split(_CHUNK)])
        self.zero_shot = self._zero_shot(original, images)

    def _zero_shot(self, original: TowerEncoder, images: LabelledImages) -> Tecoa | None:
        """The zero-shot head of the held-out classes, where there is one."""
        if not images.class_names or bool((self.labels < 0).any()):
            return None
        try:
            text = original.text
        except CheckpointError:  # a family without a text tower, or a visual-only checkpoint
            return None
        names = [names[0] for names in images.class_names]
        return Tecoa(class_embeddings(text, names, [self.plan.template]).clone())

    def measure(self, encoder: TowerEncoder) -> dict[str, float]:
        """Losses, cosines to the original embedding and, with classes, accuracies; clean and under attack."""
        objective: FinetuneObjective = self.zero_shot or Fare()
        target = objective.target(self.original, self.labels)
        generator = torch.Generator().manual_seed(self.plan.seed)
        attack = Apgd(steps=self.plan.eval_attack_steps)
        attacked = RawFeatures(fold(encoder) or encoder)
        figures: dict[str, list[Tensor]] = {}
        for start in range(0, len(self.pixels), _CHUNK):
            rows = slice(start, start + _CHUNK)
            pixels, goal = self.pixels[rows], target[rows]
            result = attack.attack(
                attacked, Maximised(objective, goal), None, pixels, self.plan.threat, generator=generator
            )
            correct = torch.ones(len(pixels), dtype=torch.bool, device=pixels.device)
            for kind, images in (("clean", pixels), ("robust", result.adversarial)):
                with torch.no_grad():
                    features = encoder.features(images)
                figures.setdefault(f"{kind}_loss", []).append(objective.per_image(features, goal))
                cosine = F.cosine_similarity(features, self.original[rows], dim=-1)
                figures.setdefault(f"{kind}_cosine", []).append(cosine)
                if self.zero_shot is not None:
                    correct = correct & (self.zero_shot.logits(features).argmax(1) == self.labels[rows])
                    figures.setdefault(f"{kind}_accuracy", []).append(correct.float())
        return {name: round(torch.cat(values).mean().item(), 4) for name, values in figures.items()}


def read_held_out(images: LabelledImages, transform: Transform, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """The first images of a seeded shuffle; unreadable ones are passed over.

    Returns:
        (n, 3, h, w) pixels in [0, 1] and (n,) int64 labels, n at most `count`.

    Raises:
        PlanError: none can be read.
    """
    pixels, labels = [], []
    for index in np.random.default_rng([seed, 3]).permutation(len(images)).tolist():
        try:
            example = images.read(index)
        except (ImageError, OSError):
            continue
        pixels.append(transform.apply(example.image))
        labels.append(example.label)
        if len(pixels) == count:
            break
    if not pixels:
        raise PlanError(f"none of the {len(images)} held-out images can be read")
    return to_pixels(pixels), torch.tensor(labels)
