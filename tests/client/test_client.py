"""Both clients against the real service: every form of images, every parameter, keys and problems."""

import contextlib
import io
import logging
import os
import re
import shutil
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest

from service.client import (
    AsyncHardlookClient,
    Forbidden,
    HardlookClient,
    HardlookError,
    ImageUnreadable,
    ProblemError,
    RateLimited,
    Unauthenticated,
    Url,
)
from service.wire import ClassifyItem, ItemError
from tests.client.conftest import Connect, Guarded
from tests.client.scripted import problem, scripted

ROOT = Path(__file__).parents[2]


def verdict_of(result: ClassifyItem | ItemError) -> str:
    assert isinstance(result, ClassifyItem)
    return str(result.verdict)


@pytest.mark.parametrize("form", ["bytes", "path", "file", "memoryview", "list", "pair"])
def test_one_image_in_every_form(connect: Connect, service: str, images: dict[str, Path], form: str) -> None:
    path = images["unsafe"]
    data = path.read_bytes()
    sent: dict[str, tuple[Any, str]] = {
        "bytes": (data, "0"),
        "path": (path, "unsafe.png"),
        "file": (io.BytesIO(data), "0"),
        "memoryview": (memoryview(data), "0"),
        "list": ([path], "unsafe.png"),
        "pair": (("an id", data), "an id"),
    }
    given, id = sent[form]
    answer = connect(service).classify(given)
    assert [(result.id, verdict_of(result)) for result in answer.results] == [(id, "unsafe")]


def test_many_images_keep_their_order_and_any_id(connect: Connect, service: str, images: dict[str, Path]) -> None:
    ids = ['"quoted"; x=\r\n', "\u00e4\u2603" * 300, "0"]
    sent = [(id, images[pool]) for id, pool in zip(ids, ("unsafe", "safe", "buffer"), strict=True)]
    answer = connect(service).classify(sent, k=1)
    assert [result.id for result in answer.results] == ids
    assert [verdict_of(result) for result in answer.results] == ["unsafe", "safe", "review"]
    assert all(isinstance(r, ClassifyItem) and len(r.neighbors) == 3 for r in answer.results)


def test_of_many_images_a_bad_one_has_an_error_and_no_verdict(
    connect: Connect, service: str, images: dict[str, Path]
) -> None:
    bad, good = connect(service).classify([("bad", b"no image"), images["safe"]]).results
    assert isinstance(bad, ItemError)
    assert (bad.id, bad.error.type) == ("bad", "urn:hardlook:problem:unsupported-format")
    assert verdict_of(good) == "safe"


def test_an_only_bad_image_raises_its_problem(connect: Connect, service: str) -> None:
    with pytest.raises(ProblemError, match="415 The image format is not accepted") as caught:
        connect(service).classify(b"no image", request_id="mine")
    error = caught.value
    assert (error.status, error.type, error.request_id) == (415, "urn:hardlook:problem:unsupported-format", "mine")
    assert "PNG" in str(error.members["accepted"]).upper()
    assert error.detail == error.problem.detail


def test_urls_go_with_data_in_one_body(connect: Connect, service: str, images: dict[str, Path]) -> None:
    """This service fetches nothing, and says so for the URL alone."""
    good, url = connect(service).classify([images["safe"], ("u", Url("https://example.org/a.png"))]).results
    assert verdict_of(good) == "safe"
    assert isinstance(url, ItemError)
    assert (url.id, url.error.type) == ("u", "urn:hardlook:problem:fetch-disabled")


def test_similar_by_image_and_by_text(connect: Connect, service: str, images: dict[str, Path]) -> None:
    client = connect(service)
    [item] = client.similar(images["unsafe"], pool="unsafe", k=2, min_similarity=0.99).results
    assert not isinstance(item, ItemError)
    assert [near.id for near in item.neighbors] == ["unsafe-0"]
    [item] = client.similar(text="a dog", k=4).results
    assert not isinstance(item, ItemError)
    assert len(item.neighbors) == 4
    with pytest.raises(ProblemError) as caught:
        client.similar(text="a dog", gallery="none")
    assert caught.value.status == 404
    several = client.similar([images["safe"], images["unsafe"]], k=1).results
    assert [result.id for result in several] == ["safe.png", "unsafe.png"]


def test_pools_and_readiness(connect: Connect, service: str) -> None:
    client = connect(service)
    assert client.is_ready()
    assert [collection.counts for collection in client.pools().collections] == [{"safe": 3, "buffer": 3, "unsafe": 3}]


def test_base_url_may_end_with_a_slash(connect: Connect, service: str) -> None:
    assert connect(f"{service}/").is_ready()


def test_context_managers_close(service: str) -> None:
    with HardlookClient(service) as client:
        assert client.is_ready()
    with pytest.raises(RuntimeError, match="closed"):
        client.is_ready()


@pytest.mark.anyio
async def test_async_context_manager_closes(service: str) -> None:
    async with AsyncHardlookClient(service) as client:
        assert await client.is_ready()
    with pytest.raises(RuntimeError, match="closed"):
        await client.is_ready()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


