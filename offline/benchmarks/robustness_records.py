"""The records of the robustness benchmark, and the table that follows from them alone."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from offline.benchmarks.intervals import Accuracy as Accuracy
from offline.jsonlines import JsonLines
from offline.threat import Norm, ThreatModel


@dataclass(frozen=True)
class Record:
    """What became of one query.

    Attributes:
        encoder, fingerprint: of the encoder.
        norm, eps: of the threat model.
        id, label: of the query.
        clean_correct: its nearest neighbour is of its class.
        robust: so it is after the attack.
        similarity: cosine of its perturbed to its clean embedding; 1 where it was not attacked.
        distance: norm of the perturbation.
    """

    encoder: str
    fingerprint: str
    norm: Norm
    eps: float
    id: str
    label: str
    clean_correct: bool
    robust: bool
    similarity: float
    distance: float

    @property
    def threat(self) -> ThreatModel:
        """The threat model."""
        return ThreatModel(self.norm, self.eps)


class RecordFile:
    """Records as JSON lines, append-only; a kill loses at most what was being appended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = JsonLines(path)

    def read(self) -> list[Record]:
        """All records, oldest first; an unfinished last line is what a kill leaves, and is passed over.

        Raises:
            RunError: a line is damaged.
        """
        return self._lines.read(_record)

    def append(self, records: Iterable[Record]) -> None:
        """Add records, to the disk; an unfinished last line gives way."""
        self._lines.append(asdict(record) for record in records)


def _record(values: dict[str, Any]) -> Record:
    """A record, if the line has the right keys with values of the right types.

    Raises:
        TypeError: it has not.
        PlanError: it is of no possible threat model.
    """
    record = Record(**values)
    for field in fields(Record):
        value = getattr(record, field.name)
        expected: Any = str if field.name == "norm" else field.type
        if not isinstance(value, expected) or (expected is float and not math.isfinite(value)):
            raise TypeError(f"{field.name} is {value!r}")
    _ = record.threat
    return record


@dataclass(frozen=True)
class Row:
    """The figures of one encoder.

    Attributes:
        encoder, fingerprint: of the encoder.
        clean: accuracy without attack, on every query of which there is a record.
        robust: accuracy by threat model, on the queries that have been judged under it.
    """

    encoder: str
    fingerprint: str
    clean: Accuracy
    robust: dict[ThreatModel, Accuracy]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        robust = [{"norm": t.norm, "eps": t.eps, **accuracy.as_dict()} for t, accuracy in self.robust.items()]
        return {
            "encoder": self.encoder,
            "fingerprint": self.fingerprint,
            "clean": self.clean.as_dict(),
            "robust": robust,
        }


def summarise(records: Iterable[Record]) -> list[Row]:
    """One row an encoder, in order of appearance; a query that was judged twice counts once, as last judged."""
    by_encoder: dict[str, dict[tuple[ThreatModel, str], Record]] = {}
    for record in records:
        by_encoder.setdefault(record.fingerprint, {})[record.threat, record.id] = record
    rows = []
    for fingerprint, judged in by_encoder.items():
        clean = {query: record.clean_correct for (_, query), record in judged.items()}
        robust: dict[ThreatModel, Accuracy] = {}
        for threat in dict.fromkeys(threat for threat, _ in judged):
            outcomes = [record.robust for (other, _), record in judged.items() if other == threat]
            robust[threat] = Accuracy(sum(outcomes), len(outcomes))
        name = next(iter(judged.values())).encoder
        rows.append(Row(name, fingerprint, Accuracy(sum(clean.values()), len(clean)), robust))
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table: accuracies in percent with 95 % intervals, radius and number of queries."""
    lines = ["| encoder | clean | linf | l2 |", "| --- | --- | --- | --- |"]
    for row in rows:
        cells = [row.encoder, _cell(row.clean)]
        for norm in ("linf", "l2"):
            under = [f"{_cell(accuracy)}, eps {_eps(t)}" for t, accuracy in row.robust.items() if t.norm == norm]
            cells.append("; ".join(under) or "not measured")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(accuracy: Accuracy) -> str:
    low, high = accuracy.interval
    return f"{100 * accuracy.value:.1f} [{100 * low:.1f}, {100 * high:.1f}] of {accuracy.total}"


def _eps(threat: ThreatModel) -> str:
    """4/255 where it is a multiple of 1/255."""
    levels = threat.eps * 255
    if threat.norm == "linf" and abs(levels - round(levels)) < 1e-9:
        return f"{round(levels)}/255"
    return f"{threat.eps:.4g}"
