"""The masking checks: silent about encoders whose gradients are honest, in words about those that hide them."""

import re
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from offline.attacks.apgd import Apgd
from offline.attacks.base import Attacked
from offline.attacks.search import input_gradient
from offline.attacks.square import Square
from offline.audit.masking import Subject, masking_checks
from offline.audit.record import Check
from offline.criteria import NearestNeighborIs
from offline.objectives import EmbeddingShift, PoolMargin, TargetSet
from offline.threat import Norm, ThreatModel
from perception.encoder import unit_embeddings
from perception.preprocess import to_pixels
from perception.testing import ToyEncoder, synthetic_image

NAMES = ["gradients", "loss-rises", "large-eps", "pgd-not-stronger", "black-box"]
CONCLUSION = "Gradients appear to be masked: "
STEPS, QUERIES, IMAGES, EXEMPLARS = 10, 120, 12, 40
EPS: dict[Norm, float] = {"linf": 8 / 255, "l2": 1.5}
TOY = ToyEncoder().requires_grad_(False)


class Quantised:
    """Sees eight levels of each pixel, so that gradients are zero wherever they exist."""

    def encode(self, pixels: Tensor) -> Tensor:
        return TOY.encode((pixels * 7).round() / 7)


class Detached:
    """Stop-gradient: its output asks for no gradient."""

    def encode(self, pixels: Tensor) -> Tensor:
        return TOY.encode(pixels).detach()


class DetachedInput:
    """Stop-gradient, but weights that could be trained."""

    trained = ToyEncoder()

    def encode(self, pixels: Tensor) -> Tensor:
        return self.trained.encode(pixels.detach())


class Saturated:
    """Features far out on the flat parts of tanh, where its derivative is zero in float32."""

    def encode(self, pixels: Tensor) -> Tensor:
        features = torch.nn.functional.adaptive_avg_pool2d(2 * pixels - 1, 8).flatten(1) @ TOY.weight.T
        return unit_embeddings(torch.tanh(1e4 * features) + 1e-3)


@dataclass
class RandomSigns:
    """Gradients of the right size with random signs."""

    draws: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def encode(self, pixels: Tensor) -> Tensor:
        if pixels.requires_grad:
            pixels = pixels.clone()
            pixels.register_hook(self._shuffle)
        return TOY.encode(pixels)

    def _shuffle(self, gradient: Tensor) -> Tensor:
        return gradient * torch.where(torch.rand(gradient.shape, generator=self.draws) < 0.5, -1.0, 1.0)


@dataclass(frozen=True)
class Rescaled:
    """Gradients in the right direction, of another size."""

    factor: float

    def encode(self, pixels: Tensor) -> Tensor:
        still = pixels.detach()
        return TOY.encode(still + (pixels - still) * self.factor)


class DetachedWhereBright:
    """Stop-gradient for some images."""

    @staticmethod
    def hides(pixels: Tensor) -> Tensor:
        return pixels.detach().mean(dim=(1, 2, 3)) > 0.5

    def encode(self, pixels: Tensor) -> Tensor:
        return TOY.encode(torch.where(self.hides(pixels).view(-1, 1, 1, 1), pixels.detach(), pixels))


class NotFinite:
    """A square root at zero: the value is fine, the gradient is not."""

    def encode(self, pixels: Tensor) -> Tensor:
        return TOY.encode(pixels + (pixels - pixels.detach()).abs().sqrt())


def pixels_of(first: int, count: int) -> Tensor:
    return to_pixels([TOY.preprocess.apply(synthetic_image(first + i)) for i in range(count)])


def subject(
    encoder: Attacked, norm: Norm = "linf", *, grey_box: bool = False, attacked: Attacked | None = None
) -> Subject:
    """Images that are nearest to one of two pools and shall be taken for the other."""
    pixels, pools = pixels_of(1000, IMAGES), torch.arange(EXEMPLARS) % 2
    with torch.no_grad():
        gallery = encoder.encode(pixels_of(0, EXEMPLARS))
        true = pools[(encoder.encode(pixels) @ gallery.T).argmax(dim=1)]
    margin = PoolMargin(gallery, pools, 1 - true, true)
    means = torch.stack([TargetSet.of(gallery[pools == pool], 1).means[0] for pool in (0, 1)])
    return Subject(
        system="toy",
        encoder=encoder,
        attacked=attacked or encoder,
        objective=TargetSet(means[1 - true]) if grey_box else margin,
        black_box=margin,
        criterion=NearestNeighborIs(gallery, pools, 1 - true),
        pixels=pixels,
        threat=ThreatModel(norm, EPS[norm]),
    )


