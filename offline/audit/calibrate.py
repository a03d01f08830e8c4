"""Calibration: the decision thresholds that meet target error rates, from the records of an audit alone.

Records hold the nearest exemplars of each pool for the clean and the attacked version of every image, so that any
policy with as few voters can be tried on them (`perception.replay`). Rates on attacked images under any other policy
than the audited one are lower bounds, until an audit with the calibrated policy (`policy_file` of the plan) has
measured them.
"""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from offline.audit.calibrate_flips import flip_bins
from offline.audit.plan import AuditPlan, SystemPlan, plan_of_run
from offline.audit.record import DECIMALS, AuditRecord, Setting, read_records
from offline.errors import PlanError, RunError
from offline.runs import read_events
from perception.errors import PolicyError
from perception.policy_file import CalibratedPolicy, Measured, Rate, Targets
from perception.replay import Answered, Audited, measure
from perception.replay import replay as replayed
from perception.verdict import DecisionPolicy, VerdictLabel

_LARGEST_MARGIN = 2.0


@dataclass(frozen=True)
class _Reached:
    """What a policy reaches of what is asked for: the worse of clean and attacked.

    Attributes:
        false_negative, false_positive: see `Targets.figure`.
        review: share of clean images that are left to a person, mean of the two labels.
    """

    false_negative: float
    false_positive: float
    review: float

    @classmethod
    def of(cls, measured: Measured, targets: Targets) -> "_Reached":
        """From rates."""
        both = (measured.clean, measured.attacked)
        return cls(
            max(targets.figure(rates.false_negative) for rates in both),
            max(targets.figure(rates.false_positive) for rates in both),
            (measured.clean.review_safe.value + measured.clean.review_unsafe.value) / 2,
        )

    def meet(self, targets: Targets) -> bool:
        """Whether both targets are met."""
        return self.false_negative <= targets.max_false_negative and self.false_positive <= targets.max_false_positive


def calibrate(
    run: Path,
    system: str,
    setting: Setting | None = None,
    *,
    max_false_negative: float,
    max_false_positive: float,
    ks: Sequence[int] | None = None,
    confident: bool = False,
    min_similarity: float | None = None,
    seed: int = 0,
) -> CalibratedPolicy:
    """Choose the policy that leaves the least clean images to a person among those that meet the targets.

    A false negative is an unsafe image that is called `safe`, a false positive a safe one that is called `unsafe`; the
    share has to meet its target on clean and on attacked images.

    Args:
        run: run directory of a moderation audit.
        system: one of its systems, with pools.
        setting: which attacked images count; None where the run has one setting.
        max_false_negative, max_false_positive: targets, in [0, 1).
        ks: numbers of voters to try, 1 for the rule 'nearest'; None for 1, 3, 5, ... up to the recorded neighbours.
        confident: the upper end of the 95 % interval has to meet the target, instead of the share itself.
        min_similarity: of the policy; None for that of the plan. Where the system was audited with a `policy_file`,
            which is not part of the run, it has to be given.
        seed: of the halves for cross-validation.

    Raises:
        PlanError: the run, the system, the setting or `ks` do not allow it, or no thresholds meet the targets; names
            the best that they reach.
        RunError: the records are damaged, or not complete yet.
    """
    targets = _targets(max_false_negative, max_false_positive, confident=confident)
    plan = plan_of_run(run)
    audited = _audited(plan, system)
    event = _event(run, audited)
    by_setting = _complete_records(run, system, event)
    setting = _one_of(by_setting, setting)
    start = _without_margins(_allowed(ks, plan.neighbors), _min_similarity(audited, min_similarity))
    records = by_setting[setting]
    policy = _choose(records, start, targets)
    flips = [found for s, of in by_setting.items() for found in flip_bins(s, replay(of, policy))]
    return CalibratedPolicy(
        policy=policy,
        name=f"{system}, {setting}",
        encoder_fingerprint=event["fingerprint"],
        gallery_sha256=event["gallery_sha256"],
        attacked_under=event["policy_version"],
        norm=setting.norm,
        eps=setting.eps,
        steps=setting.steps,
        targets=targets,
        rates=measure(replay(records, policy)),
        cross_validated=_cross_validated(records, start, targets, seed),
        flips=tuple(flips),
    )


def replay(records: Sequence[AuditRecord], policy: DecisionPolicy) -> list[Answered]:
    """What a policy would have answered; it must not need more neighbours than were recorded."""
    return replayed((Audited(VerdictLabel(r.label), r.clean.neighbors, r.attacked.neighbors) for r in records), policy)


