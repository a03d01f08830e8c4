"""Jobs through the whole service: what a job says of an image is what a request would have said."""

import base64
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from perception.testing import ToyEncoder, encoded
from service.app import create_app
from service.startup import load
from service.testing import publish, toy_pools, toy_settings

POOLS = toy_pools(per_pool=2)
FILES = [encoded(POOLS["unsafe"][0]), encoded(POOLS["safe"][1]), encoded(POOLS["safe"][0])[:60]]
GIVE_UP_S = 20.0


def service(folder: Path, **changes: Any) -> TestClient:
    settings = toy_settings(folder, **changes)
    return TestClient(create_app(settings, load(settings, ToyEncoder())))


def images() -> list[dict[str, str]]:
    return [{"id": f"image {i}", "data": base64.b64encode(file).decode()} for i, file in enumerate(FILES)]


def ended(client: TestClient, id: str) -> dict[str, Any]:
    until_s = time.monotonic() + GIVE_UP_S
    while time.monotonic() < until_s:
        job: dict[str, Any] = client.get(f"/jobs/{id}").json()["job"]
        if job["finished_at"] is not None:
            return job
        time.sleep(0.05)
    raise AssertionError(f"job {id} does not end")


def test_a_job_says_what_a_request_says(tmp_path: Path) -> None:
    publish(tmp_path, ToyEncoder(), POOLS)
    with service(tmp_path) as client:
        response = client.post("/jobs", json={"images": images(), "k": 1})
        assert response.status_code == 202
        job = ended(client, response.json()["job"]["id"])
        assert (job["done"], job["failed"]) == (2, 1)
        answer = client.post("/classify", json={"images": images(), "k": 1}).json()
        found = client.get(f"/jobs/{job['id']}/results").json()["results"]
        for position, (item, expected) in enumerate(zip(found, answer["results"], strict=True)):
            assert (item["position"], item["request_id"]) == (position, f"{job['id']}-{position}")
            if expected["status"] == "ok":
                # Similarities differ in their last bits with what else was in the encoder's batch.
                assert item["margin"] == pytest.approx(expected["margin"], abs=1e-5)
                unlike = ("margin", "neighbors", "reason")
                assert {name: item[name] for name in expected if name not in unlike} == {
                    name: value for name, value in expected.items() if name not in unlike
                }
                assert [n["id"] for n in item["neighbors"]] == [n["id"] for n in expected["neighbors"]]
                assert item["snapshot"] == answer["snapshot"]
                assert (item["model"], item["policy"]) == (answer["model"]["fingerprint"], answer["policy"]["version"])
            else:
                assert item["error"]["type"] == expected["error"]["type"]
    with service(tmp_path) as client:
        assert client.get(f"/jobs/{job['id']}").json()["job"] == job
        assert client.get(f"/jobs/{job['id']}/results").json()["results"] == found


def test_without_a_catalogue_there_are_no_jobs(tmp_path: Path) -> None:
    publish(tmp_path, ToyEncoder(), POOLS)
    with service(tmp_path, catalog="off") as client:
        response = client.post("/jobs", json={"images": images()})
        assert response.json()["type"] == "urn:hardlook:problem:editing-disabled"
