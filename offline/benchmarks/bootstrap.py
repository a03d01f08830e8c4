"""Figures with 95 % intervals: the bootstrap over the things that were measured, and Wilson's interval for counts.

A figure is a function of weighted sums, so that one set of resamples serves all figures of the same things, and the
difference between two observers of the same things is paired.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offline.errors import PlanError
from perception.intervals import wilson_interval

Floats = NDArray[np.float64]
Figure = Callable[[Floats], Floats]
"""From (r, n) weights of n things to (r,) values, NaN where there is nothing to divide by."""


class Draws:
    """Resamples of n things: `weights` is (1 + resamples, n); row 0 is all of them once, for the figure itself."""

    def __init__(self, things: int, resamples: int, seed: int) -> None:
        """Draw them, with replacement.

        Raises:
            PlanError: nothing to draw from, fewer than 2 resamples, which give no interval, or a negative seed.
        """
        if things < 1 or resamples < 2 or seed < 0:
            raise PlanError(
                f"a bootstrap needs 1 thing or more, 2 resamples or more and a seed of 0 or more, got {things}, "
                f"{resamples} and {seed}"
            )
        drawn = np.random.default_rng(seed).multinomial(things, np.full(things, 1 / things), size=resamples)
        self.weights: Floats = np.concatenate([np.ones((1, things)), drawn])


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval; None where it is not defined."""

    value: float | None
    interval: tuple[float, float] | None

    @classmethod
    def of(cls, values: Floats) -> "Estimate":
        """From a figure's values on `Draws`: the middle 95 % of the resamples that define one."""
        if not np.isfinite(values[0]):
            return cls(None, None)
        drawn = values[1:][np.isfinite(values[1:])]
        if not len(drawn):
            return cls(float(values[0]), None)
        low, high = np.quantile(drawn, (0.025, 0.975))
        return cls(float(values[0]), (float(low), float(high)))

    @classmethod
    def of_count(cls, count: int, total: int) -> "Estimate":
        """A share of things that were counted, with Wilson's interval, which has a width at 0 and 1 too."""
        return cls(count / total, wilson_interval(count, total)) if total else cls(None, None)

    def percent(self) -> str:
        """In percent, such as '56.2 [50.9, 61.3]'; '-' where it is not defined."""
        if self.value is None:
            return "-"
        spread = "" if self.interval is None else f" [{100 * self.interval[0]:.1f}, {100 * self.interval[1]:.1f}]"
        return f"{100 * self.value:.1f}{spread}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "value": None if self.value is None else round(self.value, 4),
            "interval95": None if self.interval is None else [round(x, 4) for x in self.interval],
        }


def ratio(numerator: NDArray[Any], denominator: NDArray[Any]) -> Figure:
    """The weighted sum of one (n,) column over that of another."""
    top, bottom = numerator.astype(float), denominator.astype(float)

    def figure(weights: Floats) -> Floats:
        return divided(weights @ top, weights @ bottom, missing=np.nan)

    return figure


def divided(numerator: Floats, denominator: Floats, missing: float = 0.0) -> Floats:
    """Element by element, `missing` where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full_like(numerator, missing), where=denominator != 0)
