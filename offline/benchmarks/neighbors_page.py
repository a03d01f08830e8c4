"""Nearest neighbours as pictures: one PNG grid, and one HTML page that needs nothing else.

Draws what `offline.benchmarks.neighbors` wrote down, and reads the gallery's files for it; loads no encoder. What comes
from file names is text wherever it is shown, never markup.
"""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image, ImageDraw, ImageFont

from offline.benchmarks.neighbors import PICTURES_NAME, Near, NeighborsImages, NeighborsPlan, NeighborsRecord
from offline.benchmarks.neighbors import overlap_figures as overlap_figures
from offline.data.files import read_image_file
from offline.runs import write_atomically

GRID_NAME, PAGE_NAME = "grid.png", "grid.html"
VERSIONS = ("clean", "attacked")
_CELL_PX, _GAP_PX, _LABEL_PX, _LINE_PX, _HEAD_PX, _FRAME_PX = 112, 8, 220, 15, 24, 4
_KEPT, _LOST, _TEXT = "#0072B2", "#AAAAAA", "#1A1A1A"
_SHOWN_PX = 144


@dataclass(frozen=True)
class Cell:
    """One picture of a row.

    Attributes:
        id: of the image.
        picture: RGB, small.
        similarity: to the row's query; None for the query itself.
        kept: it is a neighbour both clean and under attack.
    """

    id: str
    picture: Image.Image
    similarity: float | None
    kept: bool

    @property
    def uri(self) -> str:
        """The picture within a page."""
        buffer = io.BytesIO()
        self.picture.save(buffer, format="JPEG", quality=88)
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class Row:
    """A query in one version under one encoder, the query itself first."""

    encoder: str
    version: str
    overlap: float
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Block:
    """All rows of one query."""

    query: str
    rows: tuple[Row, ...]


def write_grid(
    records: Sequence[NeighborsRecord], images: NeighborsImages, plan: NeighborsPlan, run: Path
) -> tuple[Path, Path]:
    """Write the grid and the page into a run directory.

    Args:
        records: of one run, in any order.
        images: their gallery and queries.
        plan: of the run.
        run: where the pictures of the queries are.

    Returns:
        Where the PNG and the page are.

    Raises:
        DataMissing, DataError: a picture is not there any more.
    """
    blocks = list(_blocks(records, images, run))
    buffer = io.BytesIO()
    draw_grid(blocks).save(buffer, format="PNG")
    write_atomically(run / GRID_NAME, buffer.getvalue())
    write_atomically(run / PAGE_NAME, page(blocks, records, plan).encode("utf-8", "backslashreplace"))
    return run / GRID_NAME, run / PAGE_NAME


def page(blocks: Sequence[Block], records: Sequence[NeighborsRecord], plan: NeighborsPlan) -> str:
    """The HTML page, pictures included."""
    environment = Environment(
        loader=PackageLoader("offline.benchmarks"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("neighbors.html.j2").render(
        blocks=blocks,
        figures=overlap_figures(records),
        k=len(records[0].clean),
        eps=f"{plan.eps * 255:g}/255",
        steps=plan.steps,
        seed=plan.seed,
    )


def draw_grid(blocks: Sequence[Block]) -> Image.Image:
    """All rows as one picture; what is kept under attack has a thick blue frame."""
    columns = max(len(row.cells) for block in blocks for row in block.rows)
    height_of_row = _CELL_PX + _LINE_PX + _GAP_PX
    height = sum(_HEAD_PX + height_of_row * len(block.rows) + _GAP_PX for block in blocks)
    grid = Image.new("RGB", (_LABEL_PX + columns * (_CELL_PX + _GAP_PX) + _GAP_PX, height), "white")
    draw = ImageDraw.Draw(grid)
    top = 0
    for block in blocks:
        _write(draw, (_GAP_PX, top + 4), f"query {block.query}")
        top += _HEAD_PX
        for row in block.rows:
            _write(draw, (_GAP_PX, top + 30), row.encoder, _LABEL_PX - 2 * _GAP_PX)
            _write(draw, (_GAP_PX, top + 48), f"{row.version}, {100 * row.overlap:.0f} % kept")
            for i, cell in enumerate(row.cells):
                _draw_cell(grid, draw, (_LABEL_PX + i * (_CELL_PX + _GAP_PX), top), cell)
            top += height_of_row
        top += _GAP_PX
    return grid


def _draw_cell(grid: Image.Image, draw: ImageDraw.ImageDraw, at: tuple[int, int], cell: Cell) -> None:
    left, top = at
    picture = cell.picture.copy()
    picture.thumbnail((_CELL_PX - 2 * _FRAME_PX, _CELL_PX - 2 * _FRAME_PX))
    grid.paste(picture, (left + (_CELL_PX - picture.width) // 2, top + (_CELL_PX - picture.height) // 2))
    if cell.similarity is None:
        _write(draw, (left, top + _CELL_PX), "query")
        return
    frame = (left, top, left + _CELL_PX - 1, top + _CELL_PX - 1)
    draw.rectangle(frame, outline=_KEPT if cell.kept else _LOST, width=_FRAME_PX if cell.kept else 1)
    _write(draw, (left, top + _CELL_PX), f"{cell.similarity:.3f}{' kept' if cell.kept else ''}")


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], words: str, width_px: int = 0) -> None:
    """Words in ASCII, which is what the built-in font has for sure; cut from the left to a width."""
    text = words.encode("ascii", "backslashreplace").decode()
    font = _font()
    while width_px and len(text) > 1 and draw.textlength(text, font) > width_px:
        text = text[1:]
    draw.text(at, text, _TEXT, font)


@cache
def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(12)


def _blocks(records: Sequence[NeighborsRecord], images: NeighborsImages, run: Path) -> Iterator[Block]:
    @cache
    def small(file: Path) -> Image.Image:
        picture = read_image_file(file).copy()
        picture.thumbnail((_SHOWN_PX, _SHOWN_PX))
        return picture

    def cells(record: NeighborsRecord, version: str, found: Sequence[Near]) -> Iterator[Cell]:
        seen = small(run / PICTURES_NAME / f"{record.pictures}-{version}.png")
        yield Cell(record.query, seen, None, kept=False)
        for near in found:
            yield Cell(near.id, small(images.gallery / near.id), near.similarity, near.id in record.kept)

    for query in dict.fromkeys(record.query for record in records):
        rows = [
            Row(record.encoder, version, record.overlap, tuple(cells(record, version, found)))
            for record in records
            if record.query == query
            for version, found in zip(VERSIONS, (record.clean, record.attacked), strict=True)
        ]
        yield Block(query, tuple(rows))
