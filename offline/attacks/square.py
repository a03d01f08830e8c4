"""Square Attack: random search that only looks at the model's answers (methods 5.4).

Each image draws from a generator of its own, so that what happens to it does not depend on its batch.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from offline.attacks.search import Problem, RestartingAttack, Search, lowest
from offline.errors import PlanError
from offline.threat import ThreatModel

_BLOCK = 64  # queries whose random numbers are drawn together
_TILES = 5
_SMALLEST_WINDOW = 3
_NUMBERS = 5  # random numbers of a proposal besides the signs: two corners, and whether the tile lies
_TINY = 1e-12
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_SCHEDULED_QUERIES = 10_000  # what the schedule was made for


@dataclass(frozen=True)
class Square(RestartingAttack):
    """Square Attack for linf and l2; with the objective `Margin` it is AutoAttack's.

    linf starts from vertical stripes of +-eps, and proposes squares of +-2 eps, one sign a channel, which are
    projected. l2 starts from tiles, and proposes to move the perturbation's mass from one square window to another.
    A proposal is kept where the objective rises. Squares cover a share p of the image, which falls as the search goes
    on. As in AutoAttack, a square's corner is drawn from [0, side of the image - side of the square), without the end.

    Attributes:
        queries: proposals for each start, whose own look comes on top; `AttackResult.updates` counts proposals.
        restarts: runs from different starts, each on those that are not yet fooled.
        p_init: first share p.
        rescaled: let p fall over `queries` as it is meant to over 10000; AutoAttack's standard version does not.
    """

    queries: int = 5000
    restarts: int = 1
    p_init: float = 0.8
    rescaled: bool = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            PlanError: fewer than one query or restart, or a share outside (0, 1].
        """
        self._require_counts("queries", "restarts")
        if not 0 < self.p_init <= 1:
            raise PlanError(f"Square's p_init must be in (0, 1], got {self.p_init}")

    def _updates(self) -> int:
        return self.queries

    def share(self, query: int) -> float:
        """The share p of the proposal number `query`, from 0."""
        at = query * _SCHEDULED_QUERIES // self.queries if self.rescaled else query
        return math.ldexp(self.p_init, -sum(at > last for last in _HALVINGS))

    def _begin(self, problem: Problem, rows: Tensor, pixels: Tensor, generator: torch.Generator) -> "_Search":
        seeds = torch.randint(2**62, (len(pixels),), generator=generator, device=generator.device).tolist()
        draws = _Draws([torch.Generator().manual_seed(seeds[row]) for row in rows.tolist()])
        kind: type[_Search] = _LinfSearch if problem.threat.norm == "linf" else _L2Search
        originals = pixels[rows]
        start = kind.start(originals, problem.threat, draws)
        return kind(
            rows=rows,
            pixels=originals,
            current=start,
            best=start.clone(),
            best_value=lowest(originals),
            places=torch.arange(len(rows), device=pixels.device),
            numbers=torch.empty(len(rows), 0, 0, dtype=torch.float64, device=pixels.device),
            draws=draws,
            square=self,
        )


def linf_side(share: float, height: int, width: int) -> int:
    """Side of a linf square: 200, 142, 100, 71, ... for the shares .8, .4, .2, .1, ... of 224 x 224 pixels."""
    return min(max(round(math.sqrt(share * height * width)), 1), height, width)


def l2_side(share: float, height: int, width: int) -> int:
    """Side of an l2 window, odd and at least 3: 201, 143, 101, 71, ... as above."""
    side = max(round(math.sqrt(share * height * width)), _SMALLEST_WINDOW)
    largest = min(height, width)
    return min(side + (side + 1) % 2, largest - (largest + 1) % 2)


@lru_cache(maxsize=16)
def tile(side: int) -> Tensor:
    """The l2 attack's pattern, (side, side) float64 of unit norm: a positive bump above a negative one.

    It is shared between calls and must not be changed.
    """
    upper = side // 2
    pattern = torch.cat([_bump(upper, side), -_bump(side - upper, side)])
    norm: Tensor = torch.linalg.vector_norm(pattern)
    return pattern / norm


def _bump(height: int, width: int) -> Tensor:
    """(height, width) of unit norm: sums of centred boxes, the k-th with weight 1 / k^2; nothing for no rows."""
    bump = torch.zeros(height, width, dtype=torch.float64)
    y, x = height // 2, width // 2
    for k in range(max(y, x) + 1):
        bump[max(y - k, 0) : y + k + 1, max(x - k, 0) : x + k + 1] += 1 / (k + 1) ** 2
    return bump / torch.linalg.vector_norm(bump) if height else bump


@dataclass(frozen=True)
class _Draws:
    """Uniform numbers in [0, 1) from one generator an image."""

    generators: list[torch.Generator] = field(repr=False)

    def __call__(self, places: Tensor, *shape: int) -> Tensor:
        """(k, *shape) float64 on the CPU for the generators `places`, (k,) int64."""
        rows = [torch.rand(shape, generator=self.generators[i], dtype=torch.float64) for i in places.tolist()]
        return torch.stack(rows) if rows else torch.empty(0, *shape, dtype=torch.float64)


