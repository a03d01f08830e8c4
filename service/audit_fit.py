"""Whether an audit is of what is deployed: the encoder, the pools, the policy, the defence, each for itself.

Owns what "deployed" means, and the words for each difference. What cannot be compared does not fit.
"""

import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime

from indexer.live.view import View
from perception.verdict import PoolLabel
from service.audit_files import MIB, PlannedDefense
from service.audit_reading import AuditedSystem, AuditRun
from service.settings import Settings

MAX_POOL_BYTES = 2048 * MIB
"""Of the embeddings of pools that are compared: it takes a copy of them."""
_SHORT = 12  # digits of a hash that are shown
_DONE = {
    "exemplar.add": "added",
    "exemplar.move": "moved",
    "exemplar.delete": "deleted",
    "exemplar.disable": "disabled",
    "exemplar.quarantine": "quarantined",
    "exemplar.enable": "enabled",
    "exemplar.release": "released",
    "exemplar.suppress": "suppressed",
}
POOL_CHANGES = (*_DONE, "version.base", "version.rollback")
"""Kinds of entries of the audit log that change what the pools hold."""


@dataclass(frozen=True)
class DefenseParameters:
    """What an image goes through before it is encoded, less the seed of its noise, which no audit may know.

    Attributes:
        eps, steps, step_size, beta, threshold: see `perception.counterattack.CounterattackSettings`.
        original: name of the encoder that computes tau; empty where it is the one that serves.
    """

    eps: float
    steps: int
    step_size: float
    beta: float
    threshold: float
    original: str

    @classmethod
    def deployed(cls, settings: Settings) -> "DefenseParameters | None":
        """What the settings ask for; None for no defence."""
        if settings.defense == "none":
            return None
        return cls(
            settings.ttc_eps,
            settings.ttc_steps,
            settings.ttc_step_size,
            settings.ttc_beta,
            settings.ttc_threshold,
            settings.ttc_original or "",
        )

    @classmethod
    def audited(cls, plan: PlannedDefense | None) -> "DefenseParameters | None":
        """What a system was audited behind; None for no defence."""
        if plan is None:
            return None
        return cls(plan.eps, plan.steps, plan.step_size, plan.beta, plan.threshold, plan.original)


@dataclass(frozen=True)
class PoolChange:
    """An entry of the audit log that changed the pools: when, and its kind."""

    time: datetime
    kind: str


@dataclass(frozen=True)
class PresentPools:
    """The pools that serve, as far as audits can be compared with them.

    Attributes:
        sha256: of what `hardlook-index export` would write of them (`Gallery.sha256`); None where there is none.
        reason: why there is none, for a person; or what no export holds, and decides all the same.
        whole: whether an export would hold everything that decides.
    """

    sha256: str | None
    reason: str = ""
    whole: bool = True


@dataclass(frozen=True)
class Deployed:
    """What answers now.

    Attributes:
        encoder, fingerprint, precision: of the encoder.
        pools: that are searched.
        policy_version: of the decision policy.
        defense: None for none.
        changes: of the pools, newest first, as far back as was looked.
        all_changes: whether that was all.
    """

    encoder: str
    fingerprint: str
    precision: str
    pools: PresentPools
    policy_version: str
    defense: DefenseParameters | None
    changes: tuple[PoolChange, ...] = ()
    all_changes: bool = True


