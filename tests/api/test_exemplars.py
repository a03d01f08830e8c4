"""Exemplars over HTTP: what is added, moved, disabled or deleted counts in the next answer, and is in the log."""

import base64
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from indexer.catalog.database import Database
from indexer.catalog.ledger import Catalog
from perception.encoder import encode_images
from perception.testing import ToyEncoder, encoded, synthetic_image
from service.testing import toy_pools, toy_settings
from tests.api.conftest import Serve, served
from tests.api.sending import EXEMPLARS, classify, verdict

ENCODER = ToyEncoder()


def image(seed: int) -> bytes:
    return encoded(synthetic_image(seed))


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_an_addition_counts_in_the_next_answer_and_survives_a_restart(serve: Serve) -> None:
    client = serve()
    # One that is not judged unsafe by chance.
    novel = next(data for data in map(image, range(7000, 7100)) if verdict(client, data)[0] != "unsafe")
    before = classify(client, novel)
    started_s = time.perf_counter()
    response = client.post(
        EXEMPLARS,
        json={"items": [{"label": "unsafe", "data": base64_of(novel), "note": "n", "source": "s"}], "reason": "seen"},
    )
    after = classify(client, novel)
    assert time.perf_counter() - started_s < 1.0
    assert response.status_code == 200, response.text
    added = response.json()
    assert added["changed"]
    [item] = added["items"]
    assert (item["label"], item["note"], item["source"], item["state"]) == ("unsafe", "n", "s", "active")
    assert added["version"] == after["snapshot"]["version"] != before["snapshot"]["version"]
    assert added["revision"] == after["snapshot"]["revision"]
    assert after["results"][0]["verdict"] == "unsafe"
    assert after["results"][0]["neighbors"][0]["id"] == item["id"]
    assert added["retroactive"]["compared"] >= 1
    caught = {item["request_id"]: item["would_be"] for item in added["retroactive"]["requests"]}
    assert caught[before["request_id"]] == "unsafe"
    again = serve()
    assert verdict(again, novel) == ("unsafe", item["id"])
    assert classify(again, novel)["snapshot"] == after["snapshot"]


def test_move_disable_enable_annotate_delete(serve: Serve) -> None:
    client, known = serve(), encoded(toy_pools()["unsafe"][1])
    assert verdict(client, known) == ("unsafe", "unsafe-1")
    one = f"{EXEMPLARS}/unsafe-1"
    moved = client.patch(one, json={"label": "safe", "note": "a drawing", "metadata": {"k": "v"}, "reason": "wrong"})
    assert moved.status_code == 200, moved.text
    assert moved.json()["items"][0]["metadata"] == {"k": "v"}
    assert verdict(client, known) == ("safe", "unsafe-1")
    until = datetime.now(UTC) + timedelta(seconds=1.5)
    disabled = client.patch(one, json={"disabled": True, "disabled_until": until.isoformat()}).json()
    assert disabled["items"][0]["state"] == "disabled"
    assert verdict(client, known)[1] != "unsafe-1"
    deadline_s = time.monotonic() + 30
    while verdict(client, known)[1] != "unsafe-1":
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert client.get(one).json()["item"]["state"] == "active"
    assert client.patch(one, json={"disabled": True}).json()["changed"]
    assert not client.patch(one, json={"disabled": True}).json()["changed"]
    assert client.patch(one, json={"disabled": False}).json()["changed"]
    assert verdict(client, known)[1] == "unsafe-1"
    assert client.delete(one, params={"reason": "gone"}).json()["changed"]
    assert verdict(client, known)[1] != "unsafe-1"
    assert client.get(one).status_code == 404
    assert client.delete(one).status_code == 404


