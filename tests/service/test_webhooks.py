"""Webhooks: signatures, delivery again and again until it is taken, giving up, and whom nothing is sent to."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from email.utils import formatdate
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from sqlalchemy import select, update

from indexer.catalog.clock import parse_time
from indexer.catalog.tables import deliveries as table
from service.client.webhooks import WebhookRejected, verify_webhook
from service.editing import Editor
from service.webhook_file import Hook
from service.webhook_sender import Message, NotSent, Sender
from service.webhook_signing import signature, signing_key
from service.webhooks import ATTEMPTS, FIRST_WAIT_S, LAST_WAIT_S, Event, Result, Webhooks, wait_s
from tests.service.editors import opened
from tests.service.fetching import NO_TLS
from tests.service.recording_network import Names, RecordingNetwork, Server, head, sends
from tests.service.webhook_receivers import SECRET, Receiver, always, hook, receiving

T = TypeVar("T")
LONG_S = 20.0
PUBLIC = "93.184.215.14"
DONE = Event("job.done", {"job_id": "j"})
# The vector of the reference implementations of Standard Webhooks.
VECTOR_ID, VECTOR_S, VECTOR_BODY = "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}'
VECTOR = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, LONG_S))


class Log:
    """What became of attempts, by hook."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Result]] = []
        self._changed = asyncio.Event()

    def __call__(self, name: str, result: Result) -> None:
        self.seen.append((name, result))
        self._changed.set()

    async def has(self, *expected: tuple[str, Result]) -> None:
        """Wait until these are among what was seen."""
        while any(self.seen.count(each) < expected.count(each) for each in expected):
            self._changed.clear()
            await self._changed.wait()


def delivered(name: str, n: int) -> list[tuple[str, Result]]:
    return [(name, "delivered")] * n


@asynccontextmanager
async def sending(editor: Editor, hooks: Sequence[Hook], log: Log, **options: Any) -> AsyncIterator[Webhooks]:
    """Webhooks that try again at once, and are sending."""
    options = {"sender": Sender(tls=NO_TLS, timeout_s=5.0), "poll_s": 0.02, "wait_s": lambda attempts: 0.0, **options}
    webhooks = Webhooks(editor, hooks, observe=log, **options)
    task = asyncio.create_task(webhooks.run())
    try:
        yield webhooks
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def stored(editor: Editor) -> list[tuple[str, int, str]]:
    """State, attempts and last error of each message."""
    query = select(table).order_by(table.c.time, table.c.id)
    rows = await editor.read(lambda connection: connection.execute(query).all())
    return [(row.state, row.attempts, row.last_error) for row in rows]


# --- signatures ------------------------------------------------------------------------------------------------------


def test_signatures_are_those_of_the_convention() -> None:
    assert signature(signing_key(SECRET), VECTOR_ID, VECTOR_S, VECTOR_BODY) == VECTOR


def signed(body: bytes, at_s: int, id: str = "m", secret: str = SECRET) -> dict[str, str]:
    sign = signature(signing_key(secret), id, at_s, body)
    return {"Webhook-Id": id, "Webhook-Timestamp": str(at_s), "Webhook-Signature": sign}


BODY = json.dumps({"id": "m", "type": "job.done", "timestamp": "2026-11-21T09:30:00+00:00", "data": {"n": 1}}).encode()
NOW_S = 1_800_000_000


@pytest.fixture
def receiver_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The receiver's clock stands still: a suite may run for longer than messages are believed."""
    monkeypatch.setattr("service.client.webhooks.time", SimpleNamespace(time=lambda: NOW_S))


@pytest.mark.usefixtures("receiver_clock")
def test_receivers_verify() -> None:
    headers = signed(BODY, NOW_S)
    message = verify_webhook(headers, BODY, SECRET)
    assert (message.id, message.type, message.data) == ("m", "job.done", {"n": 1})
    other = f"whsec_{'AAAA' * 10}"
    headers["Webhook-Signature"] = f"v1a,x {signed(BODY, NOW_S, secret=other)['Webhook-Signature']} {VECTOR} "
    assert verify_webhook(headers, BODY, other).id == "m"


