"""Heat map: the attributions of a grid as shapes to lay over a picture, and as words for whoever does not see them.

The sign is in the pattern as well as in the colour, and the strongest cells carry marks that the words refer to.
"""

from collections.abc import Sequence
from dataclasses import dataclass

MARKED = 3
"""Cells of each sign that are marked and put into words."""
_MOST_OPAQUE = 0.8
_FAINT = 0.04  # of the strongest cell; weaker ones would only make the picture hazy
_ROWS, _COLUMNS = ("upper", "middle", "lower"), ("left", "centre", "right")
_POSITIVE_MARKS, _NEGATIVE_MARKS = "123456789", "abcdefghi"


@dataclass(frozen=True)
class Cell:
    """One cell of the grid.

    Attributes:
        row, column: 0-based, from the upper left.
        value: cosine that it adds, or takes away where it is negative.
        opacity: 0 to 1, in proportion to the strength.
        mark: that stands on it; empty for none.
        place: in words.
    """

    row: int
    column: int
    value: float
    opacity: float
    mark: str
    place: str


@dataclass(frozen=True)
class HeatMap:
    """A grid of attributions, ready to be drawn in a square of `size` by `size` units.

    Attributes:
        size: rows, and columns.
        cells: those that are drawn.
        added, taken: the marked cells of each sign, strongest first.
        total_added, total_taken: sums of all cells of each sign, drawn or not.
    """

    size: int
    cells: tuple[Cell, ...]
    added: tuple[Cell, ...]
    taken: tuple[Cell, ...]
    total_added: float
    total_taken: float


def heat_map(grid: Sequence[Sequence[float]]) -> HeatMap:
    """Lay out a grid.

    Args:
        grid: as many rows as columns, at least one, from the upper left; finite.

    Raises:
        ValueError: it is not square.
    """
    size = len(grid)
    if not size or any(len(row) != size for row in grid):
        raise ValueError(f"a heat map has as many rows as columns, got {[len(row) for row in grid]}")
    values = [(value, row, column) for row, line in enumerate(grid) for column, value in enumerate(line)]
    strongest = max(abs(value) for value, _, _ in values)
    marks = _marks(values)

    def cell(value: float, row: int, column: int) -> Cell:
        share = abs(value) / strongest
        place = f"row {row + 1}, column {column + 1} ({_third(row, size, _ROWS)} {_third(column, size, _COLUMNS)})"
        return Cell(row, column, value, round(_MOST_OPAQUE * share, 3), marks.get((row, column), ""), place)

    drawn = [cell(*each) for each in values if strongest and abs(each[0]) >= _FAINT * strongest]
    marked = sorted((each for each in drawn if each.mark), key=lambda each: each.mark)
    return HeatMap(
        size,
        tuple(drawn),
        tuple(each for each in marked if each.value > 0),
        tuple(each for each in marked if each.value < 0),
        sum(value for value, _, _ in values if value > 0),
        sum(value for value, _, _ in values if value < 0),
    )


def _marks(values: Sequence[tuple[float, int, int]]) -> dict[tuple[int, int], str]:
    """By row and column: numbers for those that add most, letters for those that take most away."""
    added = sorted((each for each in values if each[0] > 0), reverse=True)[:MARKED]
    taken = sorted(each for each in values if each[0] < 0)[:MARKED]
    marked = [*zip(added, _POSITIVE_MARKS, strict=False), *zip(taken, _NEGATIVE_MARKS, strict=False)]
    return {(row, column): mark for (_, row, column), mark in marked}


def _third(at: int, size: int, names: Sequence[str]) -> str:
    return names[min(len(names) - 1, at * len(names) // size)]
