"""The grid of a run while it runs: a file that is replaced every two seconds by what has been found so far."""

import time
from collections.abc import Callable, Sequence

from PIL import Image
from torch import Tensor

from offline.inversion.pictures import Cell, draw_grid
from offline.inversion.problem import Target
from offline.inversion.store import GRID_NAME, PREVIEW_NAME, Record, Store, to_picture, write_picture

EVERY_S = 2.0
_SHARE = 0.05  # of the time that drawing may take
_PREVIEW_ROWS, _GRID_ROWS = 12, 48
Place = tuple[str, str, int]
"""(encoder, target id, seed)."""


class Preview:
    """Pictures of a run by their place, and the file that shows them.

    A preview has at most 12 rows, those around what is being looked for; drawing it takes at most a twentieth of the
    time, however large the grid is. The last picture, `grid.png`, has the first 48 rows.
    """

    def __init__(
        self,
        store: Store,
        encoders: Sequence[str],
        seeds: Sequence[int],
        *,
        every_s: float = EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with no pictures.

        Args:
            store: finished pictures are read from there.
            encoders, seeds: the columns.
            every_s: seconds between two pictures.
            clock: seconds.
        """
        self._store, self._encoders, self._seeds = store, tuple(encoders), tuple(seeds)
        self._every_s, self._clock, self._next_s = every_s, clock, -float("inf")
        self._targets: list[Target] = []
        self._finished: dict[Place, float] = {}
        self._running: dict[Place, Cell] = {}

    def show_targets(self, targets: Sequence[Target]) -> None:
        """Say what the rows are; of several encoders' targets, whose squares differ, the first are shown."""
        self._targets = self._targets or list(targets)

    def finish(self, records: Sequence[Record]) -> None:
        """Take note of what the store has."""
        for record in records:
            place = (record.encoder, record.target, record.seed)
            self._finished[place] = record.similarity
            self._running.pop(place, None)

    def watch(self, places: Sequence[Place], update: int, pixels: Tensor, similarity: Tensor) -> None:
        """Show the best so far of a batch, if it is time to.

        Args:
            places: b of them.
            update: updates done.
            pixels: (b, 3, h, w) in [0, 1].
            similarity: (b,).
        """
        now = self._clock()
        if now < self._next_s:
            return
        for place, picture, value in zip(places, pixels, similarity.tolist(), strict=True):
            self._running[place] = Cell(to_picture(picture), f"{value:.3f}, step {update}")
        self.draw({place[1] for place in places})
        self._next_s = max(now + self._every_s, self._clock() + (self._clock() - now) / _SHARE)

    def draw(self, current: set[str]) -> None:
        """Replace preview.png by the rows around those of the targets `current`."""
        first = next((i for i, target in enumerate(self._targets) if target.id in current), 0)
        first = max(0, min(first, len(self._targets) - _PREVIEW_ROWS))
        picture = self._grid(self._targets[first : first + _PREVIEW_ROWS])
        write_picture(self._store.path / PREVIEW_NAME, picture, compress_level=1)

    def draw_grid(self) -> None:
        """Write grid.png."""
        write_picture(self._store.path / GRID_NAME, self._grid(self._targets[:_GRID_ROWS]))

    def _grid(self, targets: Sequence[Target]) -> Image.Image:
        columns = [(encoder, seed) for encoder in self._encoders for seed in self._seeds]
        several = len(self._seeds) > 1
        texts = all(target.picture is None for target in targets)
        titles = ["text" if texts else "original"]
        titles += [f"{encoder}, seed {seed}" if several else encoder for encoder, seed in columns]
        rows = [[_head(target), *(self._cell(name, target.id, seed) for name, seed in columns)] for target in targets]
        left = len(self._targets) - len(targets)
        return draw_grid(titles, rows, note=f"{len(targets)} of {len(self._targets)} rows" if left else "")

    def _cell(self, encoder: str, target: str, seed: int) -> Cell:
        place = (encoder, target, seed)
        if place in self._finished:
            return Cell(self._store.picture(encoder, target, seed), f"{self._finished[place]:.3f}")
        return self._running.get(place, Cell(None))


def _head(target: Target) -> Cell:
    if target.picture is None:
        return Cell(None, words=target.label)
    return Cell(target.picture, target.label)
