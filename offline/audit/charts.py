"""Which charts a report has: from rows and traces to bars and curves."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count

from offline.audit.certified import RADII
from offline.audit.pictures import Axes, Bars, Curve, Point, answer_bars, line_chart
from offline.audit.record import Setting
from offline.audit.rows import CertifiedRow, Mean, Row, Trace
from offline.benchmarks.intervals import Accuracy

_TICKS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)


@dataclass(frozen=True)
class Chart:
    """A chart (markup) and its title; `first` marks those of the setting that the verdict is about."""

    title: str
    svg: str
    first: bool


@dataclass(frozen=True)
class _Measured:
    """One figure of a row that curves are drawn of: robust accuracy, or a mean average precision."""

    row: Row
    what: str
    clean: Accuracy | Mean
    attacked: Accuracy | Mean


def answer_charts(rows: Iterable[Row], headline: Setting) -> list[Chart]:
    """One chart a setting: the verdicts on clean and attacked images of each system and label."""
    by_setting: dict[Setting, list[Bars]] = {}
    for row in rows:
        if row.answers and not row.set:
            name = f"{row.system}: {row.label} images (n = {row.total})"
            bars = Bars(name, tuple((version, row.answers[version]) for version in ("clean", "attacked")))
            by_setting.setdefault(row.setting, []).append(bars)
    charts = []
    for number, (setting, groups) in enumerate(by_setting.items()):
        title = f"Verdicts on clean and attacked images, {setting}"
        charts.append(Chart(title, answer_bars(f"bars-{number}", title, groups), setting == headline))
    return charts


def curve_charts(rows: Iterable[Row]) -> list[Chart]:
    """Figures by radius, where there are several for a number of steps, and by steps, where there are for a radius."""
    measured = [one for row in rows if not row.set for one in _measured(row)]
    numbers = count()
    charts = []
    for by_radius in (True, False):
        families: dict[tuple[str, float, str], list[_Measured]] = {}
        for one in measured:
            setting = one.row.setting
            families.setdefault((setting.norm, setting.steps if by_radius else setting.eps, one.what), []).append(one)
        for family in families.values():
            chart = _curve_chart(f"curves-{next(numbers)}", family, by_radius=by_radius)
            if chart is not None:
                charts.append(chart)
    return charts


def certified_charts(rows: Iterable[CertifiedRow]) -> list[Chart]:
    """Certified accuracy by radius: one chart a label, with a curve for each system and form of the certificate."""
    families: dict[str, list[CertifiedRow]] = {}
    for row in rows:
        if not row.set:
            families.setdefault(row.label, []).append(row)
    charts = []
    for number, (label, family) in enumerate(families.items()):
        what = f"{label} images answered {label}" if label else "right answers"
        title = f"Certified {what} by radius, l2"
        curves = [
            Curve(f"{row.system}, {row.form}", tuple(_point(eps, share) for eps, share in row.points)) for row in family
        ]
        ticks = ((0.0, "0"), *((eps, f"{round(255 * eps)}/255") for eps in RADII))
        axes = Axes("radius, l2 at the encoder's input", "percent, with 95 % band", ticks)
        charts.append(Chart(title, line_chart(f"certified-{number}", title, axes, curves), first=True))
    return charts


def loss_charts(traces: Iterable[Trace], headline: Setting) -> list[Chart]:
    """One chart an attack and setting: the mean of the highest objective so far, by updates."""
    families: dict[tuple[str, Setting], list[Trace]] = {}
    for trace in traces:
        families.setdefault((trace.attack, trace.setting), []).append(trace)
    charts = []
    for number, ((attack, setting), family) in enumerate(families.items()):
        title = f"Objective of {attack} by updates, {setting}"
        curves = [
            Curve(f"{t.system} ({t.images} images)", tuple(Point(float(x), y, y, y) for x, y in t.points))
            for t in family
        ]
        last = max(x for trace in family for x, _ in trace.points)
        ticks = tuple((float(tick), str(tick)) for tick in _TICKS if tick <= last)
        axes = Axes("updates of the image, drawn as log(1 + updates)", "mean objective", ticks, None, log=True)
        charts.append(Chart(title, line_chart(f"loss-{number}", title, axes, curves), setting == headline))
    return charts


def _measured(row: Row) -> list[_Measured]:
    if row.clean is not None and row.robust is not None:
        return [_Measured(row, f"{row.label} images answered {row.label}" if row.label else "right answers", row.clean,
                          row.robust)]  # fmt: skip
    means = row.means.items()
    return [_Measured(row, f"mean {name.replace('_', ' ')}", m["clean"], m["attacked"]) for name, m in means]


def _curve_chart(identity: str, family: Sequence[_Measured], *, by_radius: bool) -> Chart | None:
    """All systems' curves of one figure, from the clean one on; None where there is only one place on the axis."""

    def place(setting: Setting) -> float:
        return setting.eps if by_radius else float(setting.steps)

    places = sorted({place(one.row.setting) for one in family})
    if len(places) < 2:
        return None
    first, what = family[0].row.setting, family[0].what
    curves = []
    for system in dict.fromkeys(one.row.system for one in family):
        own = sorted((one for one in family if one.row.system == system), key=lambda one: place(one.row.setting))
        points = [(place(one.row.setting), one.attacked) for one in own]
        start = [] if points[0][0] == 0 else [(0.0, own[0].clean)]
        curves.append(Curve(system, tuple(_point(x, value) for x, value in (*start, *points))))
    if by_radius:
        title = f"{what[0].upper()}{what[1:]} by radius, {first.norm}, {first.steps} steps"
        names = [str(Setting(first.norm, eps, 1)).split(" ")[1].rstrip(",") for eps in places]
        x_name = f"radius, {first.norm}" + (" at 224 px" if first.norm == "l2" else "")
    else:
        title = f"{what[0].upper()}{what[1:]} by steps, {str(first).split(',')[0]}"
        names, x_name = [str(round(steps)) for steps in places], "steps of the attack, drawn as log(1 + steps)"
    ticks = ((0.0, "clean"), *((x, name) for x, name in zip(places, names, strict=True) if x > 0))
    axes = Axes(x_name, "percent, with 95 % band", ticks, log=not by_radius)
    return Chart(title, line_chart(identity, title, axes, curves), first=True)


def _point(x: float, value: Accuracy | Mean) -> Point:
    low, high = value.interval
    return Point(x, 100 * value.value, 100 * low, 100 * high)
