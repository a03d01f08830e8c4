"""Grids of pictures with captions, as in the paper's Figures 4, 5, 6 and 10. Knows no encoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_GAP_PX, _LINE_PX, _FONT_PX = 8, 15, 12
_MIN_CELL_PX, _MAX_CELL_PX, _TITLE_LINES = 112, 224, 3
_TEXT, _PAPER, _EMPTY = "#1A1A1A", "#FFFFFF", "#ECECEC"


@dataclass(frozen=True)
class Cell:
    """One place of a grid.

    Attributes:
        picture: RGB; None for words in its place, or for what is still to come.
        caption: below the picture, in one line.
        words: in the place of the picture.
    """

    picture: Image.Image | None
    caption: str = ""
    words: str = ""


def draw_grid(columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, note: str = "") -> Image.Image:
    """Draw rows of cells below the columns' titles.

    All cells are squares of the largest picture's side, between 112 and 224 px; smaller pictures are enlarged to it
    without smoothing, larger ones are reduced.

    Args:
        columns: titles; long ones are broken into lines.
        rows: as many cells each as there are columns.
        note: one line below everything.
    """
    sides = [max(cell.picture.size) for row in rows for cell in row if cell.picture is not None]
    side = min(max([_MIN_CELL_PX, *sides]), _MAX_CELL_PX)
    titles = [_broken(title, side, _TITLE_LINES) for title in columns]
    head = _GAP_PX + _LINE_PX * max(map(len, titles)) + _GAP_PX // 2
    step = side + _LINE_PX + _GAP_PX
    width = _GAP_PX + len(columns) * (side + _GAP_PX)
    grid = Image.new("RGB", (width, head + len(rows) * step + (_LINE_PX + _GAP_PX if note else 0)), _PAPER)
    draw = ImageDraw.Draw(grid)
    for i, lines in enumerate(titles):
        left = _GAP_PX + i * (side + _GAP_PX)
        for number, line in enumerate(lines):
            _write(draw, (left, _GAP_PX + number * _LINE_PX), line)
    for j, row in enumerate(rows):
        for i, cell in enumerate(row):
            _draw_cell(grid, draw, (_GAP_PX + i * (side + _GAP_PX), head + j * step), side, cell)
    if note:
        _write(draw, (_GAP_PX, head + len(rows) * step), _shortened(note, width - 2 * _GAP_PX))
    return grid


def _draw_cell(grid: Image.Image, draw: ImageDraw.ImageDraw, at: tuple[int, int], side: int, cell: Cell) -> None:
    left, top = at
    if cell.picture is not None:
        grid.paste(_fitted(cell.picture, side), at)
    elif cell.words:
        for number, line in enumerate(_broken(cell.words, side, side // _LINE_PX)):
            _write(draw, (left, top + number * _LINE_PX), line)
    else:
        draw.rectangle((left, top, left + side - 1, top + side - 1), fill=_EMPTY)
    if cell.caption:
        _write(draw, (left, top + side + 1), _shortened(cell.caption, side))


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    scale = side / max(picture.size)
    if scale == 1:
        return picture
    width, height = (max(1, round(scale * length)) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX)


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], words: str) -> None:
    draw.text(at, words, _TEXT, _font())


def _broken(words: str, width_px: int, most: int) -> list[str]:
    """At most so many lines of a width, broken after spaces, '/', '-', '_' and ':'; what is too long is cut."""
    lines = [""]
    for piece in _pieces(_one_line(words)):
        if lines[-1] and _width(lines[-1] + piece.rstrip()) > width_px:
            lines[-1] = lines[-1].rstrip()
            lines.append("")
        lines[-1] += piece
    if len(lines) > most:
        lines = [*lines[: most - 1], "".join(lines[most - 1 :])]
    return [_shortened(line.rstrip(), width_px) for line in lines]


def _pieces(words: str) -> list[str]:
    pieces = [""]
    for character in words:
        pieces[-1] += character
        if character in " /-_:":
            pieces.append("")
    return pieces


def _shortened(words: str, width_px: int) -> str:
    """One line, its middle left out where it is too long: both ends of a name tell it from others."""
    words = _one_line(words)
    kept, full = len(words), words
    while kept > 1 and _width(words) > width_px:
        kept -= 1
        words = full[: (kept + 1) // 2] + "…" + full[len(full) - kept // 2 :]
    return words


def _one_line(words: str) -> str:
    """Without line breaks and other characters that are not for printing, lone surrogates among them."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in words)


def _width(words: str) -> float:
    return _font().getlength(words)


@cache
def _font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and has letters of most alphabets."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), _FONT_PX)
