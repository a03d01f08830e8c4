"""APGD, the projected gradient ascent of AutoAttack with step sizes that each image chooses for itself (methods 5.1).

Images that are fooled leave the batch, so that the time goes into those that resist.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from torch import Tensor

from offline.attacks.base import Attacked, AttackResult
from offline.criteria import Criterion
from offline.errors import PlanError
from offline.objectives import Objective
from offline.threat import ThreatModel
from perception.errors import NonFiniteEmbedding

Start = Literal["boundary", "uniform", "clean"]


@dataclass(frozen=True)
class Apgd:
    """Auto-PGD for linf and l2.

    `z = P(x_i + eta dir(g_i)); x_{i+1} = P(x_i + a (z - x_i) + (1 - a) (x_i - x_{i-1}))` with a = 1 at first. At each
    checkpoint an image whose objective rose too seldom, or whose best has not improved although its step size was
    kept, halves its step size and goes on from its best point.

    Attributes:
        steps: updates; there is one forward pass more, and no gradient after the last.
        restarts: runs from different starts, each on those that are not yet fooled.
        start: 'boundary' is AutoAttack's random start, 'uniform' draws from the whole ball's box, 'clean' has none.
        alpha: first step size in units of eps.
        momentum: a above.
        rho: share of rising steps below which the step size is halved.
        parity: count as AutoAttack's code does at the first checkpoint, where it compares the first loss with zero in
            place of the start's, as the paper defines it.
    """

    steps: int = 100
    restarts: int = 1
    start: Start = "boundary"
    alpha: float = 2.0
    momentum: float = 0.75
    rho: float = 0.75
    parity: bool = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            PlanError: fewer than one step or restart, or no such start.
        """
        for name in ("steps", "restarts"):
            if getattr(self, name) < 1:
                raise PlanError(f"APGD's {name} must be at least 1, got {getattr(self, name)}")
        if self.start not in get_args(Start):
            raise PlanError(f"APGD's start must be one of {', '.join(get_args(Start))}, got {self.start!r}")

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
        """See `offline.attacks.base.Attack`.

        Raises:
            PlanError: start 'clean' with an objective that has no gradient there.
            NonFiniteEmbedding: an embedding is not finite; the rows are those of `pixels`.
        """
        if self.start == "clean" and objective.needs_random_start:
            raise PlanError(f"{type(objective).__name__} has no gradient at the clean image: start must be random")
        pixels = pixels.detach()
        found = AttackResult(
            adversarial=pixels.clone(),
            fooled=torch.zeros(len(pixels), dtype=torch.bool, device=pixels.device),
            objective=torch.full((len(pixels),), -torch.inf, dtype=pixels.dtype, device=pixels.device),
            updates=torch.zeros(len(pixels), dtype=torch.int64, device=pixels.device),
        )
        for _ in range(self.restarts):
            start = self._start(pixels, threat, generator)  # of all, so that nobody's start depends on who has left
            rows = torch.nonzero(~found.fooled).flatten()
            if len(rows):
                search = _Search.begin(rows, pixels[rows], start[rows], self.alpha * threat.eps)
                self._run(search, encoder, objective, criterion, threat, found)
        return found

    def _start(self, pixels: Tensor, threat: ThreatModel, generator: torch.Generator) -> Tensor:
        if self.start == "clean":
            return pixels.clone()
        draw = threat.boundary_start if self.start == "boundary" else threat.random_start
        return draw(pixels, generator)

    def _run(
        self,
        search: "_Search",
        encoder: Attacked,
        objective: Objective,
        criterion: Criterion | None,
        threat: ThreatModel,
        found: AttackResult,
    ) -> None:
        """One run from `search`'s start, whose outcome goes into `found`."""
        checks = dict(checkpoints(self.steps))
        for step in range(self.steps + 1):
            if step:
                self._move(search, threat, first=step == 1)
            embeddings, value, gradient = _forward(
                encoder, objective.rows(search.rows), search, with_gradient=step < self.steps
            )
            search.observe(value, gradient, first=step == 0, zero_first=self.parity)
            if criterion is not None:
                fooled = criterion.rows(search.rows)(embeddings).to(value.device)
                search.leave(fooled, step, found)
                if not len(search.rows):
                    return
            if step in checks:
                search.check(self.rho * checks[step])
        search.finish(self.steps, found)

    def _move(self, search: "_Search", threat: ThreatModel, *, first: bool) -> None:
        x, a = search.current, 1.0 if first else self.momentum
        step_size = search.step_size.view(-1, 1, 1, 1)
        ahead = threat.project(x + step_size * threat.steepest(search.gradient), search.pixels)
        moved = threat.project(x + a * (ahead - x) + (1 - a) * (x - search.previous), search.pixels)
        search.previous, search.current = x, moved


def checkpoints(steps: int) -> Iterator[tuple[int, int]]:
    """Yield `(updates done, updates since the last)` of each checkpoint: 22, 41, 57, 70, 80, 87, 93, 99 of 100."""
    period, shortest, shorter_by = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    done = period
    while done <= steps:
        yield done, period
        period = max(period - shorter_by, shortest)
        done += period


