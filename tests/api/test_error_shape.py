"""Every way in which an error can arise gives the same shape: an RFC 9457 problem with the request id."""

import base64
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from perception.testing import ToyEncoder, encoded, synthetic_image
from service.app import create_app
from service.startup import load
from service.testing import publish, toy_pools, toy_settings

PNG = {"content-type": "image/png"}
PIXEL = encoded(synthetic_image(1))
PIXEL64 = base64.b64encode(PIXEL).decode()


def assert_problem(response: Any, status: int, slug: str, **members: Any) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = dict(response.json())
    assert body["type"] == f"urn:hardlook:problem:{slug}"
    assert body["status"] == status
    assert body["title"]
    assert body["detail"]
    assert body["request_id"] == response.headers["x-request-id"]
    assert body["instance"] == f"urn:hardlook:request:{body['request_id']}"
    assert "Traceback" not in response.text
    assert "verdict" not in response.text
    for name, value in members.items():
        assert body[name] == value
    return body


@dataclass(frozen=True)
class Case:
    """One request that fails."""

    name: str
    status: int
    slug: str
    request: dict[str, Any]
    path: str = "/classify"
    method: str = "POST"
    members: dict[str, Any] = field(default_factory=dict)


def multipart(body: bytes) -> dict[str, Any]:
    return {"content": body, "headers": {"content-type": "multipart/form-data; boundary=x"}}


def part(name: str, content: bytes = PIXEL) -> tuple[str, tuple[str, bytes]]:
    return (name, ("a.png", content))


