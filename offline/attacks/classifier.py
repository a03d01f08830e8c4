"""The attacks on any classifier, and its accuracy under them, to compare with AutoAttack's figures (methods 5.4)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from offline.attacks.apgd import Apgd
from offline.attacks.base import AttackResult
from offline.attacks.pgd import Pgd
from offline.attacks.search import Problem, SearchAttack, nothing_found
from offline.attacks.square import Square
from offline.attacks.targeted import Targeted
from offline.criteria import ArgmaxWrong
from offline.errors import PlanError
from offline.objectives import CrossEntropy, Dlr, Margin, Objective
from offline.seeds import mixed_seed
from offline.threat import ThreatModel
from perception.errors import NonFiniteEmbedding

Logits = Callable[[Tensor], Tensor]
AttackName = Literal["apgd-ce", "apgd-dlr", "apgd-t", "square", "pgd"]


@dataclass(frozen=True)
class Classifier:
    """A classifier as what attacks take: its embeddings are its logits.

    Attributes:
        logits: (b, 3, h, w) in [0, 1] -> (b, c), in eval mode.
    """

    logits: Logits

    def encode(self, pixels: Tensor) -> Tensor:
        """See `offline.attacks.base.Attacked`."""
        return self.logits(pixels)


@dataclass(frozen=True)
class RobustAccuracy:
    """What a classifier withstood.

    Attributes:
        clean, robust: shares of all images in [0, 1] that are right, and right after every attack as well.
        standing: (b,) bool, the images that `robust` counts.
        adversarial: (b, 3, h, w) images that fool, and for the standing ones what the last attack came up with.
    """

    clean: float
    robust: float
    standing: Tensor
    adversarial: Tensor


def attack_classifier(
    logits_fn: Logits,
    pixels: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    attack: AttackName,
    steps: int,
    seed: int,
    restarts: int = 1,
    batch: int = 256,
    parity: bool = False,
) -> AttackResult:
    """Attack the images that a classifier gets right.

    An image that it gets wrong is its own adversarial image, after no updates. A classifier that gives no gradients
    makes the attacks along them stay where they start: 'square', or `offline.audit.masking`, tells such a one apart.

    Args:
        logits_fn: (b, 3, h, w) in [0, 1] -> (b, c) logits; images do not influence each other.
        pixels: (b, 3, h, w) in [0, 1]; labels: (b,) int64 in [0, c), on the same device.
        threat: what perturbations are allowed.
        attack: 'apgd-ce', 'apgd-dlr', 'apgd-t' (nine targets, the DLR towards each) and 'square' are AutoAttack's,
            'pgd' maximises the cross-entropy with a fixed step size.
        steps: updates of a run, for 'square' the queries.
        seed: of the random starts; other batch sizes have other starts.
        restarts: runs from different starts, for 'apgd-t' for each target.
        batch: images attacked together.
        parity: see `Apgd`.

    Raises:
        PlanError: impossible parameters, too few classes, or labels that do not fit the images.
        NonFiniteEmbedding: logits are not finite; the rows are those of `pixels`.
    """
    if labels.shape != (len(pixels),) or labels.dtype != torch.int64:
        raise PlanError(
            f"labels must be {len(pixels)} int64, one an image, got {tuple(labels.shape)} of type {labels.dtype}"
        )
    if batch < 1 or seed < 0:
        raise PlanError(f"batch must be at least 1 and seed not negative, got {batch} and {seed}")
    searching, objective = _attack(attack, steps, restarts, parity)
    if not len(pixels):
        return nothing_found(pixels)
    parts = []
    for number, (images, right) in enumerate(zip(pixels.detach().split(batch), labels.split(batch), strict=True)):
        problem = Problem(Classifier(logits_fn), objective(None, right), ArgmaxWrong(None, right), threat)
        generator = torch.Generator().manual_seed(mixed_seed(seed, number, bits=32))
        try:
            found = _clean(problem, images, right)
            searching.go_on(problem, images, found, generator)
        except NonFiniteEmbedding as error:
            raise NonFiniteEmbedding(tuple(number * batch + row for row in error.rows)) from error
        parts.append(found)
    columns: dict[str, Any] = {f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(AttackResult)}
    return AttackResult(**columns)


def robust_accuracy(
    logits_fn: Logits,
    pixels: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    attacks: Sequence[AttackName] = ("apgd-ce", "apgd-t"),
    steps: int = 100,
    queries: int = 5000,
    seed: int = 0,
    restarts: int = 1,
    batch: int = 256,
    parity: bool = False,
) -> RobustAccuracy:
    """Run attacks one after the other, each on the images that are still standing.

    What counts is a new forward pass over the adversarial images, after norm and box have been checked.

    Args:
        logits_fn, pixels, labels, threat, seed, restarts, batch, parity: see `attack_classifier`.
        attacks: in this order.
        steps: of the attacks with gradients.
        queries: of 'square'.

    Raises:
        PlanError: no images, or see `attack_classifier`.
        RunError: an attack left its threat model.
        NonFiniteEmbedding: logits are not finite; the rows are those of the images that were still standing.
    """
    if not len(pixels):
        raise PlanError("robust accuracy needs at least one image, got 0")
    clean = standing = _right(_logits(logits_fn, pixels, batch), labels)
    adversarial = pixels.detach().clone()
    for number, name in enumerate(attacks):
        rows = torch.nonzero(standing).flatten()
        if not len(rows):
            break
        found = attack_classifier(
            logits_fn,
            pixels[rows],
            labels[rows],
            threat,
            attack=name,
            steps=queries if name == "square" else steps,
            seed=mixed_seed(seed, number, bits=32),
            restarts=restarts,
            batch=batch,
            parity=parity,
        )
        threat.require(found.adversarial, pixels[rows], name)
        adversarial[rows] = found.adversarial
        standing = standing.clone()
        standing[rows] = _right(_logits(logits_fn, found.adversarial, batch), labels[rows])
    return RobustAccuracy(float(clean.double().mean()), float(standing.double().mean()), standing, adversarial)


def _attack(
    name: AttackName, steps: int, restarts: int, parity: bool
) -> tuple[SearchAttack, Callable[[None, Tensor], Objective]]:
    apgd = Apgd(steps=steps, restarts=restarts, parity=parity)
    if name == "apgd-ce":
        return apgd, CrossEntropy
    if name == "apgd-dlr":
        return apgd, Dlr
    if name == "apgd-t":
        return Targeted(apgd), Dlr
    if name == "square":
        return Square(queries=steps, restarts=restarts), Margin
    if name == "pgd":
        return Pgd(steps=steps, restarts=restarts), CrossEntropy
    raise PlanError(f"attack must be one of {', '.join(get_args(AttackName))}, got {name!r}")


def _clean(problem: Problem, pixels: Tensor, labels: Tensor) -> AttackResult:
    """The result before the attack: what is wrong already is fooled."""
    logits = _logits(problem.encoder.encode, pixels)
    wrong, objective = ~_right(logits, labels), problem.objective(logits).to(pixels)
    found = nothing_found(pixels)
    return replace(found, fooled=wrong, objective=objective.where(wrong, found.objective))


def _logits(logits_fn: Logits, pixels: Tensor, batch: int | None = None) -> Tensor:
    """(b, c), without gradients."""
    with torch.no_grad():
        logits = torch.cat([logits_fn(part) for part in pixels.split(batch or len(pixels))])
    finite = torch.isfinite(logits).all(dim=1)
    if not bool(finite.all()):
        raise NonFiniteEmbedding(tuple(torch.nonzero(~finite).flatten().tolist()))
    return logits


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    """(b,) bool, whether each image is classified as its label."""
    return ~ArgmaxWrong(None, labels)(logits)
