"""Reading folders of audits: what is sound, what is damaged, what is written at this moment, and what is a trap."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from perception.policy_file import Rate
from perception.replay import AttackSetting
from service import audit_files, audit_runs
from service.audit_fit import (
    DefenseParameters,
    Deployed,
    PoolChange,
    PresentPools,
    calibration_run,
    fits,
    newest_fitting,
)
from service.audit_reading import AuditRun, Signature, read_run
from service.audit_runs import AuditRuns
from service.errors import AuditUnusable, UnknownItem
from tests.service.audit_folders import (
    FINGERPRINT,
    FINISHED_S,
    GALLERY,
    POLICY,
    events,
    four,
    lines,
    plan,
    report,
    write,
)

DEPLOYED = Deployed("toy/0", FINGERPRINT, "fp32", PresentPools(GALLERY), POLICY, None)
AT = datetime.fromtimestamp(FINISHED_S, UTC)


def only(root: Path) -> AuditRun:
    [run] = AuditRuns(root).listed().runs
    return run


def test_a_sound_run_says_everything(tmp_path: Path) -> None:
    write(tmp_path / "demo")
    run = only(tmp_path)
    assert (run.id, run.state, run.problems, run.task, run.has_page) == ("demo", "finished", (), "moderation", True)
    assert (run.date, run.dated_by) == (AT, "log")
    assert run.headline == AttackSetting("linf", 8 / 255, 10)
    safe, unsafe = run.figures
    assert (safe.label, safe.clean, safe.robust) == ("safe", Rate(2, 2), Rate(1, 2))
    assert unsafe.wrong_attacked == Rate(1, 2)
    assert [check.name for check in run.checks if not check.passed] == ["black-box"]


def test_the_newest_is_first_and_no_folder_is_no_audits(tmp_path: Path) -> None:
    for name, finished_s in (("b", FINISHED_S), ("c", FINISHED_S + 5), ("a", FINISHED_S - 5)):
        write(tmp_path / name, metrics=lines(events(finished_s=finished_s)))
    assert [run.id for run in AuditRuns(tmp_path).listed().runs] == ["c", "b", "a"]
    assert AuditRuns(None).listed().runs == ()
    [(_, reason)] = AuditRuns(tmp_path / "absent").listed().skipped
    assert "cannot be read" in reason


# --- damage ----------------------------------------------------------------------------------------------------------

FOREIGN = {"audit": plan(task="retrieval")}
BROKEN: dict[str, tuple[dict[str, bytes], str, str]] = {
    "no JSON": ({"plan": b"{"}, "damaged", "plan.json does not hold what it should: Invalid JSON"),
    "a plan of another job": ({"plan": b'{"finetune": {}}'}, "damaged", "audit: Field required"),
    "no encoding": ({"plan": b"\xff\xfe"}, "damaged", "plan.json"),
    "a deep plan": ({"plan": b"[" * 100_000}, "damaged", "plan.json"),
    "a bad event": ({"metrics": b"{}\n"}, "damaged", "metrics.jsonl does not hold what it should: event"),
    "a bad time": ({"metrics": b'{"event": "a", "time_s": NaN}\n'}, "damaged", "time_s"),
    "a report without figures": ({"report": b'{"format": "hardlook-audit-figures-1"}'}, "damaged", "rows"),
    "a report of the future": ({"report": b'{"format": "hardlook-audit-figures-2"}'}, "damaged", "format"),
    "a report of another plan": ({"plan": json.dumps(FOREIGN).encode()}, "damaged", "another plan than plan.json"),
    "records that changed": ({"records": lines(four()[:3])}, "damaged", "made from other records than records.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_damage_is_said_and_hides_nothing_else(tmp_path: Path, name: str) -> None:
    files, state, reason = BROKEN[name]
    write(tmp_path / "broken", None, **files)
    write(tmp_path / "sound")
    found = {run.id: run for run in AuditRuns(tmp_path).listed().runs}
    assert found["sound"].state == "finished"
    assert found["broken"].state == state
    assert any(reason in problem for problem in found["broken"].problems), found["broken"].problems
    assert newest_fitting(list(found.values()), DEPLOYED) == (found["sound"], found["sound"].systems[0])


@pytest.mark.parametrize("missing", ["plan.json", "metrics.jsonl", "records.jsonl", "report.json", "report.html"])
def test_a_file_that_is_missing_is_named(tmp_path: Path, missing: str) -> None:
    (write(tmp_path / "run") / missing).unlink()
    run = only(tmp_path)
    assert run.state != "finished"
    said = {"report.json": "no report yet", "metrics.jsonl": "has not begun"}.get(missing, missing)
    assert said in run.problems[0]


def impossible(content: dict[str, Any]) -> None:
    content["rows"][0]["clean"]["right"] = 3


def uncounted(content: dict[str, Any]) -> None:
    content["rows"][0]["total"] = 0


@pytest.mark.parametrize("spoil", [impossible, uncounted])
def test_figures_that_cannot_be_are_no_figures(tmp_path: Path, spoil: Callable[[dict[str, Any]], None]) -> None:
    content = report(plan(), lines(four()))
    spoil(content)
    write(tmp_path / "run", report=json.dumps(content).encode())
    run = only(tmp_path)
    assert run.state == "damaged"
    assert run.figures == ()


def test_a_run_in_progress_is_unfinished_and_its_last_line_does_not_matter(tmp_path: Path) -> None:
    done = lines(four()[:2]) + b'{"system": "to'
    folder = write(tmp_path / "run", records=done, metrics=lines(events(finished_s=None)) + b'{"event": "sy')
    (folder / "report.json").unlink()
    (folder / "report.html").unlink()
    run = only(tmp_path)
    assert run.state == "unfinished"
    assert "2 of 4 records are written" in run.problems[1]
    assert run.dated_by == "log"
    assert run.date == AT - timedelta(seconds=101)
    # A report of an earlier part, as `hardlook-lab report` writes it in between.
    content = report(plan(), b"earlier", finished=False)
    (folder / "report.json").write_text(json.dumps(content))
    run = only(tmp_path)
    assert run.state == "unfinished"


@pytest.mark.parametrize("name", ["plan.json", "metrics.jsonl", "report.json", "records.jsonl"])
def test_files_have_limits_which_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    size = (write(tmp_path / "run") / name).stat().st_size
    limits = {**audit_files.LIMITS_BYTES, name: size}
    monkeypatch.setattr(audit_files, "LIMITS_BYTES", limits)
    assert only(tmp_path).state == "finished"
    limits[name] = size - 1
    run = only(tmp_path)
    assert run.state != "finished"
    assert f"{name} has {size} bytes, the limit is {size - 1}" in " ".join(run.problems)


def test_a_huge_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_files, "MAX_LINE_BYTES", 1000)
    folder = write(tmp_path / "run", metrics=lines([*events(), {"event": "x" * 2000, "time_s": 0.0}]))
    assert folder.is_dir()
    [problem] = only(tmp_path).problems
    assert problem == "metrics.jsonl has a line 4 of more than 1000 bytes, which is the limit"


# --- traps -----------------------------------------------------------------------------------------------------------


def test_links_are_not_followed(tmp_path: Path) -> None:
    root, outside = tmp_path / "audits", write(tmp_path / "outside")
    write(root / "inside")
    (root / "linked").symlink_to(outside)
    page = root / "inside" / "report.html"
    page.unlink()
    page.symlink_to(outside / "plan.json")
    runs = AuditRuns(root)
    listing = runs.listed()
    assert [run.id for run in listing.runs] == ["inside"]
    assert listing.skipped == (("linked", "is a link; links are not followed"),)
    with pytest.raises(UnknownItem):
        runs.get("linked")
    with pytest.raises(AuditUnusable, match=r"report\.html cannot be opened"):
        runs.page("inside")


def test_linked_plans_and_pipes_are_damage(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (write(tmp_path / name) / "plan.json").unlink()
    (tmp_path / "a" / "plan.json").symlink_to(tmp_path / "b" / "report.json")
    os.mkfifo(tmp_path / "b" / "plan.json")
    found = {run.id: run.problems[0] for run in AuditRuns(tmp_path).listed().runs}
    assert "links are not followed" in found["a"]
    assert "is no plain file" in found["b"]


TRAPS = ("", ".", "..", "../run", "run/..", "run/", "/", "a\\b", "run\n", "rün", "x" * 200, "-", ".hidden")


@pytest.mark.parametrize("id", TRAPS)
def test_ids_are_no_paths(tmp_path: Path, id: str) -> None:
    write(tmp_path / "audits" / "run")
    write(tmp_path / "run")
    runs = AuditRuns(tmp_path / "audits")
    with pytest.raises(UnknownItem):
        runs.get(id)
    with pytest.raises(UnknownItem):
        runs.page(id)


def test_names_that_no_id_can_have_are_listed_apart(tmp_path: Path) -> None:
    write(tmp_path / "<script>")
    write(tmp_path / ".hidden")
    (tmp_path / "notes.txt").write_text("no folder")
    listing = AuditRuns(tmp_path).listed()
    assert listing.runs == ()
    assert listing.skipped == (("?script?", "has a name of other characters than A-Z a-z 0-9 . _ -"),)


def test_of_too_many_the_last_changed_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_runs, "MAX_RUNS", 2)
    for i in range(4):
        os.utime(write(tmp_path / f"run{i}"), ns=(0, 10**9 * (100 - i)))
    listing = AuditRuns(tmp_path).listed()
    assert {run.id for run in listing.runs} == {"run0", "run1"}
    assert listing.left_out == 2


# --- again -----------------------------------------------------------------------------------------------------------


def test_what_has_not_changed_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "same")
    changing = write(tmp_path / "changing")
    reads: list[str] = []

    def noted(id: str, folder: int, signature: Signature) -> AuditRun:
        reads.append(id)
        return read_run(id, folder, signature)

    monkeypatch.setattr(audit_runs, "read_run", noted)
    runs = AuditRuns(tmp_path)
    first = {run.id: run for run in runs.listed().runs}
    assert sorted(reads) == ["changing", "same"]
    (changing / "plan.json").write_bytes(b"{")
    second = {run.id: run for run in runs.listed().runs}
    assert reads[2:] == ["changing"]
    assert second["same"] is first["same"] is runs.get("same")
    assert second["changing"].state == "damaged"
    (tmp_path / "same").rename(tmp_path / "other")
    assert {run.id for run in runs.listed().runs} == {"changing", "other"}
    with pytest.raises(UnknownItem):
        runs.get("same")


# --- what fits -------------------------------------------------------------------------------------------------------


def fit_of(run: AuditRun, deployed: Deployed = DEPLOYED) -> tuple[bool, ...]:
    found = fits(run, run.systems[0], deployed)
    assert found.whole == (not found.reasons)
    return found.encoder, found.pools, found.policy, found.defense


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (True, True, True, True)),
        ({"fingerprint": "e" * 64}, (False, True, True, True)),
        ({"pools": PresentPools("cd" * 32)}, (True, False, True, True)),
        ({"pools": PresentPools(None, "no pools are published")}, (True, False, True, True)),
        ({"pools": PresentPools(GALLERY, "something else decides too", whole=False)}, (True, False, True, True)),
        ({"policy_version": "vote-111111111111"}, (True, True, False, True)),
        ({"defense": DefenseParameters(4 / 255, 2, 1 / 255, 2.0, 0.2, "")}, (True, True, True, False)),
    ],
)
def test_each_part_fits_for_itself(tmp_path: Path, changes: dict[str, Any], expected: tuple[bool, ...]) -> None:
    write(tmp_path / "run")
    assert fit_of(only(tmp_path), replace(DEPLOYED, **changes)) == expected


def test_a_defence_fits_by_its_parameters_and_not_by_its_seed(tmp_path: Path) -> None:
    defense = {"kind": "ttc", "attacker": "adaptive", "eot": 2, "original": "toy/1", "eps": 4 / 255, "steps": 2,
               "step_size": 1 / 255, "beta": 2.0, "threshold": 0.2, "seed": 7}  # fmt: skip
    asked = plan(systems=[{**plan()["systems"][0], "defense": defense}])
    content = json.dumps(report(asked, lines(four()))).encode()
    write(tmp_path / "run", plan=json.dumps({"audit": asked}).encode(), report=content)
    run = only(tmp_path)
    same = DefenseParameters(4 / 255, 2, 1 / 255, 2.0, 0.2, "toy/1")
    assert fit_of(run, replace(DEPLOYED, defense=same)) == (True, True, True, True)
    others: dict[str, Any] = {"steps": 3, "threshold": 0.1, "original": ""}
    for name, other in others.items():
        deployed = replace(DEPLOYED, defense=replace(same, **{name: other}))
        assert fit_of(run, deployed) == (True, True, True, False)
        assert f"{name} " in fits(run, run.systems[0], deployed).reasons[0]
    assert "the audit had one" in fits(run, run.systems[0], DEPLOYED).reasons[0]


def test_changes_since_the_audit_are_told_in_words(tmp_path: Path) -> None:
    write(tmp_path / "run")
    run = only(tmp_path)
    after, before = AT + timedelta(hours=1), AT - timedelta(hours=1)
    changes = (
        *(PoolChange(after, kind) for kind in ("exemplar.add", "exemplar.add", "exemplar.move", "version.rollback")),
        PoolChange(before, "exemplar.add"),
    )
    deployed = replace(DEPLOYED, pools=PresentPools("cd" * 32), changes=changes, all_changes=False)
    [reason] = fits(run, run.systems[0], deployed).reasons
    assert reason.endswith(
        "Since the audit 2 exemplars were added, 1 exemplar was moved, an earlier version was gone back to 1 time."
    )
    [reason] = fits(run, run.systems[0], replace(deployed, changes=changes[:2])).reasons
    assert reason.endswith("Since the audit at least 2 exemplars were added.")


def test_other_tasks_and_systems_that_have_not_begun_do_not_fit(tmp_path: Path) -> None:
    write(tmp_path / "head", metrics=lines(events(gallery_sha256=None)))
    write(tmp_path / "waiting", metrics=lines(events()[:1]))
    runs = {run.id: run for run in AuditRuns(tmp_path).listed().runs}
    assert fit_of(runs["head"]) == (True, False, False, True)
    assert fit_of(runs["waiting"]) == (False, False, False, False)
    assert calibration_run(list(runs.values()), DEPLOYED) is None


def test_what_thresholds_are_tried_on(tmp_path: Path) -> None:
    """One that fits, else one that fits but for the policy, else the newest."""
    kinds: dict[str, dict[str, Any]] = {
        "fits": {},
        "policy": {"policy_version": "vote-1"},
        "other": {"gallery_sha256": "ef" * 32},
    }
    for age, (name, changes) in enumerate(kinds.items()):
        write(tmp_path / name, metrics=lines(events(finished_s=FINISHED_S + age, **changes)))
    runs = list(AuditRuns(tmp_path).listed().runs)
    assert [run.id for run in runs] == ["other", "policy", "fits"]
    for expected in ("fits", "policy", "other"):
        found = calibration_run(runs, DEPLOYED)
        assert found is not None
        assert found[0].id == expected
        runs.remove(found[0])