@pytest.mark.usefixtures("receiver_clock")
@pytest.mark.parametrize(
    ("headers", "body", "reason"),
    [
        (signed(BODY, NOW_S), BODY + b" ", "no signature"),
        (signed(BODY, NOW_S, secret=f"whsec_{'AAAA' * 10}"), BODY, "no signature"),
        ({**signed(BODY, NOW_S), "Webhook-Id": "n"}, BODY, "no signature"),
        ({**signed(BODY, NOW_S), "Webhook-Timestamp": str(NOW_S + 1)}, BODY, "no signature"),
        ({**signed(BODY, NOW_S), "Webhook-Signature": ""}, BODY, "no signature"),
        ({**signed(BODY, NOW_S), "Webhook-Signature": "v1,\udcff"}, BODY, "no signature"),
        ({**signed(BODY, NOW_S), "Webhook-Timestamp": "soon"}, BODY, "not a number"),
        ({"webhook-id": "m"}, BODY, "no header webhook-timestamp, webhook-signature"),
        (signed(BODY, NOW_S - 400), BODY, "300 s ago"),
        (signed(BODY, NOW_S + 400), BODY, "ahead"),
        (signed(b"[]", NOW_S), b"[]", "none of this service"),
        (signed(b"\xff", NOW_S), b"\xff", "none of this service"),
        (signed(BODY, NOW_S, id="n"), BODY, "id"),
    ],
)
def test_receivers_refuse(headers: dict[str, str], body: bytes, reason: str) -> None:
    with pytest.raises(WebhookRejected, match=reason) as caught:
        verify_webhook(headers, body, SECRET)
    assert SECRET[6:] not in str(caught.value)


# --- delivery --------------------------------------------------------------------------------------------------------


def test_a_receiver_that_fails_twice_gets_it_the_third_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def answers(n: int) -> tuple[str, ...]:
        return ("500 Oh",) if n < 2 else ("204 No Content",)

    async def work() -> Receiver:
        log = Log()
        async with opened(tmp_path) as editor, receiving(answers) as receiver:
            previous = f"whsec_{'AAAA' * 10}"
            there = hook(receiver.url, previous_secret=previous)
            async with sending(editor, [there], log) as webhooks:
                assert webhooks.wanted("job.done")
                assert not webhooks.wanted("verdict.unsafe")
                await editor.write(partial(webhooks.enqueue, events=[DONE, Event("verdict.unsafe", {})]))
                await log.has(("a", "delivered"))
                assert webhooks.depth == 0
            assert log.seen == [("a", "failed"), ("a", "failed"), ("a", "delivered")]
            assert await stored(editor) == [("delivered", 3, "")]
            for request in receiver.requests:
                for secret in (SECRET, previous):
                    verify_webhook(request.headers, request.body, secret)
        return receiver

    first, second, third = run(work()).requests
    assert first.line == "POST /hook?t=1 HTTP/1.1"
    assert first.headers["content-type"] == "application/json"
    assert first.body == second.body == third.body
    assert {request.headers["webhook-id"] for request in (first, second, third)} == {json.loads(first.body)["id"]}
    assert json.loads(first.body)["data"] == {"job_id": "j"}
    assert "status 500" in caplog.text
    assert "t=1" not in caplog.text
    assert SECRET[6:] not in caplog.text


def test_what_an_earlier_process_left_is_sent(tmp_path: Path) -> None:
    """It stored the message and was killed."""

    async def work() -> None:
        log = Log()
        async with receiving(always("200 OK")) as receiver:
            async with opened(tmp_path) as editor:
                await editor.write(partial(Webhooks(editor, [hook(receiver.url)]).enqueue, events=[DONE, DONE]))
            async with opened(tmp_path) as editor, sending(editor, [hook(receiver.url)], log):
                await log.has(("a", "delivered"), ("a", "delivered"))
        assert len({request.headers["webhook-id"] for request in receiver.requests}) == 2

    run(work())


