"""Zero-shot classification under attack: APGD on cross-entropy, then targeted APGD on DLR (methods 5.4, 6.9).

A class's embedding is the mean over the plan's prompts; logits are 100 times the cosine.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from offline.audit.classes import class_of, classes_of
from offline.audit.embeddings import require_finite
from offline.audit.plan import AuditPlan
from offline.audit.queries import read_images
from offline.audit.record import Judgement
from offline.audit.task import Item
from offline.criteria import ArgmaxWrong
from offline.errors import PlanError
from offline.objectives import LOGIT_SCALE, CrossEntropy, Dlr, Margin, Objective
from perception.encoder import Encoder, fingerprint
from perception.text import TextEncoder, class_embeddings

LEAST_CLASSES, LEAST_CLASSES_TARGETED = 2, 4
_OBJECTIVES: Mapping[str, type[CrossEntropy | Dlr | Margin]] = {
    "apgd-ce": CrossEntropy,
    "apgd-t": Dlr,
    "square": Margin,
}


class ZeroShotTask:
    """See `offline.audit.task.Task`; the attacker wants any other class."""

    def __init__(
        self,
        items: Sequence[Item],
        labels: Tensor,
        names: Sequence[str],
        classes: Tensor,
        identity: Mapping[str, str],
    ) -> None:
        """Hold the images and the classifier.

        Args:
            items: labelled with `names`.
            labels: (n,) int64, the items' classes; these decide, since two classes may have one name.
            names: of the c classes.
            classes: (c, d) unit embeddings.
            identity: see `Task.identity`.
        """
        self.items, self.identity = items, identity
        self._labels, self._names, self._classes = labels, names, classes

    def judge(self, rows: Tensor, embeddings: Tensor) -> list[Judgement]:
        """See `Task.judge`; the margin is the right class's logit minus the largest other."""
        embeddings = embeddings.detach()
        require_finite(embeddings)
        labels = self._labels[rows].to(embeddings.device)
        similarities = embeddings @ self._classes.to(embeddings.device).T
        predicted = similarities.argmax(dim=1)
        wrong = ArgmaxWrong(None, labels)(similarities)
        margins = -LOGIT_SCALE * Margin(None, labels)(similarities)
        return [
            Judgement(self._names[guess], not bad, {"margin": margin})
            for guess, bad, margin in zip(predicted.tolist(), wrong.tolist(), margins.tolist(), strict=True)
        ]

    def severity(self, row: int, judgement: Judgement) -> float:
        """See `Task.severity`: 1 for a wrong class."""
        return float(self.at_goal(row, judgement))

    def at_goal(self, row: int, judgement: Judgement) -> bool:
        """See `Task.at_goal`."""
        return judgement.correct is False

    def criterion(self, rows: Tensor) -> ArgmaxWrong:
        """See `Task.criterion`."""
        return ArgmaxWrong(self._classes, self._labels[rows].to(self._classes.device))

    def objective(self, attack: str, rows: Tensor, clean: Tensor) -> Objective:
        """See `Task.objective`.

        Raises:
            PlanError: there is no such attack.
        """
        if attack not in _OBJECTIVES:
            raise PlanError(f"zero-shot knows the attacks apgd-ce and apgd-t, got {attack!r}")
        return _OBJECTIVES[attack](self._classes.to(clean.device), self._labels[rows].to(clean.device))


def open_zero_shot(plan: AuditPlan, encoder: Encoder, data: Path) -> ZeroShotTask:
    """Read the images and build the classifier, of all classes of all query sets; holds the images' pixels.

    Args:
        plan: its queries are labelled; classes of several sets that have one name are one.
        encoder: of the system, with a text tower as `text`.
        data: folder that relative paths start from.

    Raises:
        OfflineError: see `read_images`.
        PlanError: an image has no class, or there are too few classes for the attacks, or the encoder has no text
            tower.
        CheckpointError: the encoder's checkpoint has no text tower.
    """
    text = getattr(encoder, "text", None)
    if not isinstance(text, TextEncoder):
        raise PlanError(f"zero-shot needs an encoder with a text tower, {encoder.name} has none")
    names, class_names, maps = classes_of(plan.queries, data)
    least = LEAST_CLASSES_TARGETED if "apgd-t" in plan.chain else LEAST_CLASSES
    if len(names) < least:
        raise PlanError(
            f"zero-shot with the attacks {', '.join(plan.chain)} needs at least {least} classes, got {len(names)}"
        )
    items, labels = [], []
    for images, indices in zip(plan.queries, maps, strict=True):
        for loaded in read_images(images, data, plan.seed):
            labels.append(class_of(loaded, images, indices))
            items.append(Item(images.set_name, loaded.id, names[labels[-1]], encoder.preprocess.apply(loaded.image)))
    words = [of[0] for of in class_names]
    classes = class_embeddings(text, words, plan.templates).clone()
    # The encoder's own fingerprint is of the image tower alone.
    prompts = {"classes": words, "templates": plan.templates}
    identity = {"classifier": fingerprint(prompts, encoder.preprocess, "fp32", text.tower.state_dict())}
    return ZeroShotTask(items, torch.tensor(labels), names, classes, identity)
