"""From a run directory to a report: one HTML page that needs nothing else, and the same figures as JSON and CSV.

Reads what the audit wrote down and nothing else: no model, no data, no network. The same run gives the same bytes. What
comes from records is text wherever it is shown, never markup.
"""

import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from offline.audit.certified import RADII, broken_certificates
from offline.audit.charts import answer_charts, certified_charts, curve_charts, loss_charts
from offline.audit.defenses import QUANTILES, Defense, defenses
from offline.audit.figures import REFERENCE_PX, Figures, summarise
from offline.audit.pictures import patterns
from offline.audit.plan import AuditPlan, plan_of_run
from offline.audit.record import RECORDS_NAME, AuditRecord, Check, Setting, read_checks, read_records
from offline.audit.rows import WRONG_WAY
from offline.audit.shown import shown_examples
from offline.audit.tables import (
    CERTIFIED_NOTE,
    L2_NOTE,
    RADIUS_NAMES,
    answers_text,
    attacks_of,
    csv_table,
    images_text,
    percent,
    scores_of,
)
from offline.errors import RunError
from offline.runs import read_events, write_atomically
from perception.verdict import VerdictLabel

REPORT_NAME = "report.html"
TOLERATED_SQUARE_GAIN = 0.5
"""Percentage points; what Square may take off after gradient attacks that are as strong as they should be."""
_NAMED = 3  # systems that one sentence can hold
_TITLES = {
    "moderation": "moderation decision",
    "retrieval": "retrieval",
    "two-afc": "perceptual choices (2AFC)",
    "odd-one-out": "perceptual choices (odd one out)",
    "zero-shot": "zero-shot classification",
}


@dataclass(frozen=True)
class Progress:
    """How many images of a system are done, over all settings; `total` is None where the run has not begun with it."""

    system: str
    done: int
    total: int | None


@dataclass(frozen=True)
class Run:
    """A run directory, read.

    Attributes:
        name: of the folder.
        plan, records, checks: what it holds.
        figures: that follow from them.
        systems: what was audited: encoder, fingerprint, hashes of pools, policy or head, number of images.
        sessions: in what it was audited: versions, device, threads; each once.
        defenses: of the systems that have one.
        records_sha256: of the file of records.
    """

    name: str
    plan: AuditPlan
    records: Sequence[AuditRecord]
    checks: Sequence[Check]
    figures: Figures
    systems: Sequence[Mapping[str, Any]]
    sessions: Sequence[Mapping[str, Any]]
    defenses: Sequence[Defense]
    records_sha256: str

    @classmethod
    def read(cls, path: Path) -> "Run":
        """Read a run directory, finished or not.

        Raises:
            PlanError: it holds no plan.
            RunError: it holds no records, or is damaged, or its records are not of its plan.
        """
        plan, records, checks = plan_of_run(path), read_records(path), read_checks(path)
        systems = {event["system"]: event for event in reversed(_events(path, "system"))}  # the first one counts
        sessions = _events(path, "session")
        return cls(
            name=path.resolve().name,
            plan=plan,
            records=records,
            checks=checks,
            figures=summarise(plan, records, checks),
            systems=[systems[system.name] for system in plan.systems if system.name in systems],
            sessions=[event for i, event in enumerate(sessions) if event not in sessions[:i]],
            defenses=defenses(plan, records, _events(path, "cost")),
            records_sha256=hashlib.sha256((path / RECORDS_NAME).read_bytes()).hexdigest(),
        )

    @property
    def progress(self) -> list[Progress]:
        """Of each system of the plan."""
        settings = {setting for threat in self.plan.threats for setting in threat.settings(REFERENCE_PX)}
        items = {event["system"]: event["items"] for event in self.systems}
        done = {system.name: 0 for system in self.plan.systems}
        for record in self.records:
            done[record.system] += 1
        return [Progress(n, d, items[n] * len(settings) if n in items else None) for n, d in done.items()]

    @property
    def finished(self) -> bool:
        """Every image of every system has been attacked under every setting."""
        return all(progress.done == progress.total for progress in self.progress)

    @property
    def headline(self) -> Setting:
        """The setting that the verdict is about: of the plan's first threat the largest radius with the most steps."""
        found = {row.setting for row in self.figures.rows}
        by_threat = [[s for s in threat.settings(REFERENCE_PX) if s in found] for threat in self.plan.threats]
        return max(next(settings for settings in by_threat if settings))

    def as_dict(self) -> dict[str, Any]:
        """The figures with all that identifies them, for JSON."""
        identity: dict[str, Any] = {
            "run": self.name,
            "finished": self.finished,
            "progress": [asdict(progress) for progress in self.progress],
            "systems": self.systems,
            "sessions": self.sessions,
            "records_sha256": self.records_sha256,
        }
        if self.defenses:
            identity["defenses"] = [defense.as_dict() for defense in self.defenses]
        return {**self.figures.as_dict(), "plan": self.plan.as_dict(), "identity": identity}


def write_report(run: Path) -> Path:
    """Write `report.html`, `report.json` and `report.csv` into a run directory, finished or not.

    Returns:
        Where the page is.

    Raises:
        PlanError: it holds no plan.
        RunError: it holds no records, or is damaged, or its records are not of its plan.
    """
    read = Run.read(run)
    content = json.dumps(read.as_dict(), indent=2, allow_nan=False) + "\n"
    write_atomically(run / "report.json", content.encode())
    write_atomically(run / "report.csv", _bytes(csv_table(read.figures)))
    write_atomically(run / REPORT_NAME, _bytes(page(read, run)))
    return run / REPORT_NAME


