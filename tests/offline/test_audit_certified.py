"""Certified accuracies in audits: from images over records to figures, tables and the report."""

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offline.audit.certified import RADII, broken_certificates, certified_rows
from offline.audit.charts import certified_charts
from offline.audit.figures import Figures, summarise
from offline.audit.gate import Recorded, compare
from offline.audit.plan import AuditPlan, plan_from_table
from offline.audit.record import AuditRecord, Judgement, Setting, read_checks, read_records
from offline.audit.report import write_report
from offline.audit.rows import CertifiedRow
from offline.audit.run import SystemAudit, run_audit
from offline.audit.tables import CERTIFIED_NOTE, csv_table, table
from offline.audit.two_afc import open_two_afc
from offline.benchmarks.intervals import Accuracy
from offline.errors import DataError
from perception.encoder import encode_images
from perception.gallery import Gallery
from perception.testing import ToyEncoder, encoded, synthetic_image
from tests.lipschitz_toy import IsometricEncoder
from tests.offline.audit_records import moderation, plan_for, record, write_run
from tests.offline.audit_records import table as plan_table
from tests.offline.two_afc_layouts import Row, bapps, nights

L2 = Setting("l2", 1.0, 5)


def two_afc_plan(*queries: dict[str, Any]) -> AuditPlan:
    table = {
        "task": "two-afc",
        "system": [{"name": "plain", "encoder": "isometry"}],
        "queries": list(queries),
        "threat": [{"norm": "l2", "eps": [2.0, 8.0], "steps": 5}],
        "square_queries": 10,
        "check_images": 2,
    }
    return plan_from_table(table)


def audited(plan: AuditPlan, data: Path, run: Path, encoder: IsometricEncoder | ToyEncoder) -> list[AuditRecord]:
    run.mkdir(exist_ok=True)
    list(SystemAudit(plan, plan.systems[0], encoder, open_two_afc(plan, encoder, data), run, data).run())
    return read_records(run)


@pytest.mark.parametrize("kind", ["nights", "bapps"])
def test_two_afc_from_files_to_certified_accuracies(kind: str, tmp_path: Path) -> None:
    judges = [0.0, 0.2, 0.5, 1.0, 0.6]
    if kind == "nights":
        nights(tmp_path / kind, [Row(n, right=n % 2, imagenet=n % 3 > 0) for n in range(24)])
    else:
        bapps(tmp_path / kind, judges, equal=1)
    plan, encoder = two_afc_plan({"kind": kind, "path": kind}), IsometricEncoder(8, size_px=16)
    records = audited(plan, tmp_path, tmp_path / "run", encoder)
    assert all(AuditRecord.from_dict(json.loads(json.dumps(asdict(one)))) == one for one in records)
    for one in records:
        undecided = kind == "bapps" and int(one.id) == judges.index(0.5)
        assert (one.certified is None) is undecided
        if one.certified is not None:
            assert 0 <= one.certified["published"] <= one.certified["tighter"]
            assert one.clean.correct or one.certified["tighter"] == 0
            if kind == "bapps" and int(one.id) == 1:  # two equal candidates: a tie
                assert one.certified == {"tighter": 0, "published": 0}
            if one.clean.correct and one.distance <= one.certified["tighter"]:
                assert one.robust
    assert broken_certificates(records) == []
    rows = summarise(plan, records, read_checks(tmp_path / "run")).certified
    whole = [row for row in rows if not row.set]
    assert [row.form for row in whole] == ["tighter", "published"]
    sets = {row.set for row in rows} - {""}
    assert len(sets) == (2 if kind == "nights" else 6)
    assert whole[0].total == (24 if kind == "nights" else 6 * 4)  # each image once, undecided ones not at all
    for form in ("tighter", "published"):
        own = {row.set: row for row in rows if row.form == form}
        for eps in RADII:  # all sets together are their size-weighted mean
            right = [own[name].at(eps).right for name in sets]
            assert own[""].at(eps).right == sum(right)
            naive = {(r.set, r.id) for r in records if r.clean.correct and r.certified and r.certified[form] > eps}
            assert own[""].at(eps).right == len(naive)
    assert 0 < whole[0].at(RADII[0]).right <= whole[0].clean.right


