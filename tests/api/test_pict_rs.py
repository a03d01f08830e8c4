"""POST /adapters/pict-rs: a success status for what may be kept, and for nothing else."""

import base64
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from perception.testing import ToyEncoder, encoded, synthetic_image
from service.app import create_app
from service.startup import load
from service.testing import publish, toy_pools, toy_settings
from tests.api.conftest import Start
from tests.api.test_error_shape import Gated, assert_problem
from tests.service.key_files import key_of

PATH = "/adapters/pict-rs"
PNG = {"content-type": "image/png"}
MP4 = b"\x00\x00\x00\x20ftypisom\x00\x00\x02\x00isomiso2avc1mp41" + bytes(64)


def send(client: TestClient, file: bytes, content_type: str = "image/png", **parameters: str) -> Any:
    """As pict-rs 0.5 does: the file as a chunked body, with its type."""
    chunks = (file[at : at + 1000] for at in range(0, len(file), 1000))
    return client.post(PATH, content=chunks, headers={"content-type": content_type}, params=parameters)


def assert_rejected(response: Any, verdict: str) -> dict[str, Any]:
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    body = dict(response.json())
    assert body["type"] == "urn:hardlook:problem:image-rejected"
    assert body["verdict"] == verdict
    assert body["reason"] in body["detail"]
    assert body["request_id"] == response.headers["x-request-id"]
    assert body["instance"] == f"urn:hardlook:request:{body['request_id']}"
    assert body["status"] == 422
    return body


@pytest.fixture(scope="module")
def files(pool_images: dict[str, list[Image.Image]]) -> dict[str, bytes]:
    return {pool: encoded(images[0]) for pool, images in pool_images.items()}


def test_a_safe_image_may_be_kept(client: TestClient, files: dict[str, bytes]) -> None:
    response = send(client, files["safe"])
    assert response.status_code == 200
    answer = response.json()
    assert answer == {
        "request_id": response.headers["x-request-id"],
        "accepted": True,
        "verdict": "safe",
        "reason": answer["reason"],
    }
    assert "safe-0" in answer["reason"]


def test_an_unsafe_image_is_rejected_whatever_is_accepted_besides(client: TestClient, files: dict[str, bytes]) -> None:
    for parameters in ({}, {"review": "reject"}, {"review": "accept"}):
        body = assert_rejected(send(client, files["unsafe"], **parameters), "unsafe")
        assert "unsafe-0" in body["reason"]


def test_what_is_to_be_reviewed_is_rejected_unless_the_url_says_otherwise(
    client: TestClient, files: dict[str, bytes]
) -> None:
    assert_rejected(send(client, files["buffer"]), "review")
    assert_rejected(send(client, files["buffer"], review="reject"), "review")
    response = send(client, files["buffer"], review="accept")
    assert response.status_code == 200
    assert response.json()["verdict"] == "review"
    for wrong in ({"review": "Accept"}, {"review": ""}, {"reviews": "accept"}):
        assert_problem(send(client, files["safe"], **wrong), 400, "invalid-parameter")


@pytest.mark.parametrize(
    "content_type", ["image/png", "image/apng", "image/jxl", "IMAGE/PNG; q=1", "application/octet-stream"]
)
def test_the_bytes_decide_and_not_the_type(client: TestClient, files: dict[str, bytes], content_type: str) -> None:
    assert send(client, files["safe"], content_type).status_code == 200
    assert_rejected(send(client, files["unsafe"], content_type), "unsafe")
    assert_problem(send(client, MP4, content_type), 415, "unsupported-format")


@pytest.mark.parametrize(
    "content_type", ["video/mp4", "video/webm", "text/plain", "application/json", "multipart/form-data; boundary=x", ""]
)
def test_what_is_no_image_is_refused(client: TestClient, files: dict[str, bytes], content_type: str) -> None:
    """A video, also one that is called so and is none; and no form that other routes take."""
    for file in (MP4, files["safe"]):
        problem = assert_problem(send(client, file, content_type), 415, "unsupported-body")
        assert problem["accepted"] == ["image/*", "application/octet-stream"]


