"""The audit log over HTTP: who did what and why, by pages, as a file, checked; and what follows from verdicts."""

import json
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from numpy.typing import NDArray
from PIL import Image

from indexer.catalog import chain
from perception.encoder import encode_images
from perception.testing import ToyEncoder, encoded, synthetic_image
from service.testing import publish, toy_pools
from tests.api.conftest import Serve
from tests.api.sending import EXEMPLARS, added, classify, exemplar
from tests.service.key_files import make

ENCODER = ToyEncoder()
IMAGE = encoded(synthetic_image(3000))


def entries(client: TestClient, **parameters: Any) -> list[dict[str, Any]]:
    response = client.get("/audit", params={"limit": 1000, **parameters})
    assert response.status_code == 200, response.text
    return list(response.json()["entries"])


def eventually(condition: Callable[[], Any]) -> Any:
    end_s = time.monotonic() + 30
    while not (found := condition()):
        assert time.monotonic() < end_s, "the condition did not come true"
        time.sleep(0.02)
    return found


def test_the_log_says_with_what_the_service_runs_and_only_once(serve: Serve, tmp_path: Path) -> None:
    make(tmp_path / "keys.json", "ann", ("admin",))
    client = serve(keys_file=tmp_path / "keys.json")
    kinds = [entry["kind"] for entry in entries(client)]
    assert kinds == ["version.base", "settings.set", "model.set", "policy.set", "keys.change"]
    text = json.dumps(entries(client))
    assert str(tmp_path) not in text
    again = serve(keys_file=tmp_path / "keys.json")
    assert [entry["kind"] for entry in entries(again)] == kinds
    other = serve(keys_file=tmp_path / "keys.json", policy_min_margin=0.1)
    new = entries(other)[len(kinds) :]
    assert [entry["kind"] for entry in new] == ["settings.set", "policy.set"]
    assert new[0]["reason"] == "changed: policy_min_margin"


def test_a_decision_can_be_made_again_from_its_entry(serve: Serve) -> None:
    client = serve()
    answer = classify(client, IMAGE)
    [decision] = eventually(lambda: entries(client, chain="decisions"))
    body, [item] = decision["body"], answer["results"]
    assert decision["request_id"] == answer["request_id"]
    assert (body["verdict"], body["pool"]) == (item["verdict"], item["pool"])
    assert (body["version"], body["revision"]) == (answer["snapshot"]["version"], answer["snapshot"]["revision"])
    assert body["encoder_fingerprint"] == answer["model"]["fingerprint"]
    assert body["policy_version"] == answer["policy"]["version"]
    known = {neighbor["id"]: neighbor["similarity"] for neighbor in item["neighbors"]}
    assert {n["id"]: n["similarity"] for n in body["neighbors"]}.items() <= known.items()
    assert "embedding" not in json.dumps(body)


def test_pages_filters_and_export_agree(serve: Serve) -> None:
    client = serve()
    for number in range(5):
        added(client, exemplar(f"x{number}", "safe", encoded(synthetic_image(3001 + number))), reason="why")
    client.delete(f"{EXEMPLARS}/x3", params={"reason": "no more"})
    every = entries(client)
    seen: list[dict[str, Any]] = []
    after: int | None = 0
    while after is not None:
        page = client.get("/audit", params={"after": after, "limit": 3}).json()
        seen += page["entries"]
        after = page["next"]
    assert seen == every
    assert [entry["kind"] for entry in entries(client, subject="x3")] == ["exemplar.add", "exemplar.delete"]
    assert {entry["reason"] for entry in entries(client, kind="exemplar.add")} == {"why"}
    lines = client.get("/audit/export").content.splitlines()
    assert [json.loads(line) for line in lines] == every
    assert not chain.verify_jsonl(lines).problems
    with_embeddings = client.get("/audit/export", params={"embeddings": True}).content.splitlines()
    assert sum("embeddings" in json.loads(line) for line in with_embeddings) == 5


