"""Policies tried on the records of an audit: naive twins, closed forms, and records that nothing can be tried on."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from math import isclose
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perception.intervals import wilson_interval
from perception.policy_file import Rates
from perception.replay import AttackSetting, Audited
from perception.verdict import DecisionPolicy, Neighbor, PoolLabel, VerdictLabel
from service import audit_records
from service.audit_records import AuditRecords, Images
from service.audit_runs import AuditRuns
from service.errors import AuditUnusable, InvalidParameter
from service.thresholds import CURVE_POINTS, curve, require_neighbors, tried
from tests.service.audit_folders import SETTING, events, four, lines, neighbors, plan, record, report, write

SAFE, UNSAFE, REVIEW = VerdictLabel.SAFE, VerdictLabel.UNSAFE, VerdictLabel.REVIEW
ONE = AttackSetting("linf", 8 / 255, 10)
similarities = st.lists(st.floats(-1, 1).map(lambda s: round(s, 6)), min_size=1, max_size=3)
evidence = st.tuples(similarities, similarities, similarities).map(
    lambda pools: tuple(
        Neighbor(f"{pool}-{i}", pool, s) for pool, of in zip(PoolLabel, pools, strict=True) for i, s in enumerate(of)
    )
)
audited = st.builds(Audited, st.sampled_from([SAFE, UNSAFE]), evidence, evidence)
both = st.lists(audited, min_size=2, max_size=12).map(
    lambda images: [replace(images[0], label=SAFE), replace(images[1], label=UNSAFE), *images[2:]]
)
margins = st.floats(0, 2).map(lambda m: round(m, 6))
policies = st.builds(
    DecisionPolicy, st.sampled_from(["nearest", "vote"]), st.integers(1, 3), st.floats(-1, 1), margins, margins
)


def images_of(root: Path, **changes: Any) -> Images:
    write(root / "run", **changes)
    runs = AuditRuns(root)
    return AuditRecords(runs).of(runs.get("run"), "toy")


def naive(images: Sequence[Audited], policy: DecisionPolicy, version: str) -> dict[str, tuple[int, int]]:
    """Counts and totals, one image after the other."""
    counts = {"false_negative": 0, "false_positive": 0, "review_unsafe": 0, "review_safe": 0}
    for image in images:
        said = policy.decide(getattr(image, version)).label
        counts["false_negative"] += image.label is UNSAFE and said is SAFE
        counts["false_positive"] += image.label is SAFE and said is UNSAFE
        counts[f"review_{image.label}"] += said is REVIEW
    unsafe = sum(image.label is UNSAFE for image in images)
    totals = {"false_negative": unsafe, "false_positive": len(images) - unsafe, "review_unsafe": unsafe}
    return {name: (count, totals.get(name, len(images) - unsafe)) for name, count in counts.items()}


def counted(rates: Rates) -> dict[str, tuple[int, int]]:
    return {name: (rate.count, rate.total) for name, rate in vars(rates).items()}


# --- rates -----------------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(both, policies)
def test_rates_are_those_of_deciding_one_by_one(images: list[Audited], policy: DecisionPolicy) -> None:
    measured = tried(images, policy)
    assert counted(measured.clean) == naive(images, policy, "clean")
    assert counted(measured.attacked) == naive(images, policy, "attacked")
    for rate in vars(measured.attacked).values():
        assert rate.interval95 == wilson_interval(rate.count, rate.total)


@settings(max_examples=25)
@given(both, policies)
def test_the_curve_is_that_of_deciding_anew_with_every_margin(images: list[Audited], policy: DecisionPolicy) -> None:
    points = curve(images, policy)
    assert len(points) == CURVE_POINTS
    assert points[0].margin == 0
    for point in points[::8]:  # the first and the last among them
        asked = replace(policy, min_margin=point.margin)
        assert counted(point.measured.clean) == naive(images, asked, "clean")
        assert counted(point.measured.attacked) == naive(images, asked, "attacked")
    negatives = [point.measured.attacked.false_negative.count for point in points]
    reviews = [point.measured.clean.review_safe.count for point in points]
    assert negatives == sorted(negatives, reverse=True)
    assert reviews == sorted(reviews)
    if points[-1].margin < 2:
        assert negatives[-1] == 0


def test_margins_do_what_they_say(tmp_path: Path) -> None:
    """Margins are 0.3 and 0.1; under attack one image of each label is on the other side by 0.1."""
    images = images_of(tmp_path).by_setting[ONE]
    expected = {
        0.0: (1, 1, 0, 0),
        0.2: (0, 1, 1, 0),  # the unsafe image that was let through is left to a person
    }
    for margin, (negative, positive, review_unsafe, review_safe) in expected.items():
        rates = tried(images, DecisionPolicy(min_margin=margin)).attacked
        assert counted(rates) == {
            "false_negative": (negative, 2),
            "false_positive": (positive, 2),
            "review_unsafe": (review_unsafe, 2),
            "review_safe": (review_safe, 2),
        }
    rates = tried(images, DecisionPolicy(min_margin=0.2, min_margin_unsafe=0.2)).clean
    assert (rates.review_unsafe.count, rates.review_safe.count) == (1, 1)
    assert tried(images, DecisionPolicy(min_similarity=0.7)).clean.review_safe.count == 1


# --- what can be tried -----------------------------------------------------------------------------------------------


def test_no_more_can_vote_than_were_recorded(tmp_path: Path) -> None:
    found = images_of(tmp_path)
    assert found.recorded == 3
    require_neighbors(DecisionPolicy("vote", 3), found.recorded)
    require_neighbors(DecisionPolicy("nearest", 9), found.recorded)
    with pytest.raises(InvalidParameter, match="it is 4, and the audit has recorded 3 neighbours of each pool"):
        require_neighbors(DecisionPolicy("vote", 4), found.recorded)


def test_more_were_recorded_where_the_audited_policy_needed_more(tmp_path: Path) -> None:
    near = neighbors([0.5] * 5, [0.1] * 5, [0.2] * 5)
    images = [record(f"i{i}", label, near, near) for i, label in enumerate(("safe", "unsafe", "safe", "unsafe"))]
    assert images_of(tmp_path, images=images).recorded == 5


def test_settings_are_chosen_from_those_of_the_records(tmp_path: Path) -> None:
    weak = AttackSetting("linf", 4 / 255, 10)
    images = [one | how for how in (asdict(weak), SETTING) for one in four()]
    asked = plan(threats=[{"norm": "linf", "eps": [4 / 255, 8 / 255], "steps": 10, "square_queries": None}])
    content = json.dumps(report(asked, lines(images))).encode()
    found = images_of(tmp_path, images=images, plan=json.dumps({"audit": asked}).encode(), report=content)
    assert list(found.by_setting) == [weak, ONE]
    assert found.chosen(None, ONE) == ONE
    near = AttackSetting("linf", 4 / 255 * (1 + 1e-9), 10)
    assert found.chosen(near, ONE) == weak
    with pytest.raises(
        InvalidParameter, match="was not audited; there are: linf 4/255, 10 steps; linf 8/255, 10 steps"
    ):
        found.chosen(replace(ONE, steps=11), ONE)


def test_the_headline_of_l2_is_scaled() -> None:
    """Radii of plans are at 224 pixels, those of records at the encoder's input."""
    image = Audited(SAFE, (), ())
    scaled = {AttackSetting("l2", eps, 10): (image,) for eps in (0.25, 0.5)}
    assert Images(scaled, 1).chosen(None, AttackSetting("l2", 2.0, 10)) == AttackSetting("l2", 0.5, 10)


