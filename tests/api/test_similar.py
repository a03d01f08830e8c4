"""POST /similar: where it looks, what it leaves out, images and texts."""

import base64
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from perception.encoder import encode_images
from perception.testing import ToyEncoder, encoded, synthetic_image

PNG = {"content-type": "image/png"}


def neighbors(client: TestClient, data: bytes, **parameters: Any) -> list[dict[str, Any]]:
    response = client.post("/similar", content=data, headers=PNG, params=parameters)
    assert response.status_code == 200, response.text
    [result] = response.json()["results"]
    return list(result["neighbors"])


def test_all_pools_are_searched_most_similar_first(
    client: TestClient, encoder: ToyEncoder, pool_images: dict[str, list[Image.Image]]
) -> None:
    data = encoded(synthetic_image(31337))
    query = encode_images(encoder, [data]).numpy()[0]
    exemplars = {f"{pool}-{i}": image for pool, group in pool_images.items() for i, image in enumerate(group)}
    similarities = encode_images(encoder, list(exemplars.values())).numpy() @ query
    order = np.argsort(-similarities)
    found = neighbors(client, data, k=100)
    assert [n["id"] for n in found] == [list(exemplars)[i] for i in order]
    assert [n["similarity"] for n in found] == pytest.approx([float(similarities[i]) for i in order], abs=1e-5)


def test_one_pool_or_a_gallery(client: TestClient, gallery_images: list[Image.Image]) -> None:
    data = encoded(gallery_images[3])
    assert {n["pool"] for n in neighbors(client, data, pool="buffer")} == {"buffer"}
    found = neighbors(client, data, gallery="landmarks")
    assert found[0]["id"] == "landmark-3"
    assert found[0]["similarity"] == pytest.approx(1.0, abs=1e-5)
    assert {(n["pool"], n["label"]) for n in found} == {("landmarks", "landmark")}
    response = client.post("/similar", content=data, headers=PNG, params={"gallery": "landmarks"})
    assert response.json()["snapshot"]["collection"] == "landmarks"


def test_k_and_min_similarity_bound_the_answer(client: TestClient) -> None:
    data = encoded(synthetic_image(99))
    everything = neighbors(client, data, k=100)
    assert len(everything) == 12
    assert neighbors(client, data, k=2) == everything[:2]
    assert neighbors(client, data) == everything[:10]
    least = everything[4]["similarity"]
    assert neighbors(client, data, k=100, min_similarity=least) == everything[:5]
    assert neighbors(client, encoded(synthetic_image(98)), min_similarity=1.0) == []


def test_three_forms_give_the_same_answer(client: TestClient, unsafe_png: bytes) -> None:
    encoded64 = base64.b64encode(unsafe_png).decode()
    answers = [
        client.post("/similar?k=4&pool=safe", content=unsafe_png, headers=PNG),
        client.post("/similar?k=4", files={"image": ("0", unsafe_png)}, data={"pool": "safe"}),
        client.post("/similar", files={"image": ("0", unsafe_png)}, data={"pool": "safe", "k": "4"}),
        client.post("/similar", json={"images": [{"data": encoded64}], "k": 4, "pool": "safe"}),
        client.post("/similar?pool=safe", json={"images": [{"data": encoded64}], "k": 4}),
    ]
    assert [answer.status_code for answer in answers] == [200] * len(answers)
    results = [answer.json()["results"] for answer in answers]
    assert all(found == results[0] for found in results)


def test_many_images_with_one_that_fails(client: TestClient, unsafe_png: bytes) -> None:
    response = client.post("/similar", files=[("image", ("a", unsafe_png)), ("image", ("b", b"no image"))])
    assert response.status_code == 200
    first, second = response.json()["results"]
    assert first["neighbors"][0]["id"] == "unsafe-0"
    assert (second["id"], second["status"], second["error"]["status"]) == ("b", "error", 415)


def test_a_text_finds_what_its_embedding_is_near_to(client: TestClient, encoder: Any) -> None:
    query = encoder.text.encode_text(["a red square"]).numpy()[0]
    by_json = client.post("/similar", json={"text": "a red square", "k": 100}).json()
    by_form = client.post("/similar?k=100", files={"text": (None, "a red square")}).json()
    assert by_json["results"] == by_form["results"]
    [found] = by_json["results"]
    assert found["image"] is None
    ids = {
        f"{pool}-{i}": 100 * number + i for number, pool in enumerate(("safe", "buffer", "unsafe")) for i in range(4)
    }
    for neighbor in found["neighbors"]:
        exemplar = encode_images(encoder, [synthetic_image(ids[neighbor["id"]])]).numpy()[0]
        assert neighbor["similarity"] == pytest.approx(float(exemplar @ query), abs=1e-5)


def test_the_first_frame_is_searched_with(client: TestClient, pool_images: dict[str, list[Image.Image]]) -> None:
    first, second = pool_images["buffer"][2], pool_images["unsafe"][2]
    data = encoded(first, "WEBP", save_all=True, append_images=[second], lossless=True, duration=100)
    assert neighbors(client, data)[0]["id"] == "buffer-2"
