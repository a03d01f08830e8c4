"""An attacker who knows the counterattack of `perception.counterattack`, but not the seed of its noise.

An image that is defended goes one of two ways, and the attack has a third:

- transfer: the encoder is attacked as if there were no defence, as far as the steps lead and not to the boundary alone.
- around: the image is made so unstable under noise that its tau reaches the threshold. It then gets noise alone, and
  the attack need only bear that.
- through: the objective is followed through the counterattack. Its steps are signs of a gradient, whose derivative is
  zero almost everywhere; in its place stands that of `tanh(g / mean |g|)`, which makes it a gradient of second order.
  (To take the counterattack for a constant, BPDA, was tried first and is weaker: docs/counterattack.md.)

The last two average over several draws of noise, expectation over transformations (Athalye et al., 2018). The best of
the images is the answer, by draws of the attacker's own that none of them has seen.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from offline.attacks.base import Attacked, AttackResult
from offline.attacks.search import Problem, SearchAttack, nothing_found
from offline.attacks.targeted import Targetable
from offline.criteria import Criterion
from offline.objectives import LOGIT_SCALE, LogitObjective, Objective
from perception.counterattack import CounterattackSettings, Features, counterattack
from perception.encoder import unit_embeddings

JUDGING_DRAWS = 16
"""Draws of noise by which the attacker chooses among images; one that fools under all of them is done."""
Way = Literal["transfer", "around", "through"]
_PENALTY, _SLACK = 5.0, 0.03  # of a tau below the threshold, in units of the objective; how far above is safe


@dataclass(frozen=True, eq=False)
class Knowledge:
    """What the attacker knows of the defence.

    Attributes:
        encoder, original, settings: see `perception.counterattack.counterattack`.
        dim: d, of an embedding.
    """

    encoder: Features
    settings: CounterattackSettings
    original: Features | None
    dim: int

    def noise(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """A draw of the noise, of the shape of `like`, (b, 3, h, w)."""
        drawn = torch.rand(like.shape, generator=generator, dtype=like.dtype)
        return (self.settings.eps * (2 * drawn - 1)).to(like.device)


@dataclass(frozen=True, eq=False)
class _View(Attacked):
    """The defended encoder as the attacker models it; embeddings under all draws stand side by side in a row.

    Attributes:
        knowledge: of the defence.
        draws: of noise, for each look.
        generator: of the noise.
        fixed: seed of draws that are the same at each look and for each image; None for new ones.
    """

    knowledge: Knowledge
    draws: int
    generator: torch.Generator
    fixed: int | None = None

    def encode(self, pixels: Tensor) -> Tensor:
        """(b, 3, h, w) in [0, 1] -> (b, draws * width), differentiable; see `Expected`."""
        if self.fixed is not None:
            drawn = torch.Generator().manual_seed(self.fixed)
            noises = [self.knowledge.noise(pixels[:1], drawn).expand_as(pixels) for _ in range(self.draws)]
        else:
            noises = [self.knowledge.noise(pixels, self.generator) for _ in range(self.draws)]
        return torch.cat(list(self.looks(pixels, noises)), dim=1)

    @abstractmethod
    def looks(self, pixels: Tensor, noises: Sequence[Tensor]) -> Iterator[Tensor]:
        """(b, width) under each draw of noise, (b, 3, h, w)."""


@dataclass(frozen=True, eq=False)
class Around(_View):
    """The unit embedding of the image with noise alone, and tau in a last column: d + 1 columns a draw."""

    def looks(self, pixels: Tensor, noises: Sequence[Tensor]) -> Iterator[Tensor]:
        """See `_View`."""
        encoder, original = self.knowledge.encoder, self.knowledge.original
        at = (original or encoder).features(pixels)
        for noise in noises:
            moved = (pixels + noise).clamp(0, 1)
            features = encoder.features(moved)
            tau = _tau(features if original is None else original.features(moved), at)
            yield torch.cat([unit_embeddings(features), tau[:, None]], dim=1)


@dataclass(frozen=True, eq=False)
class Through(_View):
    """The unit embedding of the image after the counterattack, whichever way the gate sends it: d columns a draw."""

    def looks(self, pixels: Tensor, noises: Sequence[Tensor]) -> Iterator[Tensor]:
        """See `_View`; the same values with gradient and without."""
        knows = self.knowledge
        if not (torch.is_grad_enabled() and pixels.requires_grad):
            for noise in noises:
                found = counterattack(knows.encoder, pixels, noise, knows.settings, knows.original).pixels
                yield unit_embeddings(knows.encoder.features(found))
            return
        with sdpa_kernel(SDPBackend.MATH):  # the fused kinds of attention have no second derivative
            anchors = knows.encoder.features(pixels)
            with torch.no_grad():
                gate = anchors if knows.original is None else knows.original.features(pixels)
            for noise in noises:
                yield unit_embeddings(knows.encoder.features(self._defended(pixels, noise, anchors, gate)))

    def _defended(self, x: Tensor, noise: Tensor, anchors: Tensor, gate: Tensor) -> Tensor:
        """As `counterattack`, differentiable but for the gate; `gate` are the features of what computes tau."""
        knows, settings = self.knowledge, self.knowledge.settings
        start = (x + noise).clamp(0, 1) - x
        delta, total = start, settings.weights[0] * start
        moved = knows.encoder.features(x + start)
        with torch.no_grad():
            tau = _tau(moved if knows.original is None else knows.original.features(x + start), gate)
        for step, weight in enumerate(settings.weights[1:]):
            features = knows.encoder.features(x + delta) if step else moved
            (gradient,) = torch.autograd.grad((features - anchors).square().sum(), delta, create_graph=True)
            delta = (delta + settings.step_size * _smooth_sign(gradient)).clamp(-settings.eps, settings.eps)
            delta = (x + delta).clamp(0, 1) - x
            total = total + weight * delta
        countered = (tau < settings.threshold).view(-1, 1, 1, 1)
        return torch.where(countered, (x + total).clamp(0, 1), (x + start).clamp(0, 1))


def _tau(moved: Tensor, at: Tensor) -> Tensor:
    """(b,) of features at x + delta_0 and at x."""
    tau: Tensor = (moved - at).norm(dim=1) / at.norm(dim=1)
    return tau


def _smooth_sign(gradient: Tensor) -> Tensor:
    """The sign (b, 3, h, w), with the derivative of `tanh(g / s)`, s an image's mean absolute gradient."""
    scale = gradient.detach().abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
    smooth = torch.tanh(gradient / scale)
    return gradient.detach().sign() + (smooth - smooth.detach())