def test_what_is_refused_changes_nothing(serve: Serve) -> None:
    client = serve()
    before = client.get("/pools").json()["collections"]
    good = {"label": "safe", "data": base64_of(image(7001))}
    unit = (np.ones(ENCODER.dim) / np.sqrt(ENCODER.dim)).tolist()
    mine = {"label": "safe", "fingerprint": ENCODER.fingerprint}
    cases: list[tuple[int, dict[str, Any]]] = [
        (422, {"items": [{**good, "label": "doubtful"}]}),
        (400, {"items": [good, {**good, "data": base64_of(b"not an image"), "id": "x"}]}),
        (415, {"items": [{**good, "data": base64_of(b"not an image")}]}),
        (400, {"items": [{**good, "url": "https://example.org/a.png"}]}),
        (400, {"items": [{"label": "safe"}]}),
        (400, {"items": []}),
        (400, {"items": [{**good, "frame": 5}]}),
        (409, {"items": [{**good, "id": "safe-0"}]}),
        (409, {"items": [{"label": "safe", "embedding": unit, "fingerprint": "other"}]}),
        (400, {"items": [{**mine, "embedding": unit[:-1]}]}),
        (400, {"items": [{**mine, "embedding": [0.0] * ENCODER.dim}]}),
        (422, {"items": [{**good, "note": "\x00"}]}),
        (413, {"items": [{**good, "id": str(n)} for n in range(20)]}),
    ]
    for status, body in cases:
        response = client.post(EXEMPLARS, json=body)
        assert response.status_code == status, (response.text[:300], body.keys())
        assert response.headers["content-type"] == "application/problem+json"
    changes: list[tuple[int, dict[str, Any]]] = [
        (400, {}),
        (400, {"reason": "r"}),
        (422, {"label": "doubtful"}),
        (400, {"disabled_until": "2030-01-01T00:00:00Z"}),
        (400, {"disabled": True, "disabled_until": "2030-01-01T00:00:00"}),
        (409, {"disabled": True, "disabled_until": "2020-01-01T00:00:00Z"}),
        (422, {"label": "buffer", "metadata": {"k": "v" * 3000}, "note": "\x00"}),
    ]
    for status, body in changes:
        assert client.patch(f"{EXEMPLARS}/safe-0", json=body).status_code == status, body
    assert client.patch(f"{EXEMPLARS}/nobody", json={"label": "safe"}).status_code == 404
    assert client.post("/collections/nowhere/exemplars", json={"items": [good]}).status_code == 404
    assert client.get("/pools").json()["collections"] == before


def test_an_embedding_of_this_encoder_is_as_good_as_its_image(serve: Serve) -> None:
    client, picture = serve(), synthetic_image(7002)
    embedding = encode_images(ENCODER, [picture]).numpy()[0].tolist()
    item = {"id": "by/embedding ü", "label": "buffer", "embedding": embedding, "fingerprint": ENCODER.fingerprint}
    assert client.post(EXEMPLARS, json={"items": [item]}).json()["changed"]
    assert not client.post(EXEMPLARS, json={"items": [item]}).json()["changed"]
    assert verdict(client, encoded(picture)) == ("review", "by/embedding ü")
    assert client.get(f"{EXEMPLARS}/by/embedding%20%C3%BC").json()["item"]["label"] == "buffer"


def test_listing_goes_page_by_page_through_everything(serve: Serve) -> None:
    client = serve()
    client.patch(f"{EXEMPLARS}/safe-1", json={"disabled": True})
    client.delete(f"{EXEMPLARS}/safe-2")
    seen: list[str] = []
    after = ""
    while True:
        page = client.get(EXEMPLARS, params={"limit": 2, "after": after}).json()
        seen += [item["id"] for item in page["items"]]
        if page["next"] is None:
            break
        after = page["next"]
    every = {f"{pool}-{n}" for pool in ("safe", "buffer", "unsafe") for n in range(3)} - {"safe-2"}
    assert seen == sorted(every)
    labels = client.get(EXEMPLARS, params={"label": "unsafe"}).json()["items"]
    assert {item["label"] for item in labels} == {"unsafe"}


