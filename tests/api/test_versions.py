"""Versions over HTTP: named, compared, gone back to exactly, tried out on recent traffic, and followed as shadows."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from indexer.contents import POOLS
from indexer.store import SnapshotStore
from perception.testing import ToyEncoder, encoded, synthetic_image
from service.testing import publish, toy_pools
from tests.api.conftest import Serve
from tests.api.sending import EXEMPLARS, added, classify, exemplar

ENCODER = ToyEncoder()
IMAGES = [encoded(synthetic_image(seed)) for seed in (0, 1, 100, 200, 201, 5000, 5001, 5002)]


def answers(client: TestClient) -> list[Any]:
    """Everything that an answer says but its request's id."""
    found = [classify(client, data) for data in IMAGES]
    for answer in found:
        del answer["request_id"]
        del answer["snapshot"]["revision"], answer["snapshot"]["created_at"]
    return found


def test_going_back_answers_exactly_as_before(serve: Serve) -> None:
    client = serve()
    added(client, exemplar("x", "unsafe", IMAGES[5]))
    first = client.post("/collections/pools/versions", json={"name": "good", "reason": "tested"}).json()
    before = answers(client)
    assert first["changed"]
    assert first["version"] == before[0]["snapshot"]["version"]
    added(client, exemplar("y", "safe", IMAGES[3]), exemplar("z", "buffer", IMAGES[6]))
    client.patch(f"{EXEMPLARS}/unsafe-0", json={"label": "safe"})
    client.delete(f"{EXEMPLARS}/safe-1")
    client.patch(f"{EXEMPLARS}/x", json={"disabled": True})
    left = answers(client)
    assert left != before
    back = client.post("/collections/pools/rollback", json={"version": first["version"], "reason": "worse"}).json()
    assert (back["version"], back["changed"]) == (first["version"], True)
    assert answers(client) == before
    # And forth again: what was left was never published, and is a version all the same.
    client.post("/collections/pools/rollback", json={"version": left[0]["snapshot"]["version"]})
    assert answers(client) == left
    assert answers(serve()) == left
    versions = client.get("/collections/pools/versions").json()["versions"]
    assert [version["kind"] for version in versions] == ["rollback", "rollback", "publish", "base"]
    assert (versions[2]["name"], versions[2]["reason"], versions[2]["actor"]) == ("good", "tested", "anonymous")


def test_going_back_by_revision_and_to_before_an_offline_publication(serve: Serve, tmp_path: Path) -> None:
    client = serve()
    revision = classify(client, IMAGES[0])["snapshot"]["revision"]
    before = answers(client)
    published = publish(tmp_path, ENCODER, toy_pools(2))
    deadline_s = time.monotonic() + 30
    while classify(client, IMAGES[0])["snapshot"]["version"] != published:
        assert time.monotonic() < deadline_s
    assert answers(client) != before
    assert client.post("/collections/pools/rollback", json={"revision": revision}).status_code == 200
    assert answers(client) == before
    time.sleep(0.3)  # several looks at the folder, whose CURRENT is the one that was left
    assert answers(client) == before


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400),
        ({"version": "0123456789abcdef"}, 409),
        ({"version": "%"}, 409),
        ({"revision": 99999}, 409),
        ({"revision": 0}, 400),
        ({"version": "0123456789abcdef", "revision": 1}, 400),
    ],
)
def test_where_there_was_nothing_there_is_no_way_back(serve: Serve, body: dict[str, Any], status: int) -> None:
    client = serve()
    before = client.get("/pools").json()["collections"]
    assert client.post("/collections/pools/rollback", json=body).status_code == status
    assert client.get("/pools").json()["collections"] == before


def test_diff_says_what_is_different(serve: Serve) -> None:
    client = serve()
    before = classify(client, IMAGES[0])["snapshot"]["version"]
    added(client, exemplar("x", "unsafe", IMAGES[5]))
    client.patch(f"{EXEMPLARS}/unsafe-0", json={"label": "safe"})
    client.delete(f"{EXEMPLARS}/safe-1")
    client.patch(f"{EXEMPLARS}/safe-2", json={"note": "n"})
    after = classify(client, IMAGES[0])["snapshot"]["version"]
    found = client.get("/collections/pools/diff", params={"before": before, "after": after}).json()
    assert found["counts"] == {"added": 1, "removed": 1, "moved": 1, "changed": 1}
    assert (found["added"], found["removed"], found["changed"]) == (["x"], ["safe-1"], ["safe-2"])
    assert found["moved"] == [{"id": "unsafe-0", "was": "unsafe", "now": "safe"}]
    unknown = client.get("/collections/pools/diff", params={"before": before, "after": "0123456789abcdef"})
    assert unknown.status_code == 404


