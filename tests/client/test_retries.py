"""When the client asks again, how long it waits, and that nothing but a right answer becomes one."""

import json
import time
from collections.abc import Sequence
from email.utils import formatdate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.client import AnswerNotUnderstood, ConnectionFailed, HardlookError, ProblemError, Unavailable
from service.client.answers import Reply
from service.client.calls import classify_call
from service.client.exchange import Failure, Pause, RetryRules, Send, exchange
from service.client.images import LoadedImage
from service.client.retries import RETRIED_STATUSES, backoff_s, retry_after_s
from service.wire import ClassifyAnswer
from tests.client.conftest import Connect
from tests.client.scripted import CUT, HANG, pools, problem, response, scripted, verdicts, verdicts_body

SHARES = st.floats(0, 1, exclude_max=True)
CALL = classify_call([LoadedImage("a", b"x")], None)
GOOD = Reply(200, {"content-type": "application/json"}, json.dumps(verdicts_body("safe")).encode())


def busy(retry_after: str | None = None, status: int = 503) -> Reply:
    headers = {"content-type": "application/problem+json"} | ({"retry-after": retry_after} if retry_after else {})
    return Reply(status, headers, problem(status).partition(b"\r\n\r\n")[2])


def play(
    outcomes: Sequence[Reply | Failure], rules: RetryRules, share: float = 0.5, sending_s: float = 0.0
) -> tuple[list[Send], list[float], ClassifyAnswer | HardlookError]:
    """Run one exchange with a clock of its own; the last outcome repeats."""
    now_s, sends, pauses = 0.0, list[Send](), list[float]()
    steps = exchange(CALL, rules, "id", clock=lambda: now_s, share=lambda: share)
    outcome: Reply | Failure | None = None
    try:
        while True:
            step = steps.send(outcome)
            if isinstance(step, Pause):
                now_s, outcome = now_s + step.seconds, None
                pauses.append(step.seconds)
            else:
                sends.append(step)
                now_s, outcome = now_s + sending_s, outcomes[min(len(sends), len(outcomes)) - 1]
    except StopIteration as stop:
        return sends, pauses, stop.value
    except HardlookError as error:
        return sends, pauses, error


# --- the schedule ----------------------------------------------------------------------------------------------------


@given(attempt=st.integers(1, 2000), share=SHARES)
def test_backoff_is_a_share_of_a_bounded_power(attempt: int, share: float) -> None:
    assert backoff_s(attempt, share) == pytest.approx(share * min(10.0, 0.25 * 2 ** min(attempt - 1, 10)))


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None), ("", None), ("0", 0), (" 7 ", 7), ("120", 120), ("9" * 30, float("inf")), ("-1", None),
        ("1.5", None), ("\u0663", None), ("soon", None), ("nan", None),
        (formatdate(1_000_030, usegmt=True), 30), (formatdate(999_000, usegmt=True), 0),
        ("Fri, 31 Feb 2026 00:00:00 GMT", None), ("Mon, 12 Jan 1970 13:46:50 -0000", 10),
    ],
)  # fmt: skip
def test_retry_after(header: str | None, seconds: float | None) -> None:
    assert retry_after_s(header, 1_000_000.0) == seconds


@given(header=st.text(max_size=40))
def test_no_header_breaks_the_client(header: str) -> None:
    seconds = retry_after_s(header, 0.0)
    assert seconds is None or seconds >= 0


@given(
    waits=st.lists(st.one_of(st.none(), st.integers(0, 30)), min_size=1, max_size=12),
    timeout_s=st.floats(0.1, 100),
    max_attempts=st.integers(1, 12),
    share=SHARES,
    sending_s=st.floats(0, 10),
)
def test_the_bounds_hold_whatever_the_service_asks_for(
    waits: list[int | None], timeout_s: float, max_attempts: int, share: float, sending_s: float
) -> None:
    replies = [busy(None if wait is None else str(wait)) for wait in waits]
    sends, pauses, outcome = play(replies, RetryRules(timeout_s, max_attempts), share, sending_s)
    assert isinstance(outcome, Unavailable)
    assert 1 <= len(sends) <= max_attempts
    assert len(pauses) == len(sends) - 1
    assert sends[0].timeout_s == timeout_s
    assert all(send.timeout_s > 0 for send in sends)
    spent = [sum(pauses[:i]) + i * sending_s for i in range(len(sends))]
    assert [send.timeout_s for send in sends] == pytest.approx([timeout_s - s for s in spent])
    for attempt, (pause, wait) in enumerate(zip(pauses, [*waits, *12 * [waits[-1]]], strict=False), 1):
        assert pause == pytest.approx((wait or 0) + backoff_s(attempt, share))


def test_each_attempt_has_its_own_request_id() -> None:
    sends, _, outcome = play([busy(), busy(status=429), Failure("cut", True), GOOD], RetryRules(60, 5))
    assert isinstance(outcome, ClassifyAnswer)
    assert [send.request_id for send in sends] == ["id", "id-2", "id-3", "id-4"]
    assert outcome.results[0].id == "a"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 408, 413, 415, 422, 500, 504])
def test_other_statuses_are_final(status: int) -> None:
    sends, _, outcome = play([busy(status=status)], RetryRules(60, 5))
    assert status not in RETRIED_STATUSES
    assert len(sends) == 1
    assert isinstance(outcome, ProblemError)
    assert outcome.status == status


def test_a_lasting_failure_is_final() -> None:
    sends, _, outcome = play([Failure("certificate", False)], RetryRules(60, 5))
    assert len(sends) == 1
    assert str(outcome) == "no answer: certificate"


