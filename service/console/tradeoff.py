"""Trade-off: the curve of review against false negatives over margins, as points to be drawn in an SVG.

Clean and attacked images differ in their lines and marks, not in colour alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from service.wire_audits import CurvePoint, RatesItem, TriedPolicy

WIDTH, HEIGHT = 640, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 40, 40, 52
TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Spot:
    """A point of the drawing.

    Attributes:
        x, y: from the upper left.
        label: beside it; empty for none.
    """

    x: float
    y: float
    label: str = ""


@dataclass(frozen=True)
class Tradeoff:
    """What is drawn.

    Attributes:
        clean, attacked: points of the two lines, by margin.
        marked: policies on the line of the attacked images, with their names.
        ticks: of both axes: share, x on the axis below, y on the axis to the left.
    """

    clean: tuple[Spot, ...]
    attacked: tuple[Spot, ...]
    marked: tuple[Spot, ...]
    ticks: tuple[tuple[float, float, float], ...]

    @staticmethod
    def line(spots: Sequence[Spot]) -> str:
        """As the `points` of an SVG polyline."""
        return " ".join(f"{spot.x:.1f},{spot.y:.1f}" for spot in spots)

    @property
    def frame(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom edge of the field in which lines are drawn."""
        return _LEFT, _TOP, WIDTH - _RIGHT, HEIGHT - _BOTTOM


def review_of(rates: RatesItem) -> float:
    """Share of the images that are left to a person: the mean of the two labels, as calibration counts it."""
    return (rates.review_safe.value + rates.review_unsafe.value) / 2


def tradeoff(curve: Sequence[CurvePoint], policies: Sequence[tuple[str, TriedPolicy]]) -> Tradeoff:
    """Lay out a curve.

    Args:
        curve: by margin.
        policies: to mark, with their names.
    """
    return Tradeoff(
        clean=tuple(_spot(point.clean, point.clean) for point in curve),
        attacked=tuple(_spot(point.clean, point.attacked) for point in curve),
        marked=tuple(_spot(policy.clean, policy.attacked, name) for name, policy in policies),
        ticks=tuple((share, _x(share), _y(share)) for share in TICKS),
    )


def _spot(clean: RatesItem, errs: RatesItem, label: str = "") -> Spot:
    """Where the work is of the clean images, of which there are many, and the errors of either."""
    return Spot(_x(review_of(clean)), _y(errs.false_negative.value), label)


def _x(share: float) -> float:
    return round(_LEFT + share * (WIDTH - _LEFT - _RIGHT), 2)


def _y(share: float) -> float:
    return round(HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM), 2)
