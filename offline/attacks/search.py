"""What all attacks that look at one point of each image after the other have in common.

Owns the points, who is still in the batch, and what has been found; where to go next is each attack's own matter.
Images that are fooled leave the batch, so that the time goes into those that resist.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from offline.attacks.base import Attacked, AttackResult
from offline.attacks.precision import Bf16Gradients
from offline.criteria import Criterion
from offline.errors import PlanError, RunError
from offline.objectives import Objective
from offline.threat import ThreatModel
from perception.errors import NonFiniteEmbedding

Start = Literal["boundary", "uniform", "clean"]
Watch = Callable[[Tensor, int, Tensor], None]
"""(rows (k,) of the batch, updates done, highest objective (k,) so far in this run): what an attack tells."""


@dataclass(frozen=True)
class Problem:
    """What an attack is asked; see `offline.attacks.base.Attack`."""

    encoder: Attacked
    objective: Objective
    criterion: Criterion | None
    threat: ThreatModel
    watch: Watch | None = None


@dataclass
class Search(ABC):
    """Where each image that is still in the batch stands; every field that is a tensor has one row an image.

    Attributes:
        rows: (k,) int64, the images' rows in the caller's batch.
        pixels, current: (k, 3, h, w) originals, and the points that are looked at.
        best, best_value: the point of the highest objective, and what it was.
    """

    needs_gradient: ClassVar[bool] = True

    rows: Tensor
    pixels: Tensor
    current: Tensor
    best: Tensor
    best_value: Tensor

    @abstractmethod
    def move(self, threat: ThreatModel, update: int) -> None:
        """Choose the next points; `update` counts from 1."""

    def observe(self, value: Tensor, gradient: Tensor | None, update: int) -> Tensor:
        """Take note of the current points' objective (k,) and gradient: (k,) bool, whether they are the best so far.

        There is no gradient after the last update; update 0 are the starts.
        """
        better = value > self.best_value
        self.best[better] = self.current[better]
        self.best_value = torch.where(better, value, self.best_value)
        return better

    def adjust(self, update: int) -> None:  # noqa: B027 - most attacks have nothing to adjust
        """End an update: change how the search goes on."""

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
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                setattr(self, field.name, value[~fooled])

    def finish(self, updates: int, found: AttackResult) -> None:
        """Record the best points of the images that were not fooled, where they beat those of earlier runs."""
        better = self.best_value > found.objective[self.rows]
        rows = self.rows[better]
        found.adversarial[rows] = self.best[better]
        found.objective[rows] = self.best_value[better]
        found.updates[self.rows] += updates


def lowest(pixels: Tensor) -> Tensor:
    """An objective (b,) that any other beats."""
    return torch.full((len(pixels),), -torch.inf, dtype=pixels.dtype, device=pixels.device)


def nothing_found(pixels: Tensor) -> AttackResult:
    """The result of (b, 3, h, w) images before any attack: not fooled by the images themselves."""
    count, device = len(pixels), pixels.device
    return AttackResult(
        adversarial=pixels.clone(),
        fooled=torch.zeros(count, dtype=torch.bool, device=device),
        objective=lowest(pixels),
        updates=torch.zeros(count, dtype=torch.int64, device=device),
    )


class SearchAttack(ABC):
    """An attack that can go on where another has left off."""

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
            PlanError: the attack does not go with the objective or with the images.
            NonFiniteEmbedding: an embedding is not finite; the rows are those of `pixels`.
            RunError: an objective is not finite.
        """
        pixels = pixels.detach()
        found = nothing_found(pixels)
        self.go_on(Problem(encoder, objective, criterion, threat), pixels, found, generator)
        return found

    @abstractmethod
    def go_on(self, problem: Problem, pixels: Tensor, found: AttackResult, generator: torch.Generator) -> None:
        """Attack the images that are not fooled yet, and improve `found` in place.

        Args:
            problem: of the whole batch.
            pixels: (b, 3, h, w), the whole batch.
            found: what earlier attacks found.
            generator: draws for the whole batch, so that nobody's draw depends on who has been fooled.
        """


