"""The picture of cue-conflict figures: shape bias by class, people beside encoders, as Geirhos et al. 2019 draw it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from offline.benchmarks.cue_conflict_figures import Observed
from offline.errors import PlanError

SUFFIXES = (".png", ".svg")
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
_MARKERS = ("D", "o", "s", "^", "v", "P", "X")


def require_picture(path: Path) -> None:
    """Find out before the work whether a picture can be written under that name.

    Raises:
        PlanError: it ends in neither .png nor .svg, or its folder is not there.
    """
    if not path.parent.is_dir():
        raise PlanError(f"the folder of the picture is not there: {path.parent}")
    if path.suffix.lower() not in SUFFIXES:
        raise PlanError(f"a picture is written as {' or '.join(SUFFIXES)}, got {path.name!r}")


def draw_shape_bias(observers: Sequence[Observed], path: Path) -> None:
    """Draw one row a class and one marker an observer, at the share of shape among shape and texture decisions.

    Dashed lines are the observers' figures over all classes; a class in which an observer chose neither cue has no
    marker of it. The picture needs no other file, and holds no date.

    Raises:
        PlanError: see `require_picture`.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    require_picture(path)
    classes = list(observers[0].by_class)
    rows = range(len(classes))
    figure = Figure(figsize=(8, 7.5), layout="constrained")
    axes = figure.subplots()
    for number, observed in enumerate(observers):
        colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
        points = [(estimate.value, row) for row, estimate in zip(rows, observed.by_class.values(), strict=True)]
        known = [(value, row) for value, row in points if value is not None]
        overall = observed.figures["shape_bias"].value
        label = observed.observer if overall is None else f"{observed.observer} ({overall:.2f})"
        axes.scatter(
            [value for value, _ in known], [row for _, row in known], color=colour, marker=marker, s=45, label=label,
            zorder=3,
        )  # fmt: skip
        if overall is not None:
            axes.axvline(overall, color=colour, linestyle="--", linewidth=1)
    axes.set_yticks(list(rows), classes)
    axes.invert_yaxis()
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("share of shape among shape and texture decisions")
    axes.set_ylabel("class of the shape")
    axes.grid(axis="y", linewidth=0.5, alpha=0.5)
    axes.secondary_xaxis("top", functions=(_rest, _rest)).set_xlabel("share of texture")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else {"Software": None}
    with rc_context({"svg.hashsalt": "cue-conflict", "svg.fonttype": "none"}):  # else ids are random, and text is paths
        figure.savefig(path, dpi=120, metadata=metadata)


def _rest(share: Any) -> Any:
    return 1 - np.asarray(share)