def test_replicas_send_a_message_once(tmp_path: Path) -> None:
    async def work() -> None:
        log, messages = Log(), 30
        async with opened(tmp_path) as one, opened(tmp_path) as other, receiving(always("200 OK")) as receiver:
            hooks = [hook(receiver.url)]
            async with sending(one, hooks, log) as webhooks, sending(other, hooks, log):
                for _ in range(messages):
                    await one.write(partial(webhooks.enqueue, events=[DONE]))
                await log.has(*delivered("a", messages))
            assert len({request.headers["webhook-id"] for request in receiver.requests}) == messages
            assert len(receiver.requests) == messages

    run(work())


def test_a_slow_hook_holds_up_no_other(tmp_path: Path) -> None:
    async def work() -> None:
        log = Log()
        async with (
            opened(tmp_path) as editor,
            receiving(lambda n: None) as silent,
            receiving(always("200 OK")) as quick,
        ):
            hooks = [hook(silent.url, "silent"), hook(quick.url, "quick")]
            async with sending(editor, hooks, log) as webhooks:
                await editor.write(partial(webhooks.enqueue, events=[DONE] * 9))
                await silent.has(1)
                await log.has(*delivered("quick", 9))
            assert {name for name, _ in log.seen} == {"quick"}

    run(work())


def test_a_receiver_that_is_gone_gets_nothing_more(tmp_path: Path) -> None:
    async def work() -> None:
        log = Log()
        async with opened(tmp_path) as editor, receiving(always("410 Gone")) as receiver:
            later = Webhooks(editor, [hook(receiver.url)])
            async with sending(editor, [hook(receiver.url)], log) as webhooks:
                await editor.write(partial(webhooks.enqueue, events=[DONE]))
                await log.has(("a", "given-up"))
                assert not webhooks.wanted("job.done")
                await editor.write(partial(webhooks.enqueue, events=[DONE]))
            assert await stored(editor) == [("given-up", 1, "it answered with status 410")]
            assert later.wanted("job.done")  # until a restart

    run(work())


def test_it_is_given_up_after_the_last_attempt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        log = Log()
        async with opened(tmp_path) as editor, receiving(always("503 No")) as receiver:
            await editor.write(partial(Webhooks(editor, [hook(receiver.url)]).enqueue, events=[DONE]))
            await editor.write(lambda connection: connection.execute(update(table).values(attempts=ATTEMPTS - 2)))
            async with sending(editor, [hook(receiver.url)], log):
                await log.has(("a", "given-up"))
            assert log.seen == [("a", "failed"), ("a", "given-up")]
            assert await stored(editor) == [("given-up", ATTEMPTS, "it answered with status 503")]

    run(work())
    assert f"given up after {ATTEMPTS} attempts" in caplog.text


@pytest.mark.parametrize(
    ("retry_after", "expected_s"),
    [("120", 120), ("DATE", 120), ("999999", LAST_WAIT_S), ("soon", 0), ("", 0)],
    ids=["seconds", "date", "too long", "unreadable", "empty"],
)
def test_a_receiver_may_ask_for_time(tmp_path: Path, retry_after: str, expected_s: float) -> None:
    async def work() -> float:
        log, value = Log(), retry_after.replace("DATE", formatdate(time.time() + 120, usegmt=True))
        async with opened(tmp_path) as editor, receiving(always("429 Slow", f"Retry-After: {value}")) as receiver:
            async with sending(editor, [hook(receiver.url)], log, wait_s=lambda attempts: 1.0) as webhooks:
                await editor.write(partial(webhooks.enqueue, events=[DONE]))
                await log.has(("a", "failed"))
            next_at = await editor.read(lambda connection: connection.execute(select(table.c.next_at)).scalar_one())
        return parse_time(next_at).timestamp() - time.time()

    assert run(work()) == pytest.approx(max(expected_s, 1.0), abs=30.0 * (expected_s > 0) + 2.0)


def test_waits_grow_from_seconds_to_hours() -> None:
    waits = [wait_s(attempts) for attempts in range(1, ATTEMPTS)]
    assert waits[0] == FIRST_WAIT_S
    assert waits[-1] == pytest.approx(LAST_WAIT_S)
    assert wait_s(ATTEMPTS + 5) == LAST_WAIT_S
    ratios = [after / before for before, after in pairwise(waits)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))


