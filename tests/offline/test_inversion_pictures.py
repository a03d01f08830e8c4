"""Grids: every cell at its place, readable words, and any size of pictures."""

import numpy as np
import pytest
from PIL import Image

from offline.inversion.pictures import Cell, draw_grid


def solid(colour: tuple[int, int, int], side: int = 128) -> Image.Image:
    return Image.new("RGB", (side, side), colour)


def colours(grid: Image.Image) -> set[tuple[int, int, int]]:
    return {tuple(map(int, row)) for row in np.unique(np.asarray(grid).reshape(-1, 3), axis=0)}  # type: ignore[misc]


def test_every_picture_is_at_its_place_as_it_is() -> None:
    reds = [[solid((10 * i, 20 * j, 200)) for i in range(3)] for j in range(2)]
    grid = np.asarray(draw_grid(["a", "b", "c"], [[Cell(p, "x") for p in row] for row in reds]))
    for j in range(2):
        for i in range(3):
            rows, columns = np.nonzero((grid == (10 * i, 20 * j, 200)).all(axis=2))
            assert (int(np.ptp(rows)), int(np.ptp(columns)), len(rows)) == (127, 127, 128 * 128)
            assert columns.min() == 8 + i * 136
    assert grid.shape[1] == 8 + 3 * 136


@pytest.mark.parametrize(("side", "cell"), [(16, 112), (128, 128), (224, 224), (448, 224)])
def test_small_pictures_are_enlarged_and_large_ones_reduced(side: int, cell: int) -> None:
    grid = np.asarray(draw_grid(["a"], [[Cell(solid((9, 9, 200), side))]]))
    assert int((grid == (9, 9, 200)).all(axis=2).sum()) == cell**2


def test_words_are_drawn_and_what_is_to_come_is_grey() -> None:
    plain = draw_grid(["a"], [[Cell(None)]])
    assert (236, 236, 236) in colours(plain)
    words = draw_grid(["a"], [[Cell(None, words="a very long text about a cat on a mat " * 20)]])
    assert (26, 26, 26) in colours(words)
    assert words.size == plain.size
    caption = draw_grid(["a"], [[Cell(solid((255, 255, 255), 112), "0.987")]])
    below = np.asarray(caption)[-24:]
    assert bool((below < 100).any())


def test_long_and_odd_titles_fit() -> None:
    odd = "local-dir:" + "x" * 500
    for title in (odd, "zwei\nZeilen", "\ud800 lone", "日本語", "", "a" * 3 + " " * 300):
        grid = draw_grid([title, "b"], [[Cell(solid((1, 2, 3))), Cell(solid((4, 5, 6)))]], note=title)
        assert grid.width == 8 + 2 * 136
        left = np.asarray(grid)[:8, :]  # above the titles
        assert bool((left == 255).all())
