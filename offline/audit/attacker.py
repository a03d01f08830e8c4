"""Who attacks a system: along which gradients, and with what knowledge of its defence.

Owns the way from a system's plan to what answers, and from a task's goal to what an attack is asked. The attacks
themselves are in `offline.attacks`.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offline.attacks.adaptive import Adaptive, Knowledge, Through, UnderAll, expected
from offline.attacks.apgd import Apgd
from offline.attacks.base import Attacked
from offline.attacks.precision import Bf16Gradients
from offline.attacks.search import Problem, SearchAttack, Watch
from offline.attacks.square import Square
from offline.attacks.targeted import Targeted
from offline.audit.masking import Subject
from offline.audit.plan import AuditPlan, SystemPlan
from offline.criteria import Criterion
from offline.errors import PlanError
from offline.folding import fold
from offline.objectives import Objective
from offline.threat import ThreatModel
from perception.counterattack import Counterattack, FeatureEncoder, Features
from perception.encoder import Encoder
from perception.encoders.tower import TowerEncoder
from perception.preprocess import to_pixels

SQUARE = "square"
CHECK_STEPS, CHECK_QUERIES, CHECK_QUERIES_DEFENDED = 100, 500, 100  # at most, of the masking checks
COST_IMAGES, COST_REPEATS = 16, 5


def defended(system: SystemPlan, encoder: Encoder) -> Encoder:
    """What answers: the encoder, behind the defence that the plan gives the system.

    Raises:
        PlanError: the encoder does not give the features that the defence needs.
        UnknownEncoder, HubUnreachable, CheckpointError: the original encoder cannot be loaded, or does not fit.
    """
    plan = system.defense
    if plan is None:
        return encoder
    if not isinstance(encoder, FeatureEncoder):
        raise PlanError(f"system {system.name!r}: a defence needs the features of its encoder, {encoder.name} has none")
    original: FeatureEncoder | None = None
    if plan.original:
        from perception import load_encoder

        device = str(getattr(encoder, "device", "cpu"))
        original = load_encoder(plan.original, precision=system.precision, device=device)
    seed = f"noise of an audit, seed {plan.seed}".encode()
    return Counterattack(encoder, plan.settings, seed=seed, original=original)


def described_defense(system: SystemPlan, encoder: Encoder) -> dict[str, Any]:
    """What of a defence belongs to the identity of what answers; nothing where there is none."""
    if system.defense is None or not isinstance(encoder, Counterattack):
        return {}
    original = "" if encoder.original is None else encoder.original.fingerprint
    return {"defense": encoder.defense, "attacker": system.defense.attacker, "original_fingerprint": original}


@dataclass
class Attacker:
    """The attacker of one system.

    Attributes:
        system, plan: what is audited, and how.
        encoder: what answers.
        attacked: without a defence, what gradients are taken through.
    """

    plan: AuditPlan
    system: SystemPlan
    encoder: Encoder
    attacked: Attacked

    @classmethod
    def of(cls, plan: AuditPlan, system: SystemPlan, encoder: Encoder) -> "Attacker":
        """With folded twins where there are any."""
        undefended: Encoder = encoder.encoder if isinstance(encoder, Counterattack) else encoder
        attacked: Attacked = _twin(undefended)
        return cls(plan, system, encoder, Bf16Gradients(attacked) if plan.bf16_gradients else attacked)

    @property
    def is_adaptive(self) -> bool:
        """Whether there is a defence of which the attacker knows."""
        return self.system.defense is not None and self.system.defense.attacker == "adaptive"

    def attack(self, name: str, steps: int) -> SearchAttack:
        """An attack of the plan, or 'square', with so many steps or queries."""
        if name == SQUARE:
            return Square(queries=steps)
        attack: SearchAttack = Apgd(steps, self.plan.restarts)
        if name == "apgd-t":
            attack = Targeted(attack)
        if self.is_adaptive and self.system.defense is not None:
            return Adaptive(attack, self._knowledge(), self.system.defense.eot)
        return attack

    def problem(
        self, name: str, objective: Objective, criterion: Criterion | None, threat: ThreatModel, watch: Watch | None
    ) -> Problem:
        """What that attack is asked.

        Square needs no gradients and asks what answers. Who does not know of a defence cannot tell whether an image
        fools it, and so does not stop where the encoder alone is fooled: that would leave the image at the boundary.
        """
        if self.system.defense is None:
            return Problem(self.attacked, objective, criterion, threat, watch)
        if name == SQUARE:
            return Problem(self.encoder, objective, criterion, threat, watch)
        return Problem(self.attacked, objective, criterion if self.is_adaptive else None, threat, watch)

    def subject(
        self,
        objective: Objective,
        black_box: Objective,
        criterion: Criterion | None,
        pixels: Tensor,
        threat: ThreatModel,
    ) -> Subject:
        """What the masking checks examine; of an adaptive attacker the way through the counterattack.

        Its noise is the same at each look, since nothing could be compared otherwise.
        """
        attacked, stops = self.attacked, self.system.defense is None
        if self.is_adaptive and self.system.defense is not None:
            knows = self._knowledge()
            attacked = Through(knows, self.system.defense.eot, torch.Generator(), fixed=self.plan.seed)
            objective, black_box = expected(objective, knows.dim), expected(black_box, knows.dim)
            criterion = None if criterion is None else UnderAll(criterion, knows.dim)
        return Subject(self.system.name, self.encoder, attacked, objective, black_box, criterion, pixels, threat, stops)

    def check_limits(self, steps: int) -> tuple[int, int]:
        """Steps and queries of the masking checks, of a setting with `steps`."""
        return min(steps, CHECK_STEPS), CHECK_QUERIES if self.system.defense is None else CHECK_QUERIES_DEFENDED

    def _knowledge(self) -> Knowledge:
        defense = self.encoder
        assert isinstance(defense, Counterattack)
        assert isinstance(self.attacked, Features)
        original = None if defense.original is None else _twin(defense.original)
        return Knowledge(self.attacked, defense.settings, original, defense.dim)


def measured_cost(encoder: Encoder, images: Sequence[NDArray[np.uint8]]) -> dict[str, Any]:
    """What a defence costs, one image at a time: both ways in turn, the median of a few runs of each image.

    Returns:
        `plain_ms` and `defended_ms`, means over the images, `ratio` of these, `images`, `threads` and `countered`, the
        share of the images that were counterattacked.
    """
    assert isinstance(encoder, Counterattack)
    pixels = to_pixels(images[:COST_IMAGES]).to(encoder.device)
    with torch.no_grad():
        countered = float(encoder.defend(pixels).countered.float().mean())  # warms up as well
        taken = [[_median_ms(way, image[None]) for way in (encoder.encoder, encoder)] for image in pixels]
    plain_ms, defended_ms = (statistics.fmean(times) for times in zip(*taken, strict=True))
    return {
        "plain_ms": round(plain_ms, 3),
        "defended_ms": round(defended_ms, 3),
        "ratio": round(defended_ms / plain_ms, 2),
        "images": len(pixels),
        "threads": torch.get_num_threads(),
        "countered": round(countered, 4),
    }


def _median_ms(encoder: Encoder, pixels: Tensor) -> float:
    taken = []
    for _ in range(COST_REPEATS):
        started_s = time.perf_counter()
        encoder.encode(pixels).cpu()  # on a GPU, until it is done
        taken.append(1000 * (time.perf_counter() - started_s))
    return statistics.median(taken)


def _twin(encoder: Any) -> Any:
    """The encoder, or its faster twin."""
    return (fold(encoder) if isinstance(encoder, TowerEncoder) else None) or encoder