def test_a_suppress_item_takes_evidence_away_near_it_and_says_so(serve: Serve) -> None:
    client, known = serve(), encoded(toy_pools()["unsafe"][1])
    body = {"suppresses": ["unsafe-1"], "min_similarity": 0.99, "data": base64_of(known), "reason": "harmless"}
    response = client.post("/collections/pools/suppressions", json=body)
    assert response.status_code == 200, response.text
    [item] = response.json()["items"]
    assert (item["label"], item["suppresses"]) == ("suppress", ["unsafe-1"])
    [answer] = classify(client, known)["results"]
    assert "unsafe-1" not in {neighbor["id"] for neighbor in answer["neighbors"]}
    assert [(s["id"], s["by"]) for s in answer["suppressed"]] == [("unsafe-1", item["id"])]
    assert classify(client, encoded(toy_pools()["unsafe"][2]))["results"][0]["suppressed"] == []
    client.delete(f"{EXEMPLARS}/{item['id']}")
    assert verdict(client, known) == ("unsafe", "unsafe-1")
    nobody = client.post("/collections/pools/suppressions", json={**body, "suppresses": ["nobody"]})
    assert nobody.status_code == 404


def test_a_gallery_is_created_and_filled(serve: Serve) -> None:
    client, picture = serve(), image(7003)
    assert client.post("/collections", json={"name": "landmarks"}).json()["changed"]
    assert not client.post("/collections", json={"name": "landmarks"}).json()["changed"]
    item = {"id": "tower", "label": "france", "data": base64_of(picture)}
    assert client.post("/collections/landmarks/exemplars", json={"items": [item]}).status_code == 200
    found = client.post("/similar?gallery=landmarks", content=picture, headers={"content-type": "image/png"}).json()
    assert found["results"][0]["neighbors"][0]["id"] == "tower"
    assert client.post("/collections", json={"name": "unsafe"}).status_code in (400, 404)


def test_pools_come_into_being_with_their_first_exemplars(tmp_path: Path) -> None:
    settings = toy_settings(tmp_path / "nothing", anonymous_scopes=("admin",))
    with served(settings, ENCODER) as client:
        assert client.get("/readyz").status_code == 503
        items = [
            {"id": pool, "label": pool, "data": base64_of(encoded(images[0]))} for pool, images in toy_pools().items()
        ]
        assert client.post(EXEMPLARS, json={"items": items}).status_code == 200
        assert client.get("/readyz").status_code == 200
        assert verdict(client, encoded(toy_pools()["unsafe"][0])) == ("unsafe", "unsafe")


def test_without_a_catalogue_nothing_changes_and_answers_go_on(serve: Serve) -> None:
    client = serve(catalog="off")
    good = {"items": [{"label": "safe", "data": base64_of(image(7001))}]}
    for response in (
        client.post(EXEMPLARS, json=good),
        client.delete(f"{EXEMPLARS}/safe-0"),
        client.get("/audit"),
        client.get("/reviews"),
    ):
        assert response.status_code == 409
        assert response.json()["type"].endswith("editing-disabled")
    assert classify(client, encoded(toy_pools()["unsafe"][1]))["results"][0]["verdict"] == "unsafe"


def test_postgresql_serves_as_well(serve: Serve, postgres_url: str, tmp_path: Path) -> None:
    client, other, novel = serve(catalog=postgres_url), serve(catalog=postgres_url), image(7004)
    added = client.post(EXEMPLARS, json={"items": [{"id": "n", "label": "unsafe", "data": base64_of(novel)}]})
    assert added.status_code == 200, added.text
    deadline_s = time.monotonic() + 30
    while verdict(other, novel) != ("unsafe", "n"):  # the other replica follows the log
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    with closing(Database.open(postgres_url)) as database:
        catalog = Catalog(database, tmp_path)
        assert catalog.replayed("pools") == catalog.state("pools")
