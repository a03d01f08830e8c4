"""One contract for every attack: what it returns is allowed, repeatable, true, and nobody else's business."""

from dataclasses import dataclass
from typing import Self

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offline.attacks.apgd import LARGER_EPS, Apgd
from offline.attacks.base import Attack, AttackResult
from offline.attacks.pgd import Pgd
from offline.attacks.square import Square
from offline.attacks.targeted import Targeted
from offline.criteria import ArgmaxWrong, Criterion
from offline.errors import RunError
from offline.objectives import Dlr
from offline.threat import Norm, ThreatModel
from perception.errors import NonFiniteEmbedding
from tests.offline.attack_toys import CLASSES, Network, generator, images

RADII: dict[Norm, float] = {"linf": 0.02, "l2": 0.15}
ATTACKS: dict[str, Attack] = {  # a new attack joins here
    "apgd": Apgd(steps=12),
    "apgd, restarts": Apgd(steps=5, restarts=3),
    "apgd, larger eps": Apgd(steps=12, stages=LARGER_EPS),
    "pgd": Pgd(steps=10),
    "pgd, momentum": Pgd(steps=6, momentum=0.9, restarts=2),
    "square": Square(queries=80),
    "square, restarts": Square(queries=40, restarts=2, rescaled=True),
    "targeted": Targeted(Apgd(steps=4), targets=3),
}
every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
every_norm = pytest.mark.parametrize("norm", RADII)


@dataclass(frozen=True)
class Or:
    """Fooled where the criterion says so, and images that are fooled whatever they look like."""

    criterion: ArgmaxWrong
    always: Tensor

    def __call__(self, embeddings: Tensor) -> Tensor:
        return self.criterion(embeddings) | self.always

    def rows(self, index: Tensor) -> Self:
        return type(self)(self.criterion.rows(index), self.always[index])


def run(
    attack: Attack,
    network: Network,
    pixels: Tensor,
    threat: ThreatModel,
    *,
    criterion: Criterion | None = None,
    seed: int = 0,
) -> AttackResult:
    objective = Dlr(None, network.labels(pixels))
    return attack.attack(network, objective, criterion, pixels, threat, generator=generator(seed))


def wrong(network: Network, pixels: Tensor) -> ArgmaxWrong:
    return ArgmaxWrong(None, network.labels(pixels))


@every_attack
@given(norm=st.sampled_from(["linf", "l2"]), eps=st.floats(0, 2), seed=st.integers(0, 1000), bright=st.floats(0, 1))
@settings(max_examples=8)
def test_it_stays_in_ball_and_box(attack: Attack, norm: Norm, eps: float, seed: int, bright: float) -> None:
    network, threat = Network(seed), ThreatModel(norm, eps)
    pixels = (images(seed, 3) + 2 * bright - 1).clamp(0, 1)  # many at the edges of the box
    for criterion in (None, wrong(network, pixels)):
        found = run(attack, network, pixels, threat, criterion=criterion, seed=seed)
        assert bool(threat.contains(found.adversarial, pixels, tolerance=1e-9).all())


@every_attack
@every_norm
def test_what_it_says_is_so(attack: Attack, norm: Norm) -> None:
    network, pixels = Network(), images(1, 16)
    criterion = wrong(network, pixels)
    found = run(attack, network, pixels, ThreatModel(norm, RADII[norm]), criterion=criterion)
    logits = network.encode(found.adversarial)
    assert torch.equal(criterion(logits), found.fooled)
    assert 0 < int(found.fooled.sum()) < 16
    if not isinstance(attack, Targeted):  # whose best is of another objective for each target
        reached = Dlr(None, network.labels(pixels))(logits)
        torch.testing.assert_close(reached[~found.fooled], found.objective[~found.fooled])
    assert bool((found.updates[~found.fooled] == found.updates.max()).all())


@dataclass(frozen=True)
class Risen:
    """Fooled where one logit exceeds a limit of each image, whatever the objective is about."""

    limits: Tensor

    def __call__(self, embeddings: Tensor) -> Tensor:
        return embeddings[:, 0] > self.limits

    def rows(self, index: Tensor) -> Self:
        return type(self)(self.limits[index])


@every_attack
@every_norm
def test_the_point_that_fools_counts_not_the_best(attack: Attack, norm: Norm) -> None:
    network, pixels, threat = Network(), images(1, 64), ThreatModel(norm, RADII[norm])
    criterion = Risen(network.encode(pixels)[:, 0] + 0.02)
    found = run(attack, network, pixels, threat, criterion=criterion)
    logits = network.encode(found.adversarial)
    assert torch.equal(criterion(logits), found.fooled)


@every_attack
@every_norm
def test_it_is_an_attack(attack: Attack, norm: Norm) -> None:
    """It achieves more than a random point on the boundary does."""
    network, pixels, threat = Network(), images(1, 16), ThreatModel(norm, RADII[norm])
    found = run(attack, network, pixels, threat)
    objective = Dlr(None, network.labels(pixels))
    by_chance = objective(network.encode(threat.boundary_start(pixels, generator(1))))
    assert bool((objective(network.encode(found.adversarial)) > by_chance).double().mean() > 0.9)


