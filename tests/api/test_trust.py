"""Keys, limits, probing and URLs on the HTTP surface."""

import base64
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from perception.testing import encoded, synthetic_image
from service.key_file import revoke_key
from tests.api.conftest import Start
from tests.api.sending import IMAGE, send
from tests.api.test_error_shape import assert_problem
from tests.service.key_files import key_of

PNG = {"content-type": "image/png"}


def test_a_revoked_key_is_refused_without_a_restart(start: Start, tmp_path: Path) -> None:
    key = key_of(tmp_path, "classify")
    client = start(keys_file=tmp_path / "keys.json")
    header = {"authorization": f"Bearer {key}"}
    assert send(client, "POST", "/classify", **header).status_code == 200
    revoke_key(tmp_path / "keys.json", key.split("_")[1])
    eventually(lambda: send(client, "POST", "/classify", **header).status_code == 401)


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_an_unknown_key_is_refused_where_nobody_needs_one(client: TestClient) -> None:
    assert_problem(send(client, "POST", "/classify", **{"x-api-key": "hlk_x"}), 401, "unauthenticated")


def test_what_is_told_to_anonymous_callers_is_the_operators_choice(start: Start, tmp_path: Path) -> None:
    key_of(tmp_path, "admin")
    client = start(keys_file=tmp_path / "keys.json", anonymous_scopes=("classify",))
    assert send(client, "POST", "/classify").status_code == 200
    assert_problem(send(client, "POST", "/similar"), 401, "unauthenticated")
    client = start(anonymous_scopes=())
    assert_problem(send(client, "POST", "/classify"), 401, "unauthenticated")


def test_no_body_is_read_of_a_caller_who_may_not_ask(start: Start, tmp_path: Path) -> None:
    """A body that breaks every rule changes nothing: nobody looks at it."""
    key_of(tmp_path, "admin")
    client = start(keys_file=tmp_path / "keys.json", max_body_bytes=10)
    assert_problem(client.post("/classify", content=bytes(1000), headers=PNG), 401, "unauthenticated")


def test_images_count_and_not_requests(start: Start) -> None:
    client = start(rate_limit="5/minute")
    part = ("image", ("a.png", IMAGE["content"]))
    assert client.post("/classify", files=[part] * 3).status_code == 200
    assert_problem(client.post("/classify", files=[part] * 3), 429, "rate-limited")
    assert_problem(client.post("/classify", files=[part] * 6), 413, "too-many-images", limit=5)
    assert client.post("/similar", content=IMAGE["content"], headers=PNG).status_code in (200, 429)


def test_keys_have_limits_of_their_own(start: Start, tmp_path: Path) -> None:
    slow, fast = key_of(tmp_path, "classify", rate_limit="1/minute"), key_of(tmp_path, "classify", rate_limit="")
    client = start(keys_file=tmp_path / "keys.json", rate_limit="2/minute")

    def statuses(key: str) -> list[int]:
        return [send(client, "POST", "/classify", **{"x-api-key": key}).status_code for _ in range(4)]

    assert statuses(slow) == [200, 429, 429, 429]
    assert statuses(fast) == [200] * 4
    assert statuses(key_of_default(tmp_path, client)) == [200, 200, 429, 429]


def key_of_default(tmp_path: Path, client: TestClient) -> str:
    """A key that is made while the service runs, and has no limit of its own."""
    key = key_of(tmp_path, "classify")
    eventually(lambda: send(client, "POST", "/similar", **{"x-api-key": key}).status_code == 403)
    return key


def variant(seed: int) -> bytes:
    """One image, a little different each time."""
    pixels = np.asarray(synthetic_image(7, (64, 64))).astype(int)
    noise = np.random.default_rng(seed).integers(-2, 3, pixels.shape)
    return encoded(Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8)))


def test_who_probes_an_image_learns_its_verdict_alone(start: Start) -> None:
    client = start(probing_limit=5, probing_similarity=0.99, probing_anonymous=True)

    def ask(path: str, data: bytes, **parameters: Any) -> dict[str, Any]:
        answer = client.post(path, content=data, headers=PNG, params=parameters).json()
        return dict(answer["results"][0])

    exact = ask("/similar", variant(0))
    assert exact["detail"] == "full"
    answers = [ask("/classify", variant(seed)) for seed in range(1, 12)]
    assert [answer["detail"] for answer in answers[:4]] == ["full"] * 4
    assert [answer["detail"] for answer in answers[-4:]] == ["coarse"] * 4
    first, last = answers[0], answers[-1]
    assert last["verdict"] == first["verdict"]
    assert first["neighbors"]
    assert (last["pool"], last["margin"], last["neighbors"], last["flip_rate_at_eps"]) == (None, None, [], None)
    assert not any(neighbor["id"] in json.dumps(last) for neighbor in first["neighbors"])

    rounded = ask("/similar", variant(50))
    assert rounded["detail"] == "coarse"
    assert all(n["similarity"] == round(n["similarity"], 1) for n in rounded["neighbors"])
    assert any(n["similarity"] != round(n["similarity"], 1) for n in exact["neighbors"])
    between = max(n["similarity"] for n in rounded["neighbors"]) + 0.01
    assert ask("/similar", variant(51), min_similarity=min(1, between))["neighbors"] == []
    other = ask("/classify", encoded(synthetic_image(300, (64, 64))))
    assert other["detail"] == "full"