@dataclass(frozen=True)
class Fit:
    """What of an audited system is what is deployed.

    Attributes:
        encoder, pools, policy, defense: whether each is the same.
        reasons: a sentence for each that is not.
    """

    encoder: bool
    pools: bool
    policy: bool
    defense: bool
    reasons: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether all are the same."""
        return self.encoder and self.pools and self.policy and self.defense

    @property
    def nearness(self) -> int:
        """2 where all are the same, 1 where all but the policy are, else 0."""
        return 2 if self.whole else int(self.encoder and self.pools and self.defense)


@dataclass
class PoolsHash:
    """The hash of the pools that serve, worked out once for each state of them; threads may share it."""

    _known: tuple["weakref.ref[View]", PresentPools] | None = field(default=None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def of(self, view: View | None) -> PresentPools:
        """What audits are compared with. It takes time and a copy in proportion to the pools; not for the event loop.

        Args:
            view: of the moderation pools; None where there are none.
        """
        if view is None or not len(view):
            return PresentPools(None, "no pools are published")
        with self._lock:
            # A view never changes: another state of the pools, or an exemplar that is back in them, is another view.
            if self._known is None or self._known[0]() is not view:
                self._known = (weakref.ref(view), _hashed(view))
            return self._known[1]


def _hashed(view: View) -> PresentPools:
    n_bytes = len(view) * view.dim * 4
    if n_bytes > MAX_POOL_BYTES:
        return PresentPools(
            None, f"the pools have {n_bytes} bytes of embeddings, the limit for comparing them is {MAX_POOL_BYTES}"
        )
    sha256 = view.to_gallery().sha256
    if view.gates is None:
        return PresentPools(sha256)
    return PresentPools(sha256, "suppress items take evidence away, of which no audit knows", whole=False)


def fits(run: AuditRun, system: AuditedSystem, deployed: Deployed) -> Fit:
    """Compare an audited system with what is deployed.

    Args:
        run: that it is of.
        system: of the run.
        deployed: what answers now.
    """
    noted = system.noted
    if noted is None:
        return Fit(False, False, False, False, ("The run has not come to this system yet.",))
    reasons: list[str] = []
    encoder = noted.fingerprint == deployed.fingerprint
    if not encoder:
        reasons.append(
            f"Another encoder answers: audited was {noted.encoder} in {noted.precision} ({_short(noted.fingerprint)}), "
            f"deployed is {deployed.encoder} in {deployed.precision} ({_short(deployed.fingerprint)})."
        )
    if run.task != "moderation" or noted.gallery_sha256 is None:
        what = "a detector head decides" if run.task == "moderation" else f"the task is {run.task}"
        reasons.append(f"The audit is not of pools and a policy: {what}.")
        pools = policy = False
    else:
        pools = _pools_fit(system, noted.gallery_sha256, run.begun or run.date, deployed, reasons)
        policy = noted.policy_version == deployed.policy_version
        if not policy:
            reasons.append(
                f"Another policy decides: audited was {noted.policy_version}, deployed is {deployed.policy_version}."
            )
    return Fit(encoder, pools, policy, _defense_fits(system, deployed, reasons), tuple(reasons))


def _pools_fit(system: AuditedSystem, audited: str, since: datetime, deployed: Deployed, reasons: list[str]) -> bool:
    present = deployed.pools
    if present.sha256 is None:
        reasons.append(f"The pools cannot be compared: {present.reason}.")
        return False
    if present.sha256 != audited:
        said = f"The pools are others: audited were {_short(audited)}, deployed are {_short(present.sha256)}."
        missing = sorted(set(map(str, PoolLabel)) - set(system.plan.pools or map(str, PoolLabel)))
        if missing:
            said += f" The audit left out the pool {', '.join(missing)}."
        reasons.append(f"{said} {_changes_since(since, deployed)}".strip())
        return False
    if not present.whole:
        reasons.append(f"The pools have the audited exemplars, but {present.reason}.")
    return present.whole


def _changes_since(since: datetime, deployed: Deployed) -> str:
    """What the audit log says of the pools since an audit, as a sentence; empty where it says nothing."""
    counts = Counter(change.kind for change in deployed.changes if change.time >= since)
    done: list[str] = []
    for kind, verb in _DONE.items():
        if counts[kind]:
            done.append(f"{_counted(counts[kind], 'exemplar')} {'was' if counts[kind] == 1 else 'were'} {verb}")
    if counts["version.base"]:
        was = "was" if counts["version.base"] == 1 else "were"
        done.append(f"{_counted(counts['version.base'], 'version')} {was} published offline")
    if counts["version.rollback"]:
        done.append(f"an earlier version was gone back to {_counted(counts['version.rollback'], 'time')}")
    if not done:
        return ""
    whole = deployed.all_changes or any(change.time < since for change in deployed.changes)
    return f"Since the audit {'' if whole else 'at least '}{', '.join(done)}."


def _defense_fits(system: AuditedSystem, deployed: Deployed, reasons: list[str]) -> bool:
    audited, present = DefenseParameters.audited(system.plan.defense), deployed.defense
    if audited == present:
        return True
    if audited is None:
        reasons.append("A defence stands before the encoder, which the audit did not have.")
    elif present is None:
        reasons.append("No defence stands before the encoder, the audit had one.")
    else:
        now = asdict(present)
        differing = [f"{name} {value!r}, now {now[name]!r}" for name, value in asdict(audited).items()
                     if now[name] != value]  # fmt: skip
        reasons.append(f"The defence is another: audited were {'; '.join(differing)}.")
    return False


def newest_fitting(runs: Sequence[AuditRun], deployed: Deployed) -> tuple[AuditRun, AuditedSystem] | None:
    """The newest finished run with a system that is what is deployed, in all parts.

    Args:
        runs: newest first.
        deployed: what answers now.
    """
    for run in runs:
        for system in run.systems if run.state == "finished" else ():
            if fits(run, system, deployed).whole:
                return run, system
    return None


def calibration_run(runs: Sequence[AuditRun], deployed: Deployed) -> tuple[AuditRun, AuditedSystem] | None:
    """The run whose records thresholds are best tried on: the newest that fits as nearly as any does.

    One that fits in all but the policy comes before others, since it is thresholds that are tried; then the newest.

    Args:
        runs: newest first.
        deployed: what answers now.
    """
    usable = [
        (run, system, fits(run, system, deployed))
        for run in runs
        if run.state == "finished" and run.task == "moderation"
        for system in run.systems
        if system.noted is not None and system.noted.gallery_sha256 is not None
    ]
    usable.sort(key=lambda found: found[2].nearness, reverse=True)  # stable: the newest of equals stays first
    return usable[0][:2] if usable else None


def _short(digest: str) -> str:
    return digest[:_SHORT]


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