def test_a_dead_receiver_does_not_fill_the_disk(tmp_path: Path) -> None:
    async def work() -> None:
        log = Log()
        async with opened(tmp_path) as editor:
            webhooks = Webhooks(editor, [hook()], observe=log, max_waiting=2)
            await editor.write(partial(webhooks.enqueue, events=[DONE] * 5))
            assert len(await stored(editor)) == webhooks.depth == 2
            assert log.seen == [("a", "dropped")] * 3

    run(work())


def test_a_bug_of_one_hook_is_logged_and_the_others_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Sender):
        async def send(self, hook: Hook, message: Message) -> None:
            if hook.name == "broken":
                raise RuntimeError("something unforeseen")

    async def work() -> None:
        log = Log()
        hooks = [hook(name="broken"), hook(name="good")]
        async with opened(tmp_path) as editor, sending(editor, hooks, log, sender=Broken(tls=NO_TLS)) as webhooks:
            await editor.write(partial(webhooks.enqueue, events=[DONE]))
            await log.has(("good", "delivered"), ("broken", "given-up"))
            assert sorted(await stored(editor)) == [
                ("delivered", 1, ""),
                ("given-up", ATTEMPTS, "a bug of this service"),
            ]

    run(work())
    assert "something unforeseen" in caplog.text


# --- whom nothing is sent to -----------------------------------------------------------------------------------------


def send_to(url: str, server: Server, addresses: Sequence[str], **changes: Any) -> RecordingNetwork:
    """Send one message through a network in memory."""
    network = RecordingNetwork(dict.fromkeys((PUBLIC, "127.0.0.1", "10.0.0.7", "private.example.org"), server))

    async def work() -> None:
        resolve = Names({"hooks.example.org": [addresses]})
        async with Sender(resolve=resolve, network=network, tls=NO_TLS, timeout_s=0.5) as sender:
            await sender.send(hook(url, **changes), Message("m", "{}"))

    try:
        run(work())
    finally:
        assert all(stream.closed for stream in network.streams)
    return network


TAKEN = sends(head("200 OK", "Content-Length: 0"))


def test_the_connection_goes_to_a_public_address_and_tls_to_the_name() -> None:
    network = send_to("https://hooks.example.org:8443/a?b", TAKEN, [PUBLIC])
    assert network.attempts == [(PUBLIC, 8443)]
    [stream] = network.streams
    assert stream.server_name == "hooks.example.org"
    assert stream.request.startswith(b"POST /a?b HTTP/1.1\r\nHost: hooks.example.org:8443\r\nUser-Agent: hardlook\r\n")


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["10.0.0.7"], ["169.254.169.254"], [PUBLIC, "10.0.0.7"]])
def test_a_name_does_not_lead_inside(addresses: list[str]) -> None:
    with pytest.raises(NotSent, match="not public") as caught:
        send_to("https://hooks.example.org/", TAKEN, addresses)
    assert "10.0.0.7" not in str(caught.value)


def test_the_operator_may_allow_it() -> None:
    network = send_to("http://private.example.org/", TAKEN, [], allow_private=True)
    assert network.attempts == [("private.example.org", 80)]


def test_redirects_are_not_followed() -> None:
    with pytest.raises(NotSent, match="status 302"):
        send_to("https://hooks.example.org/", sends(head("302 Found", "Location: http://127.0.0.1/")), [PUBLIC])


def test_a_receiver_without_an_address_a_connection_or_http() -> None:
    with pytest.raises(NotSent, match="no address"):
        send_to("https://other.example.org/", TAKEN, [])
    with pytest.raises(NotSent, match="ConnectError"):
        send_to("https://hooks.example.org/", TAKEN, ["8.8.8.8"])
    with pytest.raises(NotSent, match="ProtocolError"):
        send_to("https://hooks.example.org/", sends(b"220 smtp ready, your secret is x\r\n"), [PUBLIC])


async def _silent(request: str) -> AsyncIterator[bytes]:
    await asyncio.Event().wait()
    yield b""


def test_a_silent_receiver_is_left() -> None:
    with pytest.raises(NotSent, match=r"within 0\.5 s"):
        send_to("https://hooks.example.org/", _silent, [PUBLIC])
