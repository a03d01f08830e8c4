"""Conversions from audits, and from what was tried on them, to what goes over the wire (`service.wire_audits`)."""

from datetime import datetime

from perception.policy_file import Measured, Rate, Rates
from perception.replay import AttackSetting
from perception.verdict import DecisionPolicy
from service import wire_audits as wire
from service.audit_files import MeanEntry
from service.audit_fit import Deployed, Fit, calibration_run, fits, newest_fitting
from service.audit_reading import AuditedSystem, AuditRun, Figure, failed_checks
from service.audit_runs import Listing
from service.thresholds import Point


def audits_answer(request_id: str, listing: Listing, deployed: Deployed, *, configured: bool) -> wire.AuditsAnswer:
    """All audits, compared with what is deployed."""
    return wire.AuditsAnswer(
        request_id=request_id,
        configured=configured,
        audits=[_audit(run, deployed) for run in listing.runs],
        newest_fitting=_choice(newest_fitting(listing.runs, deployed)),
        calibration=_choice(calibration_run(listing.runs, deployed)),
        skipped=[wire.SkippedItem(name=name, reason=reason) for name, reason in listing.skipped],
        left_out=listing.left_out,
    )


def date_text(date: datetime) -> str:
    """To the second."""
    return date.isoformat(timespec="seconds")


def setting_item(setting: AttackSetting) -> wire.AttackSettingItem:
    """With its name in words."""
    return wire.AttackSettingItem(norm=setting.norm, eps=setting.eps, steps=setting.steps, text=str(setting))


def fit_item(fit: Fit) -> wire.FitItem:
    """What fits, and why not."""
    return wire.FitItem(
        whole=fit.whole,
        encoder=fit.encoder,
        pools=fit.pools,
        policy=fit.policy,
        defense=fit.defense,
        reasons=list(fit.reasons),
    )


def tried_policy(policy: DecisionPolicy, measured: Measured) -> wire.TriedPolicy:
    """A policy with its rates."""
    return wire.TriedPolicy(
        version=policy.version,
        rule=policy.rule,
        k=policy.k,
        min_similarity=policy.min_similarity,
        min_margin=policy.min_margin,
        min_margin_unsafe=policy.min_margin_unsafe,
        clean=_rates(measured.clean),
        attacked=_rates(measured.attacked),
    )


def curve_point(point: Point) -> wire.CurvePoint:
    """One margin with its rates."""
    return wire.CurvePoint(
        min_margin=point.margin, clean=_rates(point.measured.clean), attacked=_rates(point.measured.attacked)
    )


def _audit(run: AuditRun, deployed: Deployed) -> wire.AuditItem:
    return wire.AuditItem(
        id=run.id,
        state=run.state,
        problems=list(run.problems),
        date=date_text(run.date),
        dated_by=run.dated_by,
        task=run.task,
        systems=[_system(run, system, deployed) for system in run.systems],
        headline=None if run.headline is None else setting_item(run.headline),
        settings=[setting_item(setting) for setting in run.settings],
        figures=[_figure(figure) for figure in run.figures],
        checks=len(run.checks),
        failed_checks=[
            wire.FailedCheckItem(system=check.system, name=check.name, sentence=check.sentence)
            for check in failed_checks(run)
        ],
        has_report=run.has_page,
    )


def _system(run: AuditRun, system: AuditedSystem, deployed: Deployed) -> wire.AuditedSystemItem:
    plan, noted = system.plan, system.noted
    return wire.AuditedSystemItem(
        name=plan.name,
        encoder=plan.encoder,
        precision=plan.precision,
        fingerprint=None if noted is None else noted.fingerprint,
        gallery_sha256=None if noted is None else noted.gallery_sha256,
        policy_version=None if noted is None else noted.policy_version,
        defense=None if plan.defense is None else f"{plan.defense.kind}, attacker {plan.defense.attacker}",
        fit=fit_item(fits(run, system, deployed)),
    )


def _figure(figure: Figure) -> wire.AuditFigureItem:
    return wire.AuditFigureItem(
        system=figure.system,
        label=figure.label,
        total=figure.total,
        clean=_optional(figure.clean),
        robust=_optional(figure.robust),
        wrong_clean=_optional(figure.wrong_clean),
        wrong_attacked=_optional(figure.wrong_attacked),
        means={score: {v: _mean(mean) for v, mean in means.items()} for score, means in figure.means.items()},
    )


def _mean(mean: MeanEntry) -> wire.MeanItem:
    return wire.MeanItem(value=mean.value, interval95=(mean.low, mean.high), total=mean.total)


def _optional(rate: Rate | None) -> wire.ShareItem | None:
    return None if rate is None else _share(rate)


def _share(rate: Rate) -> wire.ShareItem:
    return wire.ShareItem(count=rate.count, total=rate.total, value=rate.value, interval95=rate.interval95)


def _rates(rates: Rates) -> wire.RatesItem:
    return wire.RatesItem(
        false_negative=_share(rates.false_negative),
        false_positive=_share(rates.false_positive),
        review_unsafe=_share(rates.review_unsafe),
        review_safe=_share(rates.review_safe),
    )


def _choice(found: tuple[AuditRun, AuditedSystem] | None) -> wire.AuditChoice | None:
    return None if found is None else wire.AuditChoice(id=found[0].id, system=found[1].name)
