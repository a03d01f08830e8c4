"""From an audit's records to its figures, without any model or data.

The figures do not depend on the order of the records. Accuracies have Wilson's interval, means over queries a seeded
bootstrap one. A combination's answer is the more cautious of two systems', each of which was attacked for itself
(methods 6.7, table IV of the paper).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from offline.audit.certified import certified_rows
from offline.audit.plan import AuditPlan, CombinationPlan
from offline.audit.record import AuditRecord, Check, Judgement, Setting
from offline.audit.rows import OPPOSITE, VERSIONS, Answers, Mean, Row, Trace
from offline.audit.rows import Figures as Figures
from offline.audit.tables import table as table
from offline.benchmarks.intervals import Accuracy
from offline.errors import RunError
from perception.heads import or_correct
from perception.verdict import VerdictLabel

SQUARE = "square"
REFERENCE_PX = 224
"""Side of the input for which a plan's l2 radii are meant."""
RESAMPLES = 2000
_DECIMALS = 6


@dataclass(frozen=True)
class Case:
    """One image as a row counts it; versions are `clean`, `attacked`, `rounded` and, so far worst, after each attack.

    Attributes:
        set, id, label: of the image.
        answers: by version.
        correct: by version; empty where there is only a ranking.
        scores: by version of `VERSIONS`.
        updates: by attack that the image went through.
    """

    set: str
    id: str
    label: str
    answers: Mapping[str, str]
    correct: Mapping[str, bool]
    scores: Mapping[str, Mapping[str, float]]
    updates: Mapping[str, int]

    def robust(self, version: str) -> bool:
        """Right when clean and in this version."""
        return self.correct["clean"] and self.correct[version]


@dataclass(frozen=True)
class Group:
    """The images of one system or combination under one setting of the plan, in the order of their sets and ids."""

    system: str
    combined: bool
    setting: Setting
    attacks: tuple[str, ...]
    cases: tuple[Case, ...]


def summarise(plan: AuditPlan, records: Sequence[AuditRecord], checks: Sequence[Check]) -> Figures:
    """Count what the records say.

    Args:
        plan: of the run; it gives the order of all things.
        records: each image under each setting once, of a whole run or of a part.
        checks: for masked gradients.

    Raises:
        RunError: there are no records, or one is not of this plan, or a system's are of several encoders.
    """
    settings = _settings_of_plan(plan)
    by_group = _grouped(plan, records, settings)
    groups: dict[tuple[str, Setting], Group] = {}
    traces: list[Trace] = []
    for (system, setting), members in by_group.items():
        attacks = (*plan.chain, *([SQUARE] if settings[setting] else []))
        cases = tuple(_case(plan.task, attacks, record) for record in members)
        groups[system, setting] = Group(system, False, setting, attacks, cases)
        traces += _traces(system, setting, plan.chain, members)
    everyone = [*groups.values(), *_combinations(plan.combinations, settings, groups)]
    order = [system.name for system in plan.systems]
    return Figures(
        task=plan.task,
        rows=tuple(row for group in everyone for row in _rows(plan, group)),
        traces=tuple(traces),
        checks=tuple(sorted(checks, key=lambda check: (_place(order, check.system), check.name))),
        certified=certified_rows(plan, records),
    )


# --- settings --------------------------------------------------------------------------------------------------------


def _settings_of_plan(plan: AuditPlan) -> dict[Setting, bool]:
    """All settings in their order, and whether Square runs under them."""
    found: dict[Setting, bool] = {}
    for threat in plan.threats:
        queries = plan.square_queries if threat.square_queries is None else threat.square_queries
        for setting in threat.settings(REFERENCE_PX):
            found.setdefault(setting, queries > 0)
    return found


def _grouped(
    plan: AuditPlan, records: Sequence[AuditRecord], settings: Iterable[Setting]
) -> dict[tuple[str, Setting], list[AuditRecord]]:
    """Records by system and the plan's setting, in the plan's order, each list by set and id."""
    of_system: dict[str, list[AuditRecord]] = {system.name: [] for system in plan.systems}
    for record in records:
        if record.system not in of_system:
            raise RunError(f"a record is of the system {record.system!r}, which the plan does not have")
        of_system[record.system].append(record)
    planned = list(settings)
    groups: dict[tuple[str, Setting], list[AuditRecord]] = {}
    for system, members in of_system.items():
        if len({record.fingerprint for record in members}) > 1:
            raise RunError(f"records of {system!r} are of more than one encoder")
        as_planned = _as_planned(system, dict.fromkeys(record.setting for record in members), planned)
        for setting in planned:
            chosen = [record for record in members if as_planned[record.setting] == setting]
            if chosen:
                groups[system, setting] = sorted(chosen, key=lambda r: (_place_of_set(plan, r.set), r.set, r.id))
    return groups


