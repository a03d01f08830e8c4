"""Thresholds: a decision policy tried on the images of an audit, beside the one that serves."""

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fastapi import Request
from fastapi.responses import Response

from service.client import ProblemError
from service.console.gate import Visit, visit_of
from service.console.rendering import page
from service.console.routes import console_router
from service.console.tradeoff import Tradeoff, review_of, tradeoff
from service.settings import Settings, variable
from service.wire import Policy
from service.wire_audits import (
    MAX_VOTERS,
    AskedSetting,
    AttackSettingItem,
    AuditChoice,
    AuditedSystemItem,
    AuditsAnswer,
    PolicyParameters,
    ReplayAnswer,
    ShareItem,
    TriedPolicy,
)

PATH = "/console/thresholds"
router = console_router()
_REFUSED = (400, 404, 409)  # what another choice in the form can mend


@dataclass(frozen=True)
class Field:
    """A number of the form.

    Attributes:
        name: of the policy's parameter.
        label, hint: for people.
        low, high, step: of the value.
    """

    name: str
    label: str
    hint: str
    low: float
    high: float
    step: str


FIELDS = (
    Field("k", "Voters (k)", "Of the rule “vote”; the rule “nearest” has one.", 1, MAX_VOTERS, "1"),
    Field("min_margin", "Least margin for safe", "Safe by less than this: review.", 0, 2, "any"),
    Field("min_margin_unsafe", "Least margin for unsafe", "Unsafe by less than this: review.", 0, 2, "any"),
    Field("min_similarity", "Least similarity", "Less similar than this to everything: review.", -1, 1, "any"),
)


@dataclass(frozen=True)
class Choices:
    """What the form shows as chosen.

    Attributes:
        audit: and system, as `Choices.value` writes them; empty where there is none.
        setting: as `setting_value` writes it; empty for the headline one.
        rule: of the policy.
        values: of `FIELDS`, as they were typed.
    """

    audit: str
    setting: str
    rule: str
    values: Mapping[str, str]

    @staticmethod
    def value(choice: AuditChoice) -> str:
        """An audit and a system of it as one value; names of audits hold no slash."""
        return f"{choice.id}/{choice.system}"

    @classmethod
    def of(cls, query: Mapping[str, str], default: AuditChoice | None, present: Policy) -> "Choices":
        """From the address; what it does not say is as it is deployed."""
        audit = query.get("audit") or ("" if default is None else cls.value(default))
        values = {
            field.name: query.get(field.name, "").strip() or _number(getattr(present, field.name)) for field in FIELDS
        }
        return cls(audit, query.get("setting", ""), query.get("rule", present.rule), values)

    @property
    def policy(self) -> PolicyParameters:
        """To try.

        Raises:
            ValueError: a value is no number, or out of range; names it.
        """
        if self.rule not in ("nearest", "vote"):
            raise ValueError(f"The rule must be nearest or vote, not {self.rule[:40]!r}.")
        numbers: dict[str, float] = {}
        for field in FIELDS:
            text = self.values[field.name]
            try:
                number = int(text) if field.name == "k" else float(text)
            except ValueError:
                raise ValueError(f"{field.label}: {text[:40]!r} is no number.") from None
            if not field.low <= number <= field.high:
                raise ValueError(f"{field.label} must be from {field.low:g} to {field.high:g}, not {number:g}.")
            numbers[field.name] = number
        return PolicyParameters.model_validate({"rule": self.rule, **numbers})

    @property
    def asked_setting(self) -> AskedSetting | None:
        """How the attacked images were attacked; raises ValueError for what `setting_value` never writes."""
        if not self.setting:
            return None
        try:
            norm, eps, steps = self.setting.split(",")
            return AskedSetting.model_validate({"norm": norm, "eps": float(eps), "steps": int(steps)})
        except ValueError:
            raise ValueError("The attack is none of those that can be chosen.") from None


@dataclass(frozen=True)
class Tried:
    """What came of it.

    Attributes:
        answer: of the replay.
        chart: the curve.
        variables: settings of the service that are this policy, by the name of the environment variable.
        file_in_use: whether a calibrated policy's file has to be taken away before they count.
        command: that chooses the least thresholds with the same error rates; None where there can be none.
    """

    answer: ReplayAnswer
    chart: Tradeoff
    variables: Mapping[str, str]
    file_in_use: bool
    command: str | None


