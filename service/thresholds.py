"""Thresholds tried out: what a decision policy would have answered to the images of an audit, clean and attacked.

Every answer is made by `DecisionPolicy.decide`, as it serves. The attacked images were made against the audited policy:
under any other one their rates are lower bounds (`perception.replay`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from perception.policy_file import Measured
from perception.replay import Answered, Audited, measure, rates_of, replay
from perception.verdict import DecisionPolicy, Verdict, VerdictLabel
from service.errors import InvalidParameter

CURVE_POINTS = 33
_STEP = 0.01  # what the end of a curve is rounded up to


@dataclass(frozen=True)
class Point:
    """What a policy reaches with one margin.

    Attributes:
        margin: `min_margin` of the policy; all else stays.
        measured: its rates.
    """

    margin: float
    measured: Measured


def require_neighbors(policy: DecisionPolicy, recorded: int) -> None:
    """Raise InvalidParameter where a policy has more voters than neighbours of each pool were recorded."""
    if policy.neighbors_needed > recorded:
        raise InvalidParameter(
            "k", f"it is {policy.k}, and the audit has recorded {recorded} neighbours of each pool: audit with more "
            "`neighbors` in its plan"
        )  # fmt: skip


def tried(images: Sequence[Audited], policy: DecisionPolicy) -> Measured:
    """The rates that a policy would have had.

    Args:
        images: of both labels.
        policy: that needs no more neighbours than they have; see `require_neighbors`.
    """
    return measure(replay(images, policy))


def curve(images: Sequence[Audited], policy: DecisionPolicy) -> list[Point]:
    """What the policy would reach with other margins for `safe`, from none to the largest that any verdict has.

    Arguments are those of `tried`. The first point asks for no margin; with the last one no image stays `safe`, unless
    its margin is 2.
    """
    answered = replay(images, replace(policy, min_margin=0.0))
    largest = max((_margin(verdict) for a in answered for verdict in (a.clean, a.attacked)), default=0.0)
    # The next multiple of the step above it: with this much, no verdict is safe any more.
    end = min(2.0, (math.floor(largest / _STEP + 1e-9) + 1) * _STEP)
    margins = [round(end * step / (CURVE_POINTS - 1), 6) for step in range(CURVE_POINTS)]
    return [Point(margin, _with_margin(answered, margin)) for margin in margins]


def _margin(verdict: Verdict) -> float:
    """Of a `safe` verdict; 0 for others."""
    return verdict.margin if verdict.label is VerdictLabel.SAFE and verdict.margin is not None else 0.0


def _with_margin(answered: Sequence[Answered], margin: float) -> Measured:
    """The rates of a policy that asks for a margin of `safe`, from its verdicts without one.

    `min_margin` is the last thing that `DecisionPolicy.decide` asks of a verdict that would be `safe`, and asks it of
    no other, so that nothing has to be decided anew for each point; a test holds this to `decide` itself.
    """

    def label(verdict: Verdict) -> VerdictLabel:
        held = verdict.label is not VerdictLabel.SAFE or (verdict.margin is not None and verdict.margin >= margin)
        return verdict.label if held else VerdictLabel.REVIEW

    return Measured(
        clean=rates_of([(a.label, label(a.clean)) for a in answered]),
        attacked=rates_of([(a.label, label(a.attacked)) for a in answered]),
    )
