"""APGD: the published trajectory, optima of linear objectives, and a naive twin that attacks one image at a time."""

from dataclasses import dataclass
from typing import Self

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offline.attacks.apgd import LARGER_EPS, LARGER_EPS_L1, Apgd, Stages, _Search, checkpoints
from offline.attacks.search import Start
from offline.errors import PlanError
from offline.objectives import EmbeddingShift
from offline.threat import Norm, ThreatModel
from perception.encoder import unit_embeddings
from perception.errors import NonFiniteEmbedding

NORMS: tuple[Norm, ...] = ("linf", "l2")


class Identity:
    """Pixels are the embedding."""

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels.flatten(1)


class Curved:
    """A seeded two-layer network in float64, so that twins differ by nothing that matters."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.first = torch.randn(48, 24, generator=generator, dtype=torch.float64)
        self.second = torch.randn(24, 6, generator=generator, dtype=torch.float64)
        self.images_seen = 0

    def encode(self, pixels: Tensor) -> Tensor:
        self.images_seen += len(pixels)
        features = ((pixels.flatten(1) - 0.5) @ self.first).tanh() @ self.second
        unit: Tensor = torch.nn.functional.normalize(features, dim=1)
        return unit


@dataclass(frozen=True)
class Bowl:
    """The objective of the published trajectory, with its optimum at (.53, .47)."""

    offset: float = 0.0
    needs_random_start: bool = False

    def __call__(self, embeddings: Tensor) -> Tensor:
        x, y = embeddings.unbind(1)
        return self.offset - (4 * (x - 0.53) ** 2 + (y - 0.47) ** 2)

    def rows(self, index: Tensor) -> Self:
        return self


@dataclass(frozen=True)
class Linear:
    """`<w, embedding>` with a vector for each image."""

    weights: Tensor
    needs_random_start: bool = False

    def __call__(self, embeddings: Tensor) -> Tensor:
        return (embeddings * self.weights).sum(dim=1)

    def rows(self, index: Tensor) -> Self:
        return type(self)(self.weights[index])


@dataclass(frozen=True)
class Beyond:
    """Fooled where the squared shift exceeds a limit, one for each image."""

    clean: Tensor
    limits: Tensor

    def __call__(self, embeddings: Tensor) -> Tensor:
        return (embeddings - self.clean).square().sum(dim=1) > self.limits

    def rows(self, index: Tensor) -> Self:
        return type(self)(self.clean[index], self.limits[index])


@dataclass(frozen=True)
class Above:
    """Fooled where the first value exceeds a limit, one for each image."""

    limits: Tensor

    def __call__(self, embeddings: Tensor) -> Tensor:
        return embeddings[:, 0] > self.limits

    def rows(self, index: Tensor) -> Self:
        return type(self)(self.limits[index])


def images(seed: int, count: int = 6) -> Tensor:
    return torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (100, [22, 41, 57, 70, 80, 87, 93, 99]),
        (200, [44, 82, 114, 140, 160, 174, 186, 198]),
        (50, [11, 21, 30, 38, 45]),
        (500, [110, 205, 285, 350, 400, 435, 465, 495]),
        (20, [4, 7, *range(9, 21)]),
        (10, [*range(2, 11)]),
        (1, [1]),
    ],
)
def test_checkpoints_are_the_published_ones(steps: int, expected: list[int]) -> None:
    assert [done for done, _ in checkpoints(steps)] == expected


def test_thresholds_of_a_hundred_steps() -> None:
    assert [0.75 * period for _, period in checkpoints(100)] == [16.5, 14.25, 12, 9.75, 7.5, 5.25, 4.5, 4.5]


# (rises, reduced, step size after) of the first four checkpoints of methods 5.1's toy.
PUBLISHED_CHECKS = [(2, True, 0.1), (2, True, 0.05), (2, False, 0.05), (0, True, 0.025)]


@pytest.mark.parametrize(
    ("offset", "parity", "first_rises"), [(0.0, False, 2), (0.0, True, 2), (10.0, False, 2), (10.0, True, 3)]
)
def test_the_published_trajectory(
    offset: float, parity: bool, first_rises: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = _Search.check

    def watched(self: _Search, enough_rises: float) -> None:
        rises = int(self.rises)
        original(self, enough_rises)
        seen.append((rises, bool(self.was_reduced), float(self.step_size)))

    monkeypatch.setattr(_Search, "check", watched)
    pixels = torch.full((1, 2, 1, 1), 0.5, dtype=torch.float64)
    attack = Apgd(steps=20, start="clean", parity=parity)
    found = attack.attack(Identity(), Bowl(offset), None, pixels, ThreatModel("linf", 0.1), generator=generator())
    assert found.adversarial.flatten().tolist() == pytest.approx([0.52958984, 0.47041016], abs=5e-9)
    assert found.objective.item() - offset == pytest.approx(-8.4114e-7, rel=1e-4)
    assert found.updates.tolist() == [20]
    assert seen[0] == (first_rises, True, 0.1)
    assert seen[1:4] == PUBLISHED_CHECKS[1:]
    assert seen[-1][2] == 0.00078125


@pytest.mark.parametrize(("pixels", "eps"), [(0.3 + 0.4 * images(0), 0.1), (images(0), 0.2)], ids=["ball", "box too"])
def test_linf_reaches_the_corner_of_a_linear_objective(pixels: Tensor, eps: float) -> None:
    weights = torch.randn(6, 48, generator=generator(1), dtype=torch.float64)
    found = Apgd(steps=20).attack(
        Identity(), Linear(weights), None, pixels, ThreatModel("linf", eps), generator=generator()
    )
    corner = (pixels + eps * weights.sign().view_as(pixels)).clamp(0, 1)
    torch.testing.assert_close(found.adversarial, corner, atol=1e-12, rtol=0)


def test_l2_reaches_the_boundary_along_the_gradient() -> None:
    pixels = 0.4 + 0.2 * images(0)
    weights = torch.randn(6, 48, generator=generator(1), dtype=torch.float64)
    found = Apgd(steps=100).attack(
        Identity(), Linear(weights), None, pixels, ThreatModel("l2", 0.3), generator=generator()
    )
    best = (weights * pixels.flatten(1)).sum(1) + 0.3 * weights.norm(dim=1)
    torch.testing.assert_close(found.objective, best, rtol=1e-6, atol=0)
    distances = (found.adversarial - pixels).flatten(1).norm(dim=1)
    torch.testing.assert_close(distances, torch.full_like(distances, 0.3))


@given(
    norm=st.sampled_from(NORMS),
    start=st.sampled_from(["boundary", "uniform"]),
    eps=st.floats(0, 3),
    steps=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40)
def test_it_never_leaves_ball_and_box(norm: Norm, start: Start, eps: float, steps: int, seed: int) -> None:
    pixels, encoder, threat = images(seed, 2), Curved(), ThreatModel(norm, eps)
    found = Apgd(steps=steps, start=start).attack(
        encoder, EmbeddingShift(encoder.encode(pixels)), None, pixels, threat, generator=generator(seed)
    )
    assert bool(threat.contains(found.adversarial, pixels).all())
    reached = EmbeddingShift(encoder.encode(pixels))(encoder.encode(found.adversarial))
    torch.testing.assert_close(reached, found.objective)


def naive_apgd(
    encoder: Curved, clean: Tensor, limit: float, x: Tensor, start: Tensor, threat: ThreatModel, steps: int
) -> tuple[Tensor, bool, int]:
    """One image, written down from methods 5.1 with whole histories: (adversarial, fooled, updates)."""

    def look(point: Tensor) -> tuple[float, Tensor, bool]:
        point = point.clone().requires_grad_(True)
        embedding = encoder.encode(point)
        shift = (embedding - clean).square().sum()
        (gradient,) = torch.autograd.grad(shift, point)
        value = float(shift.detach())
        return value, gradient, value > limit

    def direction(g: Tensor) -> Tensor:
        return g.sign() if threat.norm == "linf" else g / (g.norm() + 1e-12)

    point, before, eta = start, start, 2 * threat.eps
    value, gradient, fooled = look(point)
    if fooled:
        return point, True, 0
    history, bests = [value], [value]
    best, best_gradient = point, gradient
    reduced, last_check = True, 0
    checks = [done for done, _ in checkpoints(steps)]
    for i in range(steps):
        ahead = threat.project(point + eta * direction(gradient), x)
        a = 1.0 if i == 0 else 0.75
        new = threat.project(point + a * (ahead - point) + (1 - a) * (point - before), x)
        before, point = point, new
        value, gradient, fooled = look(point)
        if fooled:
            return point, True, i + 1
        if value > bests[-1]:
            best, best_gradient = point, gradient
        history.append(value)
        bests.append(max(bests[-1], value))
        if i + 1 in checks:
            rises = sum(history[j + 1] > history[j] for j in range(last_check, i + 1))
            stalled = rises <= 0.75 * (i + 1 - last_check)
            stalled = stalled or (not reduced and bests[-1] == bests[last_check])
            if stalled:
                eta, point, gradient = eta / 2, best, best_gradient
            reduced, last_check = stalled, i + 1
    return best, False, steps


@pytest.mark.parametrize("norm", NORMS)
def test_it_does_to_a_batch_what_a_naive_twin_does_to_each_image(norm: Norm) -> None:
    pixels, encoder, threat, steps = images(3, 8), Curved(), ThreatModel(norm, 0.03 if norm == "linf" else 0.15), 30
    clean = encoder.encode(pixels)
    attack, shift = Apgd(steps=steps), EmbeddingShift(clean)
    best = attack.attack(encoder, shift, None, pixels, threat, generator=generator(5)).objective
    limits = best * torch.tensor([0.0, 0.3, 0.6, 0.9, 0.98, 0.999, 1.5, 1.5])
    found = attack.attack(encoder, shift, Beyond(clean, limits), pixels, threat, generator=generator(5))
    starts = threat.boundary_start(pixels, generator(5))
    for i in range(8):
        one = slice(i, i + 1)
        adversarial, fooled, updates = naive_apgd(
            encoder, clean[one], float(limits[i]), pixels[one], starts[one], threat, steps
        )
        assert (bool(found.fooled[i]), int(found.updates[i])) == (fooled, updates)
        torch.testing.assert_close(found.adversarial[one], adversarial, atol=1e-9, rtol=0)
    assert found.updates[0] == 0  # fooled by the start
    assert found.fooled.tolist() == [True] * 6 + [False] * 2
    assert len(found.updates.unique()) > 3


def test_fooled_images_leave_the_batch() -> None:
    pixels, encoder = images(0), Curved()
    everybody = Above(torch.full((6,), -2.0))
    shift = EmbeddingShift(encoder.encode(pixels))
    encoder.images_seen = 0
    found = Apgd(steps=50).attack(encoder, shift, everybody, pixels, ThreatModel("linf", 0.1), generator=generator())
    assert encoder.images_seen == 6
    assert found.updates.tolist() == [0] * 6


def test_restarts_go_on_with_survivors_and_keep_the_best() -> None:
    pixels, encoder, threat = images(1), Curved(), ThreatModel("linf", 0.05)
    clean = encoder.encode(pixels)
    criterion = Above(torch.tensor([-2.0, -2, 2, 2, 2, 2]))
    runs = [
        Apgd(steps=8, restarts=n).attack(
            encoder, EmbeddingShift(clean), criterion, pixels, threat, generator=generator(2)
        )
        for n in (1, 3)
    ]
    assert runs[0].updates.tolist() == [0, 0, 8, 8, 8, 8]
    assert runs[1].updates.tolist() == [0, 0, 24, 24, 24, 24]
    assert bool((runs[1].objective >= runs[0].objective).all())
    assert torch.equal(runs[1].adversarial[:2], runs[0].adversarial[:2])
    torch.testing.assert_close(EmbeddingShift(clean)(encoder.encode(runs[1].adversarial))[2:], runs[1].objective[2:])


def test_the_generator_decides_alone() -> None:
    pixels, encoder, threat = images(1), Curved(), ThreatModel("l2", 0.5)
    shift = EmbeddingShift(encoder.encode(pixels))
    first, second, other = (
        Apgd(steps=3).attack(encoder, shift, None, pixels, threat, generator=generator(seed)).adversarial
        for seed in (4, 4, 5)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("stages", "factors"), [(LARGER_EPS, (2, 1.5, 1)), (LARGER_EPS_L1, (3, 2, 1))])
def test_larger_radii_come_first(norm: Norm, stages: Stages, factors: tuple[float, ...]) -> None:
    """30, 30 and 40 % of the steps, each from the projected best point of the stage before."""
    pixels, encoder, eps = images(3), Curved(), 0.03 if norm == "linf" else 0.15
    clean = encoder.encode(pixels)
    encoder.images_seen = 0
    found = Apgd(steps=20, stages=stages).attack(
        encoder, EmbeddingShift(clean), None, pixels, ThreatModel(norm, eps), generator=generator(5)
    )
    assert encoder.images_seen == 6 * (20 + 3)
    assert found.updates.tolist() == [20] * 6
    starts = ThreatModel(norm, eps * factors[0]).boundary_start(pixels, generator(5))
    for i in range(6):
        one = slice(i, i + 1)
        point = starts[one]
        for factor, steps in zip(factors, (6, 6, 8), strict=True):
            threat = ThreatModel(norm, eps * factor)
            point = threat.project(point, pixels[one])
            point, _, _ = naive_apgd(encoder, clean[one], torch.inf, pixels[one], point, threat, steps)
        torch.testing.assert_close(found.adversarial[one], point, atol=1e-9, rtol=0)


def test_nobody_is_fooled_beyond_the_threat_model() -> None:
    pixels, encoder, threat = 0.4 + 0.2 * images(0), Identity(), ThreatModel("linf", 0.1)
    weights = torch.ones(6, 48, dtype=torch.float64)
    reachable = torch.tensor([True, False] * 3)
    limits = pixels[:, 0, 0, 0] + torch.where(reachable, 0.095, 0.105)  # both are reached at twice the radius
    found = Apgd(steps=20, stages=LARGER_EPS).attack(
        encoder, Linear(weights), Above(limits), pixels, threat, generator=generator()
    )
    assert torch.equal(found.fooled, reachable)
    assert bool(threat.contains(found.adversarial, pixels).all())
    assert bool((found.updates >= 12).all())


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((), "factors that fall to 1"),
        (((2.0, 0.5), (1.5, 0.5)), "factors that fall to 1"),
        (((1.0, 0.5), (2.0, 0.2), (1.0, 0.3)), "factors that fall to 1"),
        (((2.0, 0.5), (1.0, 0.4)), "shares that sum to 1"),
        (((2.0, 1.0), (1.0, 0.0)), "positive shares"),
        (((2.0, 0.95), (1.0, 0.05)), "10 steps are too few for its stages"),
    ],
)
def test_impossible_stages_are_refused(stages: Stages, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Apgd(steps=10, stages=stages)


def test_a_start_without_gradient_is_refused() -> None:
    shift = EmbeddingShift(Curved().encode(images(0)))
    with pytest.raises(PlanError, match="EmbeddingShift has no gradient at the clean image"):
        Apgd(start="clean").attack(Curved(), shift, None, images(0), ThreatModel("linf", 0.1), generator=generator())


def test_no_steps_are_refused() -> None:
    with pytest.raises(PlanError, match="steps must be at least 1, got 0"):
        Apgd(steps=0)
    with pytest.raises(PlanError, match="restarts must be at least 1, got 0"):
        Apgd(restarts=0)


def test_an_unknown_start_is_refused() -> None:
    with pytest.raises(PlanError, match="start must be one of boundary, uniform, clean, got 'corner'"):
        Apgd(start="corner")  # type: ignore[arg-type]


@pytest.mark.parametrize("encoder_raises", [False, True])
def test_nan_is_an_error_that_names_the_images(encoder_raises: bool) -> None:
    class Broken(Identity):
        def encode(self, pixels: Tensor) -> Tensor:
            bright = pixels.mean(dim=(1, 2, 3), keepdim=True) > 0.85
            features = super().encode(torch.where(bright, torch.nan, pixels))
            if encoder_raises:
                unit_embeddings(features)
            return features

    pixels = torch.full((3, 3, 4, 4), 0.5, dtype=torch.float64)
    pixels[2] = 0.84
    limits = Above(torch.tensor([-2.0, 2.0, 2.0]))
    weights = torch.ones(3, 48, dtype=torch.float64)
    # The first image leaves at the start; the third breaks at the first step, and is still called the third.
    with pytest.raises(NonFiniteEmbedding) as caught:
        Apgd(steps=5).attack(
            Broken(), Linear(weights), limits, pixels, ThreatModel("linf", 0.05), generator=generator()
        )
    assert caught.value.rows == (2,)
