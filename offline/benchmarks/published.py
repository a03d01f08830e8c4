"""Figures of a benchmark beside those that the paper prints, and which of them differ too much.

Owns the value, its table and its JSON. Published figures come from the encoders' cards. Knows no benchmark: a group is
a table of a card's `[published]` ("nights", "bapps_cnn"), a name one of its keys ("clean", "linf_4_255", "l2_3").
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from offline.benchmarks.intervals import Accuracy
from offline.errors import DataError
from perception.catalogue import card_of

TOLERATED_GAP = 0.5
"""Percentage points between a measured figure and the published one; more is flagged."""
LEGEND = f"Percent [95 % interval] (published; - for none); ! where they differ by more than {TOLERATED_GAP} points."
_DECIMALS = 4


@dataclass(frozen=True)
class Figure:
    """One figure of one encoder.

    Attributes:
        encoder: the name under which it was loaded, or what else a row is about, such as a detector.
        group, name: what was measured; see the module.
        measured: percent.
        count: images, triplets or queries that it was measured on.
        published: percent; None where there is none.
        interval: 95 % interval in percent; None where the figure is no share of `count`.

    Raises:
        DataError: a figure is not finite, or was measured on nothing.
    """

    encoder: str
    group: str
    name: str
    measured: float
    count: int
    published: float | None
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        numbers = [self.measured, *([] if self.published is None else [self.published]), *(self.interval or ())]
        if self.count < 1 or not all(map(math.isfinite, numbers)):
            raise DataError("benchmark", f"{self.group} {self.name} of {self.encoder}: {numbers} on {self.count}")

    @classmethod
    def of_share(cls, encoder: str, group: str, name: str, share: Accuracy) -> "Figure":
        """A share of right answers, with Wilson's interval and the published figure of the encoder's card."""
        low, high = share.interval
        published = published_figure(encoder, group, name)
        return cls(encoder, group, name, 100 * share.value, share.total, published, (100 * low, 100 * high))

    @classmethod
    def of_mean(cls, encoder: str, group: str, name: str, value: float, count: int) -> "Figure":
        """A mean in [0, 1] that is no share, with the published figure of the encoder's card."""
        return cls(encoder, group, name, 100 * value, count, published_figure(encoder, group, name))

    @property
    def gap(self) -> float | None:
        """Measured minus published, in percentage points; None where nothing is published."""
        return None if self.published is None else round(self.measured - self.published, _DECIMALS)

    @property
    def flagged(self) -> bool:
        """The gap is larger than `TOLERATED_GAP`, to either side."""
        return self.gap is not None and abs(self.gap) > TOLERATED_GAP

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "encoder": self.encoder,
            "group": self.group,
            "name": self.name,
            "measured": round(self.measured, _DECIMALS),
            "interval95": None if self.interval is None else [round(x, _DECIMALS) for x in self.interval],
            "count": self.count,
            "published": self.published,
            "gap": self.gap,
            "flagged": self.flagged,
        }


def published_figure(encoder: str, group: str, name: str) -> float | None:
    """What the card of an encoder says, in percent; None where it has no card, or the card no such figure.

    Args:
        encoder: any name of `load_encoder`; 'visual:CARD:PATH' and adapters on a base have cards, see `card_of`.
    """
    value = _published(encoder).get(group, {}).get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def figure_table(figures: Sequence[Figure]) -> str:
    """Markdown: a table a group, in the order of the figures, with one row an encoder.

    A cell holds the measured figure with its interval and beside it, in brackets, the published one; '!' is a flag.
    """
    parts = []
    for group in dict.fromkeys(figure.group for figure in figures):
        members = {(figure.encoder, figure.name): figure for figure in figures if figure.group == group}
        names = list(dict.fromkeys(name for _, name in members))
        lines = [["encoder", "n", *(f"{group} {name}" for name in names)], ["---"] * (len(names) + 2)]
        for encoder in dict.fromkeys(encoder for encoder, _ in members):
            row = [members.get((encoder, name)) for name in names]
            counts = dict.fromkeys(str(figure.count) for figure in row if figure is not None)
            lines.append([encoder, "/".join(counts), *("not measured" if f is None else _cell(f) for f in row)])
        parts.append("".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines))
    return "\n".join([*parts, LEGEND + "\n"])


def figures_as_json(figures: Sequence[Figure]) -> list[dict[str, Any]]:
    """All figures as plain values, in their order."""
    return [figure.as_dict() for figure in figures]


@cache
def _published(encoder: str) -> dict[str, Any]:
    card = card_of(encoder)
    groups: dict[str, Any] = {} if card is None else card.table.get("published", {})
    return groups


def _cell(figure: Figure) -> str:
    spread = "" if figure.interval is None else f" [{figure.interval[0]:.1f}, {figure.interval[1]:.1f}]"
    beside = "-" if figure.published is None else f"{figure.published:g}"
    return f"{figure.measured:.2f}{spread} ({beside}){' !' if figure.flagged else ''}"
