"""Targets one after the other: which, in which order, and for whom."""

import pytest
import torch
from torch import Tensor

from offline.attacks.apgd import Apgd
from offline.attacks.base import AttackResult
from offline.attacks.search import Problem, SearchAttack
from offline.attacks.targeted import Targeted
from offline.criteria import ArgmaxWrong
from offline.errors import PlanError
from offline.objectives import CrossEntropy, Dlr, TargetedDlr
from offline.threat import ThreatModel
from tests.offline.attack_toys import CLASSES, Network, generator, images

THREAT = ThreatModel("linf", 0.02)


class Witness(SearchAttack):
    """Writes down the targets, and fools the image 1 at the second one."""

    def __init__(self) -> None:
        self.targets: list[list[int]] = []
        self.resisting: list[list[bool]] = []

    def go_on(self, problem: Problem, pixels: Tensor, found: AttackResult, generator: torch.Generator) -> None:
        assert isinstance(problem.objective, TargetedDlr)
        self.targets.append(problem.objective.targets.tolist())
        self.resisting.append((~found.fooled).tolist())
        if len(self.targets) == 2:
            found.fooled[1] = True


def test_targets_are_the_second_to_tenth_largest_clean_logits() -> None:
    network, pixels, witness = Network(), images(0, 4), Witness()
    objective = Dlr(None, network.labels(pixels))
    Targeted(witness).attack(network, objective, None, pixels, THREAT, generator=generator())
    order = network.encode(pixels).argsort(dim=1, descending=True)
    assert witness.targets == [order[:, place].tolist() for place in range(1, 10)]
    assert witness.resisting == [[True] * 4] * 2 + [[True, False, True, True]] * 7


def test_with_few_classes_all_but_the_label_are_targets() -> None:
    network, pixels, witness = Network(), images(0, 4), Witness()
    objective = Dlr(None, network.labels(pixels))
    Targeted(witness, targets=50).attack(network, objective, None, pixels, THREAT, generator=generator())
    assert len(witness.targets) == CLASSES - 1


def test_it_is_the_attacks_one_after_the_other() -> None:
    network, pixels, inner = Network(), images(1, 12), Apgd(steps=10)
    labels = network.labels(pixels)
    found = Targeted(inner, targets=3).attack(
        network, Dlr(None, labels), ArgmaxWrong(None, labels), pixels, THREAT, generator=generator(2)
    )
    draws, fooled = generator(2), torch.zeros(12, dtype=torch.bool)
    updates = torch.zeros(12, dtype=torch.int64)
    for target in network.encode(pixels).argsort(dim=1, descending=True)[:, 1:4].unbind(dim=1):
        objective = TargetedDlr(None, labels, target)
        run = inner.attack(network, objective, ArgmaxWrong(None, labels), pixels, THREAT, generator=draws)
        updates += torch.where(fooled, 0, run.updates)
        torch.testing.assert_close(found.adversarial[run.fooled & ~fooled], run.adversarial[run.fooled & ~fooled])
        fooled |= run.fooled
    assert torch.equal(found.fooled, fooled)
    assert torch.equal(found.updates, updates)
    assert 0 < int(fooled.sum()) < 12


def test_an_objective_without_targets_is_refused() -> None:
    objective = CrossEntropy(None, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(PlanError, match="CrossEntropy has no targets"):
        Targeted().attack(Network(), objective, None, images(0, 2), THREAT, generator=generator())


def test_no_targets_are_refused() -> None:
    with pytest.raises(PlanError, match="targets must be at least 1, got 0"):
        Targeted(targets=0)
