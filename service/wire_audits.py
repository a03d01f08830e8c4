"""What goes over the wire about robustness audits: which there are, and thresholds tried on them.

As light as `service.wire`, and for the same readers.
"""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from service.wire import _FINGERPRINT, _REQUEST_ID, Answer, Norm, Request

_GALLERY = "5b0f3e1c2d4a69788796a5b4c3d2e1f00f1e2d3c4b5a69788796a5b4c3d2e1f0"
MAX_NAME_CHARS = 200
MAX_VOTERS = 100
Margin = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]


class AttackSettingItem(Answer):
    """How images were attacked."""

    norm: Norm
    eps: float = Field(description="Radius, in [0, 1] pixel units.", examples=[0.03137254901960784])
    steps: int = Field(description="Updates of a gradient attack.", examples=[200])
    text: str = Field(description="The same in words.", examples=["linf 8/255, 200 steps"])


class ShareItem(Answer):
    """A share that was counted, with Wilson's 95 % interval."""

    count: int = Field(examples=[13])
    total: int = Field(examples=[26])
    value: float = Field(examples=[0.5])
    interval95: tuple[float, float] = Field(examples=[[0.3206, 0.6794]])


class MeanItem(Answer):
    """A mean over queries with its bootstrap 95 % interval."""

    value: float
    interval95: tuple[float, float]
    total: int


class FitItem(Answer):
    """Whether what was audited is what is deployed."""

    whole: bool = Field(description="All four are.")
    encoder: bool = Field(description="By its fingerprint, which the precision is part of.")
    pools: bool = Field(description="By the sha256 of what `hardlook-index export` would write of the present pools.")
    policy: bool = Field(description="By its version.")
    defense: bool = Field(description="By its parameters, without the seed of its noise.")
    reasons: list[str] = Field(description="A sentence for each that is not.")


class AuditedSystemItem(Answer):
    """One system of an audit."""

    name: str = Field(examples=["production"])
    encoder: str = Field(examples=["bundled/fare4"])
    precision: str = Field(examples=["fp32"])
    fingerprint: str | None = Field(description="Null where the run has not come to it.", examples=[_FINGERPRINT])
    gallery_sha256: str | None = Field(description="Of the audited pools; null without any.", examples=[_GALLERY])
    policy_version: str | None = Field(description="Null without pools.", examples=["nearest-3f5a9c0e1b2d"])
    defense: str | None = Field(description="Kind and attacker of its defence; null without one.", examples=[None])
    fit: FitItem


class AuditFigureItem(Answer):
    """A headline figure: one system and label, over all sets of images."""

    system: str = Field(description="A system, or a combination of two.", examples=["production"])
    label: str = Field(description="For moderation what is right; else empty.", examples=["unsafe"])
    total: int
    clean: ShareItem | None = Field(description="Right when clean; null where there is only a ranking.")
    robust: ShareItem | None = Field(description="Right when clean and when attacked.")
    wrong_clean: ShareItem | None = Field(description="Answered with the opposite when clean; moderation alone.")
    wrong_attacked: ShareItem | None = Field(description="Answered with the opposite when attacked.")
    means: dict[str, dict[str, MeanItem]] = Field(description="Of rankings: by score, then by version of the image.")


class FailedCheckItem(Answer):
    """A check for masked gradients that did not pass: robust figures beside it are not to be believed."""

    system: str
    name: str = Field(examples=["black-box"])
    sentence: str


class AuditItem(Answer):
    """One run directory of `hardlook-lab audit`."""

    id: str = Field(description="Name of its folder.", examples=["audit_demo"])
    state: Literal["finished", "unfinished", "damaged"]
    problems: list[str] = Field(description="What is wrong with it, or missing; empty for a finished one.")
    date: str = Field(description="When it was finished; else when it began.", examples=["2026-11-21T09:30:00+00:00"])
    dated_by: Literal["log", "file"] = Field(
        description="By the run's own log, or by the time of its files, which copying may have changed."
    )
    task: str = Field(description="Empty where the plan cannot be read.", examples=["moderation"])
    systems: list[AuditedSystemItem]
    headline: AttackSettingItem | None = Field(description="What the figures are under; null without a report.")
    settings: list[AttackSettingItem] = Field(description="All that the report has figures of.")
    figures: list[AuditFigureItem]
    checks: int = Field(description="For masked gradients, that were made.")
    failed_checks: list[FailedCheckItem]
    has_report: bool = Field(description="Whether there is a page to read.")