def test_the_same_image_again_and_again_is_no_probing(start: Start) -> None:
    client = start(probing_limit=2, probing_anonymous=True)
    details = [send(client, "POST", "/classify").json()["results"][0]["detail"] for _ in range(8)]
    assert details == ["full"] * 8


def test_callers_with_a_key_are_watched_and_others_where_the_operator_says_so(start: Start, tmp_path: Path) -> None:
    key = key_of(tmp_path, "classify")
    client = start(
        keys_file=tmp_path / "keys.json", anonymous_scopes=("classify",), probing_limit=2, probing_similarity=0.99
    )

    def details(**headers: str) -> list[str]:
        sent = [client.post("/classify", content=variant(seed), headers={**PNG, **headers}) for seed in range(8)]
        return [answer.json()["results"][0]["detail"] for answer in sent]

    assert details() == ["full"] * 8
    assert details(**{"x-api-key": key})[-1] == "coarse"


def test_urls_are_fetched_only_where_that_is_turned_on(start: Start) -> None:
    body = {"images": [{"id": "a", "url": "https://images.example.org/a.png?sig=s3cr3t"}]}
    assert_problem(start().post("/classify", json=body), 422, "fetch-disabled")
    client = start(fetch=True)
    for url in ("http://example.org/", "https://127.0.0.1/s3cr3t", "file:///etc/passwd", "https://[::ffff:10.0.0.1]/"):
        for path in ("/classify", "/similar"):
            response = client.post(path, json={"images": [{"url": url}]})
            assert_problem(response, 422, "url-refused")
            assert "s3cr3t" not in response.text


def test_one_url_of_several_images_fails_alone(start: Start) -> None:
    data = base64.b64encode(IMAGE["content"]).decode()
    body = {"images": [{"id": "a", "data": data}, {"id": "b", "url": "https://10.0.0.1/"}]}
    results = start(fetch=True).post("/classify", json=body).json()["results"]
    assert [(found["id"], found["status"]) for found in results] == [("a", "ok"), ("b", "error")]
    assert results[1]["error"]["type"] == "urn:hardlook:problem:url-refused"


@pytest.mark.parametrize("image", [{}, {"data": "", "url": "https://example.org/"}])
def test_an_image_has_one_source(client: TestClient, image: dict[str, str]) -> None:
    assert_problem(client.post("/classify", json={"images": [image]}), 400, "malformed-body")


def test_secrets_are_not_logged(start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    key = key_of(tmp_path, "classify", "similar")
    client = start(keys_file=tmp_path / "keys.json", fetch=True)
    with caplog.at_level(logging.DEBUG):
        for header in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}, {"x-api-key": key[:-1]}):
            client.post("/classify?k=1&token=s3cr3t", **{**IMAGE, "headers": {**PNG, **header}})
            body = {"images": [{"url": "https://user:s3cr3t@example.org/s3cr3t?s3cr3t"}]}
            client.post("/classify", json=body, headers=header)
            client.post("/similar", json={"text": "s3cr3t"}, headers=header)
    secret = key.split("_", 2)[2]
    ours = [record for record in caplog.records if not record.name.startswith("httpx")]  # that is the test's client
    assert ours
    for record in ours:
        line = f"{record.getMessage()} {vars(record)}"
        assert secret[:12] not in line
        assert "s3cr3t" not in line


def test_metrics_tell_what_happened(start: Start) -> None:
    client = start(rate_limit="4/minute")
    for _ in range(2):
        send(client, "POST", "/classify")
    client.post("/classify", content=b"no image", headers=PNG)
    client.post("/classify", content=IMAGE["content"][:60], headers=PNG)
    send(client, "POST", "/classify")
    text = client.get("/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(lines["hardlook_images_judged_total"]) == 2
    for slug in ("unsupported-format", "corrupt-image", "rate-limited"):
        assert float(lines[f'hardlook_problems_total{{type="{slug}"}}']) == 1
    for stage, count in {"decode": 4, "encode": 2, "search": 2, "decide": 2, "body": 4}.items():
        assert float(lines[f'hardlook_stage_duration_seconds_count{{stage="{stage}"}}']) >= count
    assert 'hardlook_state{state="ready"} 1.0' in text
