"""Charts of a report as SVG: no script, no colour that is not also a pattern, a dash or a shape, and words for it all.

What comes out is markup that a page may hold as it is: text reaches it through an XML tree, which escapes it.
Coordinates are px of the `viewBox`.
"""

import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass

from offline.audit.rows import Answers
from perception.verdict import VerdictLabel

# After Okabe and Ito, for the colour-blind; some are darker, so that all stand out from white by 3:1 at least.
_LINES = ("#0072B2", "#D55E00", "#00785A", "#000000", "#A0508C", "#7A6A00")
_DASHES = ("", "7 4", "2 3", "10 3 2 3", "12 5", "1 5")
_SHAPES = ("circle", "square", "diamond", "triangle")
_FILLS = {VerdictLabel.SAFE: "answer-safe", VerdictLabel.REVIEW: "answer-review", VerdictLabel.UNSAFE: "answer-unsafe"}
_LETTERS = {VerdictLabel.SAFE: "S", VerdictLabel.REVIEW: "B", VerdictLabel.UNSAFE: "U"}
_WIDTH, _LEFT, _RIGHT, _TOP, _PLOT = 640, 62, 26, 16, 230
_LEGEND_LINE, _BAR, _BAR_STEP, _BAR_LEFT, _NARROW = 20, 22, 28, 80, 46


@dataclass(frozen=True)
class Point:
    """One point of a curve with its 95 % interval; `low` and `high` are `y` where there is none."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """One line of a chart; its points are sorted by x."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Axes:
    """How a chart is scaled and named.

    Attributes:
        x_name, y_name: with units.
        x_ticks: (value, text).
        y_range: of the values; for None it follows from the curves.
        log: x is drawn as log(1 + x), which shows 0 and thousands at once.
    """

    x_name: str
    y_name: str
    x_ticks: tuple[tuple[float, str], ...]
    y_range: tuple[float, float] | None = (0.0, 100.0)
    log: bool = False


@dataclass(frozen=True)
class Bars:
    """Stacked bars under one heading: the answers to the same images in several versions, by name of the version."""

    name: str
    answers: tuple[tuple[str, Answers], ...]


def patterns() -> str:
    """The fills of stacked bars; a page that has such bars holds this once."""
    root = ET.Element("svg", {"width": "0", "height": "0", "aria-hidden": "true", "class": "patterns"})
    holder = ET.SubElement(root, "defs")
    for label, colour, mark in (
        (VerdictLabel.SAFE, "#BFE0F2", ""),
        (VerdictLabel.REVIEW, "#F6D58A", "M0 8 L8 0"),
        (VerdictLabel.UNSAFE, "#F0A37A", "M0 0 L8 8 M0 8 L8 0"),
    ):
        size = {"width": "8", "height": "8", "patternUnits": "userSpaceOnUse"}
        tile = ET.SubElement(holder, "pattern", {"id": _FILLS[label], **size})
        ET.SubElement(tile, "rect", {"width": "8", "height": "8", "fill": colour})
        if mark:
            ET.SubElement(tile, "path", {"d": mark, "stroke": "#5A3A00", "stroke-width": "0.8", "fill": "none"})
    return _markup(root)


def answer_bars(identity: str, title: str, groups: Sequence[Bars]) -> str:
    """Stacked horizontal bars of S/B/U in percent.

    Args:
        identity: unique in the page.
        title: what is shown.
        groups: one after the other.
    """
    height = 34 + sum(24 + _BAR_STEP * len(group.answers) for group in groups)
    words = "; ".join(
        f"{group.name}, {name}: " + ", ".join(f"{label} {100 * s.value:.1f} %" for label, s in answers.shares.items())
        for group in groups
        for name, answers in group.answers
    )
    root = _root(identity, title, words, height)
    at = 4.0
    for i, label in enumerate(_LETTERS):
        left = _BAR_LEFT + 130 * i
        fill = {"fill": f"url(#{_FILLS[label]})", "stroke": "#333333"}
        ET.SubElement(root, "rect", {"x": str(left), "y": "4", "width": "16", "height": "16", **fill})
        _text(root, left + 22, 17, f"{_LETTERS[label]}: {label}")
    at += 26
    for group in groups:
        _text(root, 0, at + 16, group.name, {"font-weight": "bold"})
        at += 24
        for name, answers in group.answers:
            _text(root, _BAR_LEFT - 8, at + 16, name, {"text-anchor": "end"})
            _stack(root, at, answers)
            at += _BAR_STEP
    return _markup(root)


