"""APGD, AutoAttack's projected gradient ascent with step sizes that each image chooses for itself (methods 5.1)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from offline.attacks.base import AttackResult
from offline.attacks.search import GradientAttack, Problem, Search, Start, follow, lowest
from offline.errors import PlanError
from offline.threat import ThreatModel

Stages = tuple[tuple[float, float], ...]
"""(factor of eps, share of the steps) of each stage of a run; the last factor is 1."""

ONE_STAGE: Stages = ((1.0, 1.0),)
LARGER_EPS: Stages = ((2.0, 0.3), (1.5, 0.3), (1.0, 0.4))  # methods 5.2
LARGER_EPS_L1: Stages = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))  # AutoAttack's, made for l1


@dataclass(frozen=True)
class Apgd(GradientAttack):
    """Auto-PGD for linf and l2.

    `z = P(x_i + eta dir(g_i)); x_{i+1} = P(x_i + a (z - x_i) + (1 - a) (x_i - x_{i-1}))` with a = 1 at first. At each
    checkpoint an image whose objective rose too seldom, or whose best has not improved although its step size was
    kept, halves its step size and goes on from its best point.

    Attributes:
        steps: updates; there is one forward pass more for each stage, and no gradient after a stage's last.
        restarts: runs from different starts, each on those that are not yet fooled.
        start: 'boundary' is AutoAttack's random start, 'uniform' draws from the whole ball's box, 'clean' has none.
        alpha: first step size in units of eps.
        momentum: a above.
        rho: share of rising steps below which the step size is halved.
        parity: count as AutoAttack's code does at the first checkpoint, where it compares the first loss with zero in
            place of the start's, as the paper defines it.
        stages: searches in balls of decreasing radius such as `LARGER_EPS`, each from the projection of the best point
            of the one before. Only the last one's points lie in the threat model, and only there images can be fooled.
    """

    steps: int = 100
    restarts: int = 1
    start: Start = "boundary"
    alpha: float = 2.0
    momentum: float = 0.75
    rho: float = 0.75
    parity: bool = False
    stages: Stages = ONE_STAGE

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            PlanError: fewer than one step or restart, no such start, or impossible stages.
        """
        self._require_counts("steps", "restarts")
        self._require_start()
        factors, shares = [factor for factor, _ in self.stages], [share for _, share in self.stages]
        falling = factors == sorted(factors, reverse=True) and factors[-1:] == [1.0]
        if not (falling and min(shares) > 0 and math.isclose(sum(shares), 1.0)):
            raise PlanError(
                f"APGD's stages need factors that fall to 1 and positive shares that sum to 1, got {self.stages}"
            )
        if min(self._stage_steps()) < 1:
            raise PlanError(f"APGD's {self.steps} steps are too few for its stages {self.stages}")

    def _stage_steps(self) -> list[int]:
        before = [math.ceil(share * self.steps) for _, share in self.stages[:-1]]
        return [*before, self.steps - sum(before)]

    def _stage_threat(self, threat: ThreatModel, stage: int) -> ThreatModel:
        return replace(threat, eps=self.stages[stage][0] * threat.eps)

    def _begin(self, problem: Problem, rows: Tensor, pixels: Tensor, generator: torch.Generator) -> "_Search":
        threat = self._stage_threat(problem.threat, 0)
        starts = self._starts(pixels, threat, generator)
        return self._search(rows, pixels[rows], starts[rows], threat, 0)

    def _search(self, rows: Tensor, pixels: Tensor, start: Tensor, threat: ThreatModel, stage: int) -> "_Search":
        checks = dict(checkpoints(self._stage_steps()[stage]))
        rules = _Rules(self.momentum, self.rho, self.parity, checks)
        return _Search.begin(rows, pixels, start, self.alpha * threat.eps, rules)

    def _run(self, search: Search, problem: Problem, found: AttackResult) -> None:
        done = 0
        for stage, steps in enumerate(self._stage_steps()):
            threat = self._stage_threat(problem.threat, stage)
            if stage:
                start = threat.project(search.best, search.pixels)
                search = self._search(search.rows, search.pixels, start, threat, stage)
            last = stage == len(self.stages) - 1
            criterion = problem.criterion if last else None
            follow(search, replace(problem, threat=threat, criterion=criterion), steps, found, done)
            done += steps
        search.finish(done, found)