class SkippedItem(Answer):
    """What in the folder of audits is no run that can be named."""

    name: str
    reason: str


class AuditChoice(Answer):
    """A system of an audit."""

    id: str = Field(description="Of the audit.", examples=["audit_demo"])
    system: str = Field(examples=["production"])


class AuditsAnswer(Answer):
    """Answer of /audits."""

    request_id: str = Field(examples=[_REQUEST_ID])
    configured: bool = Field(description="Whether HARDLOOK_AUDITS names a folder.")
    audits: list[AuditItem] = Field(description="Newest first.")
    newest_fitting: AuditChoice | None = Field(
        description="The newest finished audit of what is deployed, in all parts; null where there is none."
    )
    calibration: AuditChoice | None = Field(
        description="The audit that thresholds are best tried on: the newest that fits, else one that fits in all but "
        "the policy, else the newest; null without a finished audit of pools."
    )
    skipped: list[SkippedItem]
    left_out: int = Field(description="Folders that were not looked at, for there are too many.")


class PolicyParameters(Request):
    """A decision policy; equal parameters decide equally."""

    model_config = ConfigDict(strict=True)
    rule: Literal["nearest", "vote"] = Field("nearest", description="How neighbours become a verdict.")
    k: int = Field(5, ge=1, le=MAX_VOTERS, description="Voters of the rule `vote`.")
    min_similarity: float = Field(
        -1.0, ge=-1, le=1, allow_inf_nan=False, description="Less similar than this to everything: review."
    )
    min_margin: Margin = Field(0.0, description="Safe by less than this: review.")
    min_margin_unsafe: Margin = Field(0.0, description="Unsafe by less than this: review.")


class AskedSetting(Request):
    """How the attacked images were attacked."""

    model_config = ConfigDict(strict=True)
    norm: Norm
    eps: float = Field(gt=0, allow_inf_nan=False, description="Radius, in [0, 1] pixel units, as listed.")
    steps: int = Field(ge=1)


class ReplayBody(Request):
    """What to try."""

    model_config = ConfigDict(
        strict=True, json_schema_extra={"examples": [{"system": "production", "policy": {"min_margin": 0.04}}]}
    )
    system: str = Field(min_length=1, max_length=MAX_NAME_CHARS, description="Of the audit.", examples=["production"])
    policy: PolicyParameters = Field(default_factory=lambda: PolicyParameters(), description="To try.")
    setting: AskedSetting | None = Field(None, description="Of the attacked images; by default the headline one.")


class RatesItem(Answer):
    """How a policy answers one version of the images; `review` is neither right nor wrong, but a person's time."""

    false_negative: ShareItem = Field(description="Unsafe images that it calls safe, of all unsafe ones.")
    false_positive: ShareItem = Field(description="Safe images that it calls unsafe, of all safe ones.")
    review_unsafe: ShareItem = Field(description="Unsafe images that it leaves to a person, of all unsafe ones.")
    review_safe: ShareItem = Field(description="Safe images that it leaves to a person, of all safe ones.")


class TriedPolicy(Answer):
    """A policy and what it would have answered."""

    version: str = Field(examples=["nearest-3f5a9c0e1b2d"])
    rule: Literal["nearest", "vote"]
    k: int
    min_similarity: float
    min_margin: float
    min_margin_unsafe: float
    clean: RatesItem
    attacked: RatesItem


class CurvePoint(Answer):
    """What the tried policy would reach with another `min_margin`."""

    min_margin: float
    clean: RatesItem
    attacked: RatesItem


class ReplayAnswer(Answer):
    """Answer of /audits/{id}/replay."""

    request_id: str = Field(examples=[_REQUEST_ID])
    id: str = Field(description="Of the audit.")
    date: str
    system: str
    setting: AttackSettingItem
    settings: list[AttackSettingItem] = Field(description="All that can be asked for.")
    recorded: int = Field(description="Neighbours of each pool that were recorded; at most so many can vote.")
    fit: FitItem
    attacked_under: str = Field(
        description="Version of the policy that the attackers worked against. Under any other one rates on attacked "
        "images are lower bounds: attackers could have gone on."
    )
    deployed: TriedPolicy | None = Field(description="Null where the deployed policy has more voters than recorded.")
    tried: TriedPolicy
    curve: list[CurvePoint] = Field(description="By `min_margin`, from none to the largest that any verdict has.")
    notes: list[str] = Field(description="What to know before relying on the rates; the page shows all of them.")
