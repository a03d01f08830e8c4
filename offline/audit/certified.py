"""Certified accuracy, from an audit's records alone: how many images are right, and proven to stay so within a radius.

Methods 8.1: the share of images that are right when clean and whose radius is above eps. Triplets of which people say
as often the one as the other take no part. Radii are in L2 over [0, 1] pixels at the encoder's own input; unlike those
of attacks they are not scaled with its side.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from offline.audit.plan import AuditPlan
from offline.audit.record import AuditRecord
from offline.audit.rows import CertifiedRow
from offline.benchmarks.intervals import Accuracy

RADII = (36 / 255, 72 / 255, 108 / 255)
"""Those of the published tables."""
FORMS = ("decision", "tighter", "published")
_CURVE_POINTS = 33
_DECIMALS = 6


def certified_rows(plan: AuditPlan, records: Iterable[AuditRecord]) -> tuple[CertifiedRow, ...]:
    """Certified accuracies of all systems that have certificates, in the plan's order of systems.

    An image that was attacked under several settings counts once. Rows are by system, label (for moderation) and form,
    each for all sets together, and then for every set where there are several.
    """
    by_system: dict[str, dict[tuple[str, str], AuditRecord]] = {system.name: {} for system in plan.systems}
    for record in records:
        if record.certified is not None:
            by_system[record.system].setdefault((record.set, record.id), record)
    largest = max((r for own in by_system.values() for one in own.values() for r in _radii(one)), default=0.0)
    at = _curve(largest)
    return tuple(
        row
        for system, own in by_system.items()
        for row in _rows_of(plan, system, [own[key] for key in sorted(own)], at)
    )


def broken_certificates(records: Iterable[AuditRecord]) -> list[AuditRecord]:
    """Records of attacked images that have another answer, though they lie within their certified radius.

    There must be none: each is a bug, of the certificate or of the encoder's constant. Only perturbations that were
    measured in L2 can be compared.
    """
    return [
        record
        for record in records
        if record.norm == "l2"
        and record.attacked.answer != record.clean.answer
        and record.distance < max(_radii(record), default=0.0)
    ]


def _rows_of(
    plan: AuditPlan, system: str, records: Sequence[AuditRecord], at: Sequence[float]
) -> Iterator[CertifiedRow]:
    by_label: dict[str, list[AuditRecord]] = {}
    for record in records:
        by_label.setdefault(record.label if plan.task == "moderation" else "", []).append(record)
    for label, members in sorted(by_label.items()):
        sets = list(dict.fromkeys(record.set for record in members))
        for set_name in ("", *(sets if len(sets) > 1 else [])):
            chosen = [record for record in members if set_name in ("", record.set)]
            forms = {form for record in chosen for form in record.certified or ()}
            for form in sorted(forms, key=lambda form: (FORMS.index(form) if form in FORMS else len(FORMS), form)):
                points = tuple((eps, _accuracy(chosen, form, eps)) for eps in at)
                clean = Accuracy(sum(record.clean.correct is True for record in chosen), len(chosen))
                yield CertifiedRow(system, form, label, set_name, len(chosen), clean, points)


def _accuracy(records: Sequence[AuditRecord], form: str, eps: float) -> Accuracy:
    certified = [record.clean.correct is True and _form(record.certified, form) > eps for record in records]
    return Accuracy(sum(certified), len(certified))


def _form(radii: Mapping[str, float] | None, form: str) -> float:
    return 0.0 if radii is None else radii.get(form, 0.0)


def _radii(record: AuditRecord) -> Iterable[float]:
    return () if record.certified is None else record.certified.values()


def _curve(largest: float) -> list[float]:
    """Radii at which accuracies are given: those of the tables, and evenly up to the largest that is certified."""
    end = max(largest, RADII[-1])
    steps = [round(end * i / (_CURVE_POINTS - 1), _DECIMALS) for i in range(_CURVE_POINTS)]
    return sorted({*steps, *RADII})
