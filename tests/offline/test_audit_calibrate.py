"""Calibration: thresholds meet their targets on the records, and no others do so with less review."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offline.audit.calibrate import calibrate, describe, replay, with_margins
from offline.audit.calibrate_flips import LEAST_IMAGES
from offline.audit.record import AuditRecord, Setting
from offline.errors import OfflineError, PlanError, RunError
from perception.policy_file import CalibratedPolicy, Measured, Targets
from perception.replay import measure
from perception.verdict import DecisionPolicy, VerdictLabel
from tests.offline.calibration_runs import GALLERY, STRONG, WEAK, random_records, record, write_run

SAFE, UNSAFE = VerdictLabel.SAFE, VerdictLabel.UNSAFE


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 images under two settings."""
    weak = random_records(np.random.default_rng(0), 400, 3, 0.3, WEAK)
    strong = random_records(np.random.default_rng(0), 400, 3, 1.0, STRONG)
    return write_run(tmp_path_factory.mktemp("runs") / "run", [*weak, *strong])


def all_figures(measured: Measured) -> tuple[float, float, float]:
    """Worst false negatives, worst false positives, mean review of clean images."""
    both = (measured.clean, measured.attacked)
    review = (measured.clean.review_safe.value + measured.clean.review_unsafe.value) / 2
    return max(r.false_negative.value for r in both), max(r.false_positive.value for r in both), review


# --- the choice ------------------------------------------------------------------------------------------------------


@given(
    st.integers(0, 2**32 - 1),
    st.integers(2, 40),
    st.integers(1, 3),
    st.floats(0, 2),
    st.floats(0, 0.99),
    st.floats(0, 0.99),
)
def test_margins_meet_the_targets_and_none_smaller_do(
    seed: int, count: int, k: int, strength: float, max_negative: float, max_positive: float
) -> None:
    records = random_records(np.random.default_rng(seed), count, 3, strength)
    targets = Targets(max_negative, max_positive)
    start = DecisionPolicy("vote" if k > 1 else "nearest", k)
    policy = with_margins(start, replay(records, start), targets)
    negative, positive, _ = all_figures(measure(replay(records, policy)))
    assert negative <= max_negative
    assert positive <= max_positive
    # A wrong verdict may lie 1e-6 above what the record says, so 2e-6 less is one wrong verdict too many.
    for name, figure, target in (("min_margin", 0, max_negative), ("min_margin_unsafe", 1, max_positive)):
        if asked := getattr(policy, name):
            less = replace(policy, **{name: max(0.0, asked - 2.5e-6)})
            assert all_figures(measure(replay(records, less)))[figure] > target


def brute_force(records: Sequence[AuditRecord], ks: Sequence[int], targets: Targets) -> float:
    """The least review that any thresholds on a grid of all observed margins reach; infinite where none will do."""
    best = float("inf")
    for k in ks:
        start = DecisionPolicy("vote" if k > 1 else "nearest", k)
        verdicts = [v for a in replay(records, start) for v in (a.clean, a.attacked)]
        grid = {0.0} | {round(max(0.0, v.margin) + 2e-6, 6) for v in verdicts if v.margin is not None}
        for min_margin, min_margin_unsafe in itertools.product(sorted(grid), repeat=2):
            policy = replace(start, min_margin=min_margin, min_margin_unsafe=min_margin_unsafe)
            negative, positive, review = all_figures(measure(replay(records, policy)))
            if negative <= targets.max_false_negative and positive <= targets.max_false_positive:
                best = min(best, review)
    return best