def test_moderation_from_files_to_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = IsometricEncoder(8, size_px=16)
    names = {label: [f"{label}/{i}.png" for i in range(6)] for label in ("safe", "buffer", "unsafe")}
    for number, (label, own) in enumerate(names.items()):
        for kind, base in (("pools", 0), ("queries", 50)):
            (tmp_path / kind / label).mkdir(parents=True)
            for i, name in enumerate(own):
                (tmp_path / kind / name).write_bytes(encoded(synthetic_image(100 * number + base + i)))
    everything = [name for files in names.values() for name in files]
    embeddings = encode_images(encoder, [tmp_path / "pools" / name for name in everything]).numpy()
    labels = tuple(name.split("/")[0] for name in everything)
    Gallery(tuple(everything), labels, embeddings, encoder.fingerprint).save(tmp_path / "pools.safetensors")
    plan = plan_from_table(
        plan_table(
            system=[
                {"name": "plain", "encoder": "isometry", "gallery": "pools.safetensors"},
                {"name": "voting", "encoder": "isometry", "gallery": "pools.safetensors",
                 "policy": {"rule": "vote", "k": 3}},
            ],
            queries=[{"kind": "folder", "path": f"queries/{x}", "label": x} for x in ("safe", "unsafe")],
            targets=None, attacks=["white-box"], threat=[{"norm": "l2", "eps": [2.0, 20.0], "steps": 10}],
            square_queries=5, check_images=2,
        )
    )  # fmt: skip
    monkeypatch.setattr("perception.catalogue.load_encoder", lambda name, **_: encoder)
    run = tmp_path / "run"
    list(run_audit(plan, data=tmp_path, folder=tmp_path, run=run))
    records = read_records(run)
    assert broken_certificates(records) == []
    # The attack is strong enough for that to mean something.
    assert any(one.clean.correct and not one.attacked.correct for one in records)
    assert {form for one in records for form in one.certified or ()} == {"decision"}
    page = write_report(run).read_text("utf8")
    assert "Certified accuracy" in page
    assert "Certified unsafe images answered unsafe by radius, l2" in page
    figures = Figures.load(run / "report.json")
    assert figures.certified == summarise(plan, records, read_checks(run)).certified
    assert {(row.system, row.label) for row in figures.certified} == {
        (system, label) for system in ("plain", "voting") for label in ("safe", "unsafe")
    }
    with (run / "report.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        [row] = [r for r in figures.certified if (r.system, r.label) == (line["system"], line["label"])]
        assert float(line["certified_decision_l2_36_255"]) == pytest.approx(row.at(RADII[0]).value, abs=1e-6)


def of(radius: float | None, right: bool = True, **changes: Any) -> AuditRecord:
    """A record of an unsafe image with a certificate."""
    one = record(str(changes.pop("id", 0)), "unsafe", "unsafe" if right else "safe", setting=L2)
    return replace(one, certified=None if radius is None else {"decision": radius}, **changes)


L2_PLAN = moderation(threat=[{"norm": "l2", "eps": 1.0, "steps": 5}])


def test_certified_accuracy_by_hand() -> None:
    """Right and beyond the radius, strictly; of those that take part."""
    radii = [0.0, 36 / 255, 0.2, 0.3, 0.5]
    records = [of(radius, id=i) for i, radius in enumerate(radii)]
    records += [of(0.9, right=False, id=8), of(None, id=9)]
    [row] = certified_rows(L2_PLAN, records)
    assert (row.system, row.form, row.label, row.set, row.total) == ("plain", "decision", "unsafe", "", 6)
    assert (row.clean.right, row.clean.total) == (5, 6)
    assert [row.at(eps).right for eps in RADII] == [3, 2, 1]
    assert row.points[0] == (0.0, Accuracy(4, 6))
    assert row.points[-1][1].right == 0
    assert [eps for eps, _ in row.points] == sorted({eps for eps, _ in row.points})
    again = [*records, *(replace(one, eps=2.0) for one in records)]  # a second setting counts nothing twice
    assert certified_rows(L2_PLAN, again) == certified_rows(L2_PLAN, again[::-1]) == (row,)


def test_runs_without_certificates_have_no_such_figures(tmp_path: Path) -> None:
    nights(tmp_path / "nights", [Row(n, right=n % 2) for n in range(6)])
    plan = two_afc_plan({"kind": "nights", "path": "nights"})
    records = audited(plan, tmp_path, tmp_path / "run", ToyEncoder())
    assert {one.certified for one in records} == {None}
    figures = summarise(plan, records, [])
    assert figures.certified == ()
    assert "ertified" not in table(figures) + csv_table(figures)
    assert certified_charts(figures.certified) == []


def test_records_from_before_there_were_certificates_are_read() -> None:
    line = json.loads(json.dumps(asdict(of(0.5))))
    assert AuditRecord.from_dict(line).certified == {"decision": 0.5}
    del line["certified"]
    assert AuditRecord.from_dict(line) == of(None)
    for damaged in (-0.1, float("nan"), "0.5", True):
        with pytest.raises(TypeError):
            AuditRecord.from_dict({**line, "certified": {"decision": damaged}})


def test_tables_name_the_radii_and_what_they_mean(tmp_path: Path) -> None:
    records = [of(0.2, id=0), of(0.5, id=1)]
    text = table(summarise(L2_PLAN, records, []))
    assert "| system | certificate | images | n | clean | l2 36/255 | l2 72/255 | l2 108/255 |" in text
    assert "| plain | decision | unsafe | 2 | 100.0 [34.2, 100.0] | 100.0 [34.2, 100.0] | 50.0 " in text
    assert CERTIFIED_NOTE in text
    page = write_report(write_run(tmp_path, L2_PLAN, records)).read_text("utf8")
    assert "l2 108/255" in page
    assert "their certified radius" not in page


def test_a_broken_certificate_is_said_first(tmp_path: Path) -> None:
    flipped = of(0.5, id=1, attacked=Judgement("safe", False, {}), distance=0.4)
    beyond, unsure = replace(flipped, id="2", distance=0.6), replace(flipped, id="3", certified=None)
    linf = replace(flipped, id="4", norm="linf", eps=8 / 255, steps=200)
    assert broken_certificates([of(0.5), flipped, beyond, unsure, linf]) == [flipped]
    page = write_report(write_run(tmp_path, L2_PLAN, [of(0.5), flipped, beyond])).read_text("utf8")
    assert "1 attacked images have another answer within their certified radius" in page


def test_a_gate_holds_certified_accuracies_too() -> None:
    before = summarise(L2_PLAN, [of(0.5, id=i) for i in range(40)], [])
    recorded = Recorded(before, L2_PLAN.as_dict())
    same = [finding for finding in compare(L2_PLAN, before, recorded) if "certified" in finding.what]
    assert len(same) == 3
    assert not any(finding.worse for finding in same)
    worse = summarise(L2_PLAN, [of(0.2, id=i) for i in range(40)], [])
    assert [f.worse for f in compare(L2_PLAN, worse, recorded) if "certified" in f.what] == [False, True, True]
    without = replace(before, certified=())
    assert all(f.worse for f in compare(L2_PLAN, without, recorded) if "certified" in f.what)


@pytest.mark.parametrize(
    "points",
    [((0.0, Accuracy(1, 2)),), ((0.0, Accuracy(1, 3)), (0.1, Accuracy(2, 3))), ((-1.0, Accuracy(1, 3)),),
     ((0.1, Accuracy(1, 3)), (0.0, Accuracy(1, 3))), ((0.0, Accuracy(3, 3)),)],
)  # fmt: skip
def test_impossible_rows_are_refused(points: tuple[tuple[float, Accuracy], ...]) -> None:
    with pytest.raises(DataError, match="certified"):
        CertifiedRow("plain", "decision", "", "", 3, Accuracy(2, 3), points)


def test_rows_that_are_there_twice_are_refused() -> None:
    figures = summarise(L2_PLAN, [of(0.5)], [])
    with pytest.raises(DataError, match="twice"):
        replace(figures, certified=figures.certified * 2)


def test_only_tasks_with_decisions_are_certified() -> None:
    assert certified_rows(plan_for("retrieval"), [record("q", "", "")]) == ()
    assert np.isclose(RADII, (0.141176, 0.282353, 0.423529), atol=1e-6).all()
