"""Versions as pages: what there is, what is different, trying out, and going back, all without scripts."""

import base64
import re
from typing import Any

import pytest

from perception.testing import encoded, synthetic_image
from service.console.pages import versions
from tests.console.conftest import Console, StartConsole, Visitor

PNG = encoded(synthetic_image(4244))
HOSTILE = "<b onclick=x>&\"'"
PATH = "/console/versions"


@pytest.fixture
def operator(console: Console) -> Visitor:
    return console.visitor("pools:write")


def ask(console: Console, method: str, path: str, **options: Any) -> Any:
    response = console.client.request(method, path, headers={"X-API-Key": console.key("admin")}, **options)
    assert response.status_code == 200, response.text
    return response.json()


def verdict(console: Console) -> dict[str, Any]:
    found: dict[str, Any] = ask(console, "POST", "/classify", files={"image": ("a.png", PNG)})["results"][0]
    return {key: value for key, value in found.items() if key != "id"}


def add(console: Console, id: str, label: str = "unsafe", number: int = 4244) -> str:
    """Add an exemplar; the version after it."""
    data = base64.b64encode(encoded(synthetic_image(number))).decode()
    body = {"items": [{"id": id, "label": label, "data": data}]}
    return str(ask(console, "POST", "/collections/pools/exemplars", json=body)["version"])


def present(console: Console) -> str:
    return str(ask(console, "GET", "/pools")["collections"][0]["version"])


def test_versions_are_listed_with_who_and_why(console: Console, operator: Visitor) -> None:
    fields = {"collection": "pools", "name": HOSTILE, "reason": "<i>why</i>"}
    text = operator.sent(f"{PATH}/publish", fields)
    assert "The present state is a version now." in text
    assert "<b onclick" not in text
    assert "&lt;b onclick=x&gt;&amp;&#34;&#39;" in text
    assert "&lt;i&gt;why&lt;/i&gt;" in text
    assert re.search(r"<code>key:[0-9a-f]{12}</code>", text)
    assert "buffer 3, safe 3, unsafe 3, 9 in all" in text
    assert "built offline" in text


def test_the_list_is_leafed_through(console: Console, operator: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "PAGE", 2)
    for name in ("alpha", "beta", "gamma"):
        operator.post(f"{PATH}/publish", {"collection": "pools", "name": name})
    text = operator.page(PATH)
    assert [name in text for name in ("gamma", "beta", "alpha", "built offline")] == [True, True, False, False]
    [older] = re.findall(r'href="([^"]+)" rel="next"', text)
    text = operator.page(older.replace("&amp;", "&"))
    assert [name in text for name in ("gamma", "beta", "alpha", "built offline")] == [False, False, True, True]


def test_going_back_gives_the_verdict_of_before(console: Console, operator: Visitor) -> None:
    before, version = verdict(console), present(console)
    add(console, "wrong")
    after = verdict(console)
    assert after["verdict"] != before["verdict"]
    text = operator.page(f"{PATH}/roll-back", collection="pools", version=version)
    assert "<dt>Removed</dt><dd>1</dd>" in text
    assert "buffer 3, safe 3, unsafe 4, 10 in all" in text
    assert "buffer 3, safe 3, unsafe 3, 9 in all" in text
    assert verdict(console) == after  # looking changes nothing
    text = operator.sent(f"{PATH}/roll-back", {"collection": "pools", "version": version, "reason": "it was wrong"})
    assert "The earlier state is the present one again." in text
    assert "it was wrong" in text
    assert verdict(console) == before
    again = operator.post(f"{PATH}/roll-back", {"collection": "pools", "version": version})
    assert again.headers["location"].endswith("notice=unchanged")


def test_a_difference_names_ids_with_links(console: Console, operator: Visitor) -> None:
    before = present(console)
    add(console, "a/b c?#.png", "safe", 4245)
    change = {"label": "buffer"}
    ask(console, "PATCH", "/collections/pools/exemplars/safe-0", json=change)
    after = present(console)
    text = operator.page(f"{PATH}/diff", collection="pools", before=before, after=after)
    assert [(kind, n) for kind, n in re.findall(r"<dt>(\w+)</dt><dd>(\d+)</dd>", text)] == [
        ("Added", "1"),
        ("Removed", "0"),
        ("Moved", "1"),
        ("Changed", "0"),
    ]
    assert "safe → buffer" in text
    added = re.findall(r'href="(/console/pools/pools/[^"]+)"', text)
    assert len(added) == 2
    same = operator.page(f"{PATH}/diff", collection="pools", before=after, after=after)
    assert "both have the same exemplars" in same


