"""POST /classify: the three forms of a request, one image and many, frames and backgrounds."""

import base64
import io
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from perception.encoder import encode_images
from perception.gallery import Gallery
from perception.testing import ToyEncoder, encoded, synthetic_image
from perception.verdict import DecisionPolicy, Neighbor

PNG = {"content-type": "image/png"}


def raw(client: TestClient, data: bytes, **parameters: Any) -> dict[str, Any]:
    response = client.post("/classify", content=data, headers=PNG, params=parameters)
    assert response.status_code == 200, response.text
    return dict(response.json())


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def result(answer: dict[str, Any]) -> dict[str, Any]:
    [only] = answer["results"]
    return {key: value for key, value in only.items() if key != "id"}


@pytest.fixture(scope="module")
def toy_gallery(encoder: ToyEncoder, pool_images: dict[str, list[Image.Image]]) -> Gallery:
    """The published pools again, put together without the service."""
    labels = [label for label, group in pool_images.items() for _ in group]
    ids = [f"{label}-{i}" for label, group in pool_images.items() for i in range(len(group))]
    embeddings = encode_images(encoder, [image for group in pool_images.values() for image in group]).numpy()
    return Gallery(tuple(ids), tuple(labels), embeddings, encoder.fingerprint)


def library_neighbors(gallery: Gallery, encoder: ToyEncoder, data: bytes) -> list[Neighbor]:
    similarities = gallery.embeddings @ encode_images(encoder, [data]).numpy()[0]
    return [
        Neighbor(id, label, float(similarity))
        for id, label, similarity in zip(gallery.ids, gallery.labels, similarities, strict=True)
    ]


def test_three_forms_of_one_image_give_the_same_answer(client: TestClient, unsafe_png: bytes) -> None:
    answers = [
        client.post("/classify", content=unsafe_png, headers=PNG),
        client.post("/classify", content=unsafe_png, headers={"content-type": "application/octet-stream"}),
        client.post("/classify", content=unsafe_png),
        client.post("/classify", files={"image": ("a.png", unsafe_png, "image/png")}),
        client.post("/classify", files={"anything": ("a.png", unsafe_png)}),
        client.post("/classify", json={"images": [{"data": base64_of(unsafe_png)}]}),
        client.post("/classify", json={"images": [{"data": f"data:image/png;base64,{base64_of(unsafe_png)}"}]}),
    ]
    assert [answer.status_code for answer in answers] == [200] * len(answers)
    results = [result(answer.json()) for answer in answers]
    assert all(found == results[0] for found in results)
    assert results[0]["verdict"] == "unsafe"


def test_the_answer_is_the_library_s_own(
    client: TestClient, encoder: ToyEncoder, toy_gallery: Gallery, unsafe_png: bytes
) -> None:
    for data in (unsafe_png, *(encoded(synthetic_image(seed)) for seed in range(7000, 7010))):
        expected = DecisionPolicy().decide(library_neighbors(toy_gallery, encoder, data))
        answer = raw(client, data, k=4)
        found = result(answer)
        assert found["verdict"] == expected.label
        assert found["pool"] == expected.pool
        assert found["margin"] == pytest.approx(expected.margin, abs=1e-5)
        assert [n["id"] for n in found["neighbors"]] == [n.id for n in expected.neighbors]
        for shown, neighbor in zip(found["neighbors"], expected.neighbors, strict=True):
            assert shown["similarity"] == pytest.approx(neighbor.similarity, abs=1e-5)
        assert answer["policy"]["version"] == expected.policy_version


def test_answer_names_model_snapshot_policy_and_evidence(
    client: TestClient, encoder: ToyEncoder, unsafe_png: bytes
) -> None:
    answer = raw(client, unsafe_png)
    assert answer["model"] == {
        "name": encoder.name,
        "fingerprint": encoder.fingerprint,
        "precision": "fp32",
        "defense": None,
    }
    pools = next(c for c in client.get("/pools").json()["collections"] if c["name"] == "pools")
    present = {name: pools[name] for name in ("version", "revision", "created_at")}
    assert answer["snapshot"] == {"collection": "pools", **present}
    assert answer["policy"]["rule"] == "nearest"
    found = result(answer)
    nearest = found["neighbors"][0]
    assert nearest["id"] == "unsafe-0"
    assert nearest["source"] == "synthetic/unsafe/0.png"
    assert nearest["metadata"] == {"seed": "0"}
    best_other = max(n["similarity"] for n in found["neighbors"] if n["pool"] != "unsafe")
    assert found["margin"] == pytest.approx(nearest["similarity"] - best_other)
    assert found["image"] == {"format": "PNG", "width_px": 48, "height_px": 40, "frames_in_file": 1}
    assert found["frame"] == {"index": 0, "background": None, "frames_examined": 1}


def test_k_changes_what_is_shown_and_not_the_verdict(client: TestClient) -> None:
    data = encoded(synthetic_image(4242))
    answers = {k: result(raw(client, data, k=k)) for k in (1, 2, 4)}
    for k, found in answers.items():
        pools = [n["pool"] for n in found["neighbors"]]
        assert {pool: pools.count(pool) for pool in set(pools)} == {"safe": k, "buffer": k, "unsafe": k}
        assert {key: found[key] for key in ("verdict", "pool", "margin", "reason")} == {
            key: answers[1][key] for key in ("verdict", "pool", "margin", "reason")
        }