def without_goal(encoder: Attacked, norm: Norm = "linf") -> Subject:
    """Images whose embeddings shall move away from the clean ones, as in retrieval."""
    pixels = pixels_of(1000, IMAGES)
    with torch.no_grad():
        shift = EmbeddingShift(encoder.encode(pixels))
    return Subject("toy", encoder, encoder, shift, shift, None, pixels, ThreatModel(norm, EPS[norm]))


def checks_of(examined: Subject, *, steps: int = STEPS, queries: int = QUERIES, seed: int = 0) -> dict[str, Check]:
    return {check.name: check for check in masking_checks(examined, steps=steps, queries=queries, seed=seed)}


def failed(checks: dict[str, Check]) -> set[str]:
    for check in checks.values():
        masked = check.sentence.startswith(CONCLUSION) and check.sentence.endswith("cannot be trusted.")
        assert masked is not check.passed, check.sentence
    return {name for name, check in checks.items() if not check.passed}


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("grey_box", [False, True])
def test_an_honest_encoder_passes(norm: Norm, grey_box: bool) -> None:
    checks = checks_of(subject(TOY, norm, grey_box=grey_box))
    assert list(checks) == NAMES
    assert failed(checks) == set()
    assert checks["large-eps"].figures["left"] == 0
    assert checks["pgd-not-stronger"].figures["apgd"] < IMAGES  # there was something to find
    assert all(check.system == "toy" for check in checks.values())


@pytest.mark.parametrize("norm", EPS)
def test_an_honest_encoder_passes_where_there_is_no_goal(norm: Norm) -> None:
    checks = checks_of(without_goal(TOY, norm))
    assert failed(checks) == set()
    assert checks["large-eps"].figures["objective"] == pytest.approx(4, abs=0.05)  # the largest shift there is


def test_an_encoder_that_no_attack_harms_passes_too() -> None:
    robust = replace(subject(TOY), threat=ThreatModel("linf", 1e-4))
    checks = checks_of(robust)
    assert failed(checks) == set()
    assert checks["pgd-not-stronger"].figures["apgd"] == IMAGES
    assert checks["black-box"].figures["left"] == IMAGES


@pytest.mark.parametrize(
    ("encoder", "norm"),
    [
        (Quantised(), "linf"),
        (Detached(), "linf"),
        (DetachedInput(), "linf"),
        (Saturated(), "linf"),
        (Quantised(), "l2"),
    ],
)
def test_gradients_that_are_zero_are_named_and_a_black_box_attack_finds_what_they_hide(
    encoder: Attacked, norm: Norm
) -> None:
    checks = checks_of(subject(encoder, norm))
    assert {"gradients", "loss-rises", "large-eps"} <= failed(checks)
    assert f"zero for {IMAGES} of {IMAGES} images" in checks["gradients"].sentence
    assert "does not rise" in checks["loss-rises"].sentence
    assert checks["large-eps"].figures["left"] == IMAGES
    assert not checks["black-box"].passed
    assert checks["black-box"].figures["fooled"] >= 3
    assert re.search(r"fools \d+ of the \d+ images that withstand", checks["black-box"].sentence)


@pytest.mark.parametrize("encoder", [Quantised(), Detached(), Saturated()])
def test_gradients_that_are_zero_are_named_where_there_is_no_goal(encoder: Attacked) -> None:
    assert failed(checks_of(without_goal(encoder))) == {"gradients", "loss-rises", "large-eps", "black-box"}


def test_an_output_without_a_graph_is_said_to_have_none() -> None:
    said = "does not depend on the pixels in a way that can be differentiated"
    detached, quantised = (
        next(masking_checks(subject(e), steps=1, queries=0, seed=0)) for e in (Detached(), Quantised())
    )
    assert said in detached.sentence
    assert said not in quantised.sentence


def test_gradients_that_are_zero_for_some_images_are_counted() -> None:
    examined = replace(subject(DetachedWhereBright()), threat=ThreatModel("linf", 1e-4))  # too little to turn bright
    hidden = int(DetachedWhereBright.hides(examined.pixels).sum())
    assert 0 < hidden < IMAGES
    check = next(masking_checks(examined, steps=1, queries=0, seed=0))
    assert check.figures["zero"] == hidden
    assert f"zero for {hidden} of {IMAGES} images. The" in check.sentence


@pytest.mark.parametrize("norm", EPS)
def test_gradients_that_lead_nowhere_are_named(norm: Norm) -> None:
    check = next(masking_checks(subject(RandomSigns(), norm), steps=1, queries=0, seed=0))
    assert not check.passed
    assert check.figures["misleading"] >= IMAGES / 2
    assert check.figures["zero"] == check.figures["tiny"] == 0
    assert "but a small step along them raises the objective as it should for only" in check.sentence


