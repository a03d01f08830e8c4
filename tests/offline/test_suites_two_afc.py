"""NIGHTS and BAPPS from their published layouts to figures."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from offline.audit.record import RECORDS_NAME, read_records
from offline.audit.two_afc import compared, open_two_afc
from offline.benchmarks import suite_two_afc
from offline.benchmarks.intervals import Accuracy
from offline.benchmarks.published import Figure
from offline.benchmarks.suite_two_afc import bapps, bapps_figures, nights, nights_figures, steps
from offline.benchmarks.suites import ANSWERS_NAME, SuiteRequest
from offline.benchmarks.two_afc import BAPPS_SPLITS, size_weighted_mean
from offline.errors import DataError, PlanError, RunError
from perception.preprocess import to_pixels
from perception.similarity import two_afc_choice
from tests.offline import two_afc_layouts
from tests.offline.published_layouts import night_rows
from tests.offline.suite_toys import MAKERS, NamedToy, quiet, toys
from tests.offline.test_audit_two_afc import plan

__all__ = ["toys"]
COUNT = 12
JUDGES = [0.0, 0.2, 0.8, 1.0]


@pytest.fixture
def asked(tmp_path: Path, toys: list[str]) -> SuiteRequest:
    two_afc_layouts.nights(tmp_path / "data", night_rows(COUNT))
    return SuiteRequest(("toy/a", "toy/b"), tmp_path / "data", tmp_path / "run", steps=3, batch=5)


def table(figures: list[Figure]) -> dict[tuple[str, str, str], tuple[float, int]]:
    return {(f.encoder, f.group, f.name): (f.measured, f.count) for f in figures}


def right_by_hand(folder: Path, toy: NamedToy) -> dict[str, list[bool]]:
    """NIGHTS without any reader: picture n, its candidates, and the votes of `night_rows`."""
    found: dict[str, list[bool]] = {"nights_imagenet": [], "nights_no_imagenet": []}
    for n in range(COUNT):
        stem = f"{n // 10:03d}/{n:03d}"
        names = [f"ref/{stem}.png", f"distort/{stem}_0.png", f"distort/{stem}_1.png"]
        pixels = to_pixels([toy.preprocess.apply(Image.open(folder / name).convert("RGB")) for name in names])
        reference, left, right = toy.encode(pixels).detach()
        says = int(two_afc_choice(reference[None], left[None], right[None]))
        found["nights_imagenet" if n % 3 else "nights_no_imagenet"].append(says == n % 2)
    return found


def test_nights_is_what_it_is_by_hand_and_attacks_only_take_away(asked: SuiteRequest) -> None:
    figures = nights(asked, quiet)
    found = table(figures)
    assert len(found) == len(figures) == 2 * 3 * 3
    for name in asked.encoders:
        by_hand = right_by_hand(asked.folder, MAKERS[name]())
        every = by_hand["nights_imagenet"] + by_hand["nights_no_imagenet"]
        for group, right in (("nights", every), *by_hand.items()):
            assert found[name, group, "clean"] == pytest.approx((100 * sum(right) / len(right), len(right)))
            for threat in ("linf_4_255", "l2_3"):
                assert found[name, group, threat][0] <= found[name, group, "clean"][0]
    assert found["toy/a", "nights", "linf_4_255"][0] < found["toy/a", "nights", "clean"][0]
    run = asked.part("attacked")
    assert run is not None
    assert (run / "report.html").is_file(), "an audit like any other"
    assert {r.steps for r in read_records(run)} == {3}


def test_a_run_that_was_killed_comes_to_the_same_figures_and_bytes(asked: SuiteRequest) -> None:
    whole = nights(asked, quiet)
    run = asked.part("attacked")
    assert run is not None
    records = run / RECORDS_NAME
    content = records.read_bytes()
    lines = content.splitlines(keepends=True)
    records.write_bytes(b"".join(lines[: len(lines) // 2]) + lines[-1][:30])
    assert nights(asked, quiet) == whole
    assert records.read_bytes() == content
    clean = {key: value for key, value in table(whole).items() if key[2] == "clean"}
    assert table(nights(replace(asked, clean_only=True, run=None), quiet)) == clean, "no run directory is needed"
    with pytest.raises(PlanError, match="--run"):
        replace(asked, run=None)


def test_clean_answers_resume_and_further_encoders_join(asked: SuiteRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite_two_afc, "CHUNK", 5)
    clean = replace(asked, clean_only=True, encoders=("toy/a",))
    figures = nights(clean, quiet)
    assert clean.run is not None
    path = clean.run / "clean" / ANSWERS_NAME
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == COUNT
    path.write_bytes(b"".join(lines[:7]) + lines[7][:20])
    assert nights(clean, quiet) == figures
    assert path.read_bytes() == b"".join(lines)
    both = replace(clean, encoders=("toy/a", "toy/b"))
    assert nights(both, quiet)[0] == figures[0]
    assert len(path.read_bytes().splitlines()) == 2 * COUNT
    damaged = [json.loads(line) | {"fingerprint": "other"} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in damaged))
    with pytest.raises(RunError, match="other weights of toy/a"):
        nights(clean, quiet)
    with pytest.raises(RunError, match="another plan"):
        nights(replace(clean, limit=5), quiet)


def test_the_limit_is_a_seeded_part(asked: SuiteRequest) -> None:
    some = replace(asked, clean_only=True, run=None, limit=5)
    assert [f.count for f in nights(some, quiet) if f.group == "nights"] == [5, 5]
    assert nights(some, quiet) == nights(some, quiet)


def test_both_splits_are_pooled_by_their_sizes() -> None:
    splits = {"test_imagenet": Accuracy(815, 1041), "test_no_imagenet": Accuracy(541, 783)}
    pooled, *parts = nights_figures({"fare4-convnext_base_w": {"k": splits}}, [("linf_4_255", "k")])
    assert [f"{part.measured:.1f}" for part in parts] == ["78.3", "69.1"]
    assert (pooled.group, pooled.count, f"{pooled.measured:.2f}") == ("nights", 1824, "74.34")
    assert (pooled.published, pooled.flagged) == (74.3, False)
    assert round(size_weighted_mean([78.3, 69.1], [1041, 783]), 2) == 74.35


def test_bapps_is_clean_on_all_and_attacked_on_the_first(
    tmp_path: Path, toys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    two_afc_layouts.bapps(tmp_path / "data", JUDGES, equal=3)
    monkeypatch.setattr(suite_two_afc, "BAPPS_ATTACKED", 2)
    asked = SuiteRequest(("toy/a",), tmp_path / "data", tmp_path / "run", steps=3)
    figures = bapps(asked, quiet, soft=True)
    found = table(figures)
    counts = {name: found["toy/a", "bapps", name][1] for name in ("clean", "linf_4_255", "l2_3")}
    assert counts == {"clean": 24, "linf_4_255": 12, "l2_3": 12}
    run = asked.part("attacked")
    assert run is not None
    assert {record.id for record in read_records(run)} == {"000000", "000001"}
    clean = [found["toy/a", f"bapps_{split}", "clean"] for split in BAPPS_SPLITS]
    assert [count for _, count in clean] == [4] * 6
    assert found["toy/a", "bapps", "clean"][0] == pytest.approx(sum(value for value, _ in clean) / 6)
    assert found["a rater at random", "bapps_soft_score", "mean"][0] == pytest.approx(
        100 * sum(j * j + (1 - j) * (1 - j) for j in JUDGES) / 4
    )
    # The fourth triplet is a tie: half a point for it, whatever people say.
    task = open_two_afc(plan({"kind": "bapps", "path": "data"}), MAKERS["toy/a"](), tmp_path)
    embeddings = MAKERS["toy/a"]().encode(to_pixels([item.pixels for item in task.items]))
    margins = [j.scores["margin"] for j in task.judge(torch.arange(24), embeddings)]
    earned = [
        0.5 if margin == 0 else judge if margin < 0 else 1 - judge
        for margin, judge in zip(margins, JUDGES * 6, strict=True)
    ]
    assert margins.count(0.0) == 6
    assert found["toy/a", "bapps_soft_score", "mean"][0] == pytest.approx(100 * sum(earned) / 24)


def test_the_mean_of_bapps_does_not_weigh_its_splits() -> None:
    shares = {split: Accuracy(1, 2) for split in BAPPS_SPLITS} | {"cnn": Accuracy(100, 100)}
    mean, *splits = bapps_figures({"toy": {"k": shares}}, [("clean", "k")])
    assert (mean.measured, mean.count) == pytest.approx((350 / 6, 110))
    assert mean.interval is None
    assert [split.group for split in splits] == [f"bapps_{split}" for split in BAPPS_SPLITS]
    paper = {s: v / 100 for s, v in zip(BAPPS_SPLITS, (86.5, 70.5, 64.8, 67.7, 75.0, 79.3), strict=True)}
    assert round(100 * sum(paper.values()) / 6, 1) == 74.0  # FARE ConvNeXt-B_w of table XIV


def test_table_vi_has_a_column_for_each_number_of_steps(asked: SuiteRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite_two_afc, "STEP_COUNTS", (1, 2, 4))
    figures = steps(replace(asked, steps=0, encoders=("toy/a",)), quiet)
    keys = [f"{threat}_{count}" for threat in ("linf_4_255", "l2_3") for count in (1, 2, 4)]
    assert [f.name for f in figures] == ["clean", *keys]
    assert {f.group for f in figures} == {"nights_steps"}
    assert all(f.measured <= figures[0].measured for f in figures)


def test_table_vi_is_published_for_one_encoder() -> None:
    known = Figure("fare4-convnext_base_w", "nights_steps", "l2_3_500", 65.0, 1824, None)
    assert suite_two_afc._beside_table_vi(known).published == 65.7
    assert suite_two_afc._beside_table_vi(replace(known, encoder="toy")).published is None


@pytest.mark.parametrize("suite", [nights, steps, bapps])
def test_what_is_missing_is_said_before_an_encoder_is_loaded(suite: object, tmp_path: Path, toys: list[str]) -> None:
    asked = SuiteRequest(("toy/a",), tmp_path, tmp_path / "run")
    with pytest.raises(DataError, match=r"expected the layout of .*; get it with") as failed:
        suite(asked, quiet)  # type: ignore[operator]
    assert str(tmp_path) in str(failed.value)
    assert toys == []
    assert not (tmp_path / "run").exists()


def test_the_first_missing_images_are_named(asked: SuiteRequest, toys: list[str]) -> None:
    for n in (1, 2, 3, 4):
        (asked.folder / f"distort/000/{n:03d}_1.png").unlink()
    with pytest.raises(DataError, match=r"4 of 36 files are missing, e.g. .*001_1.png, .*002_1.png, .*003_1.png;"):
        nights(asked, quiet)
    assert toys == []


# --- by distance -----------------------------------------------------------------------------------------------------


def test_an_encoder_that_compares_by_distance_is_judged_and_attacked_by_it(asked: SuiteRequest) -> None:
    request = replace(asked, encoders=("toy/l2",))
    found = table(nights(request, quiet))
    toy = MAKERS["toy/l2"]()
    task = open_two_afc(plan({"kind": "nights", "path": "."}), compared(toy), asked.folder)
    by_distance, by_cosine = [], []
    for n, item in enumerate(task.items):
        stem = f"{int(item.id) // 10:03d}/{int(item.id):03d}"
        names = [f"ref/{stem}.png", f"distort/{stem}_0.png", f"distort/{stem}_1.png"]
        pixels = to_pixels([toy.preprocess.apply(Image.open(asked.folder / name).convert("RGB")) for name in names])
        f, x, y = toy.features(pixels).detach().double()
        margin = float((f - y).square().sum() - (f - x).square().sum())
        (judged,) = task.judge(torch.tensor([n]), compared(toy).encode(pixels[:1]))
        assert judged.scores["margin"] == pytest.approx(margin, rel=1e-4, abs=1e-4)
        by_distance.append((margin < 0) == (item.label == "right"))
        reference, left, right = toy.encode(pixels).detach()
        by_cosine.append(
            int(two_afc_choice(reference[None], left[None], right[None])) == ["left", "right"].index(item.label)
        )
    assert by_distance != by_cosine, "the toy would tell nothing"
    assert found["toy/l2", "nights", "clean"][0] == pytest.approx(100 * sum(by_distance) / COUNT)
    assert found["toy/l2", "nights", "linf_4_255"][0] < found["toy/l2", "nights", "clean"][0]


def test_the_attacker_of_distances_gains_what_the_defender_loses(asked: SuiteRequest) -> None:
    toy = MAKERS["toy/l2"]()
    view = compared(toy)
    task = open_two_afc(plan({"kind": "nights", "path": "."}), view, asked.folder)
    rows = torch.tensor([5, 0, 7])
    pixels = to_pixels([task.items[row].pixels for row in rows.tolist()])
    embeddings = view.encode(pixels).detach()
    objective, criterion = task.objective("two-afc", rows, embeddings), task.criterion(rows)
    assert criterion is not None
    # The cross-entropy of the two negative distances, from its definition.
    judged = task.judge(rows, embeddings)
    labels = torch.tensor([["left", "right"].index(task.items[row].label) for row in rows.tolist()])
    margins = torch.tensor([j.scores["margin"] for j in judged])
    logits = torch.stack([torch.zeros(3), -margins], dim=1)  # a constant shift of (-d0, -d1)
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert torch.allclose(objective(embeddings), expected, rtol=1e-4)
    assert criterion(embeddings).tolist() == [not j.correct for j in judged]
    part = torch.tensor([2, 0])
    assert torch.equal(objective.rows(part)(embeddings[part]), objective(embeddings)[part])
    assert criterion.rows(part)(embeddings[part]).tolist() == criterion(embeddings)[part].tolist()
    with pytest.raises(PlanError, match="'shift'"):
        task.objective("shift", rows, embeddings)
    with pytest.raises(PlanError, match="compares by distance"):
        open_two_afc(plan({"kind": "nights", "path": "."}), toy, asked.folder)


def test_equal_candidates_tie_by_distance_as_well(tmp_path: Path) -> None:
    two_afc_layouts.bapps(tmp_path / "data", JUDGES, equal=1)
    view = compared(MAKERS["toy/l2"]())
    task = open_two_afc(plan({"kind": "bapps", "path": "data"}), view, tmp_path)
    rows = torch.tensor([i for i, item in enumerate(task.items) if item.id == "000001"])
    embeddings = view.encode(to_pixels([task.items[row].pixels for row in rows.tolist()]))
    assert [(j.answer, j.scores["margin"]) for j in task.judge(rows, embeddings)] == [("left", 0.0)] * 6


def test_few_groups_of_candidates_are_held_and_come_back_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offline.audit.two_afc_distance.GROUP", 5)
    monkeypatch.setattr("offline.audit.two_afc_distance.GROUPS_HELD", 1)
    two_afc_layouts.bapps(tmp_path / "data", JUDGES)
    view = compared(MAKERS["toy/l2"]())
    task = open_two_afc(plan({"kind": "bapps", "path": "data"}), view, tmp_path)
    embeddings = view.encode(to_pixels([item.pixels for item in task.items]))
    whole = task.judge(torch.arange(24), embeddings)
    assert [task.judge(torch.tensor([row]), embeddings[row : row + 1])[0] for row in reversed(range(24))] == whole[::-1]
