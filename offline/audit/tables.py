"""The figures of an audit as text: Markdown for a terminal, and CSV for a spreadsheet."""

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

from offline.audit.certified import RADII
from offline.audit.rows import VERSIONS, WRONG_WAY, Answers, CertifiedRow, Figures, Mean, Row
from offline.benchmarks.intervals import Accuracy
from perception.verdict import VerdictLabel

L2_NOTE = "Radii of l2 are at 224 px; they scale with the side of an encoder's input."

CERTIFIED_NOTE = (
    "Certified: the share of images that are right, and proven to stay so under every perturbation of at most that L2 "
    "norm, over [0, 1] pixels at the encoder's own input (not scaled). A lower bound: others may be robust, too."
)
RADIUS_NAMES = tuple(f"{round(255 * eps)}/255" for eps in RADII)


def percent(share: Accuracy | Mean | None) -> str:
    """A share or mean in [0, 1] in percent with its 95 % interval."""
    if share is None:
        return "not measured"
    low, high = share.interval
    return f"{100 * share.value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def answers_text(answers: Answers) -> str:
    """S/B/U in percent, as table III of the paper has it."""
    return "/".join(f"{100 * share.value:.1f}" for share in answers.shares.values())


def images_text(row: Row | CertifiedRow) -> str:
    """Which images a row is of."""
    label = "" if row.set.startswith(row.label) else row.label  # sets are often called after their label
    return ", ".join(part for part in (label, row.set) if part) or "all"


def attacks_of(rows: Sequence[Row]) -> list[str]:
    """All attacks that rows have accuracies after, in their order."""
    return list(dict.fromkeys(attack for row in rows for attack in row.after))


def scores_of(rows: Sequence[Row]) -> list[str]:
    """The names of all means that rows have."""
    return list(dict.fromkeys(name for row in rows for name in row.means))


def table(figures: Figures) -> str:
    """The rows as a Markdown table: percent with 95 % intervals; one line a row, for rankings one a row and score."""
    ranked = [row for row in figures.rows if row.means]
    judged = [row for row in figures.rows if row.clean is not None]
    parts = []
    if judged:
        attacks = attacks_of(judged)
        after = [f"after {attack}" for attack in attacks]
        heads = ["system", "setting", "label", "n", "clean", *after, "robust", "8-bit", "S/B/U clean -> attacked"]
        parts.append(_markdown(heads, (_judged_cells(row, attacks) for row in judged)))
    if ranked:
        heads = ["system", "setting", "images", "score", "n", *VERSIONS]
        parts.append(_markdown(heads, (cells for row in ranked for cells in _ranked_cells(row))))
    if any(row.setting.norm == "l2" for row in figures.rows):
        parts.append(L2_NOTE + "\n")
    if figures.certified:
        heads = ["system", "certificate", "images", "n", "clean", *(f"l2 {name}" for name in RADIUS_NAMES)]
        parts.append(_markdown(heads, map(_certified_cells, figures.certified)))
        parts.append(CERTIFIED_NOTE + "\n")
    return "\n".join(parts)


def csv_table(figures: Figures) -> str:
    """One line a row; all shares and means in [0, 1], empty where there is none.

    Certified accuracies are in every line of their images, whatever its setting: they are of no attack.
    """
    lines = [_flat(row) | _flat_certified(row, figures.certified) for row in figures.rows]
    columns = list(dict.fromkeys(name for line in lines for name in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _no_formula(value) for name, value in line.items()} for line in lines)
    return text.getvalue()


def _markdown(heads: Sequence[str], lines: Iterator[list[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)


def _judged_cells(row: Row, attacks: Sequence[str]) -> list[str]:
    after = [percent(row.after[attack]) if attack in row.after else "-" for attack in attacks]
    breakdown = " -> ".join(answers_text(row.answers[v]) for v in ("clean", "attacked")) if row.answers else "-"
    name, setting, images = row.system, str(row.setting), images_text(row)
    measured = [percent(row.clean), *after, percent(row.robust), percent(row.rounded)]
    return [name, setting, images, str(row.total), *measured, breakdown]


def _ranked_cells(row: Row) -> Iterator[list[str]]:
    for name, means in row.means.items():
        measured = [percent(means[version]) for version in VERSIONS]
        yield [row.system, str(row.setting), images_text(row), name, str(means["clean"].total), *measured]


def _certified_cells(row: CertifiedRow) -> list[str]:
    shares = [percent(row.at(eps)) for eps in RADII]
    return [row.system, row.form, images_text(row), str(row.total), percent(row.clean), *shares]


def _flat_certified(row: Row, certified: Sequence[CertifiedRow]) -> dict[str, Any]:
    """The certified accuracies of a row's images at the published radii."""
    line: dict[str, Any] = {}
    for found in certified:
        if (found.system, found.label, found.set) == (row.system, row.label, row.set):
            for eps, name in zip(RADII, RADIUS_NAMES, strict=True):
                column, share = f"certified_{found.form}_l2_{name.replace('/', '_')}", found.at(eps)
                low, high = share.interval
                line |= {
                    column: round(share.value, 6),
                    f"{column}_low": round(low, 6),
                    f"{column}_high": round(high, 6),
                }
    return line


def _flat(row: Row) -> dict[str, Any]:
    """A row as one level of names."""
    line: dict[str, Any] = {
        "system": row.system,
        "combined": row.combined,
        "norm": row.setting.norm,
        "eps": row.setting.eps,
        "steps": row.setting.steps,
        "label": row.label,
        "set": row.set,
        "n": row.total,
    }
    shares: dict[str, Accuracy | Mean | None] = {"clean": row.clean}
    shares |= {f"after_{attack}": share for attack, share in row.after.items()}
    shares |= {"robust": row.robust, "rounded": row.rounded}
    if row.answers:
        way = WRONG_WAY[VerdictLabel(row.label)]
        shares |= {f"{way}_{version}": share for version, share in row.wrong_way.items()}
    shares |= {f"{name}_{version}": mean for name, means in row.means.items() for version, mean in means.items()}
    for name, share in shares.items():
        if share is not None:
            low, high = share.interval
            line |= {name: round(share.value, 6), f"{name}_low": round(low, 6), f"{name}_high": round(high, 6)}
    for version, answers in row.answers.items():
        line |= {f"answered_{label}_{version}": share.right for label, share in answers.shares.items()}
    line |= {"square_gain_points": "" if row.square_gain is None else row.square_gain}
    return line | {f"updates_{attack}": updates for attack, updates in row.updates.items()}


def _no_formula(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula, with an apostrophe in front."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
