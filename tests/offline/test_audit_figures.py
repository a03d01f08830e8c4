"""Figures of an audit against what can be counted by hand."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offline.audit.figures import Figures, bootstrap_mean, summarise, table
from offline.audit.plan import AuditPlan
from offline.audit.record import AuditRecord, Judgement, Setting
from offline.audit.rows import Row
from offline.audit.tables import csv_table
from offline.benchmarks.intervals import Accuracy
from offline.errors import RunError
from tests.offline.audit_records import SETTING, check, judged, moderation, plan_for, record

FOUR = [
    record("a", "unsafe", "unsafe", [("target-set", "unsafe"), ("white-box", "safe")], rounded="unsafe"),
    record("b", "unsafe", "unsafe", [("target-set", "review"), ("white-box", "review"), ("square", "safe")]),
    record("c", "unsafe", "unsafe", [(name, "unsafe") for name in ("target-set", "white-box", "square")]),
    record("d", "unsafe", "safe"),
]
OR_PLAN: dict[str, Any] = {"combination": [{"name": "either", "systems": ["plain", "robust"]}]}
CHAIN = ("target-set", "white-box", "square")


def row(figures: Figures, system: str = "plain", label: str = "unsafe", set: str = "") -> Row:
    (found,) = [r for r in figures.rows if (r.system, r.label, r.set) == (system, label, set)]
    return found


def right(share: Accuracy | None) -> tuple[int, int]:
    assert share is not None
    return share.right, share.total


def test_accuracy_after_each_attack_counts_what_it_and_those_before_left() -> None:
    found = row(summarise(moderation(), FOUR, []))
    assert right(found.clean) == (3, 4)
    assert {attack: right(share) for attack, share in found.after.items()} == {
        "target-set": (2, 4),
        "white-box": (1, 4),
        "square": (1, 4),
    }
    assert list(found.after) == list(CHAIN)
    assert (right(found.robust), right(found.rounded)) == ((1, 4), (2, 4))
    breakdown = {v: (a.safe, a.review, a.unsafe) for v, a in found.answers.items()}
    assert breakdown == {"clean": (1, 0, 3), "attacked": (3, 0, 1), "rounded": (2, 0, 2)}
    assert {v: right(share) for v, share in found.wrong_way.items()} == {
        "clean": (1, 4),
        "attacked": (3, 4),
        "rounded": (2, 4),
    }
    assert found.updates == {"target-set": 30, "white-box": 30, "square": 20}
    assert found.square_gain == 0.0


def test_what_was_wrong_when_clean_is_never_robust() -> None:
    lucky = replace(record("a", "unsafe", "safe"), attacked=judged("unsafe", "unsafe"))
    found = row(summarise(moderation(), [lucky], []))
    assert right(found.robust) == (0, 1)
    assert right(found.after["square"]) == (0, 1)


def test_square_gain_is_in_points() -> None:
    records = [
        record("a", "unsafe", "unsafe", [("target-set", "unsafe"), ("white-box", "unsafe"), ("square", "safe")]),
        *(record(name, "unsafe", "unsafe", [(attack, "unsafe") for attack in CHAIN]) for name in "bcd"),
    ]
    assert row(summarise(moderation(), records, [])).square_gain == 25.0


def test_square_has_no_column_where_the_threat_left_it_out() -> None:
    threat = [{"norm": "linf", "eps": "8/255", "steps": 200, "square_queries": 0}]
    found = row(summarise(moderation(threat=threat), FOUR[:1] + FOUR[3:], []))
    assert list(found.after) == ["target-set", "white-box"]
    assert found.square_gain is None


def test_or_rule_of_the_published_vector() -> None:
    """Methods 9.2: robust U with flags {T, F} and {F, F} over two unsafe images is 50 %."""
    lost, kept = [("target-set", "safe")], [(attack, "unsafe") for attack in CHAIN]
    records = [
        record("x", "unsafe", "unsafe", kept, system="plain"),
        record("y", "unsafe", "unsafe", lost, system="plain"),
        record("x", "unsafe", "unsafe", lost, system="robust"),
        record("y", "unsafe", "unsafe", lost, system="robust"),
    ]
    figures = summarise(moderation(**OR_PLAN), records, [])
    assert right(row(figures, "either").robust) == (1, 2)
    assert right(row(figures, "either").clean) == (2, 2)
    assert [right(row(figures, name).robust) for name in ("plain", "robust")] == [(1, 2), (0, 2)]
    assert row(figures, "either").updates == {}
    assert [r.system for r in figures.rows] == ["plain", "robust", "either"]


def test_a_safe_image_is_right_for_a_combination_only_if_both_say_safe() -> None:
    answers = {"x": ("safe", "safe"), "y": ("safe", "review"), "z": ("unsafe", "safe")}
    records = [
        record(name, "safe", answer, system=system)
        for name, pair in answers.items()
        for system, answer in zip(("plain", "robust"), pair, strict=True)
    ]
    found = row(summarise(moderation(**OR_PLAN), records, []), "either", "safe")
    assert right(found.clean) == (1, 3)
    clean = found.answers["clean"]
    assert (clean.safe, clean.review, clean.unsafe) == (1, 1, 1)
    assert right(found.wrong_way["clean"]) == (1, 3)  # refused


def test_combinations_hold_only_images_of_both_systems() -> None:
    records = [record(name, "unsafe", "unsafe") for name in "xyz"] + [record("y", "unsafe", "safe", system="robust")]
    figures = summarise(moderation(**OR_PLAN), records, [])
    assert row(figures, "either").total == 1
    assert row(figures, "plain").total == 3
    alone = summarise(moderation(**OR_PLAN), records[:3], [])
    assert {r.system for r in alone.rows} == {"plain"}


def test_l2_radii_are_matched_whatever_the_size_of_the_input() -> None:
    plan = moderation(threat=[{"norm": "l2", "eps": [1.5, 3], "steps": [10, 20]}], **OR_PLAN)
    records = [
        record("x", "unsafe", "unsafe", system=system, setting=Setting("l2", eps * size / 224, steps))
        for system, size in (("plain", 96), ("robust", 224))
        for eps in (1.5, 3.0)
        for steps in (10, 20)
    ]
    figures = summarise(plan, records, [])
    wanted = [Setting("l2", eps, steps) for eps in (1.5, 3.0) for steps in (10, 20)]
    assert [(r.system, r.setting) for r in figures.rows] == [
        (name, setting) for name in ("plain", "robust", "either") for setting in wanted
    ]


def test_rows_of_each_set_where_a_label_has_several() -> None:
    queries = [{"kind": "demo", "label": "unsafe", "name": name} for name in ("weapons", "blood")]
    queries.append({"kind": "demo", "label": "safe"})
    records = [
        record("x", "unsafe", "unsafe", set="blood"),
        record("y", "unsafe", "safe", set="weapons"),
        record("x", "unsafe", "unsafe", set="weapons"),
        record("x", "safe", "safe"),
    ]
    figures = summarise(moderation(queries=queries), records, [])
    assert [(r.label, r.set, right(r.clean)) for r in figures.rows] == [
        ("safe", "", (1, 1)),
        ("unsafe", "", (2, 3)),
        ("unsafe", "weapons", (1, 2)),
        ("unsafe", "blood", (1, 1)),
    ]


def test_classes_are_counted_together() -> None:
    records = [
        record("0", "cat", "cat", [("apgd-ce", "cat"), ("apgd-t", "dog"), ("square", "dog")], set="pets"),
        record("1", "dog", "dog", [("apgd-ce", "dog"), ("apgd-t", "dog"), ("square", "dog")], set="pets"),
    ]
    (found,) = summarise(plan_for("zero-shot"), records, []).rows
    assert (found.label, found.total, found.answers) == ("", 2, {})
    assert [right(share) for share in found.after.values()] == [(2, 2), (1, 2), (1, 2)]


def ranked(id: str, clean: float | None, attacked: float) -> AuditRecord:
    def ranking(value: float | None) -> Judgement:
        return Judgement("", None, {"margin": 3.0} if value is None else {"ap_medium": value, "margin": 1.0})

    of = record(id, "", "", [("shift", ""), ("square", "")], set="oxford")
    return replace(of, clean=ranking(clean), attacked=ranking(attacked), rounded=ranking((attacked + 0.1) / 2))


def test_means_of_rankings_pass_over_queries_without_the_score() -> None:
    records = [ranked("0", 0.5, 0.25), ranked("1", 1.0, 0.5), ranked("2", None, 0.9)]
    (found,) = summarise(plan_for("retrieval"), records, []).rows
    assert list(found.means) == ["ap_medium"]
    means = found.means["ap_medium"]
    assert [(means[v].value, means[v].total) for v in ("clean", "attacked", "rounded")] == [
        (0.75, 2), (0.375, 2), (0.2375, 2),
    ]  # fmt: skip
    assert (found.total, found.clean, found.after) == (3, None, {})
    assert means["clean"].interval == (0.5, 1.0)  # of two values, a resample is one of them twice in half of the cases


def test_bootstrap_interval_agrees_with_the_normal_one_for_many_values() -> None:
    random = Random(0)
    values = [random.uniform(0, 1) for _ in range(400)]
    mean = bootstrap_mean(values)
    spread = 1.96 / math.sqrt(12 * 400)
    assert mean == bootstrap_mean(values)
    assert mean.low == pytest.approx(mean.value - spread, abs=0.2 * spread)
    assert mean.high == pytest.approx(mean.value + spread, abs=0.2 * spread)
    assert bootstrap_mean([0.3] * 5).interval == (0.3, 0.3)


def test_mean_trace_carries_on_what_left_early() -> None:
    def traced(id: str, label: str, trace: tuple[tuple[int, float], ...]) -> AuditRecord:
        of = record(id, label, label, [("target-set", label)])
        return replace(of, rounds=(replace(of.rounds[0], trace=trace),))

    records = [
        traced("x", "unsafe", ((0, 0.0), (1, 1.0))),
        traced("y", "safe", ((0, 0.5), (1, 0.5), (2, 2.0), (5, 4.0))),
        record("z", "unsafe", "safe"),
    ]
    (trace,) = summarise(moderation(), records, []).traces
    assert (trace.system, trace.setting, trace.attack, trace.images) == ("plain", SETTING, "target-set", 2)
    assert trace.points == ((0, 0.25), (1, 0.75), (2, 1.5), (5, 2.5))


def test_cost_counts_each_image_once() -> None:
    records = [*FOUR, record("e", "unsafe", "unsafe", [("target-set", "safe")], set="other", updates=7)]
    figures = summarise(moderation(), records, [])
    assert figures.updates == {"target-set": 37, "white-box": 30, "square": 20}


ANSWERS = ("safe", "review", "unsafe")
OUTCOMES = st.lists(
    st.tuples(
        st.sampled_from(("safe", "unsafe")),
        st.sampled_from(ANSWERS),
        st.lists(st.sampled_from(ANSWERS), max_size=3),
        st.sampled_from(ANSWERS),
    ),
    min_size=1,
    max_size=12,
)


@given(OUTCOMES, st.randoms(use_true_random=False))
def test_rows_agree_with_a_naive_count_in_any_order(
    outcomes: list[tuple[str, str, list[str], str]], random: Random
) -> None:
    records = [
        record(str(i), label, clean, list(zip(CHAIN, after, strict=False)), rounded=rounded)
        for i, (label, clean, after, rounded) in enumerate(outcomes)
    ]
    figures = summarise(moderation(), records, [])
    for found in figures.rows:
        own = [(clean, after, rounded) for label, clean, after, rounded in outcomes if label == found.label]
        robust = after_two = after_rounding = 0
        for clean, after, rounded in own:
            if clean == found.label:
                robust += [clean, *after][-1] == found.label
                after_two += [clean, *after[:2]][-1] == found.label
                after_rounding += rounded == found.label
        assert right(found.robust) == right(found.after["square"]) == (robust, len(own))
        assert right(found.after["white-box"]) == (after_two, len(own))
        assert right(found.rounded) == (after_rounding, len(own))
    shuffled = random.sample(records, len(records))
    assert summarise(moderation(), shuffled, []) == figures


def test_checks_are_in_the_order_of_the_systems() -> None:
    checks = [check("robust"), check("plain", name="loss-rises"), check("plain")]
    figures = summarise(moderation(), FOUR, checks)
    assert [(c.system, c.name) for c in figures.checks] == [
        ("plain", "gradients"), ("plain", "loss-rises"), ("robust", "gradients"),
    ]  # fmt: skip


NO_ANSWER = replace(FOUR[3], clean=Judgement("safe", None, {}))


@pytest.mark.parametrize(
    ("plan", "records", "reason"),
    [
        (moderation(), [record("x", "safe", "safe", system="other")], "'other', which the plan does not have"),
        (moderation(), [record("x", "safe", "safe", setting=Setting("linf", 4 / 255, 200))], "linf 4/255, 200 steps"),
        (moderation(), [record("x", "safe", "safe", setting=Setting("linf", 8 / 255, 100))], "linf 8/255, 100 steps"),
        (moderation(), [FOUR[0], replace(FOUR[1], fingerprint="new")], "more than one encoder"),
        (moderation(), [record("x", "safe", "safe", [("shift", "safe")])], "attacks that the plan has not: {'shift'}"),
        (moderation(), [record("x", "cat", "cat")], "no verdict"),
        (moderation(), [NO_ANSWER], "does not say whether 'safe' is right"),
        (
            moderation(**OR_PLAN),
            [record("x", "safe", "safe", set="s"), record("x", "unsafe", "safe", set="s", system="robust")],
            "'safe' for one system and 'unsafe' for another",
        ),
    ],
)
def test_records_that_do_not_fit_are_refused(plan: AuditPlan, records: list[AuditRecord], reason: str) -> None:
    with pytest.raises(RunError, match=reason.replace("(", r"\(")):
        summarise(plan, records, [])


def test_json_in_both_directions(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    retrieval = [ranked("0", 0.5, 0.25), ranked("1", 1.0, 0.5)]
    for figures in (
        summarise(moderation(), FOUR, [check(), check(name="black-box", passed=False)]),
        summarise(plan_for("retrieval"), retrieval, []),
    ):
        path.write_text(json.dumps({**figures.as_dict(), "more": 1}, allow_nan=False))
        assert Figures.load(path) == figures


def at(*keys: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    """Put a value where the keys lead."""

    def damage(content: dict[str, Any]) -> None:
        place: Any = content
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = to

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        at("format", to="hardlook-audit-figures-0"),
        at("rows", to=[]),
        at("rows", 0, "clean", "right", to=5),
        at("rows", 0, "clean", to={"right": 1, "total": 3}),
        at("rows", 0, "clean", "right", to="3"),
        at("rows", 0, "after", "square", "total", to=0),
        at("rows", 0, "answers", "clean", "safe", to=2),
        at("rows", 0, "answers", "clean", "safe", to=-1),
        at("rows", 0, "answers", to={"clean": {"safe": 4, "review": 0, "unsafe": 0}}),
        at("rows", 0, "label", to="cat"),
        at("rows", 0, "setting", "eps", to=-1.0),
        at("rows", 0, "setting", "norm", to="l7"),
        at("rows", 0, "means", to={"ap": {"clean": {"value": math.nan, "low": 0.0, "high": 1.0, "total": 4}}}),
        at("checks", 0, "passed", to="yes"),
        lambda content: content["rows"].append(content["rows"][0]),
        lambda content: content.pop("rows"),
        lambda content: content.pop("format"),
    ],
)
def test_damaged_figures_are_refused(damage: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    content = json.loads(json.dumps(summarise(moderation(), FOUR, [check()]).as_dict()))
    path = tmp_path / "figures.json"
    path.write_text(json.dumps(content))
    Figures.load(path)
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(RunError, match=r"figures\.json holds no figures of an audit"):
        Figures.load(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"\xff", b"[" * 100_000])
def test_what_is_no_json_object_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_bytes(content)
    with pytest.raises(RunError, match="holds no figures"):
        Figures.load(path)
    with pytest.raises(RunError, match="holds no figures"):
        Figures.load(tmp_path / "absent.json")


def test_table_has_a_line_a_row() -> None:
    lines = table(summarise(moderation(), FOUR, [])).splitlines()
    quarter, half = "25.0 [4.6, 69.9]", "50.0 [15.0, 85.0]"
    assert lines == [
        "| system | setting | label | n | clean | after target-set | after white-box | after square | robust | 8-bit "
        "| S/B/U clean -> attacked |",
        "| --- " * 11 + "|",
        f"| plain | linf 8/255, 200 steps | unsafe | 4 | 75.0 [30.1, 95.4] | {half} | {quarter} | {quarter} "
        f"| {quarter} | {half} | 25.0/0.0/75.0 -> 75.0/0.0/25.0 |",
    ]


def test_table_of_rankings_and_of_l2() -> None:
    plan = plan_for("retrieval", threat=[{"norm": "l2", "eps": 3, "steps": 200}])
    records = [replace(ranked("0", 0.5, 0.25), norm="l2", eps=3.0), replace(ranked("1", 0.5, 0.25), norm="l2", eps=3.0)]
    text = table(summarise(plan, records, []))
    assert "| plain | l2 3, 200 steps | all | ap_medium | 2 | 50.0 [50.0, 50.0] | 25.0 [25.0, 25.0] |" in text
    assert "224 px" in text


def test_names_break_neither_table_nor_spreadsheet() -> None:
    queries = [{"kind": "demo", "label": "unsafe", "name": name} for name in ("=1+1", "a|b")]
    queries.append({"kind": "demo", "label": "safe"})
    records = [record("x", "unsafe", "unsafe", set=name) for name in ("=1+1", "a|b")]
    figures = summarise(moderation(queries=queries), records, [])
    assert "| unsafe, a\\|b |" in table(figures)
    assert ",unsafe,'=1+1,1," in csv_table(figures)