@dataclass(frozen=True)
class Expected:
    """The mean of an objective over the draws of a view.

    Attributes:
        inner: of one draw.
        dim: d, of an embedding; a row of k d columns holds k draws.
    """

    inner: Objective
    dim: int

    @property
    def needs_random_start(self) -> bool:
        """See `Objective`; noise moves the image away from its clean place in any case."""
        return self.inner.needs_random_start

    def __call__(self, embeddings: Tensor) -> Tensor:
        """(b, k * width) -> (b,)."""
        return torch.stack([self.value(draw) for draw in embeddings.split(self.width, dim=1)]).mean(dim=0)

    @property
    def width(self) -> int:
        """Columns of one draw."""
        return self.dim

    def value(self, draw: Tensor) -> Tensor:
        """(b, width) -> (b,) of one draw."""
        return self.inner(draw)

    def rows(self, index: Tensor) -> Self:
        """See `Objective`."""
        return replace(self, inner=self.inner.rows(index))


@dataclass(frozen=True)
class Unstable(Expected):
    """The same of `Around`, less a penalty for each draw under which tau does not reach the threshold.

    Attributes:
        threshold: of tau.
    """

    threshold: float

    @property
    def width(self) -> int:
        """See `Expected`."""
        return self.dim + 1

    def value(self, draw: Tensor) -> Tensor:
        """See `Expected`."""
        scale = LOGIT_SCALE if isinstance(self.inner, LogitObjective) else 1.0
        missing = (draw[:, self.dim] - self.threshold - _SLACK).clamp(max=0)
        return self.inner(draw[:, : self.dim]) + _PENALTY * scale * missing


class _Targets(Expected):
    """An objective that can be turned towards a class, see `Targetable`; the draws are averaged to find the classes."""

    def runners_up(self, embeddings: Tensor, count: int) -> Tensor:
        """See `Targetable`."""
        mean = torch.stack([draw[:, : self.dim] for draw in embeddings.split(self.width, dim=1)]).mean(dim=0)
        assert isinstance(self.inner, Targetable)
        return self.inner.runners_up(mean, count)

    def toward(self, targets: Tensor) -> Expected:
        """See `Targetable`."""
        assert isinstance(self.inner, Targetable)
        return replace(self, inner=self.inner.toward(targets))


class _ExpectedTargets(_Targets):
    pass