class RestartingAttack(SearchAttack):
    """Runs from several starts, each on those that are not yet fooled."""

    restarts: int

    def _require_counts(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise PlanError(f"{_name(self)}'s {name} must be at least 1, got {getattr(self, name)}")

    def go_on(self, problem: Problem, pixels: Tensor, found: AttackResult, generator: torch.Generator) -> None:
        """See `SearchAttack`."""
        for _ in range(self.restarts):
            rows = torch.nonzero(~found.fooled).flatten()
            search = self._begin(problem, rows, pixels, generator)
            if len(rows):
                self._run(search, problem, found)

    @abstractmethod
    def _updates(self) -> int:
        """Updates of one run."""

    @abstractmethod
    def _begin(self, problem: Problem, rows: Tensor, pixels: Tensor, generator: torch.Generator) -> Search:
        """A search for the images `rows` of the whole batch `pixels`, for which the starts are drawn."""

    def _run(self, search: Search, problem: Problem, found: AttackResult) -> None:
        """One run from `search`'s start, whose outcome goes into `found`."""
        follow(search, problem, self._updates(), found)
        search.finish(self._updates(), found)


class GradientAttack(RestartingAttack):
    """An attack that goes along gradients, from a start that its field `start` names."""

    steps: int
    start: Start

    def _updates(self) -> int:
        return self.steps

    def _require_start(self) -> None:
        if self.start not in get_args(Start):
            raise PlanError(f"{_name(self)}'s start must be one of {', '.join(get_args(Start))}, got {self.start!r}")

    def go_on(self, problem: Problem, pixels: Tensor, found: AttackResult, generator: torch.Generator) -> None:
        """See `SearchAttack`."""
        if self.start == "clean" and problem.objective.needs_random_start:
            name = type(problem.objective).__name__
            raise PlanError(f"{name} has no gradient at the clean image: start must be random")
        super().go_on(problem, pixels, found, generator)

    def _starts(self, pixels: Tensor, threat: ThreatModel, generator: torch.Generator) -> Tensor:
        if self.start == "clean":
            return pixels.clone()
        draw = threat.boundary_start if self.start == "boundary" else threat.random_start
        return draw(pixels, generator)


def follow(search: Search, problem: Problem, updates: int, found: AttackResult, done: int = 0) -> None:
    """Let a search make its updates, with one look more than that; the fooled leave it.

    Args:
        search: at its start.
        problem: of the caller's whole batch.
        updates: how many.
        found: where those that leave are recorded.
        done: updates that they had before.
    """
    for update in range(updates + 1):
        if update:
            search.move(problem.threat, update)
        embeddings, value, gradient = _look(search, problem, with_gradient=search.needs_gradient and update < updates)
        search.observe(value, gradient, update)
        if problem.watch is not None:
            problem.watch(search.rows, done + update, search.best_value)
        if problem.criterion is not None:
            fooled = problem.criterion.rows(search.rows)(embeddings).to(value.device)
            if isinstance(problem.encoder, Bf16Gradients):
                fooled = _confirmed(fooled, search, problem.encoder, problem.criterion)
            search.leave(fooled, done + update, found)
        if not len(search.rows):
            return
        search.adjust(update)


def _look(search: Search, problem: Problem, *, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(embeddings (k, d), objective (k,), its gradient with respect to the pixels)` at the current points."""
    with torch.set_grad_enabled(with_gradient):
        at = search.current.detach().requires_grad_(with_gradient)
        try:
            embeddings = problem.encoder.encode(at)
        except NonFiniteEmbedding as error:  # its rows are those of the images still in the batch
            raise NonFiniteEmbedding(tuple(search.rows[list(error.rows)].tolist())) from error
        finite = torch.isfinite(embeddings.detach()).all(dim=1).to(at.device)
        if not bool(finite.all()):
            raise NonFiniteEmbedding(tuple(search.rows[~finite].tolist()))
        value = problem.objective.rows(search.rows)(embeddings)
    seen = value.detach().to(at)
    if not bool(torch.isfinite(seen).all()):
        rows = search.rows[~torch.isfinite(seen)].tolist()
        raise RunError(f"{type(problem.objective).__name__} is not finite for the images in rows {rows}")
    return embeddings.detach(), seen, input_gradient(value, at) if with_gradient else None


def input_gradient(value: Tensor, pixels: Tensor) -> Tensor:
    """The gradient (b, 3, h, w) of each image's objective, (b,), with respect to its pixels.

    It is zero where the objective does not depend on the pixels in a way that can be differentiated, as behind an
    encoder that detaches its output: such an attack stays where it started, and `offline.audit.masking` says so.
    """
    if not value.requires_grad:
        return torch.zeros_like(pixels)
    (gradient,) = torch.autograd.grad(value.sum(), pixels, allow_unused=True)
    return torch.zeros_like(pixels) if gradient is None else gradient


def _confirmed(fooled: Tensor, search: Search, encoder: Attacked, criterion: Criterion) -> Tensor:
    """Those of the fooled whom a pass without gradient calls fooled as well."""
    rows = torch.nonzero(fooled).flatten()
    if not len(rows):
        return fooled
    with torch.no_grad():
        again = criterion.rows(search.rows[rows])(encoder.encode(search.current[rows]))
    confirmed = torch.zeros_like(fooled)
    confirmed[rows] = again.to(fooled.device)
    return confirmed


def _name(attack: object) -> str:
    name = type(attack).__name__
    return name.upper() if name in ("Apgd", "Pgd") else name