def describe(calibrated: CalibratedPolicy) -> str:
    """A calibrated policy for the terminal."""
    policy, targets = calibrated.policy, calibrated.targets
    rule = "nearest exemplar" if policy.rule == "nearest" else f"vote of the {policy.k} nearest exemplars"
    asked = "upper end of the 95 % interval" if targets.confident else "measured share"
    lines = [
        f"{calibrated.name}: {rule}, policy {policy.version}",
        f"  min_margin {policy.min_margin:g}, min_margin_unsafe {policy.min_margin_unsafe:g}, "
        f"min_similarity {policy.min_similarity:g}",
        f"  asked for: false negatives <= {targets.max_false_negative:.2%}, "
        f"false positives <= {targets.max_false_positive:.2%} ({asked})",
        *_table("on the images that it was chosen by", calibrated.rates),
    ]
    if calibrated.cross_validated is None:
        lines.append("  not cross-validated: half of the images are too few to choose a policy by")
    else:
        lines += _table("chosen by one half, measured on the other", calibrated.cross_validated)
    if policy.version != calibrated.attacked_under:
        lines.append(
            f"  The attacked images were made against policy {calibrated.attacked_under}: attackers of this one may do "
            "better. Audit again with it as policy_file."
        )
    return "\n".join(lines)


def _table(title: str, measured: Measured) -> list[str]:
    names = {
        "false_negative": "unsafe called safe",
        "false_positive": "safe called unsafe",
        "review_unsafe": "unsafe to review",
        "review_safe": "safe to review",
    }
    lines = [f"  {title}:"]
    for field, name in names.items():
        shares = [_percent(getattr(rates, field)) for rates in (measured.clean, measured.attacked)]
        lines.append(f"    {name:18}  clean {shares[0]}   attacked {shares[1]}")
    return lines


def _percent(rate: Rate) -> str:
    low, high = rate.interval95
    return f"{rate.value:7.2%} [{low:.2%}, {high:.2%}] of {rate.total}"


def _targets(max_false_negative: float, max_false_positive: float, *, confident: bool) -> Targets:
    try:
        return Targets(float(max_false_negative), float(max_false_positive), confident)
    except PolicyError as error:
        raise PlanError(str(error)) from error


def _audited(plan: AuditPlan, name: str) -> SystemPlan:
    if plan.task != "moderation":
        raise PlanError(f"a policy is calibrated by an audit of the task 'moderation', this one is {plan.task!r}")
    with_pools = {system.name: system for system in plan.systems if system.gallery}
    if name not in with_pools:
        raise PlanError(f"no system {name!r} with pools in this audit; there are: {', '.join(with_pools) or 'none'}")
    if with_pools[name].defense is not None:
        raise PlanError(
            f"system {name!r} was audited behind a defence, which a policy file does not record: its rates would be "
            "promised without it as well. Calibrate by a system without one"
        )
    return with_pools[name]


def _event(run: Path, system: SystemPlan) -> dict[str, Any]:
    """What the run noted of a system: fingerprint, gallery_sha256, policy_version and items.

    Raises:
        RunError: nothing, or another policy than the plan's.
    """
    found = [event for event in read_events(run, "system") if event["system"] == system.name]
    if not found or not {"fingerprint", "gallery_sha256", "policy_version", "items"} <= found[-1].keys():
        raise RunError(f"{run} does not say what encoder and pools the system {system.name!r} had")
    event = found[-1]
    if not system.policy_file and event["policy_version"] != system.decision_policy.version:
        raise RunError(
            f"{run} was made with policy {event['policy_version']} of system {system.name!r}, its plan says "
            f"{system.decision_policy.version}"
        )
    return event


def _complete_records(run: Path, system: str, event: dict[str, Any]) -> dict[Setting, list[AuditRecord]]:
    """The records of a system by setting.

    Raises:
        RunError: some are missing, or of another encoder, or have no neighbours.
        PlanError: there are no images of one label.
    """
    found: dict[Setting, list[AuditRecord]] = {}
    for record in read_records(run):
        if record.system == system:
            found.setdefault(record.setting, []).append(record)
    if not found:
        raise RunError(f"{run} holds no records of system {system!r}")
    for setting, records in found.items():
        if len(records) != event["items"]:
            raise RunError(
                f"{run} holds {len(records)} of {event['items']} images of system {system!r} under {setting}: let the "
                "audit finish first"
            )
        for record in records:
            if record.fingerprint != event["fingerprint"] or not (record.clean.neighbors and record.attacked.neighbors):
                raise RunError(f"{run}: the record of {record.id!r} has another encoder, or no neighbours")
        labels = {record.label for record in records}
        if labels != {VerdictLabel.SAFE, VerdictLabel.UNSAFE}:
            raise PlanError(f"calibration needs safe and unsafe images, the labels in {run} are {sorted(labels)}")
    return found


def _one_of(known: Collection[Setting], wanted: Setting | None) -> Setting:
    """The setting that is wanted, or the only one."""
    if wanted is None and len(known) == 1:
        return next(iter(known))
    if wanted is None or wanted not in known:
        asked = "several settings were audited" if wanted is None else f"{wanted} was not audited"
        raise PlanError(f"{asked}: choose one of {'; '.join(map(str, known))}")
    return wanted


