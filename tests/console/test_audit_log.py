"""The audit log as pages: entries, filters, the end, whether it is whole, and the file."""

import asyncio
import base64
import html
import json
import re
import sqlite3
from contextlib import closing
from typing import Any

import pytest

from indexer.catalog.chain import verify_jsonl
from perception.testing import encoded, synthetic_image
from service.api import audit as api
from service.client import ConnectionFailed
from service.client.audit import Audit
from service.console.gate import COOKIE
from service.console.pages import audit_log
from service.wire_audit import AuditEntry
from tests.console.conftest import Console, StartConsole, Visitor

PATH = "/console/audit-log"
HOSTILE = "</pre><script>alert(1)</script>"
NUMBERS = re.compile(r'<td class="number">(\d+)</td>\s*<td class="nowrap">')


@pytest.fixture
def admin(console: Console) -> Visitor:
    return console.visitor("admin")


def numbers(text: str) -> list[int]:
    """Of the entries that a page shows."""
    return [int(number) for number in NUMBERS.findall(text)]


def publish(console: Console, times: int, reason: str = "") -> None:
    for number in range(times):
        headers = {"X-API-Key": console.key("pools:write")}
        body = {"name": f"name {number}", "reason": reason}
        response = console.client.post("/collections/pools/versions", headers=headers, json=body)
        assert response.status_code == 200, response.text


def link(text: str, words: str) -> str:
    [found] = re.findall(rf'href="([^"]+)"[^>]*>{words}<', text)
    return html.unescape(found)


def test_entries_are_shown_with_hostile_text_as_text(console: Console, admin: Visitor) -> None:
    publish(console, 1, HOSTILE)
    text = admin.page(PATH)
    assert "<script>alert" not in text
    assert html.escape(HOSTILE) in text
    assert "version.publish" in text
    assert "&#34;name&#34;: &#34;name 0&#34;" in text
    assert numbers(text) == sorted(numbers(text))


def test_the_log_is_leafed_through_in_both_directions(
    console: Console, admin: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_log, "PAGE", 3)
    publish(console, 6)
    text, seen = admin.page(PATH), []
    while True:
        seen += numbers(text)
        if "After these" not in text:
            break
        text = admin.page(link(text, "After these"))
    assert seen == list(range(1, len(seen) + 1))
    end = admin.page(link(text, "Newest"))
    assert numbers(end) == seen[-3:]
    assert numbers(admin.page(link(end, "Before these"))) == seen[-6:-3]
    assert numbers(admin.page(link(end, "Oldest"))) == seen[:3]


def test_the_end_is_that_of_what_was_asked_for(
    console: Console, admin: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_log, "PAGE", 2)
    publish(console, 5)
    console.key("classify")
    text = admin.page(PATH, kind="version.publish", collection="pools", end="1")
    kinds = re.findall(r'<td class="nowrap">([a-z]+\.[a-z]+)</td>', text)
    assert kinds == ["version.publish"] * 2
    assert "name 4" in text
    before = admin.page(link(text, "Before these"))
    assert [f"name {number}" in before for number in range(5)] == [False, True, True, False, False]
    assert "There are no such entries." in admin.page(PATH, kind="exemplar.nothing", end="1")


def test_decisions_have_a_chain_of_their_own(console: Console, admin: Visitor) -> None:
    headers = {"X-API-Key": console.key("classify")}
    png = encoded(synthetic_image(4244))
    console.client.post("/classify", headers=headers, files={"image": ("a.png", png)})
    for _ in range(200):  # a verdict is recorded a moment after its answer
        text = admin.page(PATH, chain="decisions")
        if numbers(text):
            break
    assert numbers(text) == [1]
    assert 'class="tag tag-' in text
    assert numbers(admin.page(PATH, chain="decisions", end="1")) == [1]


def test_the_log_is_whole(admin: Visitor) -> None:
    response = admin.post(f"{PATH}/verify")
    assert response.status_code == 200
    assert "It is whole." in response.text
    assert response.text.count("nothing wrong") == 2


def test_a_log_that_was_changed_is_not(console: Console, admin: Visitor) -> None:
    publish(console, 2, "as agreed")
    with closing(sqlite3.connect(console.folder / "catalog.sqlite3")) as database:
        # Somebody who can write to the file.
        for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            database.execute(f"DROP TRIGGER {name}")
        changed = database.execute("UPDATE entries SET reason = ? WHERE reason = 'as agreed'", (HOSTILE,))
        assert changed.rowcount == 2
        database.commit()
    response = admin.post(f"{PATH}/verify")
    assert "It is not." in response.text
    assert 'role="alert"' in response.text
    assert "<script>alert" not in response.text


