"""Square Attack: the published schedule and sides, and a naive twin that attacks one image at a time with masks."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from offline.attacks.square import Square, l2_side, linf_side, tile
from offline.criteria import ArgmaxWrong
from offline.errors import PlanError
from offline.objectives import Margin
from offline.threat import Norm, ThreatModel
from tests.offline.attack_toys import Network, generator, images


@pytest.mark.parametrize(
    ("square", "halvings"),
    [
        (Square(queries=10_000), [11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001]),
        (Square(queries=5_000), [11, 51, 201, 501, 1001, 2001, 4001]),
        (Square(queries=5_000, rescaled=True), [6, 26, 101, 251, 501, 1001, 2001, 3001, 4001]),
        (Square(queries=10_000, rescaled=True), [11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001]),
    ],
)
def test_the_share_halves_at_the_published_queries(square: Square, halvings: list[int]) -> None:
    shares = [square.share(query) for query in range(square.queries)]
    assert shares[0] == 0.8
    assert [query for query in range(1, square.queries) if shares[query] != shares[query - 1]] == halvings
    assert shares[-1] == 0.8 / 2 ** len(halvings)


def test_sides_at_224_px() -> None:
    shares = [0.8 / 2**k for k in range(10)]
    assert [linf_side(share, 224, 224) for share in shares] == [200, 142, 100, 71, 50, 35, 25, 18, 13, 9]
    assert [l2_side(share, 224, 224) for share in shares] == [201, 143, 101, 71, 51, 35, 25, 19, 13, 9]


@given(share=st.floats(1e-6, 1), height=st.integers(5, 300), width=st.integers(5, 300))
def test_squares_fit_into_the_image(share: float, height: int, width: int) -> None:
    assert 1 <= linf_side(share, height, width) <= min(height, width)
    side = l2_side(share, height, width)
    assert 3 <= side <= min(height, width)
    assert side % 2 == 1


def test_the_tile_of_five() -> None:
    """Two rows of a positive bump, three of a negative one, written down from its definition."""
    upper = torch.tensor([[0.0, 1, 1, 1, 0], [0, 1, 1, 1, 0]]) / 4 + torch.ones(2, 5) / 9
    upper[1, 2] += 1
    lower = torch.tensor([[0.0, 1, 1, 1, 0]] * 3) / 4 + torch.ones(3, 5) / 9
    lower[1, 2] += 1
    expected = torch.cat([upper / upper.norm(), -lower / lower.norm()]) / math.sqrt(2)
    torch.testing.assert_close(tile(5), expected.double())


@pytest.mark.parametrize("side", [1, 2, 3, 9, 44])
def test_tiles_have_unit_norm_and_both_signs(side: int) -> None:
    pattern = tile(side)
    assert pattern.shape == (side, side)
    assert float(pattern.norm()) == pytest.approx(1)
    assert bool((pattern[side // 2 :] < 0).all())
    assert bool((pattern[: side // 2] > 0).all())


class Twin:
    """One image, written down from methods 5.4, with whole masks in place of windows."""

    def __init__(self, network: Network, x: Tensor, label: int, threat: ThreatModel, seed: int, queries: int) -> None:
        self.network, self.x, self.label, self.threat, self.queries = network, x, label, threat, queries
        self.draws = torch.Generator().manual_seed(seed)
        self.channels, self.height, self.width = x.shape

    def margin(self, point: Tensor) -> float:
        logits: list[float] = self.network.encode(point[None])[0].tolist()
        return logits[self.label] - max(z for i, z in enumerate(logits) if i != self.label)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.draws, dtype=torch.float64)

    def sign(self, number: Tensor) -> float:
        return -1.0 if float(number) < 0.5 else 1.0

    def tile(self, side: int, lies: Tensor) -> Tensor:
        return tile(side).T if float(lies) > 0.5 else tile(side)

    def allowed(self, point: Tensor) -> Tensor:
        return self.threat.project(point[None], self.x[None])[0]

    def share(self, query: int) -> float:
        share = 0.8
        for last in (10, 50, 200, 500):
            share = share / 2 if query > last else share
        return share

    def mask(self, down: Tensor, across: Tensor, side: int) -> Tensor:
        y, x = int(float(down) * (self.height - side)), int(float(across) * (self.width - side))
        mask = torch.zeros(self.height, self.width, dtype=torch.bool)
        mask[y : y + side, x : x + side] = True
        return mask

    def start(self) -> Tensor:
        delta = torch.zeros_like(self.x)
        if self.threat.norm == "linf":
            numbers = self.uniform(self.channels, 1, self.width)
            for c in range(self.channels):
                for column in range(self.width):
                    delta[c, :, column] = self.threat.eps * self.sign(numbers[c, 0, column])
            return self.allowed(self.x + delta)
        side = self.height // 5
        count = self.height // side
        margin, numbers = (self.height - count * side) // 2, self.uniform(count, count, 1 + self.channels)
        for i in range(count):
            for j in range(count):
                for c in range(self.channels):
                    y, x = margin + i * side, margin + j * side
                    pattern = self.sign(numbers[i, j, 1 + c]) * self.tile(side, numbers[i, j, 0])
                    delta[c, y : y + side, x : x + side] = pattern
        return self.allowed(self.x + self.threat.eps * delta / delta.norm())

    def linf_proposal(self, best: Tensor, share: float, numbers: Tensor) -> Tensor:
        side = max(round(math.sqrt(share) * self.height), 1)
        square = self.mask(numbers[0], numbers[1], side)
        delta = torch.zeros_like(self.x)
        for c in range(self.channels):
            delta[c, square] = 2 * self.threat.eps * self.sign(numbers[5 + c])
        return self.allowed(best + delta)

    def l2_proposal(self, best: Tensor, share: float, numbers: Tensor) -> Tensor:
        side = max(round(math.sqrt(share) * self.height), 3)
        side += side % 2 == 0
        gains, loses = self.mask(numbers[0], numbers[1], side), self.mask(numbers[2], numbers[3], side)
        delta = best - self.x
        free = max(self.threat.eps**2 - float(delta.norm()) ** 2, 0.0) / self.channels
        result = delta * ~loses
        for c in range(self.channels):
            old = delta[c, gains].view(side, side)
            new = self.sign(numbers[5 + c]) * self.tile(side, numbers[4]) + old / (1e-12 + old.norm())
            target = math.sqrt(free + float((delta[c] * (gains | loses)).norm()) ** 2)  # of this channel alone
            result[c, gains] = (new / (1e-12 + new.norm()) * target).flatten()
        return self.allowed(self.x + self.threat.eps * result / result.norm())

    def run(self) -> tuple[Tensor, bool, int]:
        """`(adversarial, fooled, proposals)`."""
        best = self.start()
        lowest = self.margin(best)
        if lowest < 0:
            return best, True, 0
        propose = self.linf_proposal if self.threat.norm == "linf" else self.l2_proposal
        for query in range(self.queries):
            if query % 64 == 0:
                numbers = self.uniform(64, 5 + self.channels)
            proposed = propose(best, self.share(query), numbers[query % 64])
            margin = self.margin(proposed)
            if margin < 0:
                return proposed, True, query + 1
            if margin < lowest:
                best, lowest = proposed, margin
        return best, False, self.queries


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.02), ("l2", 0.2)])
def test_it_does_to_a_batch_what_a_naive_twin_does_to_each_image(norm: Norm, eps: float) -> None:
    network, pixels, threat, queries = Network(), images(3, 12), ThreatModel(norm, eps), 300
    labels = network.labels(pixels)
    found = Square(queries=queries).attack(
        network, Margin(None, labels), ArgmaxWrong(None, labels), pixels, threat, generator=generator(5)
    )
    seeds = torch.randint(2**62, (12,), generator=generator(5)).tolist()
    for i in range(12):
        adversarial, fooled, proposals = Twin(network, pixels[i], int(labels[i]), threat, seeds[i], queries).run()
        assert (bool(found.fooled[i]), int(found.updates[i])) == (fooled, proposals)
        torch.testing.assert_close(found.adversarial[i], adversarial, atol=1e-9, rtol=0)
    assert 0 < int(found.fooled.sum()) < 12
    assert len(found.updates.unique()) > 2


def test_linf_points_are_corners_of_ball_and_box() -> None:
    network, pixels, threat = Network(), images(1), ThreatModel("linf", 0.3)
    labels = network.labels(pixels)
    found = Square(queries=30).attack(network, Margin(None, labels), None, pixels, threat, generator=generator())
    lower, upper = (pixels - 0.3).clamp(0, 1), (pixels + 0.3).clamp(0, 1)
    at_a_side = torch.minimum((found.adversarial - lower).abs(), (found.adversarial - upper).abs())
    torch.testing.assert_close(at_a_side, torch.zeros_like(pixels), atol=1e-12, rtol=0)


def test_l2_points_lie_on_the_sphere() -> None:
    network, pixels, threat = Network(), 0.4 + 0.2 * images(1), ThreatModel("l2", 0.3)
    labels = network.labels(pixels)
    found = Square(queries=30).attack(network, Margin(None, labels), None, pixels, threat, generator=generator())
    torch.testing.assert_close(threat.distance(found.adversarial, pixels), torch.full((6,), 0.3, dtype=torch.float64))


def test_it_asks_for_no_gradient_and_counts_its_queries() -> None:
    network, pixels = Network(), images(1)
    labels = network.labels(pixels)
    found = Square(queries=70, restarts=2).attack(
        network, Margin(None, labels), None, pixels, ThreatModel("linf", 0.05), generator=generator()
    )
    assert network.with_gradient == [False] * 142
    assert found.updates.tolist() == [140] * 6


def test_images_may_be_longer_than_wide() -> None:
    class Mean:
        def encode(self, pixels: Tensor) -> Tensor:
            return torch.stack([pixels.mean(dim=(1, 2, 3)), pixels[:, 0].mean(dim=(1, 2))], dim=1)

    pixels = torch.rand(2, 3, 7, 19, generator=generator(), dtype=torch.float64)
    for threat in (ThreatModel("linf", 0.1), ThreatModel("l2", 0.5)):
        labels = torch.zeros(2, dtype=torch.int64)
        found = Square(queries=20).attack(Mean(), Margin(None, labels), None, pixels, threat, generator=generator())
        assert bool(threat.contains(found.adversarial, pixels).all())


def test_l2_refuses_images_without_room_for_its_tiles() -> None:
    pixels = torch.rand(2, 3, 4, 8)
    objective = Margin(None, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(PlanError, match="at least 5 x 5 pixels, got 4x8"):
        Square().attack(Network(), objective, None, pixels, ThreatModel("l2", 1.0), generator=generator())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"queries": 0}, "Square's queries must be at least 1, got 0"),
        ({"restarts": 0}, "Square's restarts must be at least 1, got 0"),
        ({"p_init": 0.0}, r"Square's p_init must be in \(0, 1\], got 0.0"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Square(**values)
