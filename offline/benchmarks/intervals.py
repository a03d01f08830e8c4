"""Accuracy: a share of right answers with its confidence interval."""

from dataclasses import asdict, dataclass
from typing import Any

from offline.errors import DataError
from perception.intervals import wilson_interval


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers.

    Raises:
        DataError: there are no answers, or more right ones than answers.
    """

    right: int
    total: int

    def __post_init__(self) -> None:
        if self.total < 1 or not 0 <= self.right <= self.total:
            raise DataError("accuracy", f"{self.right} right of {self.total} answers is no share")

    @property
    def value(self) -> float:
        """The share, in [0, 1]."""
        return self.right / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval, in [0, 1]; unlike the usual one it has a width at 0 and 1."""
        return wilson_interval(self.right, self.total)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "value": round(self.value, 4), "interval95": [round(x, 4) for x in self.interval]}
