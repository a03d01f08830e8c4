"""Robustness audits over HTTP and through the client: the list, reports that can do nothing, thresholds tried."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from perception.testing import ToyEncoder
from perception.verdict import DecisionPolicy
from service.client import Conflict, HardlookClient, NotFound
from service.testing import publish, toy_pools, toy_settings
from service.wire_audits import AskedSetting, PolicyParameters
from tests.api.conftest import Serve, served
from tests.api.test_error_shape import assert_problem
from tests.service.audit_folders import FINISHED_S, POLICY, SETTING, events, four, lines, write

REPLAY = "/audits/run/replay"
EVIL = b"<!DOCTYPE html><script>fetch('/audits')</script><form action='/console/sign-out' method='post'>"


def audits_in(root: Path) -> Path:
    """A folder with one finished audit of the encoder that serves, and of other pools."""
    noted = events(fingerprint=ToyEncoder().fingerprint)
    images = [{**one, "fingerprint": ToyEncoder().fingerprint} for one in four()]
    write(root / "audits" / "run", images, metrics=lines(noted), page=EVIL)
    return root / "audits"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """For tests that change nothing."""
    root = tmp_path_factory.mktemp("house")
    publish(root, ToyEncoder(), toy_pools())
    with served(toy_settings(root, audits=audits_in(root), anonymous_scopes=("admin",)), ToyEncoder()) as client:
        yield client


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """For tests that change what is in it."""
    return audits_in(tmp_path)


@contextmanager
def through(client: TestClient) -> Iterator[HardlookClient]:
    """The project's client, on the same application."""

    def send(request: httpx.Request) -> httpx.Response:
        path = request.url.raw_path.decode()
        answer = client.request(request.method, path, content=request.content, headers=dict(request.headers))
        stream = httpx.ByteStream(answer.content)
        return httpx.Response(answer.status_code, headers=dict(answer.headers), stream=stream)

    with HardlookClient("http://testserver", transport=httpx.MockTransport(send), max_attempts=1) as asking:
        yield asking


# --- the list --------------------------------------------------------------------------------------------------------


def test_audits_are_listed_with_what_fits(client: TestClient) -> None:
    answer = client.get("/audits").json()
    [audit] = answer["audits"]
    assert answer["configured"]
    assert answer["newest_fitting"] is None
    assert answer["calibration"] == {"id": "run", "system": "toy"}
    assert (audit["id"], audit["state"], audit["date"]) == ("run", "finished", "2025-10-09T08:53:20+00:00")
    assert audit["headline"] == {**SETTING, "text": "linf 8/255, 10 steps"}
    [system] = audit["systems"]
    assert {part: system["fit"][part] for part in ("encoder", "pools", "policy", "defense")} == {
        "encoder": True, "pools": False, "policy": False, "defense": True,
    }  # fmt: skip
    assert len(system["fit"]["reasons"]) == 2
    assert audit["figures"][1]["wrong_attacked"]["value"] == 0.5
    assert [check["name"] for check in audit["failed_checks"]] == ["black-box"]
    assert audit["checks"] == 2


def test_without_a_folder_there_are_none(serve: Serve) -> None:
    client = serve()
    answer = client.get("/audits").json()
    assert not answer["configured"]
    assert answer["audits"] == []
    assert_problem(client.get("/audits/run/report"), 404, "unknown-item", kind="audit", name="run")


def test_a_folder_that_is_gone_is_said_to_be(serve: Serve, tmp_path: Path) -> None:
    answer = serve(audits=tmp_path / "gone").get("/audits").json()
    assert answer["configured"]
    [skipped] = answer["skipped"]
    assert "cannot be read" in skipped["reason"]
    assert str(tmp_path) not in json.dumps(answer)


def test_damage_and_traps_hide_nothing(serve: Serve, folder: Path) -> None:
    client = serve(audits=folder)
    write(folder / "broken", report=b"{")
    write(folder / "new", metrics=lines(events(finished_s=FINISHED_S + 1)))
    (folder / "out").symlink_to(folder.parent)
    answer = client.get("/audits").json()
    assert {audit["id"]: audit["state"] for audit in answer["audits"]} == {
        "new": "finished", "run": "finished", "broken": "damaged",
    }  # fmt: skip
    assert answer["skipped"] == [{"name": "out", "reason": "is a link; links are not followed"}]
    assert_problem(client.post("/audits/broken/replay", json={"system": "toy"}), 409, "audit-unusable", id="broken")


# --- reports ---------------------------------------------------------------------------------------------------------


