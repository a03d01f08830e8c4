"""A search for each of several wrong classes, one after the other, on the images that still resist (methods 5.1)."""

from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from offline.attacks.apgd import Apgd
from offline.attacks.base import AttackResult
from offline.attacks.search import Problem, SearchAttack
from offline.errors import PlanError
from offline.objectives import Objective


@runtime_checkable
class Targetable(Protocol):
    """An objective that can be turned towards a class of the attacker's choice."""

    def runners_up(self, embeddings: Tensor, count: int) -> Tensor:
        """(b, d) -> (b, min(count, c - 1)) int64, the classes of the largest logits, the label left out."""

    def toward(self, targets: Tensor) -> Objective:
        """The objective of being taken for `targets`, (b,) int64."""


@dataclass(frozen=True)
class Targeted(SearchAttack):
    """Runs an attack against the classes of the 2nd to 10th largest clean logits.

    Attributes:
        inner: the attack; its restarts are made for each target.
        targets: how many classes; with fewer of them, all but the label.
    """

    inner: SearchAttack = field(default_factory=Apgd)
    targets: int = 9

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            PlanError: fewer than one target.
        """
        if self.targets < 1:
            raise PlanError(f"targets must be at least 1, got {self.targets}")

    def go_on(self, problem: Problem, pixels: Tensor, found: AttackResult, generator: torch.Generator) -> None:
        """See `SearchAttack`."""
        objective = problem.objective
        if not isinstance(objective, Targetable):
            raise PlanError(f"{type(objective).__name__} has no targets: a targeted attack takes Dlr or TargetedDlr")
        with torch.no_grad():
            targets = objective.runners_up(problem.encoder.encode(pixels), self.targets)
        for target in targets.unbind(dim=1):
            self.inner.go_on(replace(problem, objective=objective.toward(target)), pixels, found, generator)