def _stack(root: ET.Element, at: float, answers: Answers) -> None:
    width = _WIDTH - _BAR_LEFT - _RIGHT
    left = float(_BAR_LEFT)
    for label, share in answers.shares.items():
        part = width * share.value
        if share.right:
            place = {"x": _px(left), "y": _px(at), "width": _px(part), "height": str(_BAR)}
            bar = ET.SubElement(root, "rect", {**place, "fill": f"url(#{_FILLS[label]})", "stroke": "#333333"})
            ET.SubElement(bar, "title").text = f"{label}: {share.right} of {share.total}"
        if part >= _NARROW:
            halo = {"text-anchor": "middle", "stroke": "#FFFFFF", "stroke-width": "3", "paint-order": "stroke"}
            _text(root, left + part / 2, at + 16, f"{_LETTERS[label]} {100 * share.value:.1f}", halo)
        left += part


def line_chart(identity: str, title: str, axes: Axes, curves: Sequence[Curve]) -> str:
    """Curves with their 95 % bands; see `answer_bars` for the arguments."""
    words = "; ".join(
        f"{curve.name}: " + ", ".join(f"{_number(p.y)} at {_number(p.x)}" for p in curve.points) for curve in curves
    )
    root = _root(identity, title, words, _TOP + _PLOT + 52 + _LEGEND_LINE * len(curves))
    scale = _Scale.of(axes, curves)
    _draw_axes(root, axes, scale)
    for i, curve in enumerate(curves):
        _draw_curve(root, scale, i, curve)
        top = _TOP + _PLOT + 56 + _LEGEND_LINE * i
        _line(root, i, [(_LEFT, top), (_LEFT + 44, top)])
        _marker(root, i, _LEFT + 22, top)
        _text(root, _LEFT + 52, top + 4, curve.name)
    return _markup(root)


@dataclass(frozen=True)
class _Scale:
    """From values to px."""

    log: bool
    x_low: float
    x_high: float
    y_low: float
    y_high: float
    y_ticks: tuple[float, ...]

    @classmethod
    def of(cls, axes: Axes, curves: Sequence[Curve]) -> "_Scale":
        points = [point for curve in curves for point in curve.points]
        xs = [*(point.x for point in points), *(value for value, _ in axes.x_ticks)]
        low, high = axes.y_range or (min(p.low for p in points), max(p.high for p in points))
        if high - low < 1e-9:
            low, high = low - 0.5, high + 0.5
        step = _round_step((high - low) / 5)
        first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
        return cls(
            axes.log, min(xs), max(xs), first * step, last * step, tuple(i * step for i in range(first, last + 1))
        )

    def x(self, value: float) -> float:
        at, low, high = (math.log1p(v) if self.log else v for v in (value, self.x_low, self.x_high))
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * ((at - low) / (high - low) if high > low else 0.5)

    def y(self, value: float) -> float:
        return _TOP + _PLOT * (1 - (value - self.y_low) / (self.y_high - self.y_low))


def _draw_axes(root: ET.Element, axes: Axes, scale: _Scale) -> None:
    for value in scale.y_ticks:
        y = scale.y(value)
        _path(root, [(_LEFT, y), (_WIDTH - _RIGHT, y)], {"stroke": "#CCCCCC"})
        _text(root, _LEFT - 6, y + 4, _number(value), {"text-anchor": "end"})
    last = -math.inf
    for value, name in axes.x_ticks:
        x = scale.x(value)
        _path(root, [(x, _TOP + _PLOT), (x, _TOP + _PLOT + 5)], {"stroke": "#333333"})
        if x - last >= 8 * len(name):  # what would overlap is left out
            _text(root, x, _TOP + _PLOT + 18, name, {"text-anchor": "middle"})
            last = x
    _path(root, [(_LEFT, _TOP), (_LEFT, _TOP + _PLOT), (_WIDTH - _RIGHT, _TOP + _PLOT)], {"stroke": "#333333"})
    middle = _TOP + _PLOT / 2
    _text(root, (_LEFT + _WIDTH - _RIGHT) / 2, _TOP + _PLOT + 36, axes.x_name, {"text-anchor": "middle"})
    turned = {"text-anchor": "middle", "transform": f"rotate(-90 14 {_px(middle)})"}
    _text(root, 14, middle, axes.y_name, turned)