def test_a_report_is_shown_and_can_do_nothing(client: TestClient) -> None:
    response = client.get("/audits/run/report")
    assert response.content == EVIL
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"].split("; ")
    assert policy[:2] == ["sandbox", "default-src 'none'"]
    assert "script-src" not in response.headers["content-security-policy"]
    assert {"style-src 'unsafe-inline'", "img-src data:", "form-action 'none'", "frame-ancestors 'none'"} <= set(policy)
    assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["..", "%2e%2e", "..%2frun", "run%2f..", "%2e", "a%00b", "run%0a", "x" * 200, "other"])
def test_ids_lead_nowhere_else(client: TestClient, path: str) -> None:
    for response in (client.get(f"/audits/{path}/report"), client.post(f"/audits/{path}/replay", json={"system": "a"})):
        assert response.status_code in (400, 404, 405)
        assert response.headers["content-type"] == "application/problem+json"


def test_a_run_without_a_report_is_a_conflict(serve: Serve, folder: Path) -> None:
    client = serve(audits=folder)
    (folder / "run" / "report.html").unlink()
    assert_problem(client.get("/audits/run/report"), 409, "audit-unusable", reason="report.html is missing")


# --- replays ---------------------------------------------------------------------------------------------------------


def test_a_policy_is_tried_beside_the_one_that_serves(client: TestClient) -> None:
    body = {"system": "toy", "policy": {"min_margin": 0.2, "min_margin_unsafe": 0.2}}
    found = client.post(REPLAY, json=body).json()
    assert found["tried"]["version"] == DecisionPolicy(min_margin=0.2, min_margin_unsafe=0.2).version
    assert found["deployed"]["version"] == DecisionPolicy().version
    counts = {
        name: [found[name][version][rate]["count"] for version in ("clean", "attacked") for rate in RATES]
        for name in ("deployed", "tried")
    }
    assert counts == {"deployed": [0, 0, 0, 0, 1, 1, 0, 0], "tried": [0, 0, 1, 1, 0, 0, 1, 1]}
    assert found["deployed"]["attacked"]["false_negative"]["interval95"] == pytest.approx([0.0945, 0.9055], abs=1e-4)
    assert found["curve"][0]["min_margin"] == 0
    assert found["curve"][0]["attacked"]["false_negative"]["count"] == 1
    assert found["curve"][-1]["attacked"]["false_negative"]["count"] == 0
    assert found["attacked_under"] == POLICY
    assert not found["fit"]["whole"]
    first, second, third = found["notes"]
    assert "lower bounds" in first
    assert second.startswith("1 of 2 checks for masked gradients did not pass")
    assert "6 decimals" in third


RATES = ("false_negative", "false_positive", "review_unsafe", "review_safe")
REFUSED: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "no system": ({}, 400, "invalid-parameter", "system"),
    "another system": ({"system": "other"}, 400, "invalid-parameter", "no system"),
    "a rule": ({"system": "toy", "policy": {"rule": "any"}}, 400, "malformed-body", "nearest"),
    "a margin": ({"system": "toy", "policy": {"min_margin": 2.5}}, 400, "malformed-body", "2"),
    "a word": ({"system": "toy", "policy": {"min_margin": "0.1"}}, 400, "malformed-body", "number"),
    "voters": ({"system": "toy", "policy": {"rule": "vote", "k": 4}}, 400, "invalid-parameter", "recorded 3"),
    "a setting": ({"system": "toy", "setting": {**SETTING, "steps": 9}}, 400, "invalid-parameter", "not audited"),
    "something else": ({"system": "toy", "polcy": {}}, 400, "invalid-parameter", "polcy"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_tried_is_said(client: TestClient, name: str) -> None:
    body, status, slug, said = REFUSED[name]
    response = client.post(REPLAY, json=body)
    assert_problem(response, status, slug)
    assert said in response.text


def test_a_policy_that_serves_with_more_voters_than_recorded_has_no_figures(serve: Serve, folder: Path) -> None:
    client = serve(audits=folder, policy_rule="vote", policy_k=5)
    found = client.post(REPLAY, json={"system": "toy"}).json()
    assert found["deployed"] is None
    assert any("has 5 voters" in note for note in found["notes"])


def test_the_client_asks_for_all_of_it(serve: Serve, folder: Path) -> None:
    (write(folder / "late") / "report.json").unlink()
    setting = AskedSetting.model_validate(SETTING)
    with through(serve(audits=folder)) as asking:
        listed = asking.audits.list()
        assert {audit.id for audit in listed.audits} == {"run", "late"}
        assert asking.audits.report("run") == EVIL
        found = asking.audits.replay("run", "toy", PolicyParameters(min_margin=0.2), setting=setting)
        assert found.tried.min_margin == 0.2
        assert found.tried.attacked.false_negative.count == 0
        assert asking.audits.replay("run", "toy").tried.version == DecisionPolicy().version
        with pytest.raises(NotFound):
            asking.audits.report("other")
        with pytest.raises(Conflict):
            asking.audits.replay("late", "toy")