def page(read: Run, run: Path) -> str:
    """The HTML page; example pictures are taken from `run`."""
    environment = Environment(
        loader=PackageLoader("offline.audit"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    rows, headline = read.figures.rows, read.headline
    judged = [row for row in rows if row.clean is not None]
    names = [system.name for system in read.plan.systems]
    return environment.get_template("report.html.j2").render(
        title=f"Robustness audit: {_TITLES[read.plan.task]}",
        read=read,
        verdict=verdict(read),
        warnings=list(warnings(read)),
        judged=judged,
        attacks=attacks_of(judged),
        ranked=[row for row in rows if row.means],
        scores=scores_of(rows),
        l2_note=L2_NOTE if any(row.setting.norm == "l2" for row in rows) else "",
        quantiles=[f"{100 * q:.0f} %" for q in QUANTILES],
        checks=[(name, [c for c in read.figures.checks if c.system == name]) for name in names],
        patterns=patterns(),
        bars=answer_charts(rows, headline),
        curves=curve_charts(rows),
        certified_radii=list(zip(RADII, RADIUS_NAMES, strict=True)),
        certified_note=CERTIFIED_NOTE,
        certified_curves=certified_charts(read.figures.certified),
        losses=loss_charts(read.figures.traces, headline),
        examples=shown_examples(run, names, read.records),
        plan=list(flattened(read.plan.as_dict())),
        command=f"hardlook-lab report {shlex.quote(read.name)}",
        percent=percent,
        answers_text=answers_text,
        images_text=images_text,
        wrong_way={str(label): name.replace("_", " ") for label, name in WRONG_WAY.items()},
        flattened=lambda values: list(flattened(values)),
    )


def verdict(read: Run) -> str:
    """One sentence: what the attack made of the systems, and whether to believe it."""
    rows = [row for row in read.figures.rows if row.setting == read.headline and not row.set]
    parts = []
    for label in (VerdictLabel.UNSAFE, VerdictLabel.SAFE, ""):
        chosen = [row for row in rows if row.label == label]
        if chosen and chosen[0].clean is not None:
            what = f"{label} images recognised as {label}" if label else "right answers"
            parts.append(f"{what} go {_falls([(row.system, row.clean, row.robust) for row in chosen])}")
    for score in scores_of(rows):
        having = [(row.system, row.means[score]) for row in rows if score in row.means]
        falls = _falls([(system, means["clean"], means["attacked"]) for system, means in having])
        parts.append(f"mean {score.replace('_', ' ')} goes {falls}")
    start = "Under" if read.finished else "In the part of the audit that is done, under"
    return f"{start} {read.headline}, {'; '.join(parts)}{_believable(read.figures.checks)}"


def warnings(read: Run) -> Iterator[str]:
    """What a reader must know before any figure."""
    if not read.finished:
        of = [f"{p.system}: {p.done} of {'?' if p.total is None else p.total}" for p in read.progress]
        yield f"This run is not finished. Attacked images, over all settings: {'; '.join(of)}."
    for check in read.figures.checks:
        if not check.passed:
            yield f"{check.system}: the masking check {check.name!r} did not pass. {check.sentence}"
    for system in read.plan.systems:
        if not any(check.system == system.name for check in read.figures.checks):
            yield f"{system.name}: no masking checks have been made, so nothing says how strong its attack was."
    broken = broken_certificates(read.records)
    if broken:
        yield (
            f"{len(broken)} attacked images have another answer within their certified radius, the first is "
            f"{broken[0].id!r} of {broken[0].system}: the certificates of this run are wrong, which is a bug."
        )
    for row in read.figures.rows:
        if not row.set and row.square_gain is not None and row.square_gain >= TOLERATED_SQUARE_GAIN:
            yield (
                f"{row.system}, {row.setting}, {images_text(row)}: Square took off another {row.square_gain:.1f} "
                f"points after the gradient attacks, which are therefore weaker than they should be."
            )


def flattened(values: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """All entries of nested JSON values as (dotted path, JSON text)."""
    if isinstance(values, Mapping) and values:
        for name, value in values.items():
            yield from flattened(value, f"{path}.{name}" if path else str(name))
    elif isinstance(values, list | tuple) and any(isinstance(value, Mapping) for value in values):
        for i, value in enumerate(values):
            yield from flattened(value, f"{path}[{i}]")
    else:
        yield path, json.dumps(values, ensure_ascii=False)


def _falls(systems: Sequence[tuple[str, Any, Any]]) -> str:
    """From clean to attacked, of each system, or of the best and the worst of many; values have `value`."""
    words = [f"from {100 * c.value:.1f} to {percent(a)} % for {name}" for name, c, a in systems]
    if len(systems) > _NAMED:
        order = sorted(range(len(systems)), key=lambda i: float(systems[i][2].value))
        words = [f"{words[order[-1]]} (the best)", f"{words[order[0]]} (the worst)"]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _believable(checks: Sequence[Check]) -> str:
    failed = sum(not check.passed for check in checks)
    if not checks:
        return "; no masking checks have been made yet."
    if failed:
        return f"; but {failed} of {len(checks)} masking checks did not pass, so the true figures may be lower."
    return f"; all {len(checks)} masking checks passed."


def _bytes(text: str) -> bytes:
    """As UTF-8; file names that are none, and so ids, hold lone surrogates."""
    return text.encode("utf-8", "backslashreplace")


def _events(path: Path, kind: str) -> list[dict[str, Any]]:
    """Events without the time at which they were logged.

    Raises:
        RunError: the log is damaged.
    """
    try:
        events = read_events(path, kind)
        for event in events if kind == "system" else []:
            if not isinstance(event["system"], str) or type(event["items"]) is not int:
                raise TypeError(f"a system is {event['system']!r} with {event['items']!r} items")
        return [{name: value for name, value in e.items() if name not in ("event", "time_s")} for e in events]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path / 'metrics.jsonl'} is damaged: {error!r}") from error
