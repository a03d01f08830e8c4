"""Feature inversion by APGD (Eq. 9 and 10, methods 5.3): ascend the cosine with a target in a large l2 ball of grey."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from offline.attacks.apgd import Apgd
from offline.attacks.base import Attacked
from offline.attacks.search import Problem, Search, input_gradient
from offline.errors import PlanError, RunError
from offline.inversion.optimiser import Keeper, Reconstruction, Watch
from offline.inversion.plan import APGD_STEPS, RADIUS_AT_224
from offline.inversion.problem import Target, towards
from offline.threat import ThreatModel, scaled_l2_eps
from perception.errors import NonFiniteEmbedding

_TRACE = "trace"


@dataclass(frozen=True)
class ApgdInversion:
    """See `offline.inversion.optimiser.Optimiser`.

    The start is also the ball's centre. The first step is twice the radius: 200 at the published 100.

    Attributes:
        steps: updates.
        radius: l2, at the size of the starts; None for 100 at 224 px, scaled by `scaled_l2_eps` for other sizes.
        alpha: first step size in units of the radius.
    """

    steps: int = APGD_STEPS
    radius: float | None = None
    alpha: float = 2.0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            PlanError: fewer than one step, or a radius or a step size that is not positive and finite.
        """
        if self.steps < 1:
            raise PlanError(f"steps must be at least 1, got {self.steps}")
        for name, value in (("radius", self.radius), ("alpha", self.alpha)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise PlanError(f"{name} must be positive and finite, got {value}")

    def ball(self, size_px: int) -> ThreatModel:
        """See `Optimiser`."""
        radius = scaled_l2_eps(RADIUS_AT_224, size_px) if self.radius is None else self.radius
        return ThreatModel("l2", radius)

    def settings(self) -> dict[str, Any]:
        """See `Optimiser`."""
        return {**asdict(self), "norm": "l2", "radius_at_224": RADIUS_AT_224 if self.radius is None else None}

    def run(
        self,
        encoder: Attacked,
        targets: Sequence[Target],
        starts: Tensor,
        *,
        generators: Sequence[torch.Generator],
        watch: Watch | None = None,
        keeper: Keeper | None = None,
    ) -> Reconstruction:
        """See `Optimiser`; nothing is drawn, for this search begins at the ball's centre."""
        problem = Problem(encoder, towards(targets, starts.device), None, self.ball(starts.shape[-1]))
        ascent = _Ascent(steps=self.steps, start="clean", alpha=self.alpha)
        return ascent.ascend(problem, starts.detach(), watch, keeper)


class _Ascent(Apgd):
    """APGD that nobody leaves, for there is nothing to be fooled; it can be stopped and go on at any update."""

    def ascend(self, problem: Problem, starts: Tensor, watch: Watch | None, keeper: Keeper | None) -> Reconstruction:
        """Make all updates, those before a restored state excepted."""
        searches = list(self._searches(problem, starts))
        trace: list[Tensor] = []
        first = 0
        restored = None if keeper is None else keeper.restored()
        if restored is not None:
            first = 1 + restored[0]
            trace = list(_put_back(searches, restored[1]))
        for update in range(first, self.steps + 1):
            trace.append(torch.cat([_advance(search, problem, update, self.steps) for search in searches]))
            if watch is not None:
                watch(update, *_best(searches))
            if keeper is not None and update < self.steps:
                keeper.offer(update, lambda: {**_state(searches), _TRACE: torch.stack(trace)})
        return Reconstruction(*_best(searches), torch.stack(trace))

    def _searches(self, problem: Problem, starts: Tensor) -> Iterator[Search]:
        """One a picture on a CPU, where the same bits come out whatever else is in the batch, else one for all."""
        rows = torch.arange(len(starts), device=starts.device)
        for of_search in rows.split(1 if starts.device.type == "cpu" else len(starts)):
            search = self._begin(problem, torch.arange(len(of_search)).to(rows), starts[of_search], torch.Generator())
            search.rows = of_search
            yield search


def _advance(search: Search, problem: Problem, update: int, steps: int) -> Tensor:
    """Make an update, unless it is number 0, and look: the cosines of the current points."""
    if update:
        search.move(problem.threat, update)
    with torch.set_grad_enabled(update < steps):
        at = search.current.detach().requires_grad_(update < steps)
        try:
            value = problem.objective.rows(search.rows)(problem.encoder.encode(at))
        except NonFiniteEmbedding as error:  # its rows are those of this search
            raise NonFiniteEmbedding(tuple(search.rows[list(error.rows)].tolist())) from error
    seen = value.detach().to(at)
    if not bool(torch.isfinite(seen).all()):
        raise RunError(f"a similarity is not finite, of the pictures in rows {search.rows.tolist()}")
    search.observe(seen, input_gradient(value, at) if update < steps else None, update)
    search.adjust(update)
    return seen


def _best(searches: Sequence[Search]) -> tuple[Tensor, Tensor]:
    return torch.cat([search.best for search in searches]), torch.cat([search.best_value for search in searches])


def _tensors(search: Search) -> dict[str, Tensor]:
    values = {field.name: getattr(search, field.name) for field in fields(search)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _state(searches: Sequence[Search]) -> dict[str, Tensor]:
    each = [_tensors(search) for search in searches]
    return {name: torch.cat([tensors[name] for tensors in each]) for name in each[0]}


def _put_back(searches: Sequence[Search], state: dict[str, Tensor]) -> Tensor:
    """Set searches at their starts to where `_state` was taken; returns the trace.

    Raises:
        RunError: the state is not one of such searches.
    """
    expected = _state(searches)
    if state.keys() != {*expected, _TRACE} or any(state[name].shape != now.shape for name, now in expected.items()):
        raise RunError("the checkpoint does not hold the state of an APGD search of this batch")
    for search in searches:
        for name, now in _tensors(search).items():
            setattr(search, name, state[name].to(now)[search.rows])
    return state[_TRACE].to(searches[0].best)