@pytest.mark.parametrize(
    ("file", "status", "slug"),
    [
        (b"", 415, "unsupported-format"),
        (b"\x89PNG\r\n\x1a\nnothing", 422, "corrupt-image"),
        (encoded(synthetic_image(1))[:60], 422, "corrupt-image"),
        (encoded(Image.new("1", (1000, 101))), 422, "too-many-pixels"),
        (bytes(500_001), 413, "body-too-large"),
        (b"\x89PNG\r\n\x1a\n" + bytes(300_000), 413, "image-too-large"),
    ],
)
def test_a_file_that_cannot_be_judged_is_no_success(client: TestClient, file: bytes, status: int, slug: str) -> None:
    assert_problem(send(client, file), status, slug)
    assert_problem(send(client, file, review="accept"), status, slug)


def test_an_animation_is_judged_by_its_worst_frame(
    client: TestClient, pool_images: dict[str, list[Image.Image]]
) -> None:
    def animation(*pools: str) -> bytes:
        frames = [pool_images[pool][at % 4] for at, pool in enumerate(pools)]
        buffer = io.BytesIO()
        frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
        return buffer.getvalue()

    assert send(client, animation("safe", "safe"), "image/apng").status_code == 200
    assert_rejected(send(client, animation("safe", "unsafe"), "image/apng"), "unsafe")


class Startled(ToyEncoder):
    """Has no embedding for dark images."""

    def encode(self, pixels: Any) -> Any:
        embeddings = super().encode(pixels).clone()
        embeddings[pixels.mean(dim=(1, 2, 3)) < 0.01] = float("nan")
        return embeddings


@pytest.fixture
def gated(tmp_path: Path) -> Iterator[tuple[TestClient, Gated]]:
    encoder = Gated()
    publish(tmp_path, encoder, toy_pools())
    settings = toy_settings(tmp_path, max_requests=1)
    with TestClient(create_app(settings, load(settings, encoder)), raise_server_exceptions=False) as client:
        yield client, encoder


def test_a_service_at_its_capacity_accepts_nothing(gated: tuple[TestClient, Gated], files: dict[str, bytes]) -> None:
    client, encoder = gated
    encoder.armed = True
    answers: list[Any] = []
    first = threading.Thread(target=lambda: answers.append(send(client, files["safe"])))
    first.start()
    assert encoder.entered.wait(20)
    refused = send(client, files["safe"])
    encoder.gate.set()
    first.join()
    assert_problem(refused, 503, "overloaded")
    assert [answer.status_code for answer in answers] == [200]


def test_no_pools_no_embedding_no_success(tmp_path: Path) -> None:
    settings = toy_settings(tmp_path / "absent")
    with TestClient(create_app(settings, load(settings, ToyEncoder())), raise_server_exceptions=False) as client:
        assert_problem(send(client, encoded(synthetic_image(1))), 503, "not-ready")
    encoder = Startled()
    publish(tmp_path / "blind", encoder, toy_pools())
    settings = toy_settings(tmp_path / "blind")
    with TestClient(create_app(settings, load(settings, encoder)), raise_server_exceptions=False) as client:
        assert_problem(send(client, encoded(Image.new("RGB", (20, 20))), review="accept"), 422, "no-embedding")


def test_the_key_is_in_the_url(start: Start, tmp_path: Path, files: dict[str, bytes]) -> None:
    key, other = key_of(tmp_path, "classify"), key_of(tmp_path, "similar")
    client = start(keys_file=tmp_path / "keys.json")
    file = encoded(toy_pools()["safe"][0])

    def with_userinfo(user: str, password: str) -> Any:
        credentials = base64.b64encode(f"{user}:{password}".encode()).decode()
        return client.post(PATH, content=file, headers={**PNG, "authorization": f"Basic {credentials}"})

    assert with_userinfo("pict-rs", key).status_code == 200
    assert with_userinfo(key, "").status_code == 200
    assert_problem(with_userinfo("pict-rs", other), 403, "forbidden", scope="classify")
    for user, password in (("pict-rs", key[:-1] + "!"), ("pict-rs", ""), ("", "")):
        refused = with_userinfo(user, password)
        assert_problem(refused, 401, "unauthenticated")
        assert key[17:] not in refused.text
    assert_problem(client.post(PATH, content=file, headers=PNG), 401, "unauthenticated")


def test_rejections_are_counted(start: Start) -> None:
    client = start()
    send(client, encoded(toy_pools()["unsafe"][0]))
    metrics = client.get("/metrics").text
    assert 'hardlook_problems_total{type="image-rejected"} 1.0' in metrics
    assert 'hardlook_verdicts_total{pool="unsafe",verdict="unsafe"} 1.0' in metrics
