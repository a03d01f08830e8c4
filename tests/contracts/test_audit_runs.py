"""What `hardlook-lab audit` writes is what the service reads: figures, verdicts, and whether it is what is deployed."""

import base64
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from offline.audit.record import AuditRecord, read_records
from offline.audit.report import Run
from perception.gallery import Gallery
from perception.replay import replay
from perception.testing import ToyEncoder, encoded, synthetic_image
from perception.verdict import DecisionPolicy
from service.audit_records import AuditRecords
from service.audit_runs import AuditRuns
from service.testing import publish, toy_pools, toy_settings
from tests.api.conftest import served
from tests.contracts.audited_service import EXPORT, audit, build_house

Serve = Callable[..., TestClient]
FITS = {"whole": True, "encoder": True, "pools": True, "policy": True, "defense": True, "reasons": []}


def toy(name: str, **_: Any) -> ToyEncoder:
    """'toy/N' is the toy encoder of seed N."""
    return ToyEncoder(seed=int(name.split("/")[1]))


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Published pools, and in audits/ a finished audit of them."""
    root = build_house(tmp_path_factory.mktemp("house"), ToyEncoder())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("perception.catalogue.load_encoder", toy)
        audit(root, root / "audits" / "first")
    return root


@pytest.fixture
def serve(house: Path, tmp_path: Path) -> Iterator[Serve]:
    """Starts a service over a copy of the pools, in which everybody may do everything."""
    publish(tmp_path / "pools", ToyEncoder(), toy_pools(per_pool=4))
    with ExitStack() as stack:

        def start(encoder: ToyEncoder | None = None, **changes: Any) -> TestClient:
            values = {"audits": house / "audits", "anonymous_scopes": ("admin",), **changes}
            settings = toy_settings(values.pop("pools", tmp_path / "pools"), **values)
            return stack.enter_context(served(settings, encoder or ToyEncoder()))

        yield start


def base64_of(image: Image.Image) -> str:
    return base64.b64encode(encoded(image)).decode()


def listed(client: TestClient) -> tuple[dict[str, Any], dict[str, Any]]:
    """The answer, and the fit of the one system of the one audit."""
    answer = client.get("/audits").json()
    [found] = answer["audits"]
    [system] = found["systems"]
    return answer, system["fit"]


# --- figures ---------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_report(house: Path) -> None:
    folder = house / "audits" / "first"
    [run] = AuditRuns(house / "audits").listed().runs
    content, read = json.loads((folder / "report.json").read_bytes()), Run.read(folder)
    assert (run.id, run.state, run.problems, run.dated_by) == ("first", "finished", (), "log")
    assert str(run.headline) == str(read.headline)
    assert [str(setting) for setting in run.settings] == ["linf 1/255, 5 steps", "linf 51/255, 5 steps"]
    rows = [row for row in content["rows"] if not row["set"] and row["setting"]["eps"] == read.headline.eps]
    assert len(rows) == len(run.figures) == 2
    wrong = {"unsafe": "let_through", "safe": "refused"}
    for row, figure in zip(rows, run.figures, strict=True):
        assert (figure.system, figure.label, figure.total) == (row["system"], row["label"], row["total"])
        shares = (
            (figure.clean, row["clean"]),
            (figure.robust, row["robust"]),
            (figure.wrong_clean, row[wrong[row["label"]]]["clean"]),
            (figure.wrong_attacked, row[wrong[row["label"]]]["attacked"]),
        )
        for found, recorded in shares:
            assert found is not None
            assert (found.count, found.total) == (recorded["right"], recorded["total"])
            assert found.value == pytest.approx(recorded["value"], abs=5e-5)
            assert found.interval95 == pytest.approx(recorded["interval95"], abs=5e-5)
    checks = {(check.name, check.passed, check.sentence) for check in run.checks}
    assert checks == {(c["name"], c["passed"], c["sentence"]) for c in content["checks"]}
    [system] = run.systems
    assert system.noted is not None
    [noted] = content["identity"]["systems"]
    assert system.noted.gallery_sha256 == noted["gallery_sha256"] == Gallery.load(house / EXPORT).sha256
    assert system.noted.fingerprint == noted["fingerprint"] == ToyEncoder().fingerprint


def test_a_replay_under_the_audited_policy_gives_the_verdicts_of_the_records(house: Path) -> None:
    runs = AuditRuns(house / "audits")
    run = runs.get("first")
    images = AuditRecords(runs).of(run, "toy")
    assert images.recorded == 3
    by_setting: dict[str, list[AuditRecord]] = {}
    for record in read_records(house / "audits" / "first"):
        by_setting.setdefault(str(record.setting), []).append(record)
    assert [str(setting) for setting in images.by_setting] == list(by_setting)
    changed = 0
    for setting, found in images.by_setting.items():
        records = by_setting[str(setting)]
        assert len(records) == 16
        for record, answered in zip(records, replay(found, DecisionPolicy()), strict=True):
            assert answered.label == record.label
            assert (answered.clean.label, answered.attacked.label) == (record.clean.answer, record.attacked.answer)
            changed += record.clean.answer != record.attacked.answer
    assert changed, "an attack should have done something"


def test_what_the_api_tries_is_what_the_report_counted(serve: Serve, house: Path) -> None:
    client = serve()
    found = client.post("/audits/first/replay", json={"system": "toy"}).json()
    assert found["tried"]["version"] == found["attacked_under"] == DecisionPolicy().version
    content = json.loads((house / "audits" / "first" / "report.json").read_bytes())
    rows: Mapping[str, Any] = {
        row["label"]: row
        for row in content["rows"]
        if not row["set"] and row["setting"]["eps"] == found["setting"]["eps"]
    }
    for version in ("clean", "attacked"):
        rates = found["tried"][version]
        assert rates["false_negative"]["count"] == rows["unsafe"]["let_through"][version]["right"]
        assert rates["false_positive"]["count"] == rows["safe"]["refused"][version]["right"]
        for label in ("safe", "unsafe"):
            assert rates[f"review_{label}"]["count"] == rows[label]["answers"][version]["review"]
            assert rates[f"review_{label}"]["total"] == rows[label]["total"]


# --- what is deployed ------------------------------------------------------------------------------------------------


def test_it_fits_until_an_exemplar_is_added_and_again_when_it_is_gone(serve: Serve) -> None:
    client = serve()
    answer, fit = listed(client)
    assert fit == FITS
    assert answer["newest_fitting"] == answer["calibration"] == {"id": "first", "system": "toy"}
    item = {"id": "new", "label": "unsafe", "data": base64_of(synthetic_image(77))}
    added = client.post("/collections/pools/exemplars", json={"items": [item]})
    assert added.status_code == 200, added.text
    answer, fit = listed(client)
    [reason] = fit["reasons"]
    assert (fit["whole"], fit["pools"]) == (False, False)
    assert fit["encoder"]
    assert fit["policy"]
    assert fit["defense"]
    assert reason.startswith("The pools are others: audited were ")
    assert " Since the audit 1 exemplar was added" in reason
    assert answer["newest_fitting"] is None
    assert answer["calibration"] == {"id": "first", "system": "toy"}
    assert client.delete("/collections/pools/exemplars/new?reason=gone").status_code == 200
    assert listed(client)[1] == FITS


def test_suppress_items_are_unknown_to_audits(serve: Serve) -> None:
    client = serve()
    body = {"id": "away", "suppresses": ["safe-0"], "data": base64_of(synthetic_image(78))}
    assert client.post("/collections/pools/suppressions", json=body).status_code == 200
    fit = listed(client)[1]
    assert not fit["pools"]
    assert "suppress items take evidence away" in fit["reasons"][0]


def test_another_policy_does_not_fit(serve: Serve) -> None:
    answer, fit = listed(serve(policy_min_margin=0.05))
    assert not fit["policy"]
    assert fit["pools"]
    assert fit["reasons"] == [
        f"Another policy decides: audited was {DecisionPolicy().version}, deployed is "
        f"{DecisionPolicy(min_margin=0.05).version}."
    ]
    assert answer["newest_fitting"] is None


def test_another_encoder_does_not_fit(serve: Serve, tmp_path: Path) -> None:
    other = ToyEncoder(seed=1)
    publish(tmp_path / "other", other, toy_pools(per_pool=4))
    fit = listed(serve(other, pools=tmp_path / "other"))[1]
    assert not fit["encoder"]
    assert not fit["pools"]
    assert fit["policy"]
    assert fit["defense"]
    assert other.fingerprint[:12] in fit["reasons"][0]


@pytest.mark.usefixtures("toys")
def test_pools_without_the_buffer_do_not_fit(house: Path, serve: Serve, tmp_path: Path) -> None:
    system = {"name": "toy", "encoder": "toy/0", "gallery": EXPORT, "pools": ["safe", "unsafe"]}
    audit(house, tmp_path / "runs" / "binary", system=[system])
    fit = listed(serve(audits=tmp_path / "runs"))[1]
    assert not fit["pools"]
    assert "The audit left out the pool buffer." in fit["reasons"][0]


# --- runs that are not done ------------------------------------------------------------------------------------------


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perception.catalogue.load_encoder", toy)


@pytest.mark.usefixtures("toys")
def test_a_run_in_progress_is_listed_as_that_and_then_goes_on(house: Path, tmp_path: Path) -> None:
    runs = AuditRuns(tmp_path)
    audit(house, tmp_path / "slow", batches=1)
    [run] = runs.listed().runs
    assert run.state == "unfinished"
    assert run.problems[1] == "the run is not finished: 8 of 32 records are written"
    assert not run.has_page
    events = (tmp_path / "slow" / "metrics.jsonl").read_text()
    assert '"finished"' not in events
    audit(house, tmp_path / "slow")
    [run] = runs.listed().runs
    assert (run.state, run.problems) == ("finished", ())
    audit(house, tmp_path / "slow")  # nothing is left to do: it was finished when it was finished
    assert (tmp_path / "slow" / "metrics.jsonl").read_text().count('"event": "finished"') == 1
    [again] = runs.listed().runs
    assert again.date == run.date


@pytest.mark.usefixtures("toys")
def test_a_run_from_before_dates_were_logged_is_dated_by_its_files(house: Path, tmp_path: Path) -> None:
    audit(house, tmp_path / "old")
    log = tmp_path / "old" / "metrics.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(keepends=True) if '"finished"' not in line))
    [run] = AuditRuns(tmp_path).listed().runs
    assert (run.state, run.dated_by) == ("finished", "file")
    assert run.date.timestamp() == pytest.approx((tmp_path / "old" / "checks.jsonl").stat().st_mtime, abs=1e-3)
