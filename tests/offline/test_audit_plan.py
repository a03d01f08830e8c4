"""Audit plans: what can be asked, and that what cannot is refused by name."""

from typing import Any

import pytest

from offline.audit.plan import AuditPlan, plan_from_table
from offline.audit.record import Setting
from offline.errors import PlanError

TABLE: dict[str, Any] = {
    "task": "moderation",
    "system": [{"name": "toy", "encoder": "toy/0", "gallery": "pools.safetensors"}],
    "targets": [{"kind": "folder", "path": f"targets/{x}", "label": x} for x in ("safe", "unsafe")],
    "queries": [{"kind": "folder", "path": f"queries/{x}", "label": x} for x in ("safe", "unsafe")],
    "threat": [{"norm": "linf", "eps": ["3/255", 0.2], "steps": [6, 12]}],
}


def plan(**changes: Any) -> AuditPlan:
    return plan_from_table({**TABLE, **changes})


def test_a_sweep_has_every_radius_with_every_number_of_steps() -> None:
    [threat] = plan().threats
    expected = [("linf", eps, steps) for eps in (3 / 255, 0.2) for steps in (6, 12)]
    assert threat.settings(128) == tuple(Setting("linf", eps, steps) for _, eps, steps in expected)
    [wide] = plan(threat=[{"norm": "l2", "eps": 3, "steps": 5}]).threats
    assert wide.settings(112) == (Setting("l2", 1.5, 5),)


def test_a_plan_survives_its_run_directory() -> None:
    from pydantic import TypeAdapter

    asked = plan(combination=[], batch=7)
    import json

    assert TypeAdapter(AuditPlan).validate_json(json.dumps(asked.as_dict())) == asked


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"eps": "x/255"}, "eps must be a number"),
        ({"steps": 0}, "steps"),
        ({"norm": "l1"}, "norm"),
        ({"epsilon": 1}, "epsilon"),
    ],
)
def test_impossible_threats_are_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(PlanError, match=named):
        plan(threat=[{**TABLE["threat"][0], **change}])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"task": "chess"}, "task"),
        ({"attacks": ["apgd-ce"]}, "target-set"),
        ({"targets": TABLE["targets"][:1]}, "unsafe"),
        ({"system": []}, "at least one"),
        ({"system": TABLE["system"] * 2}, "names of systems"),
        ({"system": [{**TABLE["system"][0], "gallery": ""}]}, "gallery or a head"),
        ({"system": [{**TABLE["system"][0], "pools": ["safe"]}]}, "pools must hold"),
        ({"system": [{**TABLE["system"][0], "policy": {"min_margin": 3.0}}]}, "min_margin"),
        ({"combination": [{"name": "both", "systems": ["toy", "other"]}]}, "combination 'both'"),
        ({"queries": [{"kind": "folder", "path": "queries/safe"}]}, "label"),
        ({"batch": "3"}, "batch"),
        ({"threats": []}, r"write \[\[threat\]\]"),
    ],
)
def test_impossible_plans_are_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(PlanError, match=named):
        plan(**change)