def test_a_log_that_somebody_has_changed_is_not_sound(serve: Serve, tmp_path: Path) -> None:
    client = serve()
    added(client, exemplar("x", "safe", IMAGE))
    found = client.post("/audit/verify").json()
    assert found["sound"]
    assert found["replayed"] == {"pools": True}
    assert found["chains"][0]["entries"] == len(entries(client))
    with sqlite3.connect(tmp_path / "catalog.sqlite3") as database:
        names = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'")]
        for name in names:
            database.execute(f"DROP TRIGGER {name}")
        database.execute("UPDATE entries SET actor = 'somebody else' WHERE subject = 'x'")
    database.close()
    found = client.post("/audit/verify").json()
    assert not found["sound"]
    assert found["chains"][0]["problems"]


def test_an_exemplar_that_suddenly_decides_too_much_is_put_in_quarantine(serve: Serve) -> None:
    """One in the middle of all images decides about most of them where the others are far away."""
    client = serve(flood_least=5, flood_window=20, flood_share=0.5)
    for pool in ("safe", "unsafe", "buffer"):
        for number in range(3):
            if (pool, number) not in {("safe", 0), ("unsafe", 0)}:
                client.delete(f"{EXEMPLARS}/{pool}-{number}")
    for pool in ("safe", "unsafe"):  # far from everything, but for the one that floods
        client.patch(f"{EXEMPLARS}/{pool}-0", json={"disabled": True})
    pictures = [synthetic_image(9000 + n) for n in range(60)]
    middle = mean_embedding(pictures)
    rows = [
        unit(0.3 * np.random.default_rng(seed).normal(size=ENCODER.dim) / 4 - np.array(middle)) for seed in range(12)
    ]
    items = [
        {"id": f"far-{n}", "label": ("safe", "unsafe")[n % 2], "embedding": row, "fingerprint": ENCODER.fingerprint}
        for n, row in enumerate(rows)
    ]
    items.append({"id": "blank", "label": "unsafe", "embedding": middle, "fingerprint": ENCODER.fingerprint})
    added(client, *items)
    for picture in pictures:
        classify(client, encoded(picture))
        if any(entry["kind"] == "exemplar.quarantine" for entry in entries(client)):
            break
    found = eventually(lambda: [e for e in entries(client) if e["kind"] == "exemplar.quarantine"])
    assert (found[0]["actor"], found[0]["subject"]) == ("flood-guard", "blank")
    assert client.get(f"{EXEMPLARS}/blank").json()["item"]["state"] == "quarantined"
    reviews = client.get("/reviews", params={"origin": "flood"}).json()["reviews"]
    assert [review["evidence"]["exemplar"] for review in reviews] == ["blank"]
    assert "hardlook_quarantined_total 1.0" in client.get("/metrics").text
    released = client.patch(f"{EXEMPLARS}/blank", json={"disabled": False, "reason": "it is right"}).json()
    assert released["items"][0]["state"] == "active"
    assert entries(client)[-1]["kind"] == "exemplar.release"


def unit(row: NDArray[np.floating[Any]]) -> list[float]:
    return [float(value) for value in row / np.linalg.norm(row)]


def mean_embedding(pictures: list[Image.Image]) -> list[float]:
    return unit(encode_images(ENCODER, pictures).numpy().mean(axis=0))


def test_the_shadow_of_another_encoder_is_compared_and_can_be_tried_out(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = ToyEncoder(seed=1)
    pools = toy_pools()
    publish(
        tmp_path / "candidate", other, {"safe": pools["unsafe"], "unsafe": pools["safe"], "buffer": pools["buffer"]}
    )
    monkeypatch.setattr("perception.catalogue.load_encoder", lambda name, **options: other)
    client = serve(shadow_encoder="other", shadow_pools=tmp_path / "candidate")
    for picture in pools["safe"]:
        classify(client, encoded(picture))
    found = eventually(
        lambda: next((i for i in client.get("/shadow").json()["candidates"] if i["compared"] == 3), None)
    )
    assert found["rate"] == 1.0
    text = client.get("/metrics").text
    assert f'hardlook_shadow_total{{candidate="encoder {other.name}",outcome="safe->unsafe"}} 3.0' in text

    def tried_out() -> dict[str, Any] | None:
        answer = client.post("/collections/pools/dry-run", json={"encoder": "shadow"}).json()
        return answer if answer["compared"] == 3 else None

    assert eventually(tried_out)["confusion"]["safe"]["unsafe"] == 3
