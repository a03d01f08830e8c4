"""Looking collections through over HTTP: duplicates, contradictions, probes, pool files out and in."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from indexer.pool_file import export, parse_pool_file
from indexer.snapshot import Snapshot
from perception.testing import ToyEncoder, synthetic_image
from service.app import create_app
from service.startup import load
from service.testing import publish, toy_pools, toy_settings

Start = Callable[..., TestClient]
RAW = {"content-type": "application/octet-stream"}
SCOPES = {"anonymous_scopes": ("classify", "similar", "pools:write")}


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory, encoder: ToyEncoder) -> Iterator[TestClient]:
    """Pools in which an image occurs twice, and once more in another pool; and a gallery."""
    folder, images = tmp_path_factory.mktemp("curated"), toy_pools(per_pool=4)
    images["safe"].append(images["safe"][0])
    images["unsafe"].append(images["safe"][1])
    publish(folder, encoder, images)
    publish(folder, encoder, {"shown": [*images["unsafe"][:2], synthetic_image(77)]}, collection="shop")
    settings = toy_settings(folder, **SCOPES)
    with TestClient(create_app(settings, load(settings, encoder))) as client:
        yield client


def get(client: TestClient, path: str, **parameters: Any) -> dict[str, Any]:
    response = client.get(path, params=parameters)
    assert response.status_code == 200, response.text
    return dict(response.json())


def version(client: TestClient, name: str = "pools") -> str:
    return {str(c["name"]): str(c["version"]) for c in get(client, "/pools")["collections"]}[name]


def test_duplicates_are_listed_within_pools(curated: TestClient) -> None:
    found = get(curated, "/collections/pools/duplicates", min_similarity=0.999)
    assert found["version"] == version(curated)
    assert found["total"] == 1
    [group] = found["groups"]
    assert [(m["id"], m["suggestion"]) for m in group["members"]] == [("safe-0", "keep"), ("safe-4", "delete")]
    assert group["size"] == 2
    assert get(curated, "/collections/pools/duplicates", min_similarity=0.999, label="unsafe")["groups"] == []


@pytest.mark.parametrize(
    ("path", "parameters", "status", "slug"),
    [
        ("/collections/pools/duplicates", {"min_similarity": 0.5}, 400, "invalid-parameter"),
        ("/collections/pools/duplicates", {"label": "dogs"}, 422, "invalid-label"),
        ("/collections/pools/duplicates", {"limit": 0}, 400, "invalid-parameter"),
        ("/collections/absent/duplicates", {}, 404, "unknown-gallery"),
        ("/collections/pools/file", {"label": "dogs"}, 422, "invalid-label"),
        ("/collections/absent/file", {}, 404, "unknown-gallery"),
        ("/collections/shop/contradictions", {}, 400, "invalid-parameter"),
    ],
)
def test_what_cannot_be_asked(
    curated: TestClient, path: str, parameters: dict[str, Any], status: int, slug: str
) -> None:
    response = curated.get(path, params=parameters)
    assert (response.status_code, response.json()["type"].rpartition(":")[2]) == (status, slug)


def test_what_is_too_large_for_a_request_is_refused(curated: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.api.curation.MAX_COMPARED", 3)
    response = curated.get("/collections/pools/duplicates")
    assert response.status_code == 400
    assert "the limit is 3: use 'hardlook-index duplicates'" in response.json()["detail"]


def test_contradictions_are_listed(curated: TestClient) -> None:
    found = get(curated, "/collections/pools/contradictions")
    worst = {item["id"]: item for item in found["items"][:2]}
    assert worst.keys() == {"safe-1", "unsafe-4"}
    assert worst["safe-1"]["suggestion"] == "look"
    assert worst["safe-1"]["other"]["id"] == "unsafe-4"
    assert worst["safe-1"]["other"]["similarity"] == pytest.approx(1.0, abs=1e-5)
    assert worst["safe-1"]["margin"] > 0
    assert len(get(curated, "/collections/pools/contradictions", limit=1)["items"]) == 1
    assert get(curated, "/collections/pools/contradictions", limit=1)["total"] == found["total"]


def test_probes_find_candidates_and_mark_what_is_known(curated: TestClient) -> None:
    body = {"prompts": ["a photo of a rifle", "a photo of a knife"], "k": 3}
    response = curated.post("/collections/shop/probes", json=body)
    assert response.status_code == 200, response.text
    items = response.json()["items"]
    assert {item["id"] for item in items} == {"shown-0", "shown-1", "shown-2"}
    assert [item["similarity"] for item in items] == sorted((i["similarity"] for i in items), reverse=True)
    known = {item["id"]: item["known"] and (item["known"]["pool"], item["known"]["id"]) for item in items}
    assert known["shown-0"] == ("unsafe", "unsafe-0")
    assert {item["contrast"] for item in items} == {None}
    against = curated.post("/collections/shop/probes", json={**body, "negatives": ["a toy"]}).json()["items"]
    assert all(item["contrast"] > 0 for item in against)
    bodies: list[dict[str, Any]] = [
        {"prompts": []},
        {"prompts": [" "]},
        {"prompts": ["x"], "k": 0},
        {"prompts": ["x"], "colour": 1},
    ]
    for bad in bodies:
        assert curated.post("/collections/shop/probes", json=bad).status_code == 400


def test_an_encoder_without_text_cannot_probe(start: Start) -> None:
    response = start(**SCOPES).post("/collections/pools/probes", json={"prompts": ["a rifle"]})
    assert (response.status_code, response.json()["type"]) == (422, "urn:hardlook:problem:text-unsupported")


def test_a_pool_file_goes_out_and_in_elsewhere(start: Start, tmp_path: Path) -> None:
    client = start(**SCOPES)
    response = client.get("/collections/pools/file")
    assert response.status_code == 200
    assert int(response.headers["content-length"]) == len(response.content)
    assert response.headers["content-disposition"] == f'attachment; filename="pools-{version(client)}.pool"'
    sent = parse_pool_file(response.content, "sent", ToyEncoder().fingerprint)
    assert len(sent.contents.exemplars) == 9

    empty = tmp_path / "empty"
    empty.mkdir()
    settings = toy_settings(empty, **SCOPES)
    with TestClient(create_app(settings, load(settings, ToyEncoder()))) as other:
        answers = [other.post("/collections/pools/file", content=response.content, headers=RAW) for _ in range(2)]
        assert [a.status_code for a in answers] == [200, 200], answers[0].text
        assert [(a.json()["changed"], a.json()["exemplars"]) for a in answers] == [(True, 9), (False, 9)]
        found = parse_pool_file(other.get("/collections/pools/file").content, "found")
        assert found.contents.exemplars == sent.contents.exemplars
        assert np.array_equal(found.contents.embeddings, sent.contents.embeddings)


def test_conflicts_and_bad_files(start: Start) -> None:
    client = start(**SCOPES)
    file = client.get("/collections/pools/file").content
    before = version(client)
    assert client.patch("/collections/pools/exemplars/safe-0", json={"label": "unsafe"}).status_code == 200
    moved = version(client)

    def post(content: bytes, headers: dict[str, str] = RAW, **parameters: str) -> tuple[int, str]:
        response = client.post("/collections/pools/file", content=content, headers=headers, params=parameters)
        return response.status_code, response.json().get("type", "").rpartition(":")[2]

    assert post(file) == (409, "exemplar-exists")
    assert post(file, on_conflict="skip") == (200, "")
    assert version(client) == moved
    assert post(file, on_conflict="replace") == (200, "")
    assert version(client) not in (before, moved)
    assert client.get("/collections/pools/exemplars/safe-0").json()["item"]["label"] == "safe"
    assert post(file[:-1]) == (422, "invalid-pool-file")
    assert post(b"") == (422, "invalid-pool-file")
    assert post(file, {"content-type": "image/png"}) == (415, "unsupported-body")
    assert post(file, on_conflict="shrug") == (400, "invalid-parameter")
    contents = replace(parse_pool_file(file, "x").contents, encoder_fingerprint="cd" * 32)
    assert post(b"".join(export(Snapshot.of(contents)).chunks())) == (409, "other-encoder")


def test_large_files_become_a_snapshot(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    client = start(**SCOPES)
    file = client.get("/collections/pools/file").content
    assert client.delete("/collections/pools/exemplars/safe-0").status_code == 200
    assert client.patch("/collections/pools/exemplars/safe-1", json={"label": "unsafe"}).status_code == 200
    monkeypatch.setattr("service.curation.MOST_EDITS", 3)
    response = client.post("/collections/pools/file", content=file, headers=RAW, params={"on_conflict": "replace"})
    assert response.status_code == 200, response.text
    assert response.json()["changed"]
    found, sent = (parse_pool_file(data, "x") for data in (client.get("/collections/pools/file").content, file))
    assert found.contents.exemplars == sent.contents.exemplars


def test_a_file_needs_the_editor(start: Start) -> None:
    client = start(catalog="off", **SCOPES)
    file = client.get("/collections/pools/file").content
    response = client.post("/collections/pools/file", content=file, headers=RAW)
    assert (response.status_code, response.json()["type"]) == (409, "urn:hardlook:problem:editing-disabled")
