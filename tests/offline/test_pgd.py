"""PGD: a naive twin, and the inner attack of fine-tuning, of which it is the sibling that keeps the best point."""

import pytest
import torch

from offline.attacks.pgd import Pgd
from offline.errors import PlanError
from offline.finetune.inner import InnerAttack
from offline.objectives import CrossEntropy, EmbeddingShift
from offline.threat import Norm, ThreatModel
from tests.offline.attack_toys import Network, generator, gradient_of, images

NORMS: tuple[Norm, ...] = ("linf", "l2")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_does_to_a_batch_what_a_naive_twin_does_to_each_image(norm: Norm, momentum: float) -> None:
    network, pixels = Network(), images(3)
    threat = ThreatModel(norm, 0.03 if norm == "linf" else 0.2)
    labels = network.labels(pixels)
    found = Pgd(steps=15, step_size=threat.eps / 2, momentum=momentum).attack(
        network, CrossEntropy(None, labels), None, pixels, threat, generator=generator(5)
    )
    starts = threat.random_start(pixels, generator(5))
    for i in range(len(pixels)):
        x, point, velocity = pixels[i : i + 1], starts[i : i + 1], torch.zeros(1, 3, 6, 6, dtype=torch.float64)
        objective = CrossEntropy(None, labels[i : i + 1])
        seen = []
        for _ in range(16):
            value, gradient = gradient_of(lambda at, loss=objective: loss(network.encode(at)), point)  # type: ignore[misc]
            seen.append((float(value), point))
            velocity = momentum * velocity + threat.steepest(gradient)
            velocity = velocity.sign() if norm == "linf" else velocity / velocity.norm()
            point = threat.project(point + threat.eps / 2 * velocity, x)
        best = max(seen, key=lambda pair: pair[0])
        assert float(found.objective[i]) == pytest.approx(best[0], abs=1e-9)
        torch.testing.assert_close(found.adversarial[i : i + 1], best[1], atol=1e-9, rtol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_where_every_step_helps_it_is_the_inner_attack(norm: Norm) -> None:
    network, pixels = Network(), 0.4 + 0.2 * images(2)  # no start leaves the box, which the inner one would not clamp
    threat = ThreatModel(norm, 0.05)
    step_size = 0.002
    clean = network.encode(pixels)
    found = Pgd(steps=10, step_size=step_size, momentum=0.9).attack(
        network, EmbeddingShift(clean), None, pixels, threat, generator=generator(4)
    )
    inner = InnerAttack(threat, steps=10, step_size=step_size)
    start = threat.random_perturbation(pixels, generator(4))
    expected = inner(network.encode, lambda now, was: (now - was).square().sum(1), pixels, clean, start)
    torch.testing.assert_close(found.adversarial, expected, atol=1e-12, rtol=0)


def test_the_last_look_asks_for_no_gradient() -> None:
    network, pixels = Network(), images(0)
    shift = EmbeddingShift(network.encode(pixels))
    network.with_gradient.clear()
    found = Pgd(steps=4, restarts=2).attack(
        network, shift, None, pixels, ThreatModel("linf", 0.1), generator=generator()
    )
    assert network.with_gradient == ([True] * 4 + [False]) * 2
    assert found.updates.tolist() == [8] * 6


def test_more_restarts_never_find_less() -> None:
    network, pixels, threat = Network(), images(0), ThreatModel("linf", 0.05)
    objective = CrossEntropy(None, network.labels(pixels))
    one, three = (
        Pgd(steps=5, restarts=n).attack(network, objective, None, pixels, threat, generator=generator()).objective
        for n in (1, 3)
    )
    assert bool((three >= one).all())
    assert bool((three > one).any())


def test_the_default_steps_cross_the_ball() -> None:
    """2.5 eps together: from the clean image a linear objective's corner is reached."""

    class Sum:
        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            return torch.stack([pixels.sum(dim=(1, 2, 3)), -pixels.sum(dim=(1, 2, 3))], dim=1)

    pixels = torch.full((1, 3, 6, 6), 0.5, dtype=torch.float64)
    objective = CrossEntropy(None, torch.tensor([1]))
    found = Pgd(steps=5, start="clean").attack(
        Sum(), objective, None, pixels, ThreatModel("linf", 0.1), generator=generator()
    )
    torch.testing.assert_close(found.adversarial, pixels + 0.1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "PGD's steps must be at least 1, got 0"),
        ({"restarts": 0}, "PGD's restarts must be at least 1, got 0"),
        ({"step_size": 0.0}, "PGD's step_size must be finite and positive, got 0.0"),
        ({"step_size": float("nan")}, "PGD's step_size must be finite and positive, got nan"),
        ({"momentum": -0.1}, "PGD's momentum must be finite and not negative, got -0.1"),
        ({"start": "corner"}, "PGD's start must be one of boundary, uniform, clean, got 'corner'"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Pgd(**values)  # type: ignore[arg-type]


def test_a_start_without_gradient_is_refused() -> None:
    shift = EmbeddingShift(Network().encode(images(0)))
    with pytest.raises(PlanError, match="EmbeddingShift has no gradient at the clean image"):
        Pgd(start="clean").attack(Network(), shift, None, images(0), ThreatModel("linf", 0.1), generator=generator())
