"""No attack flips a decision within its certified radius; a little beyond, where the certificate is exact, one does."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from offline.attacks.apgd import Apgd
from offline.attacks.base import Attack
from offline.attacks.pgd import Pgd
from offline.attacks.square import Square
from offline.audit.moderation import ModerationTask, PoolsDecider
from offline.audit.task import Item
from offline.audit.two_afc import TwoAfcTask
from offline.certify import Certifier
from offline.criteria import Criterion
from offline.objectives import Objective, PoolMargin, TwoAfcCrossEntropy
from offline.threat import ThreatModel
from perception.certificates import feature_bound
from perception.counterattack import Counterattack, CounterattackSettings, FeatureEncoder
from perception.encoders.lipsim import LipsimConfig, LipsimEncoder, LipsimNetwork, LipsimParts
from perception.gallery import Gallery
from perception.preprocess import PreprocessSpec, to_pixels
from perception.testing import ToyEncoder
from perception.verdict import DecisionPolicy, PoolLabel
from tests.lipschitz_toy import IsometricEncoder

SIZE_PX = 12
POOLS = tuple(str(pool) for pool in PoolLabel)


@dataclass(frozen=True)
class AnswerChanged:
    """A criterion: the code that serves gives another answer than for the clean image."""

    task: ModerationTask | TwoAfcTask
    items: Tensor
    answers: tuple[str, ...]

    def __call__(self, embeddings: Tensor) -> Tensor:
        judged = self.task.judge(self.items, embeddings)
        return torch.tensor([one.answer != answer for one, answer in zip(judged, self.answers, strict=True)])

    def rows(self, index: Tensor) -> Self:
        return replace(self, items=self.items[index], answers=tuple(self.answers[i] for i in index.tolist()))


@dataclass
class Subject:
    """Images with their answers and certificates, and what attacks on them need."""

    encoder: FeatureEncoder
    task: ModerationTask | TwoAfcTask
    objective: Objective
    pixels: Tensor
    answers: tuple[str, ...]
    radii: Tensor

    def criterion(self, rows: Tensor) -> Criterion:
        return AnswerChanged(self.task, rows, tuple(self.answers[row] for row in rows.tolist()))

    def flips(self, attack: Attack, rows: Tensor, eps: float, seed: int = 0) -> tuple[Tensor, Tensor]:
        """(len(rows),) bool, whose answer another image of at most that distance has; and its distance."""
        threat = ThreatModel("l2", eps)
        found = attack.attack(
            self.encoder, self.objective.rows(rows), self.criterion(rows), self.pixels[rows], threat,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        threat.require(found.adversarial, self.pixels[rows], type(attack).__name__)
        with torch.no_grad():
            flipped = self.criterion(rows)(self.encoder.encode(found.adversarial))
        return flipped, threat.distance(found.adversarial, self.pixels[rows])


def lipsim(*, bias_dim: bool) -> LipsimEncoder:
    """A small network; its weights are random, but the same in each run."""
    config = LipsimConfig(
        image_size=SIZE_PX, channels=8, depth=2, inner_channels=4, pools=(2,), dense_layers=2, dense_width=32, dim=48,
        bias_dim=bias_dim,
    )  # fmt: skip
    torch.manual_seed(3)
    spec = PreprocessSpec(size_px=SIZE_PX, resize_px=SIZE_PX, mean=(0.5,) * 3, std=(1.0,) * 3)
    return LipsimParts(config, spec, LipsimNetwork(config).state_dict(), "test").build("lipsim", "fp32", "cpu")


def images(count: int, seed: int) -> NDArray[np.uint8]:
    """Coarse patterns: neither the encoder nor an attack sees noise alone."""
    coarse = np.random.default_rng(seed).integers(20, 236, (count, 3, 4, 4), dtype=np.uint8)
    return coarse.repeat(SIZE_PX // 4, axis=2).repeat(SIZE_PX // 4, axis=3)


def items_of(pixels: NDArray[np.uint8], label: str) -> list[Item]:
    return [Item("s", str(i), label, each) for i, each in enumerate(pixels)]


def certified(
    encoder: FeatureEncoder, task: ModerationTask | TwoAfcTask, pixels: Tensor, form: str
) -> tuple[tuple[str, ...], Tensor]:
    """Answers and radii of clean images, as an audit finds them; also of images that are labelled otherwise."""
    rows = torch.arange(len(pixels))
    with torch.no_grad():
        judged = task.judge(rows, encoder.encode(pixels))
    certifier = Certifier.of(encoder, task)
    assert certifier is not None
    radii = certifier.radii(rows, pixels, [replace(one, correct=True) for one in judged])
    return tuple(one.answer for one in judged), torch.tensor([each[form] for each in radii if each is not None])


def moderation(encoder: FeatureEncoder, count: int, policy: DecisionPolicy) -> Subject:
    pixels = images(count, 0)
    with torch.no_grad():
        known = encoder.encode(to_pixels(list(images(90, 1))))
    gallery = Gallery(
        tuple(f"x{i}" for i in range(90)),
        tuple(POOLS[i % 3] for i in range(90)),
        known.numpy().copy(),
        encoder.fingerprint,
    )
    task = ModerationTask(items_of(pixels, "safe"), PoolsDecider(gallery, policy, 1, [[]] * count), {})
    tensor = to_pixels(list(pixels))
    answers, radii = certified(encoder, task, tensor, "decision")
    # Towards the pool that is nearest but for the one that wins.
    with torch.no_grad():
        similarities = encoder.encode(tensor) @ known.T
    best = similarities.view(count, -1, 3).amax(dim=1)
    order = best.argsort(dim=1, descending=True)
    pools = torch.arange(90) % 3
    return Subject(encoder, task, PoolMargin(known, pools, order[:, 1], order[:, 0]), tensor, answers, radii)


def two_afc(encoder: FeatureEncoder, count: int, form: str = "tighter") -> Subject:
    with torch.no_grad():
        left, right = (encoder.encode(to_pixels(list(images(count, seed)))) for seed in (2, 3))
    pixels = images(count, 4)
    task = TwoAfcTask(items_of(pixels, "left"), left, right, {})
    answers, radii = certified(encoder, task, to_pixels(list(pixels)), form)
    labels = torch.tensor([("left", "right").index(answer) for answer in answers])
    return Subject(encoder, task, TwoAfcCrossEntropy(left, right, labels), to_pixels(list(pixels)), answers, radii)


def groups(radii: Tensor, size: int) -> Iterator[Tensor]:
    """Rows with something certified, in groups of nearly the same radius."""
    rows = torch.nonzero(radii > 0).flatten()
    yield from rows[radii[rows].argsort()].split(size)


ATTACKS: tuple[Attack, ...] = (Apgd(steps=15), Pgd(steps=15), Square(queries=60))


@pytest.mark.slow
def test_no_attack_flips_a_decision_inside_its_certified_radius() -> None:
    """1,000 examples: 500 verdicts and 500 choices of small LipSims, with the bias dimension and without."""
    policies = (DecisionPolicy(), DecisionPolicy("vote", 3))
    subjects = [
        *(moderation(lipsim(bias_dim=biased), 250, policies[biased]) for biased in (False, True)),
        *(two_afc(lipsim(bias_dim=biased), 250) for biased in (False, True)),
    ]
    assert sum(len(subject.radii) for subject in subjects) == 1000
    tried = beyond = 0
    for subject in subjects:
        assert float((subject.radii > 0.02).double().mean()) > 0.5  # or there is nothing to attack
        for rows in groups(subject.radii, 25):
            radii = subject.radii[rows].double()
            for attack in ATTACKS:
                flipped, _ = subject.flips(attack, rows, float(radii.min()))
                assert not flipped.any()
            tried += len(rows)
            # The same attacks are no weak ones: let loose, they flip; and what they flip lies beyond the radius.
            flipped, distance = subject.flips(ATTACKS[0], rows, 2.5 * float(radii.max()))
            assert (distance[flipped] > radii[flipped]).all()
            beyond += int(flipped.sum())
    assert tried > 800
    assert beyond > 0.3 * tried


@pytest.mark.parametrize("bias_dim", [False, True])
def test_just_beyond_the_radius_of_an_isometry_attacks_flip_choices(bias_dim: bool) -> None:
    """There the tighter form is exact, up to the box of pixels; the published one is a fraction of it."""
    subject = two_afc(IsometricEncoder(6, size_px=SIZE_PX, bias_dim=bias_dim), 40)
    attack = Apgd(steps=40)
    for rows in groups(subject.radii, 1):
        radius = float(subject.radii[rows])
        assert not subject.flips(attack, rows, radius)[0].any()
    flipped = [
        bool(subject.flips(attack, rows, 1.02 * float(subject.radii[rows]) + 1e-3)[0])
        for rows in groups(subject.radii, 1)
    ]
    assert np.mean(flipped) > 0.9  # of the others the box is in the way
    published = two_afc(subject.encoder, 40, "published")
    assert (published.radii <= subject.radii).all()
    assert (published.radii < 0.9 * subject.radii).any()


def test_just_beyond_the_radius_of_an_isometry_attacks_flip_verdicts() -> None:
    subject = moderation(IsometricEncoder(6, size_px=SIZE_PX), 60, DecisionPolicy())
    flipped = []
    for rows in groups(subject.radii, 1):
        radius = float(subject.radii[rows])
        assert not subject.flips(ATTACKS[0], rows, radius)[0].any()
        flipped.append(bool(subject.flips(ATTACKS[0], rows, 1.3 * radius + 1e-3)[0]))
    assert np.mean(flipped) > 0.5  # the retrieval form is a lower bound, and the objective knows one border


def test_what_has_no_certificate() -> None:
    task = two_afc(IsometricEncoder(6, size_px=SIZE_PX), 3).task
    assert Certifier.of(ToyEncoder(), task) is None
    encoder = IsometricEncoder(6, size_px=SIZE_PX)
    assert Certifier.of(encoder, object()) is None
    defended = Counterattack(encoder, CounterattackSettings(), seed=b"0" * 16)
    assert Certifier.of(defended, task) is None  # it does something else to images than the encoder alone


def test_radii_are_rounded_down_and_0_where_the_image_is_wrong() -> None:
    subject = two_afc(IsometricEncoder(6, size_px=SIZE_PX), 20)
    certifier = Certifier.of(subject.encoder, subject.task)
    assert certifier is not None
    rows = torch.arange(20)
    judged = subject.task.judge(rows, subject.encoder.encode(subject.pixels))
    found = certifier.radii(rows, subject.pixels, judged)
    proven = feature_bound(subject.encoder)
    assert proven is not None
    bound = subject.task.certified(rows, subject.encoder.features(subject.pixels), proven)
    for one, exact, judgement in zip(found, bound, judged, strict=True):
        assert one is not None
        assert exact is not None
        for form in ("tighter", "published"):
            if judgement.correct:
                assert exact[form] - 1e-6 <= one[form] <= exact[form]
            else:
                assert one[form] == 0
    assert certifier.radii(rows.flip(0), subject.pixels.flip(0), judged[::-1]) == found[::-1]  # each once