@pytest.mark.parametrize("seed", range(4))
def test_trying_everything_finds_nothing_better(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    records = random_records(rng, 10, 3, 1.0)
    targets = Targets(float(rng.choice([0, 0.17, 0.4])), float(rng.choice([0, 0.17, 0.4])))
    chosen = calibrate(
        write_run(tmp_path / "run", records),
        "fare",
        max_false_negative=targets.max_false_negative,
        max_false_positive=targets.max_false_positive,
        ks=(1, 2, 3),
    )
    negative, positive, review = all_figures(chosen.rates)
    assert negative <= targets.max_false_negative
    assert positive <= targets.max_false_positive
    assert review == brute_force(records, (1, 2, 3), targets)


def test_closed_form() -> None:
    """Ten unsafe images, called safe by 0.1, 0.2, ... 1.0: two may, so the third largest is barred."""
    records = [record(f"u{i}", "unsafe", [[0.1 * i], [-1], [0]], [[0.1 * i], [-1], [0]]) for i in range(1, 11)]
    records += [record(f"s{i}", "safe", [[0.5], [-1], [0]], [[0], [-1], [0.05 * i]]) for i in range(1, 11)]
    policy = with_margins(
        DecisionPolicy("nearest", 1), replay(records, DecisionPolicy("nearest", 1)), Targets(0.2, 0.5)
    )
    assert policy == DecisionPolicy("nearest", 1, -1.0, 0.800002, 0.250002)
    measured = measure(replay(records, policy))
    assert (measured.clean.false_negative.count, measured.attacked.false_negative.count) == (2, 2)
    assert (measured.clean.false_positive.count, measured.attacked.false_positive.count) == (0, 5)
    assert (measured.clean.review_unsafe.count, measured.clean.review_safe.count) == (8, 10)


def test_nothing_is_asked_for_where_nothing_has_to_be() -> None:
    records = random_records(np.random.default_rng(3), 20, 3, 0.0)
    start = DecisionPolicy("nearest", 1)
    policy = with_margins(start, replay(records, start), Targets(0.99, 0.99))
    assert policy == start


def test_equal_review_goes_to_fewer_voters(tmp_path: Path) -> None:
    clean = {"safe": [[0.9] * 3, [0.1] * 3, [0.1] * 3], "unsafe": [[0.1] * 3, [0.1] * 3, [0.9] * 3]}
    records = [record(f"{label}{i}", label, clean[label], clean[label]) for label in clean for i in range(5)]
    chosen = calibrate(
        write_run(tmp_path / "run", records), "fare", max_false_negative=0, max_false_positive=0, ks=(3, 2, 1)
    )
    assert chosen.policy == DecisionPolicy("nearest", 1)


def test_a_vote_is_chosen_where_it_saves_review(tmp_path: Path) -> None:
    """One exemplar of the buffer is nearest to each unsafe image, and all others are far from it."""
    safe, unsafe = [[0.9] * 3, [0.1] * 3, [0.1] * 3], [[0.1] * 3, [0.9, 0.1, 0.1], [0.85] * 3]
    records = [record(f"s{i}", "safe", safe, safe) for i in range(5)]
    records += [record(f"u{i}", "unsafe", unsafe, unsafe) for i in range(5)]
    chosen = calibrate(write_run(tmp_path / "run", records), "fare", max_false_negative=0, max_false_positive=0)
    assert chosen.policy == DecisionPolicy("vote", 3)
    assert chosen.rates.clean.review_unsafe.count == 0


# --- the whole -------------------------------------------------------------------------------------------------------


def test_a_run_becomes_a_policy_that_can_be_saved(run: Path, tmp_path: Path) -> None:
    chosen = calibrate(run, "fare", STRONG, max_false_negative=0.05, max_false_positive=0.1)
    negative, positive, _ = all_figures(chosen.rates)
    assert negative <= 0.05
    assert positive <= 0.1
    assert chosen.name == "fare, linf 8/255, 10 steps"
    assert (chosen.encoder_fingerprint, chosen.gallery_sha256) == ("an encoder", GALLERY)
    assert chosen.attacked_under == DecisionPolicy().version
    assert (chosen.norm, chosen.eps, chosen.steps) == ("linf", 8 / 255, 10)
    assert chosen.rates.clean.false_negative.total == chosen.rates.clean.false_positive.total == 200
    assert calibrate(run, "fare", STRONG, max_false_negative=0.05, max_false_positive=0.1) == chosen
    chosen.save(tmp_path / "policy.json")
    assert CalibratedPolicy.load(tmp_path / "policy.json") == chosen


def test_cross_validation_counts_every_image_once_and_is_no_replay(run: Path) -> None:
    tight: dict[str, Any] = {"max_false_negative": 0.05, "max_false_positive": 0.1}
    chosen = calibrate(run, "fare", STRONG, **tight)
    assert chosen.cross_validated is not None
    for rates in (chosen.cross_validated.clean, chosen.cross_validated.attacked):
        assert rates.false_negative.total == rates.false_positive.total == 200
    assert chosen.cross_validated != chosen.rates
    other = calibrate(run, "fare", STRONG, **tight, seed=1)
    assert other.cross_validated != chosen.cross_validated
    assert (other.policy, other.rates, other.flips) == (chosen.policy, chosen.rates, chosen.flips)


def test_confident_targets_ask_for_more(run: Path) -> None:
    plain = calibrate(run, "fare", STRONG, max_false_negative=0.1, max_false_positive=0.1)
    confident = calibrate(run, "fare", STRONG, max_false_negative=0.1, max_false_positive=0.1, confident=True)
    for rates in (confident.rates.clean, confident.rates.attacked):
        assert rates.false_negative.interval95[1] <= 0.1
        assert rates.false_positive.interval95[1] <= 0.1
    assert all_figures(confident.rates)[2] > all_figures(plain.rates)[2]


def test_too_few_images_for_confidence_are_named(run: Path) -> None:
    """No error among 200 has the upper end z^2 / (200 + z^2) = 0.0188."""
    with pytest.raises(PlanError, match=r"false negatives is 0\.0188 of 200 unsafe images \(asked for 0\.01\)"):
        calibrate(run, "fare", STRONG, max_false_negative=0.01, max_false_positive=0.5, confident=True)


def test_halves_that_are_too_small_are_not_cross_validated(run: Path) -> None:
    """0.0188 is met by 200 images; their half needs 0.037."""
    chosen = calibrate(run, "fare", STRONG, max_false_negative=0.03, max_false_positive=0.5, confident=True)
    assert chosen.cross_validated is None
    assert "not cross-validated" in describe(chosen)


def test_description_has_every_figure(run: Path) -> None:
    chosen = calibrate(run, "fare", STRONG, max_false_negative=0.05, max_false_positive=0.1)
    text = describe(chosen)
    assert chosen.policy.version in text
    assert f"min_margin {chosen.policy.min_margin:g}, min_margin_unsafe {chosen.policy.min_margin_unsafe:g}" in text
    assert text.count("of 200") == 16
    for rates in (chosen.rates.attacked, chosen.rates.clean):
        assert f"{rates.false_negative.value:.2%}" in text
    assert "Audit again" in text
    audited = replace(chosen, attacked_under=chosen.policy.version)
    assert "Audit again" not in describe(audited)


def test_flips_add_up_for_every_setting_and_verdict(run: Path) -> None:
    chosen = calibrate(run, "fare", STRONG, max_false_negative=0.05, max_false_positive=0.1)
    assert {(b.eps, b.verdict) for b in chosen.flips} == {(s.eps, v) for s in (WEAK, STRONG) for v in (SAFE, UNSAFE)}
    records = [AuditRecord.from_dict(json.loads(line)) for line in (run / "records.jsonl").read_text().splitlines()]
    for setting, verdict in itertools.product((WEAK, STRONG), (SAFE, UNSAFE)):
        bins = [b for b in chosen.flips if b.eps == setting.eps and b.verdict is verdict]
        right = flipped = 0
        for r in records:
            if r.setting == setting and r.label == verdict and chosen.policy.decide(r.clean.neighbors).label is verdict:
                right += 1
                flipped += chosen.policy.decide(r.attacked.neighbors).label is not verdict
                margin = chosen.policy.decide(r.clean.neighbors).margin
                rates = [rate for rate in chosen.flip_rates(verdict, margin) if rate.eps == setting.eps]
                assert len(rates) == 1
        assert sum(b.total for b in bins) == right
        assert sum(b.flipped for b in bins) == flipped
        assert all(b.total >= LEAST_IMAGES for b in bins) or len(bins) == 1
        assert all(a.margin_to == b.margin_from for a, b in itertools.pairwise(bins))
    weak, strong = (sum(b.flipped for b in chosen.flips if b.eps == s.eps) for s in (WEAK, STRONG))
    assert weak < strong


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(run: Path, said: str, kind: type[OfflineError] = PlanError, system: str = "fare", **changes: Any) -> None:
    values: dict[str, Any] = {"setting": STRONG, "max_false_negative": 0.1, "max_false_positive": 0.1, **changes}
    with pytest.raises(kind, match=said):
        calibrate(run, system, **values)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ks": (1, 4)}, "ks must be from 1 to 3"),
        ({"ks": (0,)}, "ks must be from 1 to 3"),
        ({"ks": ()}, "ks must be from 1 to 3"),
        ({"max_false_negative": -0.1}, "max_false_negative"),
        ({"max_false_positive": 1.0}, "max_false_positive"),
        ({"min_similarity": 1.5}, "min_similarity"),
        ({"setting": None}, "several .* choose one of linf 4/255, 10 steps; linf 8/255, 10 steps"),
        ({"setting": Setting("linf", 8 / 255, 20)}, "linf 8/255, 20 steps was not audited: choose"),
        ({"system": "head"}, "no system 'head' with pools in this audit; there are: fare"),
    ],
)
def test_what_does_not_fit_the_run_is_refused(run: Path, changes: dict[str, Any], said: str) -> None:
    refused(run, said, **changes)


