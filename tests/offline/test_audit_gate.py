"""The gate: a candidate passes unless a figure is worse than the recorded one by more than its interval."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from offline.audit.figures import summarise
from offline.audit.gate import Finding, Recorded, compare
from offline.audit.plan import AuditPlan
from offline.audit.record import AuditRecord, Check
from offline.errors import RunError
from tests.offline.audit_records import moderation, record

PLAN = moderation(system=[{"name": "plain", "encoder": "toy", "gallery": "pools"}])
PASSED = Check("plain", "gradients", True, "all gradients are there", {})


def records(robust: int, clean: int = 40, total: int = 40) -> list[AuditRecord]:
    """Unsafe images: so many right when clean, so many of them robust."""
    made = []
    for i in range(total):
        right = "unsafe" if i < clean else "review"
        last = right if i < robust else "safe"
        made.append(record(f"u{i}", "unsafe", right, [("target-set", last), ("white-box", last), ("square", last)]))
    return made


def recorded(robust: int = 20) -> Recorded:
    return Recorded(summarise(PLAN, records(robust), [PASSED]), PLAN.as_dict())


def worse(robust: int, plan: AuditPlan = PLAN, checks: tuple[Check, ...] = (PASSED,)) -> list[Finding]:
    candidate = summarise(plan, records(robust), checks)
    return [finding for finding in compare(plan, candidate, recorded()) if finding.worse]


@pytest.mark.parametrize("robust", [20, 19, 14, 21, 40])
def test_what_lies_within_the_interval_or_above_passes(robust: int) -> None:
    """Wilson's interval of 20 of 40 is [0.352, 0.648]: 14.1 to 25.9 images; 14 are outside."""
    assert bool(worse(robust)) == (robust < 14.1)


def test_a_worse_candidate_is_named_with_both_figures() -> None:
    found = {finding.what: finding for finding in worse(2)}
    robust = found["plain, linf 8/255, 200 steps, unsafe, robust"]
    assert robust.sentence == "5.0 %, was 50.0 % [35.2, 64.8]"
    assert str(robust).startswith("WORSE plain")
    assert "plain, linf 8/255, 200 steps, unsafe, let through, attacked" in found


def test_another_model_under_the_same_protocol_can_be_compared() -> None:
    other = moderation(system=[{"name": "plain", "encoder": "another", "gallery": "newer"}], batch=5, examples=3)
    assert worse(20, other) == []


@pytest.mark.parametrize("change", [{"seed": 1}, {"threat": [{"norm": "linf", "eps": "4/255", "steps": 200}]},
                                    {"square_queries": 7}])  # fmt: skip
def test_another_protocol_cannot(change: dict[str, object]) -> None:
    other = moderation(system=[{"name": "plain", "encoder": "toy", "gallery": "pools"}], **change)
    with pytest.raises(RunError, match="cannot be compared"):
        compare(other, recorded().figures, recorded())


def test_what_is_missing_is_worse() -> None:
    candidate = summarise(PLAN, records(20), [PASSED])
    nothing = replace(candidate, rows=(replace(candidate.rows[0], system="renamed"),))
    assert [f.sentence for f in compare(PLAN, nothing, recorded()) if f.worse] == ["the candidate has no such figures"]
    fewer = summarise(PLAN, records(19, total=39, clean=39), [PASSED])
    assert any("39 images" in f.sentence for f in compare(PLAN, fewer, recorded()) if f.worse)


def test_masked_gradients_do_not_pass_for_robustness() -> None:
    failed = Check("plain", "gradients", False, "gradients are zero for 32 of 32 images", {})
    assert [f.sentence for f in worse(40, checks=(failed,))] == [failed.sentence]
    assert [f.what for f in worse(40, checks=())] == ["plain, check gradients"]


def test_what_is_no_report_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with pytest.raises(RunError):
        Recorded.load(path)
    path.write_text(json.dumps(recorded().figures.as_dict()))
    with pytest.raises(RunError, match="by which plan"):
        Recorded.load(path)
    path.write_text(json.dumps({**recorded().figures.as_dict(), "plan": PLAN.as_dict()}))
    assert Recorded.load(path) == recorded()