# --- over a socket ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first",
    [
        problem(503, retry_after="0"),
        problem(429, "rate-limited", retry_after="0"),
        response(502, b"<html>", "text/html"),
        CUT,
        response(200, b"{}")[:-1],
        b"not http at all\r\n\r\n",
    ],
    ids=["503", "429", "502", "cut", "cut within", "garbage"],
)
def test_asked_again_until_there_is_an_answer(connect: Connect, first: bytes) -> None:
    with scripted(classify=[first, verdicts("unsafe")]) as server:
        answer = connect(server.url).classify(b"x", request_id="mine")
        assert [result.status for result in answer.results] == ["ok"]
        assert [request.headers["x-request-id"] for request in server.received] == ["mine", "mine-2"]
        assert {request.body for request in server.received} == {b"x"}


def test_random_request_ids_differ(connect: Connect) -> None:
    with scripted(pools=[pools()]) as server:
        client = connect(server.url)
        client.pools()
        client.pools()
        assert len({request.headers["x-request-id"] for request in server.received}) == 2


def test_refused_connections_are_tried_again_and_counted(connect: Connect) -> None:
    with pytest.raises(ConnectionFailed, match=r"(refused|failed).*after 2 attempts") as caught:
        connect("http://127.0.0.1:9", max_attempts=2).classify(b"x")
    assert caught.value.attempts == 2
    assert not connect("http://127.0.0.1:9").is_ready()


def test_the_timeout_is_for_everything(connect: Connect) -> None:
    with scripted(classify=[problem(503, retry_after="0"), HANG]) as server:
        began_s = time.monotonic()
        with pytest.raises(ConnectionFailed):
            connect(server.url, timeout_s=1.0).classify(b"x")
        assert 0.5 < time.monotonic() - began_s < 3
        assert len(server.received) == 2


def test_a_long_retry_after_is_not_waited_for(connect: Connect) -> None:
    for wait in ("3600", formatdate(time.time() + 3600, usegmt=True)):
        with scripted(classify=[problem(503, retry_after=wait)]) as server:
            with pytest.raises(Unavailable) as caught:
                connect(server.url).classify(b"x")
            assert caught.value.retry_after_s == pytest.approx(3600, abs=5)
            assert len(server.received) == 1


def test_redirects_are_not_followed(connect: Connect) -> None:
    with scripted(pools=[pools()]) as elsewhere:
        moved = response(307, b"", location=f"{elsewhere.url}/pools")
        with scripted(pools=[moved]) as server, pytest.raises(AnswerNotUnderstood, match="redirect"):
            connect(server.url, api_key="key").pools()
        assert elsewhere.received == []


def changed(**changes: Any) -> bytes:
    return response(200, json.dumps(verdicts_body("safe") | changes).encode())


RESULT = verdicts_body("safe")["results"][0]


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (response(200, b"{}"), "request_id"),
        (response(200, b"safe"), "JSON"),
        (response(200, b""), "JSON"),
        (response(200, json.dumps(verdicts_body("safe")).encode(), "text/html"), "content type 'text/html'"),
        (response(200, json.dumps(verdicts_body("safe")).encode(), content_encoding="gzip"), "encoded"),
        (response(201, json.dumps(verdicts_body("safe")).encode()), "status 201"),
        (response(204, b""), "status 204"),
        (changed(results=[]), "0 results"),
        (changed(results=[RESULT, RESULT]), "2 results"),
        (changed(results=[RESULT | {"id": "1"}]), "not those of the 1 images"),
        (changed(results=[RESULT | {"verdict": "harmless"}]), "verdict"),
        (changed(results=[{name: value for name, value in RESULT.items() if name != "verdict"}]), "verdict"),
        (changed(results=[RESULT | {"status": "error"}]), "error"),
        (changed(later="x" * 20_000), "too large"),
        (response(500, b"<html>", "text/html"), "content type 'text/html'"),
        (response(404, b'{"detail": "Not Found"}'), "content type"),
        (response(422, b"{}", "application/problem+json"), "type"),
    ],
)
def test_what_is_no_answer_is_no_verdict(connect: Connect, reply: bytes, reason: str) -> None:
    with scripted(classify=[reply]) as server:
        with pytest.raises(AnswerNotUnderstood, match=reason) as caught:
            connect(server.url, max_answer_bytes=10_000).classify(b"x")
        assert len(server.received) == 1
        assert "x" * 100 not in str(caught.value)


def test_answers_in_another_order_are_no_answers(connect: Connect) -> None:
    body = verdicts_body("safe", "unsafe")
    body["results"].reverse()
    swapped = response(200, json.dumps(body).encode())
    with scripted(classify=[swapped]) as server, pytest.raises(AnswerNotUnderstood, match="not those"):
        connect(server.url).classify([b"x", b"y"])


@pytest.mark.parametrize("reply", [problem(503, "not-ready"), response(502, b"<html>", "text/html"), CUT])
def test_not_ready_is_false_and_asked_once(connect: Connect, reply: bytes) -> None:
    with scripted(readyz=[reply]) as server:
        assert not connect(server.url).is_ready()
        assert len(server.received) == 1


@pytest.mark.parametrize("reply", [response(200, b"ok", "text/plain"), problem(404, "not-found")])
def test_another_service_is_an_error_and_not_unready(connect: Connect, reply: bytes) -> None:
    with scripted(readyz=[reply]) as server, pytest.raises((AnswerNotUnderstood, ProblemError)):
        connect(server.url).is_ready()


def test_proxies_of_the_environment_are_used_only_when_asked(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted(pools=[pools()]) as server:
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert connect(server.url).pools().request_id == "r"
        with pytest.raises(ConnectionFailed):
            connect(server.url, trust_env=True, max_attempts=1).pools()
        assert len(server.received) == 1