@router.get(PATH)
async def thresholds(request: Request) -> Response:
    """The form, and what the policy in the address would have answered."""
    async with visit_of(request, "pools:write") as visit:
        answer = await visit.client.audits.list()
        choices = Choices.of(request.query_params, answer.calibration, visit.runtime.policy)
        found: Tried | str = ""
        if choices.audit:
            found = await _tried(visit, choices, answer)
        refused = found if isinstance(found, str) else ""
        return page(
            visit,
            "thresholds.html",
            status=400 if refused else 200,
            answer=answer,
            choices=choices,
            options=_options(answer),
            fields=FIELDS,
            tried=found if isinstance(found, Tried) else None,
            refused=refused,
            setting_value=setting_value,
            review_of=review_of,
        )


async def _tried(visit: Visit, choices: Choices, listed: AuditsAnswer) -> Tried | str:
    """What came of the form; or what has to be mended in it."""
    id, _, name = choices.audit.partition("/")
    try:
        policy, setting = choices.policy, choices.asked_setting
        answer = await visit.client.audits.replay(id, name, policy, setting=setting)
    except ProblemError as error:
        if error.status not in _REFUSED:
            raise
        return error.problem.detail
    except ValueError as error:
        return str(error)
    policies = [("tried", answer.tried)] + ([("deployed", answer.deployed)] if answer.deployed else [])
    system = next((s for a in listed.audits if a.id == id for s in a.systems if s.name == name), None)
    return Tried(
        answer,
        tradeoff(answer.curve, policies),
        _variables(policy),
        visit.runtime.settings.policy_file is not None,
        _command(answer, system),
    )


def setting_value(setting: AttackSettingItem) -> str:
    """A setting as the value of an option."""
    return f"{setting.norm},{setting.eps!r},{setting.steps}"


def _options(answer: AuditsAnswer) -> list[tuple[str, str]]:
    """Audits and systems that a policy can be tried on: value and label."""
    found = []
    for audit in answer.audits:
        for system in audit.systems if audit.state == "finished" and audit.task == "moderation" else ():
            if system.gallery_sha256 is not None:
                fits = "as deployed" if system.fit.whole else "not what is deployed"
                choice = Choices.value(AuditChoice(id=audit.id, system=system.name))
                found.append((choice, f"{audit.id}, {system.name}, {audit.date[:10]} ({fits})"))
    return found


def _variables(policy: PolicyParameters) -> dict[str, str]:
    """The policy as settings: those that are not the default, or all defaults' names would hide what matters."""
    values = policy.model_dump()
    if policy.rule == "nearest":
        del values["k"]  # which it does not look at
    fields = Settings.model_fields
    return {
        variable(f"policy_{name}"): _number(value)
        for name, value in values.items()
        if value != fields[f"policy_{name}"].default
    }


def _command(answer: ReplayAnswer, system: AuditedSystemItem | None) -> str | None:
    """`hardlook-lab calibrate`, for the error rates that the tried policy has; it looks for the least review."""
    negative, positive = _worse(answer.tried, "false_negative"), _worse(answer.tried, "false_positive")
    if system is None or system.defense is not None or negative >= 1 or positive >= 1:
        return None
    setting = answer.setting
    levels = setting.eps * 255
    eps = f"{round(levels)}/255" if math.isclose(levels, round(levels), abs_tol=1e-9) else repr(setting.eps)
    words = ["hardlook-lab", "calibrate", answer.id, "--system", answer.system, "--out", "policy.json"]
    words += ["--max-false-negative", f"{negative:g}", "--max-false-positive", f"{positive:g}"]
    if len(answer.settings) > 1:
        words += ["--norm", setting.norm, "--eps", eps, "--steps", str(setting.steps)]
    return shlex.join(words)


def _worse(tried: TriedPolicy, name: Literal["false_negative", "false_positive"]) -> float:
    """The larger of a rate on clean and on attacked images, rounded up to four decimals."""
    shares: list[ShareItem] = [getattr(rates, name) for rates in (tried.clean, tried.attacked)]
    return math.ceil(max(share.value for share in shares) * 10_000) / 10_000


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