def _as_planned(system: str, found: Iterable[Setting], planned: Sequence[Setting]) -> dict[Setting, Setting]:
    """The plan's setting of each recorded one: recorded l2 radii are scaled with the side of the encoder's input.

    The scale is one number for a system, and the first that fits all of its settings.

    Raises:
        RunError: none fits.
    """
    found = list(found)
    radius = next((s.eps for s in found if s.norm == "l2" and s.eps > 0), None)
    scales = [1.0] if radius is None else [radius / s.eps for s in planned if s.norm == "l2" and s.eps > 0]
    for scale in scales:
        fits = {setting: _fitting(setting, planned, scale) for setting in found}
        matched = {setting: fit for setting, fit in fits.items() if fit is not None}
        if len(matched) == len(found):
            return matched
    raise RunError(f"records of {system!r} are of settings that the plan does not have: {', '.join(map(str, found))}")


def _fitting(setting: Setting, planned: Sequence[Setting], scale: float) -> Setting | None:
    for plan in planned:
        wanted = plan.eps * (scale if plan.norm == "l2" else 1.0)
        if (plan.norm, plan.steps) == (setting.norm, setting.steps) and math.isclose(wanted, setting.eps, rel_tol=1e-9):
            return plan
    return None


# --- images ----------------------------------------------------------------------------------------------------------


def _case(task: str, attacks: Sequence[str], record: AuditRecord) -> Case:
    judged = {"clean": record.clean, "attacked": record.attacked, "rounded": record.rounded}
    scores = {version: judgement.scores for version, judgement in judged.items()}
    updates = {step.attack: step.updates for step in record.rounds}
    unknown = set(updates) - set(attacks)
    if unknown:
        raise RunError(f"record {record.id!r} of {record.system!r} has attacks that the plan has not: {unknown}")
    if task == "retrieval":
        return Case(record.set, record.id, record.label, {}, {}, scores, updates)
    answers = {version: judgement.answer for version, judgement in judged.items()}
    correct = {version: _require_correct(record, judgement) for version, judgement in judged.items()}
    answer, right = record.clean.answer, correct["clean"]
    rounds = {step.attack: step for step in record.rounds}
    for attack in attacks:  # an attack that was not needed leaves things as they stood
        if attack in rounds:
            answer, right = rounds[attack].answer, rounds[attack].correct is True
        answers[attack], correct[attack] = answer, right
    if task == "moderation" and not (set(answers.values()) <= set(VerdictLabel) and record.label in OPPOSITE):
        raise RunError(f"record {record.id!r} of {record.system!r} is labelled or answered with no verdict")
    return Case(record.set, record.id, record.label, answers, correct, scores, updates)


def _require_correct(record: AuditRecord, judgement: Judgement) -> bool:
    if judgement.correct is None:
        raise RunError(f"record {record.id!r} of {record.system!r} does not say whether {judgement.answer!r} is right")
    return judgement.correct


def _combinations(
    plans: Sequence[CombinationPlan], settings: Iterable[Setting], groups: Mapping[tuple[str, Setting], Group]
) -> Iterator[Group]:
    """The groups of all combinations, of the images that both systems have judged."""
    planned = list(settings)
    for plan in plans:
        for setting in planned:
            pair = [groups.get((system, setting)) for system in plan.systems]
            if pair[0] is None or pair[1] is None:
                continue
            others = {(case.set, case.id): case for case in pair[1].cases}
            both = [(case, others[case.set, case.id]) for case in pair[0].cases if (case.set, case.id) in others]
            if both:
                yield Group(plan.name, True, setting, pair[0].attacks, tuple(_combined(both)))


def _combined(pairs: Sequence[tuple[Case, Case]]) -> list[Case]:
    """Each pair as one image: detected if either detects it, right to be safe only if both stay at safe.

    Raises:
        RunError: the two systems have different labels for an image.
    """
    for first, second in pairs:
        if first.label != second.label:
            raise RunError(f"image {first.id!r} is {first.label!r} for one system and {second.label!r} for another")
    unsafe = [first.label == VerdictLabel.UNSAFE for first, _ in pairs]
    correct: list[dict[str, bool]] = [{} for _ in pairs]
    for version in pairs[0][0].correct:
        # `review` alarms where safe is right, and detects nothing where unsafe is.
        flags = [
            [case.correct[version] == u for case, u in zip(side, unsafe, strict=True)]
            for side in zip(*pairs, strict=True)
        ]
        for known, right in zip(correct, or_correct(unsafe, *flags).tolist(), strict=True):
            known[version] = right
    cases = []
    for (first, second), right in zip(pairs, correct, strict=True):
        answers = {
            version: _more_cautious(answer, second.answers[version]) for version, answer in first.answers.items()
        }
        cases.append(Case(first.set, first.id, first.label, answers, right, {}, {}))
    return cases