def test_a_gradient_may_be_small_but_not_tiny() -> None:
    assert next(masking_checks(subject(Rescaled(1e-4)), steps=1, queries=0, seed=0)).passed
    tiny = checks_of(subject(Rescaled(1e-20), "l2"))
    assert f"tiny for {IMAGES} of {IMAGES} images" in tiny["gradients"].sentence
    # APGD's l2 step shrinks with such a gradient, and that of PGD does not.
    assert {"gradients", "loss-rises", "pgd-not-stronger"} <= failed(tiny)
    assert "PGD, the simpler attack" in tiny["pgd-not-stronger"].sentence


def test_gradients_that_are_not_finite_are_named_and_break_no_run() -> None:
    checks = checks_of(subject(NotFinite(), "l2"))
    assert failed(checks) == set(NAMES)
    assert f"not finite for {IMAGES} of {IMAGES} images" in checks["gradients"].sentence
    assert "the attack broke off" in checks["loss-rises"].sentence


def test_gradients_come_from_what_is_attacked_and_verdicts_from_what_serves() -> None:
    checks = checks_of(subject(Quantised(), attacked=TOY))  # a straight-through twin
    assert checks["gradients"].passed
    assert checks["loss-rises"].passed
    assert checks["pgd-not-stronger"].figures["apgd"] <= IMAGES / 2  # without the twin almost all withstand

    class Unmoved:
        def encode(self, pixels: Tensor) -> Tensor:
            return TOY.encode(examined.pixels[: len(pixels)])

    examined = subject(TOY)
    checks = checks_of(replace(examined, encoder=Unmoved()))
    assert checks["pgd-not-stronger"].figures["apgd"] == IMAGES


def test_images_at_the_goal_take_no_part() -> None:
    whole = subject(TOY)
    assert isinstance(whole.criterion, NearestNeighborIs)
    wanted = whole.criterion.wanted.clone()
    wanted[:5] = 1 - wanted[:5]
    checks = checks_of(replace(whole, criterion=replace(whole.criterion, wanted=wanted)))
    assert checks["gradients"].figures["images"] == IMAGES - 5
    assert checks["large-eps"].figures["images"] == IMAGES - 5


@pytest.mark.parametrize("why", ["no image is left", "eps is 0"])
def test_nothing_to_check_is_no_pass(why: str) -> None:
    whole = subject(TOY)
    none = torch.zeros(0, dtype=torch.int64)
    checks = checks_of(replace(whole, threat=ThreatModel("linf", 0.0)) if "eps" in why else whole.rows(none))
    assert list(checks) == NAMES
    assert not any(check.passed for check in checks.values())
    assert all(check.sentence.startswith(f"Nothing could be checked: {why}") for check in checks.values())


def test_a_single_image_can_be_checked() -> None:
    assert failed(checks_of(subject(TOY).rows(torch.tensor([3])), steps=5)) == set()
    assert "gradients" in failed(checks_of(subject(RandomSigns()).rows(torch.tensor([3])), steps=5))


def test_the_black_box_attack_can_be_left_out() -> None:
    assert list(checks_of(subject(TOY), steps=2, queries=0)) == NAMES[:-1]


def test_checks_are_a_function_of_the_seed() -> None:
    first, again, other = (checks_of(subject(TOY), steps=3, queries=20, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first["loss-rises"].figures != other["loss-rises"].figures


def test_an_attack_on_an_encoder_without_a_graph_stays_at_its_start_and_leaves_the_work_to_square() -> None:
    examined = subject(Detached())
    arguments = (examined.encoder, examined.black_box, None, examined.pixels, examined.threat)
    stuck = Apgd(steps=5).attack(*arguments, generator=torch.Generator().manual_seed(0))
    start = examined.threat.boundary_start(examined.pixels, torch.Generator().manual_seed(0))
    assert torch.equal(stuck.adversarial, start)
    free = Square(queries=50).attack(*arguments, generator=torch.Generator().manual_seed(0))
    assert bool((free.objective > stuck.objective + 0.01).all())


def test_the_gradient_of_each_image() -> None:
    pixels = pixels_of(0, 3).requires_grad_(True)
    assert torch.allclose(input_gradient(pixels.square().sum(dim=(1, 2, 3)), pixels), 2 * pixels.detach())
    weight = torch.ones(3, requires_grad=True)
    for value in (weight, weight.detach()):  # neither depends on the pixels
        assert torch.equal(input_gradient(value, pixels), torch.zeros_like(pixels))