def test_a_record_that_was_written_twice_counts_once_as_last_written(tmp_path: Path) -> None:
    last = record("s1", "safe", neighbors([0.9], [0.1], [0.2]), neighbors([0.9], [0.1], [0.2]))
    images = images_of(tmp_path, images=[*four(), last]).by_setting[ONE]
    assert len(images) == 4
    assert tried(images, DecisionPolicy()).attacked.false_positive.count == 0


def test_ids_that_are_halves_of_characters_stay_apart(tmp_path: Path) -> None:
    images = four()
    images[0]["id"], images[1]["id"] = "a\udc80", "a\udc81"
    images[1]["set"] = images[0]["set"]
    assert len(images_of(tmp_path, images=images).by_setting[ONE]) == 4


def spoiled(**changes: Any) -> list[dict[str, Any]]:
    return [*four()[:3], {**four()[3], **changes}]


NOTHING: dict[str, Any] = {"neighbors": []}
ONE_LABEL = [{**one, "label": "safe", "set": str(i)} for i, one in enumerate(four())]
BROKEN = {
    "another encoder": (spoiled(fingerprint="e" * 64), "of another encoder"),
    "no neighbours": (spoiled(clean=NOTHING), "without neighbours"),
    "another pool": (spoiled(clean={"neighbors": [{"id": "a", "pool": "grey", "similarity": 0.5}]}), "that is none"),
    "no cosine": (spoiled(clean={"neighbors": [{"id": "a", "pool": "safe", "similarity": 1.5}]}), "that is none"),
    "no number": (spoiled(attacked={"neighbors": [{"id": "a", "pool": "safe", "similarity": None}]}), "similarity"),
    "another label": (spoiled(label="review"), "with the label 'review'"),
    "one is missing": (four()[:3], "has 3 of 4 images of 'toy' (linf 8/255, 10 steps)"),
    "one label alone": (ONE_LABEL, "no images that are unsafe"),
    "none at all": ([{**one, "system": "other"} for one in four()], "has no record of the system 'toy'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_records_that_nothing_can_be_tried_on(tmp_path: Path, name: str) -> None:
    images, reason = BROKEN[name]
    with pytest.raises(AuditUnusable) as caught:
        images_of(tmp_path, images=images)
    assert caught.value.id == "run"
    assert reason in caught.value.reason


def test_runs_that_nothing_can_be_tried_on(tmp_path: Path) -> None:
    write(tmp_path / "sound")
    write(tmp_path / "broken", report=b"{")
    write(tmp_path / "head", metrics=lines(events(gallery_sha256=None)))
    runs = AuditRuns(tmp_path)
    records = AuditRecords(runs)
    with pytest.raises(AuditUnusable, match="it is damaged: report"):
        records.of(runs.get("broken"), "toy")
    with pytest.raises(AuditUnusable, match="was not audited with pools"):
        records.of(runs.get("head"), "toy")
    with pytest.raises(InvalidParameter, match="no system 'other'; there are: 'toy'"):
        records.of(runs.get("sound"), "other")


def test_too_many_records_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_records, "MAX_IMAGES", 3)
    with pytest.raises(AuditUnusable, match="more than 3 records of the system, which is the limit"):
        images_of(tmp_path)


def test_records_are_read_again_only_where_they_have_changed(tmp_path: Path) -> None:
    folder = write(tmp_path / "run")
    runs = AuditRuns(tmp_path)
    records = AuditRecords(runs)
    first = records.of(runs.get("run"), "toy")
    assert records.of(runs.get("run"), "toy") is first
    images = [{**one, "id": f"{one['id']} again"} for one in four()]
    (folder / "records.jsonl").write_bytes(lines(images))
    (folder / "report.json").write_text(json.dumps(report(plan(), lines(images))))
    second = records.of(runs.get("run"), "toy")
    assert second is not first
    assert isclose(second.by_setting[ONE][0].clean[0].similarity, 0.8)
