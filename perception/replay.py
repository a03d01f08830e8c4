"""Replay: what any decision policy would have answered to images of which the nearest exemplars were recorded.

Audits write down the neighbours of every image, as it is and as an attacker left it. So any policy can be tried on them
through `DecisionPolicy.decide`, as it serves. What cannot be replayed is the attacker: the attacked images were made
against the policy that was audited, and stop where they fooled that one. Rates on attacked images under any other
policy are therefore lower bounds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from perception.policy_file import Measured, Norm, Rate, Rates
from perception.verdict import DecisionPolicy, Neighbor, Verdict, VerdictLabel

RECORDED_DECIMALS = 6
"""Of the similarities that audits write down."""


@dataclass(frozen=True, order=True)
class AttackSetting:
    """How an image was attacked: what is allowed, and how long the attacker searched.

    Attributes:
        norm: `linf` or `l2`.
        eps: radius in [0, 1] pixel units, at the encoder's input size.
        steps: updates of a gradient attack.
    """

    norm: Norm
    eps: float
    steps: int

    def __str__(self) -> str:
        levels = self.eps * 255
        exact = self.norm == "linf" and abs(levels - round(levels)) < 1e-9
        return f"{self.norm} {f'{round(levels)}/255' if exact else f'{self.eps:.4g}'}, {self.steps} steps"


@dataclass(frozen=True)
class Audited:
    """The evidence on one image of an audit.

    Attributes:
        label: what is right, `safe` or `unsafe`.
        clean, attacked: the nearest exemplars of each pool to the image as it is, and to its worst version.
    """

    label: VerdictLabel
    clean: tuple[Neighbor, ...]
    attacked: tuple[Neighbor, ...]


@dataclass(frozen=True)
class Answered:
    """What a policy says of one image.

    Attributes:
        label: what is right.
        clean, attacked: verdicts on its two versions.
    """

    label: VerdictLabel
    clean: Verdict
    attacked: Verdict


def replay(images: Iterable[Audited], policy: DecisionPolicy) -> list[Answered]:
    """What a policy would have answered; it must not need more neighbours than were recorded."""
    return [Answered(image.label, policy.decide(image.clean), policy.decide(image.attacked)) for image in images]


def measure(answered: Sequence[Answered]) -> Measured:
    """The rates of a policy.

    Raises:
        PolicyError: there are no safe images, or no unsafe ones.
    """
    return Measured(
        clean=rates_of([(a.label, a.clean.label) for a in answered]),
        attacked=rates_of([(a.label, a.attacked.label) for a in answered]),
    )


def rates_of(answers: Sequence[tuple[VerdictLabel, VerdictLabel]]) -> Rates:
    """The rates of answers to one version of the images.

    Args:
        answers: what is right, and what was said.

    Raises:
        PolicyError: there are no safe images, or no unsafe ones.
    """
    of = {label: [answer for right, answer in answers if right is label] for label in VerdictLabel}
    unsafe, safe = of[VerdictLabel.UNSAFE], of[VerdictLabel.SAFE]
    return Rates(
        false_negative=Rate(unsafe.count(VerdictLabel.SAFE), len(unsafe)),
        false_positive=Rate(safe.count(VerdictLabel.UNSAFE), len(safe)),
        review_unsafe=Rate(unsafe.count(VerdictLabel.REVIEW), len(unsafe)),
        review_safe=Rate(safe.count(VerdictLabel.REVIEW), len(safe)),
    )