@dataclass
class _Search(Search):
    """Adds to `Search` the random numbers.

    Attributes:
        places: (k,) int64, which generators are the images'.
        numbers: (k, `_BLOCK`, n) uniform numbers of the present block of queries.
        draws: the generators.
        square: the attack.
    """

    needs_gradient: ClassVar[bool] = False

    places: Tensor
    numbers: Tensor
    draws: _Draws
    square: Square

    @staticmethod
    @abstractmethod
    def start(pixels: Tensor, threat: ThreatModel, draws: _Draws) -> Tensor:
        """Where to begin: (k, 3, h, w) -> the same."""

    @abstractmethod
    def _propose(self, threat: ThreatModel, share: float, numbers: Tensor) -> Tensor:
        """Images to ask about, (k, 3, h, w), from (k, 5 + channels) numbers: a sign a channel comes last."""

    def move(self, threat: ThreatModel, update: int) -> None:
        """See `Search`."""
        query = update - 1
        if query % _BLOCK == 0:
            drawn = self.draws(self.places, _BLOCK, _NUMBERS + self.pixels.shape[1])
            self.numbers = drawn.to(self.pixels.device)
        proposed = self._propose(threat, self.square.share(query), self.numbers[:, query % _BLOCK])
        self.current = threat.project(proposed, self.pixels)


class _LinfSearch(_Search):
    """Squares of one sign a channel."""

    @staticmethod
    def start(pixels: Tensor, threat: ThreatModel, draws: _Draws) -> Tensor:
        """See `_Search`: vertical stripes."""
        count, channels, _, width = pixels.shape
        signs = _signs(draws(torch.arange(count), channels, 1, width), pixels)
        return threat.project(pixels + threat.eps * signs, pixels)

    def _propose(self, threat: ThreatModel, share: float, numbers: Tensor) -> Tensor:
        channels, height, width = self.pixels.shape[1:]
        side = linf_side(share, height, width)
        window = _window(numbers[:, 0], numbers[:, 1], side, self.pixels)
        proposed = self.best.clone()
        proposed[window] += 2 * threat.eps * _signs(numbers[:, -channels:, None, None], self.pixels)
        return proposed


class _L2Search(_Search):
    """Mass that moves from one window to another."""

    @staticmethod
    def start(pixels: Tensor, threat: ThreatModel, draws: _Draws) -> Tensor:
        """See `_Search`: tiles, five of them along the shorter side unless rounding leaves room for more.

        Raises:
            PlanError: the images are too small.
        """
        count, channels, height, width = pixels.shape
        side = min(height, width) // _TILES
        if not side:
            raise PlanError(f"Square for l2 needs images of at least {_TILES} x {_TILES} pixels, got {height}x{width}")
        down, across = height // side, width // side
        numbers = draws(torch.arange(count), down, across, 1 + channels).to(pixels.device)
        delta = torch.zeros_like(pixels)
        for row in range(down):
            for column in range(across):
                y, x = (height - down * side) // 2 + row * side, (width - across * side) // 2 + column * side
                delta[:, :, y : y + side, x : x + side] = _tiles(numbers[:, row, column], side, pixels)
        return threat.project(pixels + threat.eps * threat.steepest(delta), pixels)

    def _propose(self, threat: ThreatModel, share: float, numbers: Tensor) -> Tensor:
        channels, height, width = self.pixels.shape[1:]
        side = l2_side(share, height, width)
        delta = self.best - self.pixels
        gains = _window(numbers[:, 0], numbers[:, 1], side, self.pixels)
        loses = _window(numbers[:, 2], numbers[:, 3], side, self.pixels)
        outside = delta.clone()
        outside[gains] = outside[loses] = 0
        norms = _squares(delta, (1, 2, 3))
        # A channel has what the two windows held of it, and its part of what the ball still allows.
        to_spend = (threat.eps**2 - norms).clamp_min(0) / channels + _squares(delta - outside, (2, 3))
        old = delta[gains]
        new = _tiles(numbers[:, 4:], side, self.pixels) + old / (_TINY + _squares(old, (2, 3)).sqrt())
        delta[loses] = 0
        delta[gains] = new / (_TINY + _squares(new, (2, 3)).sqrt()) * to_spend.sqrt()
        return self.pixels + threat.eps * threat.steepest(delta)


def _signs(numbers: Tensor, like: Tensor) -> Tensor:
    """Uniform numbers -> signs of the same shape, on `like`'s device."""
    return torch.where(numbers < 0.5, -1.0, 1.0).to(like)


def _tiles(numbers: Tensor, side: int, like: Tensor) -> Tensor:
    """(k, 1 + channels) numbers -> (k, channels, side, side): the tile, upright or lying, with one sign a channel."""
    upright = tile(side).to(like)
    lies = (numbers[:, 0] > 0.5)[:, None, None]
    return torch.where(lies, upright.T, upright)[:, None] * _signs(numbers[:, 1:, None, None], like)


def _window(down: Tensor, across: Tensor, side: int, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Index of a square window of each image, (k, channels, side, side) values, from two uniform numbers an image."""
    count, channels, height, width = images.shape
    along = torch.arange(side, device=images.device)
    y, x = (down * (height - side)).long(), (across * (width - side)).long()
    return (
        torch.arange(count, device=images.device).view(-1, 1, 1, 1),
        torch.arange(channels, device=images.device).view(1, -1, 1, 1),
        (y[:, None] + along).view(-1, 1, side, 1),
        (x[:, None] + along).view(-1, 1, 1, side),
    )


def _squares(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Sum of squares over some dimensions, which stay with length 1."""
    return values.square().sum(dim=dims, keepdim=True)