def _more_cautious(*answers: str) -> str:
    return next(label for label in (VerdictLabel.UNSAFE, VerdictLabel.REVIEW, VerdictLabel.SAFE) if label in answers)


# --- rows ------------------------------------------------------------------------------------------------------------


def _rows(plan: AuditPlan, group: Group) -> Iterator[Row]:
    by_label: dict[str, list[Case]] = {}
    for case in group.cases:
        by_label.setdefault(case.label if plan.task == "moderation" else "", []).append(case)
    for label, cases in sorted(by_label.items()):
        yield _row(group, label, "", cases)
        sets = list(dict.fromkeys(case.set for case in cases))
        for name in sets if len(sets) > 1 else []:
            yield _row(group, label, name, [case for case in cases if case.set == name])


def _row(group: Group, label: str, set_name: str, cases: Sequence[Case]) -> Row:
    known = not group.combined
    spent = {attack: sum(case.updates.get(attack, 0) for case in cases) for attack in group.attacks} if known else {}
    if not cases[0].correct:
        means = _means(cases)
        return Row(group.system, group.combined, group.setting, label, set_name, len(cases), means=means, updates=spent)
    return Row(
        system=group.system,
        combined=group.combined,
        setting=group.setting,
        label=label,
        set=set_name,
        total=len(cases),
        clean=_share(case.correct["clean"] for case in cases),
        robust=_share(case.robust("attacked") for case in cases),
        rounded=_share(case.robust("rounded") for case in cases),
        after={attack: _share(case.robust(attack) for case in cases) for attack in group.attacks},
        answers={version: _answers(case.answers[version] for case in cases) for version in VERSIONS} if label else {},
        updates=spent,
    )


def _share(right: Iterable[bool]) -> Accuracy:
    outcomes = list(right)
    return Accuracy(sum(outcomes), len(outcomes))


def _answers(given: Iterable[str]) -> Answers:
    answers = list(given)
    return Answers(*(answers.count(label) for label in (VerdictLabel.SAFE, VerdictLabel.REVIEW, VerdictLabel.UNSAFE)))


def _means(cases: Sequence[Case]) -> dict[str, dict[str, Mean]]:
    """Average precisions by name and version, over the queries that have them in all versions."""
    names = sorted({name for case in cases for name in case.scores["clean"] if name.startswith("ap")})
    means = {}
    for name in names:
        having = [case for case in cases if all(name in case.scores[version] for version in VERSIONS)]
        if having:
            means[name] = {v: bootstrap_mean([case.scores[v][name] for case in having]) for v in VERSIONS}
    return means


def bootstrap_mean(values: Sequence[float]) -> Mean:
    """Mean of at least one value with the percentile bootstrap's 95 % interval, always from the same resamples."""
    generator, known = np.random.default_rng(0), np.asarray(values, dtype=np.float64)
    resampled = [known[generator.integers(len(known), size=len(known))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(resampled, [2.5, 97.5])
    value, low, high = (round(float(x), _DECIMALS) for x in (known.mean(), low, high))
    return Mean(value, low, high, len(known))


# --- loss by step ----------------------------------------------------------------------------------------------------


def _traces(system: str, setting: Setting, chain: Sequence[str], records: Sequence[AuditRecord]) -> Iterator[Trace]:
    for attack in chain:
        traces = [step.trace for r in records for step in r.rounds if step.attack == attack and step.trace]
        if traces:
            yield Trace(system, setting, attack, len(traces), _mean_trace(traces))


def _mean_trace(traces: Sequence[Sequence[tuple[int, float]]]) -> tuple[tuple[int, float], ...]:
    """Mean at every step at which a trace has a point; a trace keeps its last value, and before its first that one."""
    steps = sorted({step for trace in traces for step, _ in trace})
    total = np.zeros(len(steps))
    for trace in traces:
        at, values = zip(*sorted(trace), strict=True)
        last = np.searchsorted(at, steps, side="right") - 1
        total += np.asarray(values, dtype=np.float64)[last.clip(min=0)]
    return tuple((step, round(float(value), _DECIMALS)) for step, value in zip(steps, total / len(traces), strict=True))


def _place_of_set(plan: AuditPlan, name: str) -> int:
    return _place([images.set_name for images in plan.queries], name)


def _place(order: Sequence[str], name: str) -> int:
    """Where a name stands; what is not there comes last."""
    return order.index(name) if name in order else len(order)
