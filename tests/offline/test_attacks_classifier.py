"""The attacks on a small trained network, against AutoAttack's loops written down one image at a time."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from offline.attacks import classifier
from offline.attacks.apgd import Apgd, checkpoints
from offline.attacks.base import AttackResult
from offline.attacks.classifier import AttackName, attack_classifier, robust_accuracy
from offline.errors import PlanError, RunError
from offline.threat import Norm, ThreatModel
from perception.errors import NonFiniteEmbedding
from tests.offline.attack_toys import generator, gradient_of

COUNT, CLASSES, SIDE = 80, 6, 8
RADII: dict[Norm, float] = {"linf": 0.03, "l2": 0.3}
ATTACKS: tuple[AttackName, ...] = ("apgd-ce", "apgd-dlr", "apgd-t", "square", "pgd")
Loss = Callable[[Tensor], Tensor]


def synthetic(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Noisy copies of one pattern a class."""
    patterns = torch.rand(CLASSES, 3, SIDE, SIDE, generator=generator(99), dtype=torch.float64)
    labels = torch.arange(count) % CLASSES
    noise = torch.rand(count, 3, SIDE, SIDE, generator=generator(seed), dtype=torch.float64)
    return 0.15 * patterns[labels] + 0.85 * noise, labels


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A convolutional network in float64 after a few steps of training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.GELU(), nn.Flatten(), nn.Linear(128, CLASSES)
        ).double()
    optimizer = torch.optim.Adam(made.parameters(), lr=0.01)
    pixels, labels = synthetic(1, 600)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(made(pixels), labels).backward()
        optimizer.step()
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    return synthetic(2, COUNT)


# --- AutoAttack's loops, for one image -------------------------------------------------------------------------------


def reference_apgd(
    network: nn.Module, loss: Loss, x: Tensor, y: int, start: Tensor, norm: Norm, eps: float, steps: int
) -> bool:
    """APGD as AutoAttack's code has it, with its list of losses and the first check's wrap-around: is it fooled?"""
    period, shortest, shorter_by = max(int(0.22 * steps), 1), max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)

    def project(point: Tensor) -> Tensor:
        if norm == "linf":
            return torch.min(torch.max(point, x - eps), x + eps).clamp(0, 1)
        delta = point - x
        onto: Tensor = delta / (delta.norm() + 1e-12) * min(eps, float(delta.norm()))
        return (x + onto).clamp(0, 1)

    def direction(gradient: Tensor) -> Tensor:
        unit: Tensor = gradient.sign() if norm == "linf" else gradient / (gradient.norm() + 1e-12)
        return unit

    point = before = best = start
    value, gradient = gradient_of(lambda at: loss(network(at)), point)
    fooled = int(network(point).argmax()) != y
    best_value = at_last_check = float(value)
    best_gradient, eta, reduced, since = gradient, 2 * eps, True, 0
    losses = [0.0] * steps
    for i in range(steps):
        moved = project(point + eta * direction(gradient))
        a = 0.75 if i > 0 else 1.0
        moved = project(point + (moved - point) * a + (point - before) * (1 - a))
        before, point = point, moved
        value, gradient = gradient_of(lambda at: loss(network(at)), point)
        fooled |= int(network(point).argmax()) != y
        losses[i] = float(value)
        if float(value) > best_value:
            best, best_value, best_gradient = point, float(value), gradient
        since += 1
        if since == period:
            rises = sum(losses[i - j] > losses[i - j - 1] for j in range(period))  # losses[-1] is 0 at first
            stalled = rises <= 0.75 * period or (not reduced and at_last_check >= best_value)
            reduced, at_last_check = stalled, best_value
            if stalled:
                eta, point, gradient = eta / 2, best, best_gradient
            since, period = 0, max(period - shorter_by, shortest)
    return fooled


def reference_starts(pixels: Tensor, norm: Norm, eps: float, draws: torch.Generator) -> Tensor:
    if norm == "linf":
        noise = 2 * torch.rand(pixels.shape, generator=draws, dtype=pixels.dtype) - 1
        largest = torch.stack([row.abs().max() for row in noise])
    else:
        noise = torch.randn(pixels.shape, generator=draws, dtype=pixels.dtype)
        largest = torch.stack([row.square().sum().sqrt() for row in noise])
    return (pixels + eps * noise / (largest.view(-1, 1, 1, 1) + 1e-12)).clamp(0, 1)


