"""The adaptive attacker: its model of the defence is the defence, and its gradients lead past it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from offline.attacks.adaptive import Adaptive, Around, Knowledge, Through, UnderAll, Way, expected, unstable
from offline.attacks.apgd import Apgd
from offline.attacks.search import Problem, SearchAttack, nothing_found
from offline.attacks.targeted import Targetable, Targeted
from offline.criteria import ArgmaxWrong
from offline.objectives import CrossEntropy, Dlr, Margin
from offline.threat import ThreatModel
from perception.counterattack import CounterattackSettings, counterattack
from perception.encoder import Precision, unit_embeddings
from perception.preprocess import PreprocessSpec

DIM, CLASSES, SIZE_PX = 12, 5, 8
THREAT = ThreatModel("linf", 8 / 255)


class Network:
    """Two smooth layers: curved enough for a counterattack to undo what was done without it in mind."""

    def __init__(self, seed: int = 0) -> None:
        made = torch.Generator().manual_seed(seed)
        self.first = torch.randn(3 * SIZE_PX**2, 48, generator=made) / 3
        self.second = torch.randn(48, DIM, generator=made)
        self.name, self.dim, self.fingerprint = "network", DIM, str(seed)
        self.precision: Precision = "fp32"
        self.preprocess = PreprocessSpec(size_px=SIZE_PX, resize_px=SIZE_PX)

    def features(self, pixels: Tensor) -> Tensor:
        return torch.sin((pixels.flatten(1) - 0.5) @ self.first.to(pixels)) @ self.second.to(pixels)

    def encode(self, pixels: Tensor) -> Tensor:
        return unit_embeddings(self.features(pixels))


NETWORK = Network()
TEXTS = unit_embeddings(torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(3)))
SETTINGS = CounterattackSettings(eps=8 / 255, step_size=4 / 255, threshold=0.35)
KNOWS = Knowledge(NETWORK, SETTINGS, None, DIM)


def images(count: int = 24, seed: int = 1) -> Tensor:
    return torch.rand(count, 3, SIZE_PX, SIZE_PX, generator=torch.Generator().manual_seed(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def labels(pixels: Tensor) -> Tensor:
    return (NETWORK.encode(pixels) @ TEXTS.T).argmax(dim=1)


def first(view: Around | Through, x: Tensor, noise: Tensor) -> Tensor:
    """What a view shows under one draw."""
    [seen] = view.looks(x, [noise])
    return seen


# --- the attacker's model of the defence -----------------------------------------------------------------------------


@pytest.mark.parametrize("original", [None, Network(7)])
@pytest.mark.parametrize("threshold", [0.0, 0.35, 1e9])
def test_what_is_seen_is_what_the_defence_does(original: Network | None, threshold: float) -> None:
    knows = replace(KNOWS, original=original, settings=replace(SETTINGS, threshold=threshold))
    x = images()
    noise = knows.noise(x, generator())
    assert noise.abs().max() <= SETTINGS.eps
    found = counterattack(NETWORK, x, noise, knows.settings, original).pixels
    view = Through(knows, 1, generator())
    expected_ = NETWORK.encode(found)
    torch.testing.assert_close(first(view, x, noise), expected_, rtol=0, atol=1e-5)
    with_gradient = first(view, x.clone().requires_grad_(), noise)
    assert with_gradient.requires_grad
    torch.testing.assert_close(with_gradient.detach(), expected_, rtol=0, atol=1e-4)


def test_around_shows_noise_and_tau() -> None:
    x, noise = images(), KNOWS.noise(images(), generator())
    seen = first(Around(KNOWS, 1, generator()), x, noise)
    torch.testing.assert_close(seen[:, :DIM], NETWORK.encode((x + noise).clamp(0, 1)))
    tau = counterattack(NETWORK, x, noise, SETTINGS).tau
    torch.testing.assert_close(seen[:, DIM], tau, rtol=1e-4, atol=1e-5)
    original = Network(7)
    seen = first(Around(replace(KNOWS, original=original), 1, generator()), x, noise)
    torch.testing.assert_close(
        seen[:, DIM], counterattack(NETWORK, x, noise, SETTINGS, original).tau, rtol=1e-4, atol=1e-5
    )


def test_gradients_through_a_step_are_of_second_order() -> None:
    """Against a twin of one step with the sign written as what its derivative is taken from."""
    settings = CounterattackSettings(eps=1.0, steps=1, step_size=0.02, beta=0.0, threshold=1e9)
    x, noise = (
        0.25 + 0.5 * images(3).double(),
        0.01 * torch.randn(3, 3, SIZE_PX, SIZE_PX, generator=generator()).double(),
    )
    target = torch.randn(DIM, generator=generator(5)).double()
    at = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(
        (first(Through(replace(KNOWS, settings=settings), 1, generator()), at, noise) @ target.float()).sum(), at
    )

    def smooth(flat: Tensor) -> Tensor:
        image = flat.view(1, 3, SIZE_PX, SIZE_PX)
        moved = (image + noise[:1]).requires_grad_()
        distance = (NETWORK.features(moved) - NETWORK.features(image)).square().sum()
        (gradient,) = torch.autograd.grad(distance, moved, create_graph=True)
        scale = gradient.detach().abs().mean()
        tanh = torch.tanh(gradient / scale)
        step = gradient.detach().sign() + tanh - tanh.detach()
        mean = 0.5 * noise[:1] + 0.5 * (noise[:1] + settings.step_size * step)
        return (NETWORK.encode(image + mean).double() @ target).sum()

    flat = x[0].flatten().clone().requires_grad_()
    (twin,) = torch.autograd.grad(smooth(flat), flat)
    torch.testing.assert_close(found[0].flatten(), twin, rtol=1e-3, atol=1e-6)


def test_draws_are_new_at_each_look_unless_they_are_fixed() -> None:
    x = images(2)
    fresh = Through(KNOWS, 3, generator())
    first, second = fresh.encode(x), fresh.encode(x)
    assert first.shape == (2, 3 * DIM)
    assert not torch.equal(first, second)
    assert not torch.equal(first[:, :DIM], first[:, DIM : 2 * DIM])
    fixed = Through(KNOWS, 3, generator(), fixed=4)
    torch.testing.assert_close(fixed.encode(x)[:1], fixed.encode(x[:1]))


# --- objectives ------------------------------------------------------------------------------------------------------


def test_objectives_are_means_over_draws_and_criteria_hold_under_all() -> None:
    draws = [NETWORK.encode(images(6, seed)) for seed in range(3)]
    inner = Margin(TEXTS, torch.arange(6) % CLASSES)
    values = torch.stack([inner(draw) for draw in draws])
    together = torch.cat(draws, dim=1)
    torch.testing.assert_close(expected(inner, DIM)(together), values.mean(dim=0))
    torch.testing.assert_close(expected(inner, DIM)(draws[0]), values[0])
    rows = torch.tensor([4, 1])
    torch.testing.assert_close(expected(inner, DIM).rows(rows)(together[rows]), values.mean(dim=0)[rows])
    wrong = ArgmaxWrong(TEXTS, torch.arange(6) % CLASSES)
    everywhere = torch.stack([wrong(draw) for draw in draws]).all(dim=0)
    assert UnderAll(wrong, DIM)(together).tolist() == everywhere.tolist()
    assert UnderAll(wrong, DIM).rows(rows)(together[rows]).tolist() == everywhere[rows].tolist()


def test_only_a_tau_below_the_threshold_costs() -> None:
    draw = NETWORK.encode(images(2))
    inner = Margin(TEXTS, torch.zeros(2, dtype=torch.int64))
    asked = unstable(inner, DIM, 0.2)
    high, low = (asked(torch.cat([draw, torch.full((2, 1), tau)], dim=1)) for tau in (0.9, 0.1))
    torch.testing.assert_close(high, inner(draw))
    torch.testing.assert_close(high - low, torch.full((2,), 5.0 * 100 * 0.13))


def test_targets_are_there_where_the_objective_has_them() -> None:
    y = torch.arange(6) % CLASSES
    assert not isinstance(expected(CrossEntropy(TEXTS, y), DIM), Targetable)
    assert not isinstance(unstable(CrossEntropy(TEXTS, y), DIM, 0.2), Targetable)
    draws = torch.cat([NETWORK.encode(images(6, seed)) for seed in range(2)], dim=1)
    found = expected(Dlr(TEXTS, y), DIM)
    assert isinstance(found, Targetable)
    chosen = found.runners_up(draws, 2)
    assert chosen.tolist() == Dlr(TEXTS, y).runners_up((draws[:, :DIM] + draws[:, DIM:]) / 2, 2).tolist()
    torch.testing.assert_close(
        found.toward(chosen[:, 0])(draws[:, :DIM]), Dlr(TEXTS, y).toward(chosen[:, 0])(draws[:, :DIM])
    )
    with_tau = torch.cat([draws[:, :DIM], torch.ones(6, 1)], dim=1)
    around = unstable(Dlr(TEXTS, y), DIM, 0.2)
    assert isinstance(around, Targetable)
    assert around.runners_up(with_tau, 2).tolist() == Dlr(TEXTS, y).runners_up(draws[:, :DIM], 2).tolist()


# --- the attack ------------------------------------------------------------------------------------------------------


def standing(ways: tuple[Way, ...], knows: Knowledge, *, targeted: bool = False) -> tuple[float, Tensor]:
    """How many images the defence is expected to answer as when clean, over many draws of its noise; and the images."""
    x = images(40)
    y = labels(x)
    attack: SearchAttack = Targeted(Apgd(10), targets=2) if targeted else Apgd(10)
    objective = Dlr(TEXTS, y) if targeted else Margin(TEXTS, y)
    found = nothing_found(x)
    problem = Problem(NETWORK, objective, ArgmaxWrong(TEXTS, y), THREAT)
    Adaptive(attack, knows, 2, ways).go_on(problem, x, found, generator())
    THREAT.require(found.adversarial, x, "adaptive")
    assert (found.updates > 0).all()
    view, left = Through(knows, 1, generator(77)), 0.0
    with torch.no_grad():
        for _ in range(40):
            left += float(((view.encode(found.adversarial) @ TEXTS.T).argmax(dim=1) == y).sum()) / 40
    return left, found.adversarial


@pytest.mark.parametrize("threshold", [0.5, 1e9])
def test_the_best_of_all_ways_is_kept(threshold: float) -> None:
    knows = replace(KNOWS, settings=replace(SETTINGS, threshold=threshold))
    ways: tuple[Way, ...] = ("transfer", "around", "through")
    alone = [standing((way,), knows)[0] for way in ways]
    assert standing(ways, knows)[0] <= min(alone) + 0.5
    assert standing(ways, knows, targeted=True)[0] < 40 / 4


def test_around_makes_images_unstable() -> None:

    def taus(x: Tensor) -> Tensor:
        return torch.stack(
            [counterattack(NETWORK, x, KNOWS.noise(x, generator(i)), SETTINGS).tau for i in range(5)]
        ).flatten()

    threshold = float(taus(images(40)).median())
    _, found = standing(("around",), replace(KNOWS, settings=replace(SETTINGS, threshold=threshold)))
    assert float((taus(found) < threshold).float().mean()) < 0.25


def test_a_run_can_be_repeated_and_says_what_it_did() -> None:
    x, y = images(), labels(images())
    problem = Problem(NETWORK, Margin(TEXTS, y), ArgmaxWrong(TEXTS, y), THREAT)
    results = []
    for _ in range(2):
        found = nothing_found(x)
        Adaptive(Apgd(4), KNOWS, 2).go_on(problem, x, found, generator(9))
        results.append(found)
    for name in ("adversarial", "fooled", "objective", "updates"):
        assert torch.equal(getattr(results[0], name), getattr(results[1], name))
    fooled = results[0].fooled
    assert set(results[0].updates[~fooled].tolist()) <= {12}
    assert set(results[0].updates.tolist()) <= {4, 8, 12}
    assert (results[0].objective[fooled] > 0).all()


def test_without_a_goal_the_higher_mean_is_kept() -> None:
    x, y = images(8), labels(images(8))
    found = nothing_found(x)
    Adaptive(Apgd(4), KNOWS, 2).go_on(Problem(NETWORK, Margin(TEXTS, y), None, THREAT), x, found, generator())
    assert not found.fooled.any()
    assert torch.isfinite(found.objective).all()
    alone = nothing_found(x)
    Adaptive(Apgd(4), KNOWS, 2, ("around",)).go_on(
        Problem(NETWORK, Margin(TEXTS, y), None, THREAT), x, alone, generator()
    )
    assert found.objective.mean() > alone.objective.mean()
