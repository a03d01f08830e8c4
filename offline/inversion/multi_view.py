"""Multi-view inversion: Adam on the pixels, over random views of the picture at each step (methods 6.10).

What a picture must match is not one embedding but the mean over views that are shifted, recoloured and cut, so that
patterns which only work at one place and in one colour are worth little. It comes from CLIPAG's notebook, which has
AdamW, a little noise on each view and an image of the data as a start; all but the last are options here.

Each picture is optimised for itself, with an optimiser and random numbers of its own and in passes of its own views
alone: the same bits come out whatever else is in the batch.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from offline.attacks.base import Attacked
from offline.attacks.search import input_gradient
from offline.errors import PlanError, RunError
from offline.inversion.augment import PAPERS_POLICY, DiffAugment
from offline.inversion.optimiser import Keeper, Reconstruction, Watch
from offline.inversion.problem import Target
from offline.runs import adam_tensors, restore_adam
from offline.threat import ThreatModel
from perception.errors import NonFiniteEmbedding

STEPS, VIEWS, LR = 1000, 32, 0.1


@dataclass(frozen=True)
class MultiViewInversion:
    """Minimises `mean_v (1 - cos(phi(view_v(x)), t))`; see `offline.inversion.optimiser.Optimiser`.

    What is returned is the best of the pictures that were judged. Judged is the picture itself, without augmentation:
    its similarity with the target under the encoder, at the start, after every `judge_every` updates and after the
    last. The mean over views is another draw at each step, so that its lowest is partly luck; and it is the picture
    that people look at, not its views.

    Attributes:
        steps: updates.
        views: of the picture at each step, augmented independently.
        lr: of Adam, in pixel values: its first update changes each value by about so much.
        policy: of the views; see `DiffAugment`.
        noise: standard deviation of Gaussian noise on each view before it is augmented; CLIPAG's is 0.01.
        weight_decay: decoupled, as AdamW's, towards black; CLIPAG's is 0.01. 0 is Adam.
        judge_every: updates.
    """

    steps: int = STEPS
    views: int = VIEWS
    lr: float = LR
    policy: tuple[str, ...] = field(default=PAPERS_POLICY)
    noise: float = 0.0
    weight_decay: float = 0.0
    judge_every: int = 10

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            PlanError: a count below 1, a learning rate that is not positive and finite, noise or decay that is negative
                or not finite, or no such policy.
        """
        for name in ("steps", "views", "judge_every"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise PlanError(f"lr must be positive and finite, got {self.lr}")
        for name in ("noise", "weight_decay"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise PlanError(f"{name} must be finite and not negative, got {value}")
        DiffAugment(self.policy)

    def ball(self, size_px: int) -> ThreatModel | None:
        """See `Optimiser`: only the box [0, 1] holds the pictures."""
        return None

    def settings(self) -> dict[str, Any]:
        """See `Optimiser`."""
        return {
            "steps": self.steps,
            "views": self.views,
            "lr": self.lr,
            "policy": list(self.policy),
            "noise": self.noise,
            "weight_decay": self.weight_decay,
            "judge_every": self.judge_every,
        }

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
        """See `Optimiser`.

        Raises:
            RunError: what the keeper gives back is of another search, too.
        """
        given = zip(targets, starts.detach(), generators, strict=True)
        searches = [_Search(self, encoder, row, *of_row) for row, of_row in enumerate(given)]

        def state() -> dict[str, Tensor]:
            return {name: tensor for search in searches for name, tensor in search.state()}

        kept = keeper.restored() if keeper is not None else None
        if kept is not None:
            for search in searches:
                search.restore(kept[1])
        for update in range(0 if kept is None else kept[0] + 1, self.steps + 1):
            for search in searches:
                search.advance(update)
            if watch is not None:
                watch(update, *_best(searches))
            if keeper is not None and update < self.steps:
                keeper.offer(update, state)
        return Reconstruction(*_best(searches), torch.stack([search.trace for search in searches], dim=1))


class _Search:
    """One picture on its way.

    Attributes:
        best, best_value: (3, h, w) the picture that was judged best, and its similarity.
        trace: (steps + 1,) the mean similarity of the views at each step.
    """

    def __init__(
        self,
        rules: MultiViewInversion,
        encoder: Attacked,
        row: int,
        target: Target,
        start: Tensor,
        generator: torch.Generator,
    ) -> None:
        self._rules, self._encoder, self._row, self._generator = rules, encoder, row, generator
        self._target = target.embedding.detach().to(start)
        self._augment = DiffAugment(rules.policy)
        self._pixels = start.clone()
        self._pixels.grad = torch.zeros_like(start)
        self._adam = torch.optim.AdamW([self._pixels], lr=rules.lr, weight_decay=rules.weight_decay)
        self.best, self.best_value = start.clone(), torch.full_like(start[0, 0, 0], -torch.inf)
        self.trace = torch.full((rules.steps + 1,), torch.nan, dtype=start.dtype, device=start.device)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """All that changes, by name; the next update needs the gradient, whose views have been drawn."""
        for name, tensor in self._tensors().items():
            yield f"{self._row}.{name}", tensor
        for name, tensor in adam_tensors(self._adam).items():
            yield f"{self._row}.{name}", tensor
        yield f"{self._row}.generator", self._generator.get_state()

    def restore(self, kept: Mapping[str, Tensor]) -> None:
        """Go back to what `state` said.

        Raises:
            RunError: it is the state of another search.
        """
        own = {name.partition(".")[2]: value for name, value in kept.items() if name.startswith(f"{self._row}.")}
        try:
            for name, tensor in self._tensors().items():
                if own[name].shape != tensor.shape:
                    raise ValueError(f"{name} of shape {tuple(own[name].shape)}, expected {tuple(tensor.shape)}")
                tensor.copy_(own[name])
            restore_adam(self._adam, own)
            self._generator.set_state(own["generator"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise RunError(f"the kept state of row {self._row} is not of this search: {error}") from error

    def _tensors(self) -> dict[str, Tensor]:
        assert self._pixels.grad is not None
        return {
            "pixels": self._pixels,
            "gradient": self._pixels.grad,
            "best": self.best,
            "best_value": self.best_value,
            "trace": self.trace,
        }

    def advance(self, update: int) -> None:
        """Make an update, unless it is number 0, and look at the picture that results."""
        if update:
            self._adam.step()
            self._pixels.clamp_(0, 1)
        if update % self._rules.judge_every == 0 or update == self._rules.steps:
            self._judge()
        self._look(update)

    def _look(self, update: int) -> None:
        """Note the mean similarity of fresh views, and have its gradient ready but after the last update."""
        last = update == self._rules.steps
        at = self._pixels.detach().requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            views = at.expand(self._rules.views, -1, -1, -1)
            if self._rules.noise:
                drawn = torch.randn(views.shape, generator=self._generator, dtype=views.dtype)
                views = views + self._rules.noise * drawn.to(views)
            similarity = self._similarities(self._augment(views, self._generator)).mean()
            if not last:
                self._pixels.grad = -input_gradient(similarity, at)
        self.trace[update] = similarity.detach()

    @torch.no_grad()
    def _judge(self) -> None:
        value = self._similarities(self._pixels[None])[0]
        if bool(value > self.best_value):
            self.best.copy_(self._pixels)
            self.best_value.copy_(value)

    def _similarities(self, pixels: Tensor) -> Tensor:
        """(v, 3, h, w) -> (v,) cosines with the target.

        Raises:
            NonFiniteEmbedding: names the row of the caller's batch.
            RunError: a cosine is not finite.
        """
        try:
            embeddings = self._encoder.encode(pixels)
        except NonFiniteEmbedding as error:
            raise NonFiniteEmbedding((self._row,)) from error
        cosines = embeddings.to(self._target) @ self._target
        if not bool(torch.isfinite(cosines.detach()).all()):
            raise RunError(f"the similarity with {self._target.shape[0]}-d target of row {self._row} is not finite")
        return cosines


def _best(searches: Sequence[_Search]) -> tuple[Tensor, Tensor]:
    """(b, 3, h, w) pictures and (b,) similarities."""
    return torch.stack([search.best for search in searches]), torch.stack([search.best_value for search in searches])
