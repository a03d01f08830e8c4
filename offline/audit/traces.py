"""The loss of each image on its way through an attack, at a few of its updates."""

from torch import Tensor

from offline.audit.record import DECIMALS

_MARKS = frozenset(factor * 10**power for power in range(5) for factor in (1, 2, 5)) | {0}


class Traces:
    """The highest objective of each item at some updates of an attack's first run."""

    def __init__(self, items: int, steps: int) -> None:
        self._points: list[list[tuple[int, float]]] = [[] for _ in range(items)]
        self._marks, self._last, self._first_run = _MARKS | {steps}, -1, True

    def watch(self, rows: Tensor, updates: int, best: Tensor) -> None:
        """See `offline.attacks.search.Watch`."""
        self._first_run &= updates > self._last
        self._last = updates
        if self._first_run and updates in self._marks:
            for row, value in zip(rows.tolist(), best.tolist(), strict=True):
                self._points[row].append((updates, round(value, DECIMALS)))

    def of(self, item: int) -> tuple[tuple[int, float], ...]:
        """The points of one item."""
        return tuple(self._points[item])