def test_other_tasks_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [], task="two-afc", attacks=["two-afc"])
    refused(run, "'moderation', this one is 'two-afc'")


def test_an_unfinished_audit_is_refused(tmp_path: Path) -> None:
    records = random_records(np.random.default_rng(0), 20, 3, 1.0)
    run = write_run(tmp_path / "run", records)
    lines = (run / "records.jsonl").read_text().splitlines(keepends=True)
    (run / "records.jsonl").write_text("".join(lines[:-1]))
    refused(run, "holds 19 of 20 images", RunError)
    (run / "records.jsonl").write_text("")
    refused(run, "no audit records", RunError)
    (run / "records.jsonl").write_text("".join(lines))
    (run / "metrics.jsonl").write_text("")
    refused(run, "does not say what encoder", RunError)


def test_records_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    records = random_records(np.random.default_rng(0), 20, 3, 1.0)
    other = [*records[:-1], replace(records[-1], fingerprint="another")]
    refused(write_run(tmp_path / "a", other), "another encoder", RunError)
    bare = [*records[:-1], replace(records[-1], clean=replace(records[-1].clean, neighbors=()))]
    refused(write_run(tmp_path / "b", bare), "no neighbours", RunError)
    refused(write_run(tmp_path / "c", records[::2]), "safe and unsafe images")
    run = write_run(tmp_path / "d", records)
    events = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(events.replace(DecisionPolicy().version, "nearest-000000000000"))
    refused(run, "was made with policy nearest-000000000000", RunError)


def test_the_audited_least_similarity_is_kept_or_has_to_be_given(tmp_path: Path) -> None:
    records = random_records(np.random.default_rng(0), 40, 3, 1.0)
    run = write_run(tmp_path / "a", records, system={"policy": {"min_similarity": 0.25}})
    targets: dict[str, Any] = {"max_false_negative": 0.1, "max_false_positive": 0.1}
    assert calibrate(run, "fare", **targets).policy.min_similarity == 0.25
    assert calibrate(run, "fare", **targets, min_similarity=0).policy.min_similarity == 0
    again = write_run(tmp_path / "b", records, system={"policy_file": "policy.json"})
    refused(again, "give min_similarity")
    assert calibrate(again, "fare", **targets, min_similarity=0.2).policy.min_similarity == 0.2