def checkpoints(steps: int) -> Iterator[tuple[int, int]]:
    """Yield `(updates done, updates since the last)` of each checkpoint: 22, 41, 57, 70, 80, 87, 93, 99 of 100."""
    period, shortest, shorter_by = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    done = period
    while done <= steps:
        yield done, period
        period = max(period - shorter_by, shortest)
        done += period


@dataclass(frozen=True)
class _Rules:
    """How a search goes; see `Apgd`. `checks` maps the updates of the checkpoints to the updates since the last."""

    momentum: float
    rho: float
    parity: bool
    checks: dict[int, int]


@dataclass
class _Search(Search):
    """Adds to `Search` what an image needs to choose its step size.

    Attributes:
        previous, gradient: (k, 3, h, w) point of the last step, gradient at the current one.
        best_gradient: (k, 3, h, w) what was found at the best point.
        value: (k,) objective here.
        rises: (k,) int64, how often the objective rose since the last checkpoint.
        step_size: (k,) in pixels.
        was_reduced: (k,) bool, whether the last checkpoint halved the step size; starts as True.
        best_at_check: (k,) best_value as of the last checkpoint.
        rules: the same for all images.
    """

    previous: Tensor
    gradient: Tensor
    best_gradient: Tensor
    value: Tensor
    rises: Tensor
    step_size: Tensor
    was_reduced: Tensor
    best_at_check: Tensor
    rules: _Rules

    @classmethod
    def begin(cls, rows: Tensor, pixels: Tensor, start: Tensor, step_size: float, rules: _Rules) -> "_Search":
        """At the start, before its objective is known."""
        zeros = torch.zeros_like(pixels)
        return cls(
            rows=rows,
            pixels=pixels,
            current=start,
            best=start.clone(),
            best_value=lowest(pixels),
            previous=start,
            gradient=zeros,
            best_gradient=zeros.clone(),
            value=lowest(pixels),
            rises=torch.zeros_like(rows),
            step_size=torch.full_like(lowest(pixels), step_size),
            was_reduced=torch.ones_like(rows, dtype=torch.bool),
            best_at_check=lowest(pixels),
            rules=rules,
        )

    def move(self, threat: ThreatModel, update: int) -> None:
        """See `Search`."""
        x, a = self.current, 1.0 if update == 1 else self.rules.momentum
        step_size = self.step_size.view(-1, 1, 1, 1)
        ahead = threat.project(x + step_size * threat.steepest(self.gradient), self.pixels)
        moved = threat.project(x + a * (ahead - x) + (1 - a) * (x - self.previous), self.pixels)
        self.previous, self.current = x, moved

    def observe(self, value: Tensor, gradient: Tensor | None, update: int) -> Tensor:
        """See `Search`."""
        if gradient is not None:
            self.gradient = gradient
        better = super().observe(value, gradient, update)
        self.best_gradient[better] = self.gradient[better]
        if update:
            self.rises += value > self.value
            self.value = value
        else:
            self.best_at_check = value.clone()
            self.value = torch.zeros_like(value) if self.rules.parity else value
        return better

    def adjust(self, update: int) -> None:
        """See `Search`."""
        if update in self.rules.checks:
            self.check(self.rules.rho * self.rules.checks[update])

    def check(self, enough_rises: float) -> None:
        """A checkpoint: halve the step size and return to the best point where the search has stalled."""
        stalled = (self.rises <= enough_rises) | (~self.was_reduced & (self.best_at_check >= self.best_value))
        self.was_reduced, self.best_at_check = stalled, self.best_value.clone()
        self.rises = torch.zeros_like(self.rises)
        self.step_size = torch.where(stalled, self.step_size / 2, self.step_size)
        there = stalled.view(-1, 1, 1, 1)
        self.current = torch.where(there, self.best, self.current)
        self.gradient = torch.where(there, self.best_gradient, self.gradient)
