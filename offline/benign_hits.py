"""Draws the benign test hits: images that the demo pools hold as buffer and unsafe exemplars, and nothing else.

As anti-virus scanners have their harmless test file, an integrator can send these and see a positive. They are bold
and unlike photographs, so that they match themselves after re-encoding and resizing, and match nothing else.
"""

import math
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE_PX = 384
Canvas = ImageDraw.ImageDraw


def _label(canvas: Canvas, text: str, y: int, fill: str) -> None:
    canvas.rectangle((24, y - 26, SIDE_PX - 24, y + 26), fill="black")
    canvas.text((SIDE_PX / 2, y), text, fill=fill, font=ImageFont.load_default(34), anchor="mm")


def _stripes(canvas: Canvas) -> None:
    for i, x in enumerate(range(-SIDE_PX, SIDE_PX, 48)):
        colour = "#d4001a" if i % 2 else "#ffffff"
        canvas.polygon([(x, 0), (x + 48, 0), (x + 48 + SIDE_PX, SIDE_PX), (x + SIDE_PX, SIDE_PX)], fill=colour)
    canvas.regular_polygon((SIDE_PX / 2, 150, 96), 8, rotation=22, fill="#7a0010", outline="white", width=10)
    canvas.line((144, 102, 240, 198), fill="white", width=26)
    canvas.line((240, 102, 144, 198), fill="white", width=26)
    _label(canvas, "TEST HIT: UNSAFE 1", 320, "#ff5566")


def _burst(canvas: Canvas) -> None:
    centre = SIDE_PX / 2
    for i in range(24):
        a, b = (2 * math.pi * (i + d) / 24 for d in (0, 1))
        far = SIDE_PX * 0.75
        points = [(centre, centre), *((centre + far * math.cos(t), centre + far * math.sin(t)) for t in (a, b))]
        canvas.polygon(points, fill="#ff7a00" if i % 2 else "#1a0033")
    canvas.regular_polygon((centre, centre, 84), 3, fill="#ffee00", outline="#1a0033", width=14)
    canvas.rectangle((centre - 9, 152, centre + 9, 198), fill="#1a0033")
    _label(canvas, "TEST HIT: UNSAFE 2", 340, "#ffb060")


def _checks(canvas: Canvas) -> None:
    step = SIDE_PX // 8
    for row in range(8):
        for column in range(8):
            colour = "#0038c8" if (row + column) % 2 else "#ffe14d"
            canvas.rectangle((column * step, row * step, (column + 1) * step, (row + 1) * step), fill=colour)
    canvas.ellipse((112, 60, 272, 220), fill="#ffffff", outline="#001a66", width=12)
    canvas.text((SIDE_PX / 2, 140), "?", fill="#001a66", font=ImageFont.load_default(130), anchor="mm")
    _label(canvas, "TEST HIT: BUFFER 1", 310, "#9db8ff")


def _rings(canvas: Canvas) -> None:
    canvas.rectangle((0, 0, SIDE_PX, SIDE_PX), fill="#00e0a0")
    for i, radius in enumerate(range(260, 0, -26)):
        colour = "#5a0078" if i % 2 else "#00e0a0"
        box = (SIDE_PX / 2 - radius, 150 - radius, SIDE_PX / 2 + radius, 150 + radius)
        canvas.ellipse(box, fill=colour)
    _label(canvas, "TEST HIT: BUFFER 2", 330, "#7dffd8")


DRAWINGS: dict[str, Callable[[Canvas], None]] = {
    "unsafe-1": _stripes,
    "unsafe-2": _burst,
    "buffer-1": _checks,
    "buffer-2": _rings,
}


def draw(folder: Path) -> list[Path]:
    """Draw every test hit as `<pool>-<n>.png`, 384 x 384 RGB, and return the paths."""
    paths = []
    for name, drawing in DRAWINGS.items():
        image = Image.new("RGB", (SIDE_PX, SIDE_PX), "white")
        drawing(ImageDraw.Draw(image))
        paths.append(folder / f"{name}.png")
        image.save(paths[-1], optimize=True)
    return paths