def _forward(
    encoder: Attacked, objective: Objective, search: "_Search", *, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(embeddings (b, d), objective (b,), its gradient with respect to the pixels)` at the current points."""
    with torch.set_grad_enabled(with_gradient):
        at = search.current.detach().requires_grad_(with_gradient)
        try:
            embeddings = encoder.encode(at)
        except NonFiniteEmbedding as error:  # its rows are those of the images still in the batch
            raise NonFiniteEmbedding(tuple(search.rows[list(error.rows)].tolist())) from error
        finite = torch.isfinite(embeddings.detach()).all(dim=1).to(at.device)
        if not bool(finite.all()):
            raise NonFiniteEmbedding(tuple(search.rows[~finite].tolist()))
        value = objective(embeddings)
    gradient = torch.autograd.grad(value.sum(), at)[0] if with_gradient else None
    return embeddings.detach(), value.detach().to(at), gradient


@dataclass
class _Search:
    """Where each image that is still in the batch stands; every field has one row an image.

    Attributes:
        rows: (k,) int64, the images' rows in the caller's batch.
        pixels, current, previous, gradient: (k, 3, h, w) originals, points of this and the last step, gradient here.
        best, best_gradient, best_value: the point of the highest objective, and what was found there.
        value: (k,) objective here.
        rises: (k,) int64, how often the objective rose since the last checkpoint.
        step_size: (k,) in pixels.
        was_reduced: (k,) bool, whether the last checkpoint halved the step size; starts as True.
        best_at_check: (k,) best_value as of the last checkpoint.
    """

    rows: Tensor
    pixels: Tensor
    current: Tensor
    previous: Tensor
    gradient: Tensor
    best: Tensor
    best_gradient: Tensor
    best_value: Tensor
    value: Tensor
    rises: Tensor
    step_size: Tensor
    was_reduced: Tensor
    best_at_check: Tensor

    @classmethod
    def begin(cls, rows: Tensor, pixels: Tensor, start: Tensor, step_size: float) -> "_Search":
        """At the start, before its objective is known."""
        lowest = torch.full((len(rows),), -torch.inf, dtype=pixels.dtype, device=pixels.device)
        zeros = torch.zeros_like(pixels)
        return cls(
            rows=rows,
            pixels=pixels,
            current=start,
            previous=start,
            gradient=zeros,
            best=start.clone(),
            best_gradient=zeros.clone(),
            best_value=lowest,
            value=lowest.clone(),
            rises=torch.zeros_like(rows),
            step_size=torch.full_like(lowest, step_size),
            was_reduced=torch.ones_like(rows, dtype=torch.bool),
            best_at_check=lowest.clone(),
        )

    def observe(self, value: Tensor, gradient: Tensor | None, *, first: bool, zero_first: bool) -> None:
        """Take note of the objective and gradient at the current points.

        Args:
            value, gradient: of the current points; there is no gradient after the last update.
            first: these are the starts.
            zero_first: the first update is compared with an objective of zero, not with that of the start.
        """
        if gradient is not None:
            self.gradient = gradient
        better = value > self.best_value
        self.best[better] = self.current[better]
        self.best_gradient[better] = self.gradient[better]
        self.best_value = torch.where(better, value, self.best_value)
        if first:
            self.best_at_check = value.clone()
            self.value = torch.zeros_like(value) if zero_first else value
        else:
            self.rises += value > self.value
            self.value = value

    def leave(self, fooled: Tensor, updates: int, found: AttackResult) -> None:
        """Record the images that fool at their current points, and keep the others alone."""
        if not bool(fooled.any()):
            return
        rows = self.rows[fooled]
        found.fooled[rows] = True
        found.adversarial[rows] = self.current[fooled]
        found.objective[rows] = found.objective[rows].maximum(self.best_value[fooled])
        found.updates[rows] += updates
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[~fooled])

    def check(self, enough_rises: float) -> None:
        """A checkpoint: halve the step size and return to the best point where the search has stalled."""
        stalled = (self.rises <= enough_rises) | (~self.was_reduced & (self.best_at_check >= self.best_value))
        self.was_reduced, self.best_at_check = stalled, self.best_value.clone()
        self.rises = torch.zeros_like(self.rises)
        self.step_size = torch.where(stalled, self.step_size / 2, self.step_size)
        there = stalled.view(-1, 1, 1, 1)
        self.current = torch.where(there, self.best, self.current)
        self.gradient = torch.where(there, self.best_gradient, self.gradient)

    def finish(self, updates: int, found: AttackResult) -> None:
        """Record the best points of the images that were not fooled, where they beat those of earlier runs."""
        better = self.best_value > found.objective[self.rows]
        rows = self.rows[better]
        found.adversarial[rows] = self.best[better]
        found.objective[rows] = self.best_value[better]
        found.updates[self.rows] += updates
