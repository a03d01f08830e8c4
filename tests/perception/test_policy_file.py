"""Calibrated policies: the file says what was saved or is refused, and flip rates are those of the right bin."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perception.errors import FingerprintMismatch, PolicyError
from perception.policy_file import CalibratedPolicy, FlipBin, Measured, Rate, Targets
from perception.verdict import DecisionPolicy, VerdictLabel
from tests.perception.calibrated_policies import a_policy

SAFE, UNSAFE, REVIEW = VerdictLabel.SAFE, VerdictLabel.UNSAFE, VerdictLabel.REVIEW


@pytest.mark.parametrize("policy", [a_policy(), a_policy(cross_validated=None, flips=()), a_policy(name="ä 'b'\n")])
def test_loaded_is_what_was_saved(tmp_path: Path, policy: CalibratedPolicy) -> None:
    path = tmp_path / "policy.json"
    policy.save(path)
    loaded = CalibratedPolicy.load(path)
    assert loaded == policy
    assert loaded.sha256 == policy.sha256 == json.loads(path.read_text())["sha256"]
    assert loaded.policy.version == policy.policy.version
    assert [p.name for p in tmp_path.iterdir()] == ["policy.json"]


def test_a_whole_number_for_a_float_is_no_other_policy(tmp_path: Path) -> None:
    whole = a_policy(policy=DecisionPolicy(min_similarity=0, min_margin=1))
    whole.save(tmp_path / "p")
    assert CalibratedPolicy.load(tmp_path / "p").sha256 == whole.sha256
    assert whole.sha256 == a_policy(policy=DecisionPolicy(min_similarity=0.0, min_margin=1.0)).sha256


def test_saving_replaces_a_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    a_policy(name="old").save(path)
    a_policy(name="new").save(path)
    assert CalibratedPolicy.load(path).name == "new"


def test_every_changed_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    a_policy(flips=a_policy().flips[:1], cross_validated=None).save(path)
    data = path.read_bytes()
    for at, byte in enumerate(data):
        # Another character, a blank, or nothing in its place.
        changed = (bytes([byte ^ 1]), b"\t" if byte == ord(" ") else b" ", b"")[at % 3]
        path.write_bytes(data[:at] + changed + data[at + 1 :])
        with pytest.raises(PolicyError, match=r"policy\.json"):
            CalibratedPolicy.load(path)


def document(policy: CalibratedPolicy, path: Path) -> dict[str, Any]:
    policy.save(path)
    loaded: dict[str, Any] = json.loads(path.read_bytes())
    return loaded


def test_a_changed_figure_is_named_as_a_change(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    values = document(a_policy(), path)
    path.write_text(path.read_text().replace('"min_margin": 0.05', '"min_margin": 0.01'))
    with pytest.raises(PolicyError, match=f"changed since it was written.*recorded is {values['sha256']}"):
        CalibratedPolicy.load(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "hardlook-policy-2"}, "format 'hardlook-policy-2', expected 'hardlook-policy-1'"),
        ({"more": 1}, "changed"),
        ({"content": {}}, "policy"),
        ({"content": None}, "policy.json"),
        ({"sha256": None}, "changed"),
    ],
)
def test_other_documents_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(document(a_policy(), path) | change, indent=1, sort_keys=True) + "\n")
    with pytest.raises(PolicyError, match=said):
        CalibratedPolicy.load(path)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff", b"{}", b"[" * 100_000, b'{"format": NaN}'])
def test_what_is_no_policy_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p").write_bytes(content)
    with pytest.raises(PolicyError):
        CalibratedPolicy.load(tmp_path / "p")


def test_absent_files_and_folders_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(PolicyError, match="cannot read policy"):
            CalibratedPolicy.load(path)


def test_every_field_is_part_of_the_hash() -> None:
    policy = a_policy()
    changed = [
        replace(policy, policy=DecisionPolicy()),
        replace(policy, name="b"),
        replace(policy, encoder_fingerprint="b"),
        replace(policy, gallery_sha256="0" * 64),
        replace(policy, attacked_under="b"),
        replace(policy, norm="l2"),
        replace(policy, eps=0.5),
        replace(policy, steps=11),
        replace(policy, targets=Targets(0.05, 0.1, confident=True)),
        replace(policy, rates=Measured(policy.rates.attacked, policy.rates.clean)),
        replace(policy, cross_validated=None),
        replace(policy, flips=policy.flips[1:]),
    ]
    assert len({p.sha256 for p in (policy, *changed)}) == 13


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"encoder_fingerprint": ""},
        {"attacked_under": ""},
        {"gallery_sha256": "ab"},
        {"eps": 0.0},
        {"eps": math.inf},
        {"steps": 0},
    ],
)
def test_impossible_policies_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(PolicyError):
        a_policy(**change)


@pytest.mark.parametrize(
    "change",
    [{"eps": -1.0}, {"steps": 0}, {"verdict": REVIEW}, {"margin_to": 0.05}, {"margin_to": math.inf},
     {"margin_from": math.nan}, {"flipped": 21}, {"flipped": -1}, {"flipped": 0, "total": 0}],
)  # fmt: skip
def test_impossible_bins_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(PolicyError):
        replace(a_policy().flips[0], **change)


@pytest.mark.parametrize("wrong", [(-0.1, 0.0), (1.0, 0.0), (0.0, 1.0), (math.nan, 0.0)])
def test_targets_are_shares(wrong: tuple[float, float]) -> None:
    with pytest.raises(PolicyError, match="max_false"):
        Targets(*wrong)


def test_confident_targets_look_at_the_upper_end() -> None:
    rate = Rate(1, 100)
    assert Targets(0.1, 0.1).figure(rate) == 0.01
    assert Targets(0.1, 0.1, confident=True).figure(rate) == rate.interval95[1] > 0.05


def test_the_encoder_has_to_be_the_audited_one() -> None:
    a_policy().require_encoder("an encoder")
    with pytest.raises(FingerprintMismatch, match=r"an encoder.*another"):
        a_policy().require_encoder("another")


def test_flip_rates_are_of_the_bin_that_holds_the_margin() -> None:
    policy = a_policy()
    low, all_of_it = policy.flip_rates(SAFE, 0.05)
    assert (low.norm, low.eps, low.steps, low.value, low.n) == ("linf", 4 / 255, 10, 0.5, 20)
    assert low.interval95 == Rate(10, 20).interval95
    assert (all_of_it.eps, all_of_it.n) == (8 / 255, 45)
    assert [rate.n for rate in policy.flip_rates(SAFE, 0.2)] == [25, 45]
    assert [rate.n for rate in policy.flip_rates(UNSAFE, 0.2)] == [21]
    assert policy.flip_rates(UNSAFE, 0.2)[0].value == 0


@pytest.mark.parametrize(
    ("label", "margin"),
    [(SAFE, None), (REVIEW, 0.1), (REVIEW, None), (SAFE, 0.049), (SAFE, 0.5), (UNSAFE, 0.3), (SAFE, math.nan)],
)
def test_no_flip_rate_without_data(label: VerdictLabel, margin: float | None) -> None:
    assert a_policy().flip_rates(label, margin) == ()


@given(st.lists(st.floats(-2, 2), min_size=2, max_size=8, unique=True), st.floats(-2.5, 2.5))
def test_bins_side_by_side_hold_a_margin_once(edges: list[float], margin: float) -> None:
    edges = sorted(edges)
    bins = tuple(
        FlipBin("l2", 1.0, 5, SAFE, low, high, 0, i + 1) for i, (low, high) in enumerate(itertools.pairwise(edges))
    )
    found = a_policy(flips=bins).flip_rates(SAFE, margin)
    assert len(found) == (edges[0] <= margin < edges[-1])