# --- keys ------------------------------------------------------------------------------------------------------------


def test_keys(connect: Connect, guarded: Guarded, images: dict[str, Path]) -> None:
    url, keys = guarded.url, guarded.keys
    assert verdict_of(connect(url, api_key=keys["classify"]).classify(images["safe"]).results[0]) == "safe"
    with pytest.raises(Unauthenticated):
        connect(url).classify(images["safe"])
    with pytest.raises(Forbidden) as caught:
        connect(url, api_key=keys["metrics"]).classify(images["safe"])
    assert caught.value.members == {"scope": "classify"}


def test_a_rate_limit_beyond_the_timeout_is_not_waited_for(
    connect: Connect, guarded: Guarded, images: dict[str, Path]
) -> None:
    client = connect(guarded.url, api_key=guarded.keys["slow"])
    with contextlib.suppress(RateLimited):  # the other kind of client may have used it up
        client.classify(images["safe"])
    with pytest.raises(RateLimited) as caught:
        client.classify(images["safe"])
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s > 60


def test_a_key_is_nowhere_to_be_read(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    key = "hlk_" + "s3cret" * 5
    with scripted(classify=[problem(401, "unauthenticated")]) as server:
        client = connect(server.url, api_key=key)
        with pytest.raises(Unauthenticated) as refused:
            client.classify(b"x")
        assert [request.headers["authorization"] for request in server.received] == [f"Bearer {key}"]
    with pytest.raises(HardlookError) as gone:
        connect(server.url, api_key=key, max_attempts=1).classify(b"x")
    wrong = [pytest.raises(ValueError, match="api_key"), pytest.raises(ValueError, match="credentials")]
    with wrong[0] as no_header:
        connect(server.url, api_key=key + "\n")
    with wrong[1] as in_url:
        connect(server.url.replace("//", f"//me:{key}@"))
    texts = [repr(client), str(vars(client)), caplog.text]
    for caught in (refused, gone, no_header, in_url):
        error: BaseException | None = caught.value
        while error is not None:
            texts += [str(error), repr(error), "".join(traceback.format_exception(error))]
            error = error.__cause__ or error.__context__
    assert [text for text in texts if "s3cret" in text] == []


# --- what is refused before anything is sent -------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["photo.jpg", io.StringIO("text"), None, 1, ("id", b"x", b"y"), [("id",)], {"a": 1}])
def test_no_images(connect: Connect, wrong: Any) -> None:
    with pytest.raises(TypeError):
        connect("http://127.0.0.1:9").classify(wrong)


def test_unreadable_files(connect: Connect, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(bytes(11))
    (tmp_path / "loop").symlink_to("loop")
    client = connect("http://127.0.0.1:9", max_image_bytes=10)
    unreadable: list[tuple[Any, str]] = [
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "none", "No such file"),
        (tmp_path / "loop", "Too many levels"),
        (tmp_path / "large", "11 bytes, the limit is 10"),
        (Path("a\0b"), "null"),
        (io.BytesIO(bytes(11)), "more than 10 bytes"),
    ]
    for path, reason in unreadable:
        with pytest.raises(ImageUnreadable, match=reason):
            client.classify(path)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"base_url": "127.0.0.1:8000"}, "base_url"),
        ({"base_url": "ftp://example.org"}, "base_url"),
        ({"base_url": "http://example.org/?a=1"}, "base_url"),
        ({"base_url": "http://[::1"}, "base_url"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": float("nan")}, "timeout_s"),
        ({"max_attempts": 0}, "max_attempts"),
        ({"api_key": ""}, "api_key"),
        ({"api_key": "a b"}, "api_key"),
    ],
)
def test_wrong_settings(connect: Connect, arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        connect(**{"base_url": "http://127.0.0.1:9", **arguments})


def test_wrong_parameters(connect: Connect) -> None:
    client = connect("http://127.0.0.1:9")
    with pytest.raises(ValueError, match="k\n"):
        client.classify(b"x", k=0)
    with pytest.raises(ValueError, match="pool"):
        client.similar(b"x", pool="other")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="either images or a text"):
        client.similar(b"x", text="a")
    with pytest.raises(ValueError, match="either images or a text"):
        client.similar()
    with pytest.raises(ValueError, match="request id"):
        client.classify(b"x", request_id="a b")
    with pytest.raises(ValueError, match="no images"):
        client.classify([])
    with pytest.raises(ValueError, match="https"):
        Url("file:///etc/passwd")


# --- documentation ---------------------------------------------------------------------------------------------------

EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "client.md").read_text("utf8"), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_run(own: str, images: dict[str, Path], tmp_path: Path, example: str) -> None:
    """Each against a service of its own, with the files that it names."""
    (tmp_path / "photos").mkdir()
    for name in ("photo.jpg", "a.jpg", "photos/b.jpg"):
        shutil.copy(images["safe"], tmp_path / name)
    code = example.replace("http://127.0.0.1:8000", own)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert ("safe" in result.stdout) == ("http://" in example)