class _UnstableTargets(Unstable, _Targets):
    pass


def expected(inner: Objective, dim: int) -> Expected:
    """`Expected`, which has targets where `inner` has."""
    return (_ExpectedTargets if isinstance(inner, Targetable) else Expected)(inner, dim)


def unstable(inner: Objective, dim: int, threshold: float) -> Unstable:
    """`Unstable`, which has targets where `inner` has."""
    return (_UnstableTargets if isinstance(inner, Targetable) else Unstable)(inner, dim, threshold)


@dataclass(frozen=True)
class UnderAll:
    """A criterion that holds under all draws of a view.

    Attributes:
        inner: of one draw.
        dim: d, of an embedding.
    """

    inner: Criterion
    dim: int

    def __call__(self, embeddings: Tensor) -> Tensor:
        """(b, k d) -> (b,) bool."""
        return torch.stack([self.inner(draw) for draw in embeddings.split(self.dim, dim=1)]).all(dim=0)

    def rows(self, index: Tensor) -> Self:
        """See `Criterion`."""
        return replace(self, inner=self.inner.rows(index))


@dataclass(frozen=True)
class Adaptive(SearchAttack):
    """Runs an attack in each of the ways, from the cheapest to the dearest, on the images that still resist.

    What it is asked for is the encoder without the defence; objective and criterion are of one embedding. Nobody leaves
    before the last step: an image that fools under one draw of noise need not do so under the next.

    Attributes:
        inner: the attack.
        knowledge: of the defence; its encoder is the one that is attacked.
        draws: of noise at each look.
        ways: which ones, in their order.
    """

    inner: SearchAttack
    knowledge: Knowledge
    draws: int
    ways: tuple[Way, ...] = ("transfer", "around", "through")

    def go_on(self, problem: Problem, pixels: Tensor, found: AttackResult, generator: torch.Generator) -> None:
        """See `SearchAttack`; `found.fooled` are those that fool under `JUDGING_DRAWS` draws of the attacker's own."""
        shares = torch.zeros(len(pixels), device=pixels.device)
        for way in self.ways:
            standing = torch.nonzero(~found.fooled).flatten()
            if not len(standing):
                return
            tried = nothing_found(pixels)
            tried.fooled.copy_(found.fooled)
            self.inner.go_on(self._asked(way, problem, generator), pixels, tried, generator)
            self._keep(problem, standing, tried, found, shares, generator)

    def _asked(self, way: Way, problem: Problem, generator: torch.Generator) -> Problem:
        """What the inner attack is asked; only the last way's objective is that of the defended encoder."""
        knows = self.knowledge
        asked = replace(problem, criterion=None, watch=problem.watch if way == "through" else None)
        if way == "transfer":
            return asked
        if way == "around":
            objective: Objective = unstable(problem.objective, knows.dim, knows.settings.threshold)
            return replace(asked, encoder=Around(knows, self.draws, generator), objective=objective)
        objective = expected(problem.objective, knows.dim)
        return replace(asked, encoder=Through(knows, self.draws, generator), objective=objective)

    def _keep(
        self,
        problem: Problem,
        rows: Tensor,
        tried: AttackResult,
        found: AttackResult,
        shares: Tensor,
        generator: torch.Generator,
    ) -> None:
        """Take over the images `rows` that fool more often than those found so far, or as often by more."""
        share, value = self._judge(problem, rows, tried.adversarial[rows], generator)
        better = (share > shares[rows]) | ((share == shares[rows]) & (value > found.objective[rows]))
        found.updates[rows] += tried.updates[rows]
        at = rows[better]
        found.adversarial[at], found.objective[at] = tried.adversarial[at], value[better]
        shares[at] = share[better]
        found.fooled[at] = share[better] == 1

    def _judge(
        self, problem: Problem, rows: Tensor, images: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """(k,) share of draws under which the images `rows` fool, 0 without a criterion, and mean objective."""
        objective = problem.objective.rows(rows)
        criterion = None if problem.criterion is None else problem.criterion.rows(rows)
        share, value = torch.zeros(2, len(rows), device=images.device).unbind()
        view = Through(self.knowledge, 1, generator)
        with torch.no_grad():
            for _ in range(JUDGING_DRAWS):
                embeddings = view.encode(images)
                value = value + objective(embeddings).to(value) / JUDGING_DRAWS
                if criterion is not None:
                    share = share + criterion(embeddings).to(value) / JUDGING_DRAWS
        return share, value