IMAGE: dict[str, Any] = {"content": PIXEL, "headers": PNG}
UNTYPED: dict[str, Any] = {"content": PIXEL, "headers": {"content-type": ""}}
NOISE = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)))
CASES = [
    Case("unknown route", 404, "not-found", {}, path="/nope"),
    Case("trailing slash", 404, "not-found", IMAGE, path="/classify/"),
    Case("wrong method", 405, "method-not-allowed", {}, method="GET"),
    Case("wrong method on pools", 405, "method-not-allowed", IMAGE, path="/pools"),
    Case("empty content type", 415, "unsupported-body", UNTYPED, members={"found": ""}),
    Case("form body", 415, "unsupported-body", {"data": {"image": "x"}}),
    Case("text body", 415, "unsupported-body", {"content": b"x", "headers": {"content-type": "text/plain"}}),
    Case("empty raw body", 415, "unsupported-format", {"content": b"", "headers": PNG}),
    Case("no image format", 415, "unsupported-format", {"content": b"hello", "headers": PNG}),
    Case("corrupt image", 422, "corrupt-image", {"content": PIXEL[:60], "headers": PNG}),
    Case(
        "too many pixels",
        422,
        "too-many-pixels",
        {"content": encoded(Image.new("1", (1000, 101))), "headers": PNG},
        members={"limit": 100_000, "actual": 101_000, "quantity": "pixels"},
    ),
    Case(
        "too many bytes",
        413,
        "image-too-large",
        {"content": NOISE, "headers": PNG},
        members={"limit": 200_000, "actual": len(NOISE), "quantity": "bytes"},
    ),
    Case(
        "too many bytes in a part",
        413,
        "image-too-large",
        {"files": [part("image", NOISE)]},
        members={"limit": 200_000},
    ),
    Case("body too large", 413, "body-too-large", {"content": bytes(500_001), "headers": PNG},
         members={"limit": 500_000}),
    Case(
        "chunked body too large",
        413,
        "body-too-large",
        {"content": (bytes(50_000) for _ in range(20)), "headers": PNG},
        members={"limit": 500_000},
    ),
    Case("multipart too large", 413, "body-too-large", {"files": [part("image", bytes(600_000))]}),
    Case("too many parts", 413, "too-many-images", {"files": [part("image")] * 7}, members={"limit": 6}),
    Case("far too many parts", 413, "too-many-images", {"files": [part("image", b"")] * 100}, members={"limit": 6}),
    Case("too many in JSON", 413, "too-many-images", {"json": {"images": [{"data": ""}] * 7}}, members={"limit": 6}),
    Case("not JSON", 400, "malformed-body", {"content": b"{", "headers": {"content-type": "application/json"}}),
    Case("JSON list", 400, "malformed-body", {"json": []}),
    Case("no images in JSON", 400, "malformed-body", {"json": {}}),
    Case("empty images in JSON", 400, "malformed-body", {"json": {"images": []}}),
    Case("image without data", 400, "malformed-body", {"json": {"images": [{"id": "a"}]}}),
    Case("bad base64", 400, "malformed-body", {"json": {"images": [{"data": "!"}]}}),
    Case("bad data URI", 400, "malformed-body", {"json": {"images": [{"data": "data:image/png"}]}}),
    Case("surrogate", 400, "malformed-body", {"content": b'{"images":[{"id":"\\ud800","data":""}]}',
                                              "headers": {"content-type": "application/json"}}),
    Case("unknown member", 400, "invalid-parameter", {"json": {"images": [{"data": PIXEL64}], "url": "x"}},
         members={"name": "url"}),
    Case("k as text in JSON", 400, "invalid-parameter", {"json": {"images": [{"data": PIXEL64}], "k": "3"}}),
    Case("no boundary", 400, "malformed-body", {"content": b"x", "headers": {"content-type": "multipart/form-data"}}),
    Case("garbled multipart", 400, "malformed-body", multipart(b"garbage")),
    Case("cut multipart", 400, "malformed-body", multipart(b'--x\r\nContent-Disposition: form-data; name="a"\r\n')),
    Case("nameless part", 400, "malformed-body", multipart(b"--x\r\nContent-Type: image/png\r\n\r\nx\r\n--x--\r\n")),
    Case("multipart without image", 400, "malformed-body", {"files": {"k": (None, "3")}}),
    Case("image as text field", 400, "invalid-parameter", {"files": [("image", (None, "abc")), part("other")]},
         members={"name": "image"}),
    Case("field twice", 400, "invalid-parameter", {"files": [("k", (None, "1")), ("k", (None, "2")), part("image")]}),
    Case("unknown field", 400, "invalid-parameter", {"files": [("kk", (None, "1")), part("image")]},
         members={"name": "kk"}),
    Case("k of zero", 400, "invalid-parameter", IMAGE, path="/classify?k=0", members={"name": "k"}),
    Case("k no number", 400, "invalid-parameter", IMAGE, path="/classify?k=x", members={"name": "k"}),
    Case("k over the schema", 400, "invalid-parameter", IMAGE, path="/classify?k=1001", members={"name": "k"}),
    Case("k over the setting", 400, "invalid-parameter", IMAGE, path="/classify?k=101", members={"name": "k"}),
    Case("unknown parameter", 400, "invalid-parameter", IMAGE, path="/classify?kay=1", members={"name": "kay"}),
    Case("text to classify", 400, "invalid-parameter", {"json": {"text": "a", "images": [{"data": ""}]}}),
    Case("parameter twice", 400, "invalid-parameter", {"files": [("k", (None, "1")), part("image")]},
         path="/similar?k=1", members={"name": "k"}),
    Case("unknown gallery", 404, "unknown-gallery", IMAGE, path="/similar?gallery=x",
         members={"name": "x", "known": ["landmarks", "pools"]}),
    Case("a path for a gallery", 404, "unknown-gallery", IMAGE, path="/similar?gallery=../pools"),
    Case("unknown pool", 400, "invalid-parameter", IMAGE, path="/similar?pool=x", members={"name": "pool"}),
    Case("gallery and pool", 400, "invalid-parameter", IMAGE, path="/similar?gallery=landmarks&pool=safe"),
    Case("similarity over 1", 400, "invalid-parameter", IMAGE, path="/similar?min_similarity=1.1"),
    Case("similarity no number", 400, "invalid-parameter", IMAGE, path="/similar?min_similarity=nan"),
    Case("empty text", 400, "invalid-parameter", {"json": {"text": " "}}, path="/similar", members={"name": "text"}),
    Case("long text", 400, "invalid-parameter", {"json": {"text": "a" * 4001}}, path="/similar"),
    Case("long text in a form", 400, "invalid-parameter", {"files": {"text": (None, "a" * 4001)}}, path="/similar"),
    Case("text and image", 400, "invalid-parameter", {"json": {"text": "a", "images": [{"data": ""}]}},
         path="/similar"),
    Case("neither text nor image", 400, "malformed-body", {"json": {}}, path="/similar"),
    Case("corrupt image to similar", 422, "corrupt-image", {"content": PIXEL[:60], "headers": PNG}, path="/similar"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_error_is_a_problem(client: TestClient, case: Case) -> None:
    response = client.request(case.method, case.path, **case.request)
    assert_problem(response, case.status, case.slug, **case.members)


def test_method_not_allowed_names_the_methods(client: TestClient) -> None:
    assert client.get("/classify").headers["allow"] == "POST"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Callable[..., TestClient]]:
    """Starts services of its own: other encoders, other settings."""
    clients: list[TestClient] = []

    def start(encoder: ToyEncoder | None = None, pools: bool = True, **changes: Any) -> TestClient:
        encoder = encoder or ToyEncoder()
        if pools:
            publish(tmp_path, encoder, toy_pools())
        settings = toy_settings(tmp_path if pools else tmp_path / "absent", **changes)
        client = TestClient(create_app(settings, load(settings, encoder)), raise_server_exceptions=False)
        clients.append(client)
        return client.__enter__()

    yield start
    for client in clients:
        client.__exit__(None, None, None)


class Gated(ToyEncoder):
    """Waits, once it is armed, until it may answer."""

    def __init__(self) -> None:
        super().__init__()
        self.armed, self.entered, self.gate = False, threading.Event(), threading.Event()

    def encode(self, pixels: Any) -> Any:
        if self.armed:
            self.entered.set()
            assert self.gate.wait(20)
        return super().encode(pixels)


def test_without_pools_alive_but_not_ready(service: Callable[..., TestClient]) -> None:
    client = service(pools=False)
    assert client.get("/healthz").json() == {"status": "alive"}
    assert client.get("/pools").json()["collections"] == []
    ready = client.get("/readyz")
    assert "hardlook-index build" in assert_problem(ready, 503, "not-ready")["detail"]
    assert ready.headers["retry-after"] == "1"
    for path in ("/classify", "/similar"):
        assert_problem(client.post(path, **IMAGE), 503, "not-ready")


def test_text_without_a_text_tower(service: Callable[..., TestClient]) -> None:
    client = service()
    assert_problem(client.post("/similar", json={"text": "a dog"}), 422, "text-unsupported", encoder="toy/0")


def test_an_answer_that_takes_too_long(service: Callable[..., TestClient]) -> None:
    encoder = Gated()
    client = service(encoder, deadline_s=0.3)
    encoder.armed = True
    try:
        assert_problem(client.post("/classify", **IMAGE), 504, "deadline-exceeded", limit_s=0.3)
    finally:
        encoder.gate.set()
    assert client.post("/classify", **IMAGE).status_code == 200


def test_more_requests_than_are_admitted(service: Callable[..., TestClient]) -> None:
    encoder = Gated()
    client = service(encoder, max_requests=1)
    encoder.armed = True
    answers: list[Any] = []
    first = threading.Thread(target=lambda: answers.append(client.post("/classify", **IMAGE)))
    first.start()
    assert encoder.entered.wait(20)
    refused = client.post("/classify", **IMAGE)
    encoder.gate.set()
    first.join()
    assert_problem(refused, 503, "overloaded", queue="requests", limit=1)
    assert refused.headers["retry-after"] == "1"
    assert [answer.status_code for answer in answers] == [200]


def test_decoding_that_takes_too_long_or_too_much_memory(service: Callable[..., TestClient]) -> None:
    large = encoded(Image.new("RGB", (6000, 6000)))
    client = service(decode_timeout_s=0.05)
    assert_problem(client.post("/classify", content=large, headers=PNG), 422, "decode-limit", limit=0.05)
    client = service(decode_memory_bytes=64 * 1024 * 1024)
    response = client.post("/classify", content=large, headers=PNG)
    assert_problem(response, 422, "decode-limit", limit=64 * 1024 * 1024, quantity="bytes of memory")
    assert client.post("/classify", **IMAGE).status_code == 200


class Buggy(ToyEncoder):
    """Fails on dark images, with a secret in its message."""

    def encode(self, pixels: Any) -> Any:
        if (pixels.mean(dim=(1, 2, 3)) < 0.01).any():
            raise RuntimeError("a secret")
        return super().encode(pixels)


BLACK = encoded(Image.new("RGB", (20, 20)))


def test_a_bug_is_a_problem_without_its_trace(
    service: Callable[..., TestClient], caplog: pytest.LogCaptureFixture
) -> None:
    client = service(Buggy())
    with caplog.at_level(logging.ERROR):
        response = client.post("/classify", content=BLACK, headers={**PNG, "x-request-id": "the-bug"})
    assert_problem(response, 500, "internal", request_id="the-bug")
    assert "secret" not in response.text
    [record] = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert record.exc_info is not None
    assert "a secret" in str(record.exc_info[1])


def test_a_bug_of_one_image_leaves_the_others_alone(service: Callable[..., TestClient]) -> None:
    client = service(Buggy())
    response = client.post("/classify", files=[part("image"), part("image", BLACK), part("image")])
    assert response.status_code == 200
    results = response.json()["results"]
    assert [found["status"] for found in results] == ["ok", "error", "ok"]
    assert results[1]["error"]["type"] == "urn:hardlook:problem:internal"
    assert "secret" not in response.text


class Blind(ToyEncoder):
    """Has no embedding for dark images."""

    def encode(self, pixels: Any) -> Any:
        embeddings = super().encode(pixels)
        embeddings = embeddings.clone()
        embeddings[pixels.mean(dim=(1, 2, 3)) < 0.01] = float("nan")
        return embeddings


def test_an_embedding_that_is_not_finite_is_never_a_verdict(service: Callable[..., TestClient]) -> None:
    client = service(Blind())
    assert_problem(client.post("/classify", content=BLACK, headers=PNG), 422, "no-embedding")
    response = client.post("/classify", files=[part("image"), part("image", BLACK)])
    assert [found["status"] for found in response.json()["results"]] == ["ok", "error"]