def test_a_check_that_takes_too_long_says_so(admin: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise ConnectionFailed("not there in time")

    monkeypatch.setattr(Audit, "verify", never)
    response = admin.post(f"{PATH}/verify")
    assert response.status_code == 200
    assert "Not known." in response.text


def test_the_file_is_what_the_api_sends(console: Console, admin: Visitor) -> None:
    publish(console, 3)
    response = admin.get(f"{PATH}/export", chain="changes")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/x-ndjson"
    assert response.headers["content-disposition"] == 'attachment; filename="hardlook-changes.jsonl"'
    assert len(response.headers.get_list("x-request-id")) == 1
    lines = response.text.splitlines()
    assert [json.loads(line)["seq"] for line in lines] == list(range(1, len(lines) + 1))
    assert verify_jsonl(lines).problems == ()
    sent = console.client.get("/audit/export?chain=changes", headers={"X-API-Key": console.key("admin")}).text
    assert sent.startswith(response.text)


def test_the_file_is_sent_piece_by_piece(console: Console, admin: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_LINES", 1)
    publish(console, 3)
    n = len(admin.get(f"{PATH}/export").text.splitlines())
    pieces: list[bytes] = []

    async def fetch() -> None:
        cookie = f"{COOKIE}={admin.client.cookies[COOKIE]}".encode()
        unsent = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive() -> Any:
            return unsent.pop() if unsent else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            pieces.append(message.get("body", b""))

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": f"{PATH}/export",
            "raw_path": f"{PATH}/export".encode(),
            "query_string": b"",
            "headers": [(b"host", b"testserver"), (b"cookie", cookie)],
            "client": ("127.0.0.1", 1),
            "server": ("testserver", 80),
        }
        await console.client.app(scope, receive, send)

    assert console.client.portal is not None
    console.client.portal.call(fetch)
    assert len([piece for piece in pieces if piece]) == n


def test_the_file_has_embeddings_where_they_are_wanted(console: Console, admin: Visitor) -> None:
    headers = {"X-API-Key": console.key("pools:write")}
    data = base64.b64encode(encoded(synthetic_image(4244))).decode()
    body = {"items": [{"label": "safe", "data": data}]}
    assert console.client.post("/collections/pools/exemplars", headers=headers, json=body).status_code == 200
    assert '"embeddings":' not in admin.get(f"{PATH}/export").text
    assert '"embeddings":' in admin.get(f"{PATH}/export", embeddings="1").text


@pytest.mark.parametrize(
    ("params", "status"),
    [
        ({"chain": "gone"}, 400),
        ({"chain": "gone", "end": "1"}, 400),
        ({"after": "x"}, 403),
        ({"before": "-1"}, 403),
        ({"after": "9" * 16}, 400),  # beyond the numbers that JSON keeps exactly
        ({"after": "9" * 17}, 403),
        ({"kind": "x" * 5000}, 400),
        ({"subject": "a\0b"}, 400),
        ({"subject": "a\0b", "end": "1"}, 400),
    ],
)
def test_what_no_log_has_is_a_page_too(admin: Visitor, params: dict[str, str], status: int) -> None:
    response = admin.get(PATH, **params)
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("text/html")


def test_a_file_of_no_chain_is_refused_as_a_page(admin: Visitor) -> None:
    response = admin.get(f"{PATH}/export", chain="gone")
    assert response.status_code == 400
    assert 'role="alert"' in response.text


def test_long_bodies_are_cut_and_it_is_said() -> None:
    blank = dict.fromkeys(AuditEntry.model_fields, "")
    said = {"chain": "changes", "seq": 1, "body": {"records": ["x" * 10_000]}}
    entry = AuditEntry.model_validate({**blank, **said})
    text, left_out = audit_log.body_text(entry)
    assert len(text) < 5000
    assert len(text) + left_out == len(json.dumps(entry.body, indent=1))


def test_only_admins_see_it(console: Console) -> None:
    visitor = console.visitor("classify", "similar", "pools:write", "review", "metrics")
    for path in (PATH, f"{PATH}/export"):
        assert visitor.get(path).status_code == 403
    assert visitor.post(f"{PATH}/verify").status_code == 403
    assert console.visitor("admin").client.post(f"{PATH}/verify", data={"form_token": "x"}).status_code == 403


def test_without_a_catalogue_there_is_no_log(start_console: StartConsole) -> None:
    visitor = start_console(catalog="off").visitor("admin")
    for path in (PATH, f"{PATH}?end=1", f"{PATH}/export"):
        response = visitor.get(path)
        assert response.status_code == 409
        assert "HARDLOOK_CATALOG" in response.text