def dlr(logits: Tensor, y: int, target: int | None = None) -> Tensor:
    z, ordered = logits[0], logits[0].sort(descending=True).values
    if target is None:
        other = ordered[1] if int(z.argmax()) == y else ordered[0]
        return -(z[y] - other) / (ordered[0] - ordered[2] + 1e-12)
    return -(z[y] - z[target]) / (ordered[0] - 0.5 * (ordered[2] + ordered[3]) + 1e-12)


def reference_losses(name: AttackName, network: nn.Module, x: Tensor, y: int) -> Iterator[Loss]:
    """One loss for each run of an attack."""
    if name == "apgd-ce":
        yield lambda z: nn.functional.cross_entropy(z, torch.tensor([y]))
    elif name == "apgd-dlr":
        yield lambda z: dlr(z, y)
    else:
        for place in range(2, 11):
            if place <= CLASSES:
                target = int(network(x)[0].sort().indices[-place])
                yield lambda z, t=target: dlr(z, y, t)  # type: ignore[misc]


def seed_of(seed: int, batch: int) -> int:
    return int(np.random.SeedSequence((seed, batch)).generate_state(1)[0])


@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "apgd-t"])
def test_apgd_fools_exactly_whom_autoattack_fools(
    name: AttackName, norm: Norm, network: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    pixels, labels = (part[:40] for part in data)
    steps, eps, seed = 10, RADII[norm], 7
    found = attack_classifier(
        network, pixels, labels, ThreatModel(norm, eps), attack=name, steps=steps, seed=seed, parity=True
    )
    draws = torch.Generator().manual_seed(seed_of(seed, 0))
    starts = [reference_starts(pixels, norm, eps, draws) for _ in range(5)]
    for i in range(40):
        x, y = pixels[i : i + 1], int(labels[i])
        fooled = int(network(x).argmax()) != y
        for run, loss in enumerate(reference_losses(name, network, x, y)):
            if not fooled:
                fooled = reference_apgd(network, loss, x, y, starts[run][i : i + 1], norm, eps, steps)
        assert bool(found.fooled[i]) == fooled, i
    right = network(pixels).argmax(dim=1) == labels
    assert 0 < int(found.fooled[right].sum()) < int(right.sum())


def reference_square(
    network: nn.Module, x: Tensor, y: int, eps: float, queries: int, draws: np.random.Generator
) -> bool:
    """AutoAttack's Square for linf and one image."""

    def margin(point: Tensor) -> float:
        z = network(point[None])[0]
        return float(z[y] - torch.cat([z[:y], z[y + 1 :]]).max())

    def signs(*shape: int) -> Tensor:
        return torch.from_numpy(draws.choice([-1.0, 1.0], size=shape))

    best = (x + eps * signs(3, 1, SIDE)).clamp(0, 1)
    lowest = margin(best)
    for query in range(queries):
        if lowest <= 0:
            return True
        share = 0.8 / 2 ** sum(query > last for last in (10, 50, 200, 500, 1000))
        side = max(round(math.sqrt(share * SIDE * SIDE)), 1)
        top, left = (int((SIDE - side) * draws.random()) for _ in range(2))
        proposed = best.clone()
        proposed[:, top : top + side, left : left + side] += 2 * eps * signs(3, 1, 1)
        proposed = torch.min(torch.max(proposed, x - eps), x + eps).clamp(0, 1)
        found = margin(proposed)
        if found < lowest:
            best, lowest = proposed, found
    return lowest <= 0


def test_square_fools_about_as_many_as_autoattack(network: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    """Other random numbers, so not the same images: test_square.py has a twin with the same."""
    pixels, labels = data
    found = attack_classifier(
        network, pixels, labels, ThreatModel("linf", RADII["linf"]), attack="square", steps=150, seed=0
    )
    draws = np.random.default_rng(0)
    expected = [reference_square(network, pixels[i], int(labels[i]), RADII["linf"], 150, draws) for i in range(COUNT)]
    assert int(found.fooled.sum()) == pytest.approx(sum(expected), abs=3)


# --- what comes back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("norm", RADII)
def test_only_what_is_right_is_attacked(
    name: AttackName, norm: Norm, network: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    pixels, labels, threat = data[0], data[1].clone(), ThreatModel(norm, RADII[norm])
    labels[::9] = (labels[::9] + 1) % CLASSES  # certainly wrong
    wrong = network(pixels).argmax(dim=1) != labels
    found = attack_classifier(network, pixels, labels, threat, attack=name, steps=8, seed=0, batch=33)
    assert int(wrong.sum()) >= 9
    assert bool(found.fooled[wrong].all())
    assert torch.equal(found.adversarial[wrong], pixels[wrong])
    assert not found.updates[wrong].any()
    assert torch.equal(network(found.adversarial).argmax(dim=1) != labels, found.fooled)
    assert bool(threat.contains(found.adversarial, pixels).all())
    assert bool(torch.isfinite(found.objective).all())


def test_attacks_one_after_the_other(network: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    pixels, labels = data
    threat = ThreatModel("linf", RADII["linf"])
    names: tuple[AttackName, ...] = ("square", "apgd-ce", "apgd-t")
    outcomes = [
        robust_accuracy(network, pixels, labels, threat, attacks=names[:n], steps=15, queries=30, batch=50)
        for n in range(4)
    ]
    assert [outcome.clean for outcome in outcomes] == [float((network(pixels).argmax(1) == labels).double().mean())] * 4
    assert outcomes[0].robust == outcomes[0].clean
    assert torch.equal(outcomes[0].adversarial, pixels)
    accuracies = [outcome.robust for outcome in outcomes]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[0] > accuracies[1] > accuracies[2] >= accuracies[3] > 0
    last = outcomes[3]
    assert last.robust == float(last.standing.double().mean())
    assert torch.equal(network(last.adversarial).argmax(dim=1) == labels, last.standing)
    assert bool(threat.contains(last.adversarial, pixels).all())


def test_where_nothing_stands_nothing_is_attacked(network: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    pixels = data[0]
    never = (network(pixels).argmax(dim=1) + 1) % CLASSES
    outcome = robust_accuracy(network, pixels, never, ThreatModel("linf", 0.1), steps=2)
    assert (outcome.clean, outcome.robust) == (0.0, 0.0)
    assert torch.equal(outcome.adversarial, pixels)


def test_an_attack_that_leaves_the_ball_is_an_error(
    network: nn.Module, data: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def beyond(_: object, pixels: Tensor, *rest: object, **options: object) -> AttackResult:
        zeros = torch.zeros(len(pixels))
        return AttackResult((pixels + 0.2).clamp(0, 1), zeros > 0, zeros, zeros)

    monkeypatch.setattr(classifier, "attack_classifier", beyond)
    with pytest.raises(RunError, match="apgd-ce left its threat model"):
        robust_accuracy(network, *data, ThreatModel("linf", 0.1))


def test_logits_that_are_not_finite_name_their_images(network: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    pixels, labels = data[0].clone(), data[1]
    pixels[57] = torch.nan
    for name in ATTACKS:
        with pytest.raises(NonFiniteEmbedding) as caught:
            attack_classifier(network, pixels, labels, ThreatModel("linf", 0.1), attack=name, steps=2, seed=0, batch=25)
        assert caught.value.rows == (57,)
    with pytest.raises(NonFiniteEmbedding) as caught:
        robust_accuracy(network, pixels, labels, ThreatModel("linf", 0.1))
    assert caught.value.rows == (57,)


def test_impossible_requests_are_refused(network: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    pixels, labels, threat = data[0][:4], data[1][:4], ThreatModel("linf", 0.1)
    with pytest.raises(PlanError, match=r"attack must be one of apgd-ce, .*, got 'fab-t'"):
        attack_classifier(network, pixels, labels, threat, attack="fab-t", steps=1, seed=0)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"labels must be 4 int64, one an image, got \(3,\)"):
        attack_classifier(network, pixels, labels[:3], threat, attack="pgd", steps=1, seed=0)
    with pytest.raises(PlanError, match="batch must be at least 1 and seed not negative, got 0 and 0"):
        attack_classifier(network, pixels, labels, threat, attack="pgd", steps=1, seed=0, batch=0)
    with pytest.raises(PlanError, match="at least one image, got 0"):
        robust_accuracy(network, pixels[:0], labels[:0], threat)
    assert len(attack_classifier(network, pixels[:0], labels[:0], threat, attack="pgd", steps=1, seed=0).fooled) == 0


def test_parity_is_handed_on() -> None:
    searching, _ = classifier._attack("apgd-ce", 10, 2, True)
    assert searching == Apgd(steps=10, restarts=2, parity=True)
    assert len(list(checkpoints(10))) == 9
