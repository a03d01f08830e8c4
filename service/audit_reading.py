"""Reading one run directory of an audit: what was asked, what came out, when, and what is wrong with it.

Owns the rules by which a run counts as finished, and which figures stand for it. Nothing here raises for what a run
holds: whatever is wrong is among its `problems`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal, TypeAlias

from perception.errors import PolicyError
from perception.policy_file import Rate
from perception.replay import AttackSetting
from service.audit_files import (
    CHECKS,
    EVENTS,
    PAGE,
    PLAN,
    RECORDS,
    REPORT,
    CheckEntry,
    Event,
    FileMissing,
    MeanEntry,
    Plan,
    PlanFile,
    PlannedSystem,
    PlannedThreat,
    ReportFile,
    RowEntry,
    RunDamaged,
    SystemEvent,
    finished_lines,
    parsed,
    read_model,
    sha256_of,
)

_OPPOSITE = {"safe": "unsafe", "unsafe": "safe"}
State = Literal["finished", "unfinished", "damaged"]
DatedBy = Literal["log", "file"]
Signature: TypeAlias = tuple[tuple[str, int, int, int], ...]
"""Of each file that is there, and of the folder as '.': name, time in ns, bytes, inode."""


@dataclass(frozen=True)
class AuditedSystem:
    """One system of a run: what the plan says, and what the run noted when it began with it.

    Attributes:
        plan: of it.
        noted: None where the run has not come to it yet.
    """

    plan: PlannedSystem
    noted: SystemEvent | None

    @property
    def name(self) -> str:
        """In the plan and in all figures."""
        return self.plan.name


@dataclass(frozen=True)
class Figure:
    """A headline figure: one system and label under the headline setting, all sets of images together.

    Attributes:
        system: or combination of systems.
        label: for moderation what is right; else empty.
        total: images.
        clean, robust: right when clean; right when clean and when attacked. None where there is only a ranking.
        wrong_clean, wrong_attacked: the opposite of what is right was answered: let through, or refused.
        means: of rankings, by score, then by version.
    """

    system: str
    label: str
    total: int
    clean: Rate | None
    robust: Rate | None
    wrong_clean: Rate | None
    wrong_attacked: Rate | None
    means: Mapping[str, Mapping[str, MeanEntry]]


@dataclass(frozen=True)
class AuditRun:
    """A run directory, read.

    Attributes:
        id: name of the folder.
        state: `finished`: every image of every system has been attacked under every setting, and there is a sound
            report of that. `damaged`: a file is not what it should be.
        problems: what is wrong with it, for a person; empty for a sound and finished run.
        date: when it was finished; else when it began, or its folder was changed.
        begun: when its first system was loaded, by its own log; None where that does not say.
        dated_by: `log`: by the run itself; `file`: by the time of its files, which copying may have changed.
        task: of the plan; empty where that cannot be read.
        systems: in the order of the plan.
        neighbors: of each pool that were asked to be recorded.
        headline: the setting that the headline figures are of; None without a report.
        settings: that the report has figures of, in its order.
        figures: headline figures, in the order of the report.
        checks: for masked gradients.
        has_page: there is a report to be read.
    """

    id: str
    state: State
    problems: tuple[str, ...]
    date: datetime
    dated_by: DatedBy
    begun: datetime | None = None
    task: str = ""
    systems: tuple[AuditedSystem, ...] = ()
    neighbors: int = 0
    headline: AttackSetting | None = None
    settings: tuple[AttackSetting, ...] = ()
    figures: tuple[Figure, ...] = ()
    checks: tuple[CheckEntry, ...] = ()
    has_page: bool = False

    def system(self, name: str) -> AuditedSystem | None:
        """By its name; None where the plan has none."""
        return next((system for system in self.systems if system.name == name), None)


def read_run(id: str, folder: int, signature: Signature) -> AuditRun:
    """A run from its files.

    Args:
        id: name of the folder.
        folder: a descriptor of it.
        signature: of the files as they are now.
    """
    times_ns = {name: mtime_ns for name, mtime_ns, _, _ in signature}
    problems: list[str] = []
    damaged = False
    try:
        plan = read_model(folder, PLAN, PlanFile).audit
    except RunDamaged as error:
        date = _at(times_ns["."] / 1e9)
        return AuditRun(id, "damaged", (f"no run of an audit: {error}",), date, "file")
    noted: dict[str, SystemEvent] = {}
    begun_s = finished_s = None
    try:
        noted, begun_s, finished_s = _events(folder)
    except FileMissing:
        problems.append("the run has not begun with any system")
    except RunDamaged as error:
        problems.append(str(error))
        damaged = True
    report = None
    try:
        report = _report(folder, plan)
    except FileMissing:
        problems.append("there is no report yet: it is written at the end, or by 'hardlook-lab report'")
    except RunDamaged as error:
        problems.append(str(error))
        damaged = True
    if report is None or not report.identity.finished:
        problems.append(_progress(folder, plan, noted))
    if PAGE not in times_ns and report is not None:
        problems.append(f"{PAGE} is missing: write it anew with 'hardlook-lab report'")
    state: State = "damaged" if damaged else "unfinished" if problems else "finished"
    date, dated_by = _date(state, times_ns, begun_s, finished_s)
    systems = tuple(AuditedSystem(system, noted.get(system.name)) for system in plan.systems)
    begun = None if begun_s is None else _at(begun_s)
    run = AuditRun(id, state, tuple(problems), date, dated_by, begun, plan.task, systems, plan.neighbors)
    return run if report is None else _with_figures(run, plan, report, has_page=PAGE in times_ns)


def _events(folder: int) -> tuple[dict[str, SystemEvent], float | None, float | None]:
    """What was noted of each system, when the run began, and when it was finished, in seconds since 1970.

    Of a system the first event counts: a run goes on with nothing else.
    """
    noted: dict[str, SystemEvent] = {}
    begun_s = finished_s = None
    for _, line in finished_lines(folder, EVENTS):
        event = parsed(EVENTS, line, Event)
        begun_s = event.time_s if begun_s is None else begun_s
        if event.event == "system":
            system = parsed(EVENTS, line, SystemEvent)
            noted.setdefault(system.system, system)
        elif event.event == "finished" and finished_s is None:
            finished_s = event.time_s
    return noted, begun_s, finished_s


def _report(folder: int, plan: Plan) -> ReportFile:
    """The report.

    Raises:
        FileMissing: there is none yet.
        RunDamaged: it is none, or of another plan, or of other records than are there now.
    """
    report = read_model(folder, REPORT, ReportFile)
    if report.plan != plan:
        raise RunDamaged(REPORT, f"is of another plan than {PLAN}")
    try:
        same = sha256_of(folder, RECORDS) == report.identity.records_sha256
    except FileMissing:
        raise RunDamaged(REPORT, f"was made from records, but {RECORDS} is missing") from None
    if not same and report.identity.finished:
        raise RunDamaged(
            REPORT, f"was made from other records than {RECORDS}: write it anew with 'hardlook-lab report'"
        )
    return report


def _progress(folder: int, plan: Plan, noted: Mapping[str, SystemEvent]) -> str:
    """How far a run has come; its records are counted, and not looked at."""
    try:
        done = sum(1 for _ in finished_lines(folder, RECORDS))
    except FileMissing:
        done = 0
    except RunDamaged as error:
        return str(error)
    settings = set().union(*(_settings(threat) for threat in plan.threats))
    items = [noted[system.name].items if system.name in noted else None for system in plan.systems]
    total = "?" if None in items else str(len(settings) * sum(filter(None, items)))
    return f"the run is not finished: {done} of {total} records are written"


def _date(
    state: State, times_ns: Mapping[str, int], begun_s: float | None, finished_s: float | None
) -> tuple[datetime, DatedBy]:
    if state != "unfinished" and finished_s is not None:
        return _at(finished_s), "log"
    written_ns = [times_ns[name] for name in (RECORDS, CHECKS) if name in times_ns]
    if state == "unfinished" and begun_s is not None:
        return _at(begun_s), "log"
    return _at(max(written_ns, default=times_ns["."]) / 1e9), "file"


def _at(seconds: float) -> datetime:
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, ValueError, OSError):  # what a damaged log says
        return datetime.fromtimestamp(0, UTC)


def _with_figures(run: AuditRun, plan: Plan, report: ReportFile, *, has_page: bool) -> AuditRun:
    settings = tuple(dict.fromkeys(_setting(row) for row in report.rows))
    headline = headline_of(plan, settings)
    try:
        figures = tuple(_figure(row) for row in report.rows if not row.set and _setting(row) == headline)
    except PolicyError as error:
        return replace(run, state="damaged", problems=(*run.problems, f"{REPORT} counts what cannot be: {error}"))
    return replace(run, headline=headline, settings=settings, figures=figures, checks=report.checks, has_page=has_page)


def headline_of(plan: Plan, found: Sequence[AttackSetting]) -> AttackSetting | None:
    """What a report's verdict is about: of the plan's first threat the largest radius with the most steps."""
    for planned in plan.threats:
        own = _settings(planned) & set(found)
        if own:
            return max(own)
    return None


def _settings(threat: PlannedThreat) -> set[AttackSetting]:
    radii = threat.eps if isinstance(threat.eps, tuple) else (threat.eps,)
    counts = threat.steps if isinstance(threat.steps, tuple) else (threat.steps,)
    return {AttackSetting(threat.norm, eps, steps) for eps in radii for steps in counts}


def _setting(row: RowEntry) -> AttackSetting:
    return AttackSetting(row.setting.norm, row.setting.eps, row.setting.steps)


def _figure(row: RowEntry) -> Figure:
    def wrong(version: str) -> Rate | None:
        answers = row.answers.get(version)
        if answers is None or row.label not in _OPPOSITE:
            return None
        return Rate(getattr(answers, _OPPOSITE[row.label]), answers.safe + answers.review + answers.unsafe)

    clean, robust = (None if each is None else Rate(each.right, each.total) for each in (row.clean, row.robust))
    return Figure(row.system, row.label, row.total, clean, robust, wrong("clean"), wrong("attacked"), row.means)


def failed_checks(run: AuditRun) -> Iterator[CheckEntry]:
    """Those that did not pass: next to one, a robust figure is not to be believed."""
    return (check for check in run.checks if not check.passed)