def test_what_is_cut_off_is_said(console: Console, operator: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    from service.api import versions as api

    monkeypatch.setattr(api, "_MOST_IDS", 2)
    before = present(console)
    for number in range(3):
        add(console, f"new-{number}", "safe", 4300 + number)
    text = operator.page(f"{PATH}/diff", collection="pools", before=before, after=present(console))
    assert "The first 2 of 3 are shown." in text


def test_a_dry_run_tells_what_would_change(console: Console, operator: Visitor) -> None:
    version = present(console)
    add(console, "wrong")
    assert verdict(console)["verdict"] == "unsafe"
    form = operator.page(f"{PATH}/dry-run", version=version)
    assert f'value="{version}"' in form
    assert "Result for" not in form
    for _ in range(100):  # a verdict is recorded a moment after its answer
        response = operator.post(f"{PATH}/dry-run", {"version": version, "limit": "100"})
        if "There was nothing to compare" not in response.text:
            break
    assert response.status_code == 200
    assert "<strong>1 of 1</strong> verdicts would have been others: 100.0 %" in response.text
    assert "Examples, the gravest first" in response.text


def test_a_shadow_is_started_and_stopped(console: Console, operator: Visitor) -> None:
    version = present(console)
    add(console, "other")
    assert "No candidate sees the traffic." in operator.page(PATH)
    text = operator.sent(f"{PATH}/shadow", {"version": version, "reason": "to see"})
    assert f"<code>version {version}</code>" in text
    assert "No candidate sees the traffic." in operator.sent(f"{PATH}/shadow/stop")


@pytest.mark.parametrize(
    ("path", "params", "status"),
    [
        ("", {"collection": "nowhere"}, 404),
        ("", {"before": "x"}, 400),
        ("/diff", {"before": "0" * 16, "after": "0" * 16}, 404),
        ("/diff", {}, 404),
        ("/roll-back", {"version": HOSTILE}, 404),
        ("/roll-back", {"version": "0" * 65}, 400),
    ],
)
def test_what_is_not_there_is_said(operator: Visitor, path: str, params: dict[str, str], status: int) -> None:
    response = operator.get(PATH + path, **params)
    assert response.status_code == status, response.text
    assert 'role="alert"' in response.text
    assert "<b onclick" not in response.text


@pytest.mark.parametrize(
    ("path", "fields", "status"),
    [
        ("publish", {"collection": "pools", "name": " "}, 400),
        ("publish", {"collection": "", "name": "x"}, 400),
        ("publish", {"collection": "nowhere", "name": "x"}, 404),
        ("roll-back", {"collection": "pools", "version": "0" * 16}, 409),
        ("dry-run", {"version": "0" * 16, "limit": "10"}, 404),
        ("dry-run", {"version": "encoder", "limit": "10"}, 404),
        ("dry-run", {"version": "0" * 16, "limit": "0"}, 400),
        ("dry-run", {"version": "0" * 16, "limit": "ten"}, 403),
        ("shadow", {"version": "0" * 16}, 404),
    ],
)
def test_what_cannot_be_done_is_said(
    console: Console, operator: Visitor, path: str, fields: dict[str, str], status: int
) -> None:
    response = operator.post(f"{PATH}/{path}", fields)
    assert response.status_code == status, response.text
    assert 'role="alert"' in response.text


@pytest.mark.parametrize("path", ["publish", "roll-back", "dry-run", "shadow", "shadow/stop"])
def test_a_form_of_another_session_is_refused(console: Console, operator: Visitor, path: str) -> None:
    fields = {"collection": "pools", "name": "x", "version": present(console), "limit": "10", "form_token": "x"}
    assert operator.client.post(f"{PATH}/{path}", data=fields).status_code == 403


def test_who_may_not_change_pools_sees_nothing(console: Console) -> None:
    visitor = console.visitor("classify", "review", "metrics")
    for path in ("", "/diff", "/roll-back", "/dry-run"):
        assert visitor.get(PATH + path).status_code == 403
    assert visitor.post(f"{PATH}/publish", {"collection": "pools", "name": "x"}).status_code == 403


def test_without_a_catalogue_there_are_no_versions(start_console: StartConsole) -> None:
    response = start_console(catalog="off").visitor("pools:write").get(PATH)
    assert response.status_code == 409
    assert "HARDLOOK_CATALOG" in response.text