def test_many_images_are_answered_in_order_each_with_result_or_error(
    client: TestClient, pool_images: dict[str, list[Image.Image]]
) -> None:
    files = [
        ("image", ("first.png", encoded(pool_images["safe"][1]))),
        ("image", ("broken.png", b"\x89PNG\r\n\x1a\nnothing")),
        ("image", ("text.txt", b"hello")),
        ("image", ("huge.png", encoded(Image.new("RGB", (1000, 101))))),
        ("image", ("last.png", encoded(pool_images["unsafe"][1]))),
    ]
    response = client.post("/classify", files=files)
    assert response.status_code == 200
    results = response.json()["results"]
    assert [found["id"] for found in results] == [name for _, (name, _) in files]
    assert [found["status"] for found in results] == ["ok", "error", "error", "error", "ok"]
    assert [found.get("verdict") for found in results] == ["safe", None, None, None, "unsafe"]
    assert [found["error"]["status"] for found in results if found["status"] == "error"] == [422, 415, 422]
    assert all("safe" not in str(found) for found in results[1:4])
    assert {found["error"]["request_id"] for found in results[1:4]} == {response.json()["request_id"]}


def test_an_image_too_many_bytes_and_bad_base64_are_errors_of_their_image_alone(
    client: TestClient, unsafe_png: bytes
) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8))
    images = [
        {"id": "ok", "data": base64_of(unsafe_png)},
        {"id": "large", "data": base64_of(encoded(noise))},
        {"id": "garbled", "data": "%%%"},
        {"id": "uri", "data": "data:image/png,plain"},
    ]
    response = client.post("/classify", json={"images": images})
    assert response.status_code == 200
    results = response.json()["results"]
    assert [found["id"] for found in results] == ["ok", "large", "garbled", "uri"]
    assert results[0]["verdict"] == "unsafe"
    assert [found["error"]["status"] for found in results[1:]] == [413, 400, 400]
    assert results[1]["error"]["limit"] == 200_000


def test_the_worst_frame_of_an_animation_decides(client: TestClient, pool_images: dict[str, list[Image.Image]]) -> None:
    frames = [pool_images[pool][0] for pool in ("safe", "safe", "unsafe", "safe")]
    frames[1] = pool_images["safe"][1]  # an equal frame would be merged into the one before
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], lossless=True, duration=100)
    found = result(raw(client, buffer.getvalue()))
    assert found["verdict"] == "unsafe"
    assert found["frame"] == {"index": 2, "background": None, "frames_examined": 4}
    assert found["neighbors"][0]["id"] == "unsafe-0"
    assert found["image"]["frames_in_file"] == 4


def test_an_image_that_shows_something_else_on_black_is_judged_on_both_backgrounds(
    client: TestClient, encoder: ToyEncoder, toy_gallery: Gallery
) -> None:
    """Grey c with alpha a is c a on black and c a + 1 - a on white: any dark and any lighter image fit in one file."""
    policy = DecisionPolicy()
    greys = [np.asarray(synthetic_image(seed).convert("L"), np.float64) for seed in range(30)]

    def verdict(grey: NDArray[np.float64]) -> str:
        data = encoded(Image.fromarray(np.round(grey).astype(np.uint8)).convert("RGB"))
        return policy.decide(library_neighbors(toy_gallery, encoder, data)).label

    dark = next(grey / 2 for grey in greys if verdict(grey / 2) == "unsafe")
    light = next(127 + grey / 2 for grey in greys if verdict(127 + grey / 2) != "unsafe")
    alpha = 255 - (light - dark)
    colour = np.clip(255 * dark / np.maximum(alpha, 1), 0, 255)
    bands = [Image.fromarray(np.round(band).astype(np.uint8)) for band in (colour, colour, colour, alpha)]
    found = result(raw(client, encoded(Image.merge("RGBA", bands))))
    assert found["verdict"] == "unsafe"
    assert found["frame"] == {"index": 0, "background": "black", "frames_examined": 2}


def test_request_id_is_taken_or_made(client: TestClient, unsafe_png: bytes) -> None:
    given_id = client.post("/classify", content=unsafe_png, headers={**PNG, "x-request-id": "client-1.a_b"})
    assert given_id.headers["x-request-id"] == given_id.json()["request_id"] == "client-1.a_b"
    for refused in ("", "a" * 65, "with space", "semi;colon"):
        made = client.post("/classify", content=unsafe_png, headers={**PNG, "x-request-id": refused})
        assert made.headers["x-request-id"] == made.json()["request_id"]
        assert made.headers["x-request-id"] != refused
        assert len(made.headers["x-request-id"]) == 32


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200), cut=st.integers(0, 400), flip=st.integers(0, 400))
def test_whatever_the_bytes_the_answer_is_200_or_a_typed_4xx(
    client: TestClient, unsafe_png: bytes, data: bytes, cut: int, flip: int
) -> None:
    damaged = bytearray(unsafe_png)
    damaged[flip % len(damaged)] ^= 0xFF
    for body in (data, bytes(damaged[: max(cut, 8)]), b"GIF89a" + data, b"\xff\xd8\xff" + data, b"BM" + data):
        response = client.post("/classify", content=body, headers=PNG)
        assert response.status_code in (200, 413, 415, 422), response.text
        if response.status_code != 200:
            assert response.json()["type"].startswith("urn:hardlook:problem:")


def test_served_embeddings_do_not_depend_on_the_batch(
    client: TestClient, encoder: ToyEncoder, toy_gallery: Gallery
) -> None:
    images = [encoded(synthetic_image(seed)) for seed in range(6)]
    alone = [result(raw(client, data, k=4)) for data in images]
    together = client.post("/classify", params={"k": 4}, files=[("image", ("x", data)) for data in images]).json()
    for data, one, many in zip(images, alone, together["results"], strict=True):
        expected = {n.id: n.similarity for n in library_neighbors(toy_gallery, encoder, data)}
        for found in (one, many):
            assert {n["id"]: n["similarity"] for n in found["neighbors"]} == pytest.approx(expected, abs=1e-5)
        assert one["verdict"] == many["verdict"]
