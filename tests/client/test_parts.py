"""What is sent again and what is not, how paths are quoted, and how steps are taken, by both clients."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.client import AsyncHardlookClient, ConnectionFailed, HardlookClient, NotFound, Unavailable
from service.client.calls import file_call, path_of
from service.client.collections import Collections
from service.client.connection import receiving
from service.client.exchange import Pause
from service.client.parts import growing_pauses
from tests.client.conftest import Connect
from tests.client.scripted import CUT, HANG, problem, response, scripted

CHANGED = {"collection": "pools", "version": "1", "revision": 1, "request_id": "r", "changed": True, "items": []}
VERSION = {"collection": "pools", "version": "1", "revision": 1, "request_id": "r", "changed": True}
JOB = {
    "id": "j", "state": "queued", "total": 1, "done": 0, "failed": 0, "waiting": 1, "verdicts": {},
    "created_at": "2026-01-01T00:00:00+00:00", "finished_at": None, "expires_at": None,
}  # fmt: skip
DONE = JOB | {"state": "done", "done": 1, "waiting": 0, "finished_at": "2026-01-01T00:00:01+00:00"}
BELOW = httpx.Client(base_url="http://127.0.0.1:9/below", verify=False)
EXEMPLARS = "collections/pools/exemplars"
Act = Callable[[Any], object]


def good(body: object, status: int = 200) -> bytes:
    return response(status, json.dumps(body).encode())


def job(body: dict[str, Any], status: int = 200) -> bytes:
    return good({"request_id": "r", "job": body}, status)


# What would count twice, or answer otherwise the second time; and a right answer to it.
ONCE: dict[str, tuple[Act, str, bytes]] = {
    "submit": (lambda client: client.jobs.submit(b"x"), "jobs", job(JOB, 202)),
    "feedback": (
        lambda client: client.feedback("false-negative", request_id="r"),
        "feedback",
        good({"request_id": "r", "review_id": "i"}),
    ),
    "publish": (lambda client: client.versions.publish("pools", "n"), "collections/pools/versions", good(VERSION)),
    "delete": (lambda client: client.collections.delete("pools", "a"), f"{EXEMPLARS}/a", good(CHANGED)),
    "shadow": (lambda client: client.shadow.start("1"), "shadow", good({"request_id": "r", "candidates": []})),
}


@pytest.mark.parametrize("name", ONCE)
@pytest.mark.parametrize("lost", [CUT, response(502, b"<html>", "text/html")], ids=["cut", "502"])
def test_what_counts_twice_is_not_sent_again(connect: Connect, name: str, lost: bytes) -> None:
    act, path, right = ONCE[name]
    with scripted(**{path: [lost, right]}) as server:
        with pytest.raises(Exception, match=r"502|done all the same") as caught:
            act(connect(server.url))
        assert len(server.received) == 1
        assert not isinstance(caught.value, ConnectionFailed) or caught.value.in_doubt


@pytest.mark.parametrize("name", ONCE)
def test_what_was_refused_is_sent_again(name: str) -> None:
    act, path, right = ONCE[name]
    busy = [problem(503, retry_after="0"), problem(429, "rate-limited", retry_after="0")]
    with scripted(**{path: [*busy, right]}) as server, HardlookClient(server.url) as client:
        act(client)
        assert len(server.received) == 3


def test_what_was_never_sent_is_sent_again(connect: Connect) -> None:
    with pytest.raises(ConnectionFailed, match="after 3 attempts") as caught:
        connect("http://127.0.0.1:9", max_attempts=3).jobs.submit(b"x")
    assert not caught.value.in_doubt


def test_what_comes_to_the_same_is_sent_again(connect: Connect) -> None:
    with scripted(**{EXEMPLARS: [CUT, response(502, b"", "text/html"), good(CHANGED)]}) as server:
        assert connect(server.url).collections.add("pools", b"x", "safe").changed
        assert len(server.received) == 3
        assert len({request.body for request in server.received}) == 1


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=3))
def test_paths_say_what_was_meant(segments: list[str]) -> None:
    path = BELOW.build_request("GET", path_of(*segments)).url.raw_path.decode("ascii")
    assert [unquote(segment) for segment in path.split("/")] == ["", "below", *segments]


def test_an_id_without_an_encoding_is_refused() -> None:
    with pytest.raises(ValueError, match="surrogates"):
        path_of("\ud800")


def test_pages_are_asked_for_as_they_are_needed(connect: Connect) -> None:
    item = {"label": "safe", "sha256": "", "source": "", "metadata": {}, "note": "", "state": "active"}
    state = {"collection": "pools", "version": "1", "revision": 1, "request_id": "r"}
    first = good(state | {"items": [item | {"id": "a"}, item | {"id": "b"}], "next": "b"})
    last = good(state | {"items": [item | {"id": "c"}], "next": None})
    with scripted(**{EXEMPLARS: [first, CUT, last]}) as server:
        found = connect(server.url).collections.exemplars("pools", label="safe", page_size=2)
        assert [next(found).id, next(found).id] == ["a", "b"]
        assert len(server.received) == 1
        assert [each.id for each in found] == ["c"]
        asked = [request.line.split()[1].partition("?")[2] for request in server.received]
        assert asked == ["label=safe&limit=2", *2 * ["label=safe&limit=2&after=b"]]


def test_a_job_is_waited_for_through_a_restart(connect: Connect) -> None:
    restart = [CUT, problem(503, "not-ready", retry_after="0"), response(502, b"", "text/html")]
    seen: list[str] = []
    with scripted(**{"jobs/j": [job(JOB), *restart, job(DONE)]}) as server:
        client = connect(server.url, max_attempts=1)
        assert client.jobs.wait("j", progress=lambda job: seen.append(job.state)).job.done == 1
    assert seen == ["queued", "done"]


def test_results_are_waited_for_or_not(connect: Connect) -> None:
    error = json.loads(problem(422, "corrupt-image").partition(b"\r\n\r\n")[2])
    result = {"id": "a", "status": "error", "error": error, "position": 0, "request_id": "j-0"}
    nothing = good({"request_id": "r", "job_id": "j", "results": [], "next": -1})
    last = good({"request_id": "r", "job_id": "j", "results": [result], "next": None})
    with scripted(**{"jobs/j/results": [nothing, nothing, last]}) as server:
        client = connect(server.url)
        assert list(client.jobs.results("j")) == []
        assert [each.id for each in client.jobs.results("j", wait=True)] == ["a"]
        assert len(server.received) == 3


def test_of_several_reviewers_each_gets_another_item(connect: Connect) -> None:
    item: dict[str, Any] = {
        "time": "t", "origin": "verdict", "state": "open", "collection": "pools", "image_sha256": "0",
        "verdict": "review", "evidence": {}, "comment": "", "request_id": "r", "reporter": "p", "claimed_by": None,
        "claimed_until": None, "decided_by": None, "decided_at": None, "decision": None, "exemplar_id": None, "seen": 1,
    }  # fmt: skip
    counts = {"open": 2, "claimed": 0, "decided": 0, "skipped": 0}
    page = good({"request_id": "r", "counts": counts, "reviews": [item | {"id": i} for i in "ab"], "next": None})
    taken, mine = problem(409, "review-taken"), good({"request_id": "r", "review": item | {"id": "b"}})
    with scripted(reviews=[page], **{"reviews/a/claim": [taken], "reviews/b/claim": [mine]}) as server:
        client = connect(server.url)
        assert client.reviews.counts() == counts
        answer = client.reviews.claim_next()
        assert answer is not None
        assert answer.review.id == "b"
    gone = problem(404, "unknown-review")
    with scripted(reviews=[page], **{"reviews/a/claim": [gone]}) as server, pytest.raises(NotFound):
        connect(server.url).reviews.claim_next()


# --- files -----------------------------------------------------------------------------------------------------------

LINES = b'{"seq":1}\n' * 5000


def ndjson(body: bytes) -> bytes:
    return response(200, body, "application/x-ndjson")


def test_a_file_is_there_when_it_is_whole(connect: Connect, tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    with scripted(**{"audit/export": [ndjson(LINES)[:-10], CUT, ndjson(LINES)]}) as server:
        saved = connect(server.url, max_answer_bytes=100).audit.export(file)
        assert len(server.received) == 3
        assert server.received[0].headers["accept"] == "application/x-ndjson, application/problem+json"
    assert (saved.size_bytes, file.read_bytes()) == (len(LINES), LINES)
    assert [path.name for path in tmp_path.iterdir()] == ["audit.jsonl"]


@pytest.mark.parametrize(
    "reply",
    [
        ndjson(LINES)[:-10],
        response(200, LINES, "text/html"),
        response(200, LINES, "application/x-ndjson", content_encoding="gzip"),
        response(206, LINES, "application/x-ndjson"),
        problem(403, "forbidden"),
        CUT,
    ],
    ids=["cut", "html", "gzip", "206", "problem", "nothing"],
)
def test_what_is_no_file_leaves_none(connect: Connect, tmp_path: Path, reply: bytes) -> None:
    with scripted(**{"audit/export": [reply]}) as server, pytest.raises(Exception, match=r"40[03]|20[06]|no answer"):
        connect(server.url, max_attempts=2).audit.export(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_no_file_is_replaced(connect: Connect, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"mine")
    with scripted(**{"audit/export": [ndjson(LINES)]}) as server:
        with pytest.raises(FileExistsError):
            connect(server.url).audit.export(file)
        assert server.received == []
    assert file.read_bytes() == b"mine"


def test_nor_one_that_comes_meanwhile(tmp_path: Path) -> None:
    file = tmp_path / "file"
    call = file_call("/audit/export", file, "application/x-ndjson", {})
    response = httpx.Response(200, headers={"content-type": "application/x-ndjson"})
    with receiving(call, response, 0, 0.0) as body:
        assert body.add(LINES)
        file.write_bytes(b"mine")
        with pytest.raises(FileExistsError):
            body.reply(response)
    assert [(path, path.read_bytes()) for path in tmp_path.iterdir()] == [(file, b"mine")]


def test_a_file_that_stops_coming_is_given_up(connect: Connect, tmp_path: Path) -> None:
    with scripted(**{"audit/export": [HANG]}) as server, pytest.raises(ConnectionFailed):
        connect(server.url, timeout_s=0.5).audit.export(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


# --- methods ---------------------------------------------------------------------------------------------------------


def test_methods_keep_their_names_and_descriptions() -> None:
    client = HardlookClient("http://127.0.0.1:9")
    assert client.collections.move.__name__ == "move"
    assert client.collections.move.__doc__ == Collections.move.__doc__
    assert "pool" in (Collections.move.__doc__ or "")
    client.close()


@pytest.mark.anyio
async def test_async_methods_are_awaited_and_iterated() -> None:
    page = good({"request_id": "r", "jobs": [JOB, DONE], "next": None})
    with scripted(jobs=[page], **{"jobs/j": [job(DONE)]}) as server:
        async with AsyncHardlookClient(server.url) as client:
            assert [each.state async for each in client.jobs.list()] == ["queued", "done"]
            assert (await client.jobs.get("j")).job.done == 1
            with pytest.raises(ValueError, match="empty"):
                await client.jobs.get("")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_pauses_grow_to_a_bound() -> None:
    pauses = growing_pauses(1.0)
    seconds = [next(pauses) for _ in range(20)]
    assert seconds[0] == Pause(0.1)
    assert [pause.seconds for pause in seconds] == sorted(pause.seconds for pause in seconds)
    assert seconds[-1] == Pause(1.0)


def test_a_service_that_stays_busy_is_said(connect: Connect) -> None:
    with scripted(jobs=[problem(503, retry_after="0")]) as server, pytest.raises(Unavailable):
        connect(server.url, max_attempts=2).jobs.submit(b"x")
