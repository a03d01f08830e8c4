"""What the records and events of an audit say of defences: who attacked them, how their gate stands, what they cost.

Knows no models: like all figures, these follow from what was written down.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from offline.audit.plan import AuditPlan, DefensePlan
from offline.audit.record import AuditRecord, Setting

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
_DECIMALS = 4


@dataclass(frozen=True)
class Gate:
    """tau of the images of one system, clean or attacked.

    Attributes:
        setting: of the attack; None for the clean images.
        images: with a tau.
        quantiles: of tau, at `QUANTILES`.
        countered: share of images with tau below the threshold, which were counterattacked.
    """

    setting: Setting | None
    images: int
    quantiles: tuple[float, ...]
    countered: float


@dataclass(frozen=True)
class Defense:
    """The defence of one system.

    Attributes:
        system: its name.
        plan: parameters and attacker.
        gates: of the clean images, then under each setting.
        cost: as `offline.audit.attacker.measured_cost` returned it; empty where it has not been measured yet.
    """

    system: str
    plan: DefensePlan
    gates: tuple[Gate, ...]
    cost: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "quantiles": QUANTILES}


def defenses(plan: AuditPlan, records: Sequence[AuditRecord], costs: Sequence[Mapping[str, Any]]) -> list[Defense]:
    """Those of all systems that have one, in the plan's order.

    Args:
        records: of the run.
        costs: its events of the kind 'cost'.
    """
    found = []
    for system in plan.systems:
        if system.defense is None:
            continue
        own = [record for record in records if record.system == system.name]
        settings = list(dict.fromkeys(record.setting for record in own))
        clean = {(record.set, record.id): record.clean.scores.get("tau") for record in own}
        gates = [_gate(None, clean.values(), system.defense.threshold)]
        for setting in settings:
            taus = [record.attacked.scores.get("tau") for record in own if record.setting == setting]
            gates.append(_gate(setting, taus, system.defense.threshold))
        cost = next((event for event in costs if event["system"] == system.name), {})
        kept = {name: value for name, value in cost.items() if name != "system"}
        found.append(Defense(system.name, system.defense, tuple(gate for gate in gates if gate.images), kept))
    return found


def _gate(setting: Setting | None, taus: Any, threshold: float) -> Gate:
    known = np.array([tau for tau in taus if tau is not None], dtype=np.float64)
    if not len(known):
        return Gate(setting, 0, (), 0.0)
    quantiles = tuple(round(float(q), _DECIMALS) for q in np.quantile(known, QUANTILES))
    return Gate(setting, len(known), quantiles, round(float((known < threshold).mean()), _DECIMALS))