@every_attack
@every_norm
def test_the_seed_decides_alone(attack: Attack, norm: Norm) -> None:
    network, pixels, threat = Network(), images(2), ThreatModel(norm, RADII[norm])
    first, second, other = (run(attack, network, pixels, threat, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(first.adversarial, second.adversarial)
    assert torch.equal(first.objective, second.objective)
    assert not torch.equal(first.adversarial, other.adversarial)


@every_attack
@every_norm
@pytest.mark.parametrize("leaving", [[0], [1, 4], [0, 1, 2, 3, 4]])
def test_nobody_minds_who_leaves(attack: Attack, norm: Norm, leaving: list[int]) -> None:
    network, pixels, threat = Network(), images(3), ThreatModel(norm, RADII[norm])
    criterion = wrong(network, pixels)
    always = torch.zeros(6, dtype=torch.bool)
    always[leaving] = True
    among_all = run(attack, network, pixels, threat, criterion=criterion)
    among_few = run(attack, network, pixels, threat, criterion=Or(criterion, always))
    assert bool(among_few.fooled[always].all())
    assert torch.equal(among_few.fooled[~always], among_all.fooled[~always])
    assert torch.equal(among_few.updates[~always], among_all.updates[~always])
    torch.testing.assert_close(among_few.adversarial[~always], among_all.adversarial[~always], atol=1e-9, rtol=0)


@every_attack
@every_norm
def test_inputs_stay_as_they_are(attack: Attack, norm: Norm) -> None:
    network, pixels = Network(), images(4)
    network.first.requires_grad_(True)
    before = pixels.clone()
    found = run(attack, network, pixels, ThreatModel(norm, 0.1), criterion=wrong(network, pixels))
    assert torch.equal(pixels, before)
    assert network.first.grad is None
    assert not found.adversarial.requires_grad
    found.adversarial.zero_()
    assert torch.equal(pixels, before)


@every_attack
@every_norm
def test_the_fooled_are_not_looked_at_again(attack: Attack, norm: Norm) -> None:
    network, pixels = Network(), images(5)
    everybody = Or(wrong(network, pixels), torch.ones(6, dtype=torch.bool))
    found = run(attack, network, pixels, ThreatModel(norm, 0.1), criterion=everybody)
    assert bool(found.fooled.all())
    looks = len(network.images_seen) - isinstance(attack, Targeted)  # which needs to see the clean images
    before_the_last_stage = 8 if attack is ATTACKS["apgd, larger eps"] else 0
    assert found.updates.tolist() == [before_the_last_stage] * 6
    assert looks == 1 + before_the_last_stage + (2 if before_the_last_stage else 0)


@every_attack
def test_a_radius_of_zero_leaves_the_images_alone(attack: Attack) -> None:
    network, pixels = Network(), images(6)
    for norm in RADII:
        found = run(attack, network, pixels, ThreatModel(norm, 0.0), criterion=wrong(network, pixels))
        assert torch.equal(found.adversarial, pixels)
        assert not found.fooled.any()


@every_attack
def test_no_images_are_no_work(attack: Attack) -> None:
    network = Network()
    found = run(attack, network, images(0, 0), ThreatModel("linf", 0.1), criterion=wrong(network, images(0, 0)))
    assert found.adversarial.shape == (0, 3, 6, 6)
    assert len(found.fooled) == len(found.objective) == len(found.updates) == 0


@every_attack
def test_nan_is_an_error_that_names_the_images(attack: Attack) -> None:
    class Broken(Network):
        def encode(self, pixels: Tensor) -> Tensor:
            bright = pixels.mean(dim=(1, 2, 3))[:, None] > 0.7
            return super().encode(pixels).where(~bright, torch.nan)

    network, pixels = Broken(), torch.full((3, 3, 6, 6), 0.5, dtype=torch.float64)
    pixels[2] = 0.9
    first_leaves = Or(wrong(network, pixels), torch.tensor([True, False, False]))
    with pytest.raises(NonFiniteEmbedding) as caught:
        run(attack, network, pixels, ThreatModel("linf", 0.01), criterion=first_leaves)
    assert caught.value.rows == (2,)


@every_attack
def test_an_objective_that_is_not_a_number_is_an_error(attack: Attack) -> None:
    class Lost(Dlr):
        def __call__(self, embeddings: Tensor) -> Tensor:
            return super().__call__(embeddings) / 0

        def toward(self, targets: Tensor) -> "Lost":  # type: ignore[override]
            return self

    network, pixels = Network(), images(7)
    lost = Lost(None, network.labels(pixels))
    with pytest.raises(RunError, match=r"Lost is not finite for the images in rows \[0, 1, 2, 3, 4, 5\]"):
        attack.attack(network, lost, None, pixels, ThreatModel("linf", 0.1), generator=generator())


def test_the_toy_has_classes_to_target() -> None:
    assert len(Network().labels(images(0, 64)).unique()) > CLASSES // 2
