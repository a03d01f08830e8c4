"""The routes of jobs, over a runner whose images say themselves what comes of them."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.testclient import TestClient

from indexer.errors import IndexerError
from service.admission import Admission
from service.api import jobs
from service.app import _answer_expected, _answer_validation
from service.errors import ServiceError
from service.jobs import JobImage, JobRunner
from service.keys import KeyRing
from service.rate_limits import RateLimits
from service.request_log import RequestLog
from service.settings import Settings
from service.telemetry import Metrics
from service.wire_jobs import JobItem
from tests.service.editors import opened
from tests.service.job_doubles import judged
from tests.service.key_files import make

Start = Callable[..., TestClient]
SETTINGS: dict[str, Any] = {"max_job_images": 20, "max_image_bytes": 100, "max_neighbors": 50, "max_jobs": 3}


def data(word: str) -> dict[str, str]:
    return {"id": word, "data": base64.b64encode(word.encode()).decode()}


class Service:
    """The routes and what they need, with a key for each of some callers."""

    def __init__(self, folder: Path, rate_limit: str, **changes: Any) -> None:
        self.settings = Settings(**{**SETTINGS, **changes})
        path = folder / "keys.json"
        self.keys = {name: make(path, name) for name in ("ann", "bob")}
        self.keys["root"] = make(path, "root", ("admin",))
        self.keys["metrics"] = make(path, "metrics", ("metrics",))
        self.go_on = asyncio.Event()
        self._folder, self._path, self._rate_limit = folder, path, rate_limit

    async def classify(self, image: JobImage) -> JobItem:
        if image.id == "hang":
            await self.go_on.wait()
        return judged(image)

    @asynccontextmanager
    async def life(self, app: FastAPI) -> AsyncIterator[None]:
        async with opened(self._folder) as editor:
            settings = self.settings
            runner = JobRunner(editor, self.classify, max_jobs=settings.max_jobs, poll_s=0.01)
            app.state.runtime = SimpleNamespace(
                settings=settings,
                keys=KeyRing(self._path),
                anonymous_scopes=frozenset(),
                rate_limits=RateLimits(self._rate_limit),
                admission=Admission(8, 30.0),
                require_editor=lambda: editor,
                require_jobs=lambda: runner,
            )
            task = asyncio.create_task(runner.run())
            yield
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def app(self) -> FastAPI:
        app = FastAPI(lifespan=self.life)
        app.include_router(jobs.router)
        app.add_middleware(RequestLog, metrics=Metrics())
        for error_type in (IndexerError, ServiceError):
            app.add_exception_handler(error_type, _answer_expected)
        app.add_exception_handler(RequestValidationError, _answer_validation)
        return app


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """(rate_limit='', **settings) -> client of ann's; its `keys` has the others' keys."""
    clients: list[TestClient] = []

    def started(rate_limit: str = "", **changes: Any) -> TestClient:
        service = Service(tmp_path, rate_limit, **changes)
        client = TestClient(service.app(), headers=as_caller(service.keys["ann"]))
        client.__enter__()
        clients.append(client)
        client.keys = service.keys  # type: ignore[attr-defined]
        return client

    yield started
    for client in clients:
        client.__exit__(None, None, None)


def as_caller(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def ended(client: TestClient, id: str) -> dict[str, Any]:
    give_up_s = time.monotonic() + 10
    while time.monotonic() < give_up_s:
        job: dict[str, Any] = client.get(f"/jobs/{id}").json()["job"]
        if job["finished_at"] is not None:
            return job
        time.sleep(0.01)
    raise AssertionError(f"job {id} does not end")


def slug(response: Any) -> str:
    return str(response.json()["type"].rpartition(":")[2])


def test_submit_poll_and_read(start: Start) -> None:
    client = start()
    images = [data("safe"), data("unsafe"), data("other"), {"data": "*"}, {"url": "https://a.example.org/"}]
    images.append({"id": "large", "data": base64.b64encode(bytes(101)).decode()})
    response = client.post("/jobs", json={"images": images, "k": 5})
    assert response.status_code == 202
    submitted = response.json()["job"]
    assert response.headers["location"] == f"/jobs/{submitted['id']}"
    assert (submitted["state"], submitted["total"], submitted["failed"]) == ("queued", 6, 2)
    job = ended(client, submitted["id"])
    assert (job["state"], job["done"], job["failed"], job["waiting"]) == ("done", 3, 3, 0)
    assert job["verdicts"] == {"safe": 1, "unsafe": 1, "review": 1}
    assert job["expires_at"] > job["finished_at"] > job["created_at"]
    answer = client.get(f"/jobs/{job['id']}/results").json()
    assert answer["next"] is None
    assert answer["job_id"] == job["id"]
    found = answer["results"]
    assert [item["id"] for item in found] == ["safe", "unsafe", "other", "3", "4", "large"]
    assert [item["position"] for item in found] == list(range(6))
    assert [item["status"] for item in found] == ["ok", "ok", "error", "error", "ok", "error"]
    errors = [item["error"]["type"].rpartition(":")[2] for item in found if item["status"] == "error"]
    assert errors == ["corrupt-image", "malformed-body", "image-too-large"]
    assert found[0]["reason"] == "k is 5"
    assert found[2]["error"]["request_id"] == f"{job['id']}-2"


def test_results_come_page_by_page(start: Start) -> None:
    client = start()
    id = client.post("/jobs", json={"images": [data("safe")] * 7}).json()["job"]["id"]
    ended(client, id)
    positions: list[int] = []
    after: int | None = -1
    while after is not None:
        answer = client.get(f"/jobs/{id}/results", params={"after": after, "limit": 3}).json()
        positions += [item["position"] for item in answer["results"]]
        after = answer["next"]
    assert positions == list(range(7))


def test_a_running_job_shows_what_it_has_and_can_be_cancelled(start: Start) -> None:
    client = start()
    id = client.post("/jobs", json={"images": [data("safe"), {**data("safe"), "id": "hang"}]}).json()["job"]["id"]
    give_up_s = time.monotonic() + 10
    while client.get(f"/jobs/{id}").json()["job"]["done"] < 1 and time.monotonic() < give_up_s:
        time.sleep(0.01)
    answer = client.get(f"/jobs/{id}/results").json()
    assert ([item["position"] for item in answer["results"]], answer["next"]) == ([0], 0)
    assert client.get(f"/jobs/{id}/results", params={"after": 0}).json() | {"request_id": ""} == {
        "request_id": "", "job_id": id, "results": [], "next": 0,
    }  # fmt: skip
    job = client.delete(f"/jobs/{id}").json()["job"]
    assert (job["state"], job["done"], job["waiting"]) == ("cancelled", 1, 1)
    assert client.delete(f"/jobs/{id}").json()["job"] == job
    assert client.get(f"/jobs/{id}/results").json()["next"] is None


def test_jobs_are_their_owners_and_the_administrators(start: Start) -> None:
    client = start()
    bob, root = (as_caller(client.keys[name]) for name in ("bob", "root"))  # type: ignore[attr-defined]
    ids = [client.post("/jobs", json={"images": [data("safe")]}).json()["job"]["id"] for _ in range(3)]
    for method, path in (("GET", ""), ("GET", "/results"), ("DELETE", "")):
        response = client.request(method, f"/jobs/{ids[0]}{path}", headers=bob)
        assert (response.status_code, slug(response)) == (404, "unknown-job")
    assert client.get("/jobs", headers=bob).json()["jobs"] == []
    assert [job["id"] for job in client.get("/jobs", headers=root).json()["jobs"]] == ids[::-1]
    assert client.get(f"/jobs/{ids[0]}/results", headers=root).status_code == 200
    first = client.get("/jobs", params={"limit": 2}).json()
    assert ([job["id"] for job in first["jobs"]], first["next"]) == ([ids[2], ids[1]], ids[1])
    second = client.get("/jobs", params={"limit": 2, "after": first["next"]}).json()
    assert ([job["id"] for job in second["jobs"]], second["next"]) == ([ids[0]], None)


@pytest.mark.parametrize(
    ("body", "status", "expected"),
    [
        ({"images": []}, 400, "malformed-body"),
        ({"images": [data("safe")] * 21}, 413, "too-many-images"),
        ({"images": [data("safe")], "k": 51}, 400, "invalid-parameter"),
        ({"images": [data("safe")], "verbose": True}, 400, "invalid-parameter"),
        ({"images": [{**data("safe"), "id": "a\0b"}]}, 400, "malformed-body"),
        ({"images": [{"url": "https://a.example.org/\0"}]}, 400, "malformed-body"),
        ({"images": [{**data("safe"), "url": "https://a.example.org/"}]}, 400, "malformed-body"),
    ],
)
def test_what_is_refused(start: Start, body: dict[str, Any], status: int, expected: str) -> None:
    client = start()
    response = client.post("/jobs", json=body)
    assert (response.status_code, slug(response)) == (status, expected)
    assert client.get("/jobs").json()["jobs"] == []


def test_a_job_is_json(start: Start) -> None:
    response = start().post("/jobs", content=b"x", headers={"content-type": "image/png"})
    assert (response.status_code, slug(response)) == (415, "unsupported-body")


def test_the_scope_is_classify(start: Start) -> None:
    client = start()
    key = client.keys["metrics"]  # type: ignore[attr-defined]
    for method, path in (("POST", ""), ("GET", ""), ("GET", "/x"), ("GET", "/x/results"), ("DELETE", "/x")):
        response = client.request(method, f"/jobs{path}", headers=as_caller(key))
        assert (response.status_code, slug(response)) == (403, "forbidden")
        response = client.request(method, f"/jobs{path}", headers={"authorization": ""})
        assert response.status_code == 401


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "after=-2", "after=x", "page=1"])
def test_pages_have_bounds(start: Start, query: str) -> None:
    response = start().get(f"/jobs/x/results?{query}")
    assert (response.status_code, slug(response)) == (400, "invalid-parameter")


def test_there_is_a_bound_on_jobs(start: Start) -> None:
    client = start()
    hang = {"images": [{**data("safe"), "id": "hang"}]}
    for _ in range(3):
        assert client.post("/jobs", json=hang).status_code == 202
    response = client.post("/jobs", json=hang)
    assert (response.status_code, slug(response)) == (503, "overloaded")
    assert response.json()["limit"] == 3
    assert "retry-after" in response.headers


def test_images_count_against_the_callers_limit(start: Start) -> None:
    client = start("10/hour")
    assert client.post("/jobs", json={"images": [data("safe")] * 4}).status_code == 202
    response = client.post("/jobs", json={"images": [data("safe")] * 7})
    assert (response.status_code, slug(response)) == (429, "rate-limited")
    assert client.get("/jobs").status_code == 200  # looking costs nothing


def test_a_job_may_be_larger_than_the_limit_and_then_uses_it_up(start: Start) -> None:
    client = start("10/hour")
    id = client.post("/jobs", json={"images": [data("safe")] * 20}).json()["job"]["id"]
    assert slug(client.post("/jobs", json={"images": [data("safe")]})) == "rate-limited"
    assert ended(client, id)["done"] == 20