def _draw_curve(root: ET.Element, scale: _Scale, number: int, curve: Curve) -> None:
    if any(point.low < point.high for point in curve.points):
        band = [(scale.x(p.x), scale.y(p.high)) for p in curve.points]
        band += [(scale.x(p.x), scale.y(p.low)) for p in reversed(curve.points)]
        colour = _LINES[number % len(_LINES)]
        _path(root, band, {"fill": colour, "fill-opacity": "0.14", "stroke": "none"}, closed=True)
    _line(root, number, [(scale.x(point.x), scale.y(point.y)) for point in curve.points])
    for point in curve.points:
        marker = _marker(root, number, scale.x(point.x), scale.y(point.y))
        span = "" if point.low == point.high else f" [{_number(point.low)}, {_number(point.high)}]"
        ET.SubElement(marker, "title").text = f"{curve.name}: {_number(point.y)}{span} at {_number(point.x)}"


def _line(root: ET.Element, number: int, points: Sequence[tuple[float, float]]) -> None:
    look = {"stroke": _LINES[number % len(_LINES)], "stroke-width": "2"}
    dash = _DASHES[number % len(_DASHES)]
    _path(root, points, look | ({"stroke-dasharray": dash} if dash else {}))


def _marker(root: ET.Element, number: int, x: float, y: float) -> ET.Element:
    """A small shape; with colour and dash it tells 12 curves apart."""
    shape, look = _SHAPES[number % len(_SHAPES)], {"fill": _LINES[number % len(_LINES)]}
    if shape == "circle":
        return ET.SubElement(root, "circle", {"cx": _px(x), "cy": _px(y), "r": "4", **look})
    corners = {
        "square": ((-4, -4), (4, -4), (4, 4), (-4, 4)),
        "diamond": ((0, -5), (5, 0), (0, 5), (-5, 0)),
        "triangle": ((0, -5), (5, 4), (-5, 4)),
    }[shape]
    return _path(root, [(x + dx, y + dy) for dx, dy in corners], look, closed=True)


def _path(
    root: ET.Element, points: Sequence[tuple[float, float]], look: dict[str, str], *, closed: bool = False
) -> ET.Element:
    steps = " L".join(f"{_px(x)} {_px(y)}" for x, y in points)
    return ET.SubElement(root, "path", {"d": f"M{steps}" + (" Z" if closed else ""), "fill": "none", **look})


def _text(root: ET.Element, x: float, y: float, words: str, look: dict[str, str] | None = None) -> None:
    ET.SubElement(root, "text", {"x": _px(x), "y": _px(y), **(look or {})}).text = words


def _root(identity: str, title: str, words: str, height: float) -> ET.Element:
    names = {"role": "img", "aria-labelledby": f"{identity}-title {identity}-words"}
    root = ET.Element("svg", {"class": "chart", "viewBox": f"0 0 {_WIDTH} {_px(height)}", **names})
    ET.SubElement(root, "title", {"id": f"{identity}-title"}).text = title
    ET.SubElement(root, "desc", {"id": f"{identity}-words"}).text = words
    return root


def _markup(root: ET.Element) -> str:
    return ET.tostring(root, encoding="unicode")


def _round_step(step: float) -> float:
    """The next 1, 2, 5, 10, ... times a power of ten."""
    power: float = 10.0 ** math.floor(math.log10(step) + 1e-9)
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _number(value: float) -> str:
    return f"{value:.4g}"