def test_a_dry_run_says_how_a_version_would_have_judged(serve: Serve, tmp_path: Path) -> None:
    client = serve()
    good = classify(client, IMAGES[5])["snapshot"]["version"]
    added(client, exemplar("x", "safe", IMAGES[5]))
    for data in IMAGES:
        classify(client, data)
    client.patch(f"{EXEMPLARS}/safe-2", json={"note": "waits for the verdicts to be recorded"})
    deadline_s = time.monotonic() + 30
    while True:
        found = client.post("/collections/pools/dry-run", json={"version": good}).json()
        if found["compared"] == len(IMAGES) + 1:
            break
        assert time.monotonic() < deadline_s, found
    assert found["changed"] >= 2  # IMAGES[5] was seen twice; x alone makes it safe
    assert found["confusion"]["safe"]["unsafe"] == found["changed"]
    assert found["interval95"][0] < found["rate"] < found["interval95"][1]
    same = client.post("/collections/pools/dry-run", json={"version": classify_version(client)}).json()
    assert (same["changed"], same["rate"]) == (0, 0.0)
    # A version that was built and not published: as it would be with what was changed since on top.
    staged = SnapshotStore(tmp_path, POOLS).stage(SnapshotStore(tmp_path, POOLS).load(ENCODER.fingerprint).contents())
    assert client.post("/collections/pools/dry-run", json={"version": staged}).status_code == 200
    assert client.post("/collections/pools/dry-run", json={"encoder": "shadow"}).status_code == 404


def classify_version(client: TestClient) -> str:
    [pools] = client.get("/pools").json()["collections"]
    return str(pools["version"])


def test_a_version_sees_live_traffic_without_being_heard(serve: Serve) -> None:
    client = serve()
    good = classify_version(client)
    added(client, exemplar("x", "safe", IMAGES[5]))
    shadow = client.put("/shadow", json={"version": good, "reason": "is x right?"}).json()
    assert [item["candidate"] for item in shadow["candidates"]] == [f"version {good}"]
    for data in (IMAGES[5], IMAGES[2]):
        classify(client, data)
    deadline_s = time.monotonic() + 30
    while (item := client.get("/shadow").json()["candidates"][0])["compared"] < 2:
        assert time.monotonic() < deadline_s
    assert (item["compared"], item["rate"]) == (2, 0.5)
    text = client.get("/metrics").text
    assert f'hardlook_shadow_total{{candidate="version {good}",outcome="safe->unsafe"}} 1.0' in text
    assert client.delete("/shadow").json()["candidates"] == []
    kinds = [entry["kind"] for entry in client.get("/audit", params={"collection": "pools"}).json()["entries"]]
    assert kinds[-2:] == ["shadow.start", "shadow.stop"]
    assert client.put("/shadow", json={"version": "0123456789abcdef"}).status_code == 404


def test_a_snapshot_is_renewed_behind_the_scenes(serve: Serve, tmp_path: Path) -> None:
    client = serve(compact_after=100)
    rows = np.random.default_rng(3).normal(size=(110, ENCODER.dim))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    items = [
        {
            "id": f"n{n}",
            "label": ("safe", "unsafe")[n % 2],
            "embedding": row.tolist(),
            "fingerprint": ENCODER.fingerprint,
        }
        for n, row in enumerate(rows)
    ]
    changed = added(client, *items)
    before = answers(client)
    deadline_s = time.monotonic() + 30
    while (version := classify_version(client)) == changed["version"]:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert (tmp_path / "pools" / "versions" / version).is_dir()
    for one, other in zip(answers(client), before, strict=True):
        assert one["results"] == other["results"]
    added(client, exemplar("more", "unsafe", IMAGES[5]))
    client.post("/collections/pools/rollback", json={"version": changed["version"]})
    assert [answer["results"] for answer in answers(client)] == [answer["results"] for answer in before]
    kinds = {entry["kind"] for entry in client.get("/audit", params={"limit": 1000}).json()["entries"]}
    assert "version.compact" in kinds
    assert client.post("/audit/verify").json()["sound"]