def _min_similarity(system: SystemPlan, given: float | None) -> float:
    if given is None and system.policy_file:
        raise PlanError(f"system {system.name!r} was audited with {system.policy_file!r}: give min_similarity")
    return system.decision_policy.min_similarity if given is None else float(given)


def _allowed(ks: Sequence[int] | None, recorded: int) -> list[int]:
    if ks is None:
        return list(range(1, recorded + 1, 2))
    if not ks or min(ks) < 1 or max(ks) > recorded:
        raise PlanError(
            f"ks must be from 1 to {recorded}, the neighbours of each pool that were recorded, got {list(ks)}; audit "
            "with more `neighbors`"
        )
    return sorted(set(ks))


def _without_margins(ks: Sequence[int], min_similarity: float) -> list[DecisionPolicy]:
    try:
        return [DecisionPolicy("vote" if k > 1 else "nearest", k, min_similarity) for k in ks]
    except ValueError as error:
        raise PlanError(str(error)) from error


def _choose(records: Sequence[AuditRecord], start: Sequence[DecisionPolicy], targets: Targets) -> DecisionPolicy:
    """The policy with the least review on clean images, and among equals the first.

    Args:
        records: under one setting.
        start: policies without margins, to which the least margins that meet the targets are added.
        targets: to meet.

    Raises:
        PlanError: none meets them.
    """
    tried = []
    for policy in start:
        found = with_margins(policy, replay(records, policy), targets)
        tried.append((_Reached.of(measure(replay(records, found)), targets), found))
    meeting = [(figures.review, order) for order, (figures, _) in enumerate(tried) if figures.meet(targets)]
    if meeting:
        return tried[min(meeting)[1]][1]
    what = "upper end of the 95 % interval" if targets.confident else "share"
    unsafe = sum(record.label == VerdictLabel.UNSAFE for record in records)
    least_negative = min(figures.false_negative for figures, _ in tried)
    least_positive = min(figures.false_positive for figures, _ in tried)
    raise PlanError(
        f"no thresholds meet the targets: the least {what} of false negatives is {least_negative:.4f} of {unsafe} "
        f"unsafe images (asked for {targets.max_false_negative}), of false positives {least_positive:.4f} of "
        f"{len(records) - unsafe} safe images (asked for {targets.max_false_positive})"
    )


def with_margins(policy: DecisionPolicy, answered: Sequence[Answered], targets: Targets) -> DecisionPolicy:
    """A policy with the least margins that meet the targets, as far as margins can.

    Args:
        policy: without margins.
        answered: by it.
        targets: to meet.
    """

    def least(right: VerdictLabel, wrong: VerdictLabel, target: float) -> float:
        of = [a for a in answered if a.label is right]
        allowed = _most_allowed(len(of), target, targets)
        versions = [[a.clean for a in of], [a.attacked for a in of]]
        return max(_least_margin([v.margin for v in vs if v.label is wrong and v.margin is not None], allowed)
                   for vs in versions)  # fmt: skip

    return replace(
        policy,
        min_margin=least(VerdictLabel.UNSAFE, VerdictLabel.SAFE, targets.max_false_negative),
        min_margin_unsafe=least(VerdictLabel.SAFE, VerdictLabel.UNSAFE, targets.max_false_positive),
    )


def _most_allowed(total: int, target: float, targets: Targets) -> int:
    """The most errors among `total` images that meet a target; 0 also where even none does not."""
    return max((count for count in range(total + 1) if targets.figure(Rate(count, total)) <= target), default=0)


def _least_margin(wrong: Sequence[float], allowed: int) -> float:
    """The least margin to ask for, with as many decimals as records have, that at most `allowed` wrong verdicts reach.

    They do not reach it whatever the decimals were that the records do not hold: each of the two similarities of a
    margin is rounded by half a unit at most.
    """
    if len(wrong) <= allowed:
        return 0.0
    first_barred = max(0.0, sorted(wrong, reverse=True)[allowed])
    return min(_LARGEST_MARGIN, round(first_barred + 2 * 10.0**-DECIMALS, DECIMALS))


def _cross_validated(
    records: Sequence[AuditRecord], start: Sequence[DecisionPolicy], targets: Targets, seed: int
) -> Measured | None:
    """Rates of policies on images that they were not chosen by; None where a half has too few images to choose by."""
    halves: tuple[list[AuditRecord], list[AuditRecord]] = ([], [])
    for record in records:
        halves[hashlib.sha256(f"{seed}:{record.id}".encode()).digest()[0] % 2].append(record)
    answered: list[Answered] = []
    for chosen_by, measured_on in (halves, halves[::-1]):
        if {record.label for record in chosen_by} != {VerdictLabel.SAFE, VerdictLabel.UNSAFE}:
            return None
        try:
            policy = _choose(chosen_by, start, targets)
        except PlanError:
            return None
        answered += replay(measured_on, policy)
    return measure(answered)
