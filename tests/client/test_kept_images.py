"""Pictures, as both clients get them."""

import asyncio
import hashlib
import time
from pathlib import Path

import pytest

from perception.testing import encoded, synthetic_image
from service.client import AnswerNotUnderstood, AsyncHardlookClient, Forbidden, HardlookClient, NotFound
from service.testing import publish, toy_pools
from tests.client.conftest import ToyClip, serving
from tests.client.scripted import CUT, problem, response, scripted

JPEG = b"\xff\xd8 a picture \xff\xd9"
SHA256 = "ab" * 32
PATH = f"images/{SHA256}"


def test_both_clients_get_the_bytes() -> None:
    async def asked(url: str) -> bytes:
        async with AsyncHardlookClient(url) as client:
            return await client.images.get(SHA256)

    with scripted(**{PATH: [CUT, response(200, JPEG, "image/jpeg")]}) as server:
        with HardlookClient(server.url) as client:
            assert client.images.get(SHA256) == JPEG  # asking twice comes to the same
        assert asyncio.run(asked(server.url)) == JPEG
        assert [request.headers["accept"] for request in server.received] == 3 * [
            "image/jpeg, application/problem+json"
        ]


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (problem(404, "unknown-item"), NotFound),
        (problem(403, "forbidden"), Forbidden),
        (response(200, b"<html>", "text/html"), AnswerNotUnderstood),
        (response(200, b"{}"), AnswerNotUnderstood),
        (response(200, JPEG, "image/jpeg", **{"content-encoding": "br"}), AnswerNotUnderstood),
        (response(204, b"", "image/jpeg"), AnswerNotUnderstood),
    ],
)
def test_nothing_else_is_taken_for_a_picture(reply: bytes, error: type[Exception]) -> None:
    with (
        scripted(**{PATH: [reply]}) as server,
        HardlookClient(server.url, max_attempts=1) as client,
        pytest.raises(error),
    ):
        client.images.get(SHA256)


def test_a_picture_that_is_too_large_is_not_read() -> None:
    with (
        scripted(**{PATH: [response(200, JPEG, "image/jpeg")]}) as server,
        HardlookClient(server.url, max_answer_bytes=len(JPEG) - 1) as client,
        pytest.raises(AnswerNotUnderstood, match="too large"),
    ):
        client.images.get(SHA256)


def test_names_stay_in_their_place() -> None:
    with scripted(**{"images/..%2Faudit": [problem(404, "not-found")]}) as server:
        with HardlookClient(server.url) as client, pytest.raises(NotFound):
            client.images.get("../audit")
        with HardlookClient(server.url) as client, pytest.raises(ValueError, match="empty"):
            client.images.get("")


def test_of_a_real_service(tmp_path: Path) -> None:
    publish(tmp_path, ToyClip(), toy_pools())
    data = encoded(synthetic_image(3))
    sha256 = hashlib.sha256(data).hexdigest()
    changes = {"anonymous_scopes": ("admin",), "keep_images": "all", "decode_timeout_s": 30.0}
    with serving(tmp_path, **changes) as url, HardlookClient(url) as client:
        with pytest.raises(NotFound):
            client.images.get(sha256)
        client.classify(data)
        until_s = time.monotonic() + 100
        while True:
            try:
                found = client.images.get(sha256)
                break
            except NotFound:
                assert time.monotonic() < until_s
                time.sleep(0.02)
        assert found.startswith(b"\xff\xd8\xff")
