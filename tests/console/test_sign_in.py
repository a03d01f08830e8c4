"""The gate: sign-in, scopes, forms of other sites, and headers, as somebody without scripts meets them."""

import re
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.console.gate import FORM_TOKEN
from service.errors import SettingsError
from service.runtime import VOUCHED_FOR
from service.testing import toy_settings
from tests.console.conftest import Console, StartConsole


def test_whoever_has_not_signed_in_is_sent_to_the_form(console: Console) -> None:
    nobody = console.visitor()
    for path in ("/console", "/console/classify", "/console/health", "/console/audit-log"):
        response = nobody.get(path)
        assert (response.status_code, response.headers["location"]) == (303, "/console/sign-in")


@pytest.mark.parametrize("key", ["", "x", "hlk_000000000000_" + "a" * 43, "é" * 60, "a" * 100_000])
def test_what_is_no_key_is_refused_and_not_shown(console: Console, key: str) -> None:
    response = console.visitor().post("/console/sign-in", {"key": key})
    assert response.status_code in (401, 413)
    assert 'role="alert"' in response.text
    assert len(key) < 2 or key not in response.text
    assert console.visitor().get("/console/classify").status_code == 303


def test_a_key_opens_what_its_scopes_open(console: Console) -> None:
    visitor = console.visitor("classify")
    assert visitor.get("/console").headers["location"] == "/console/classify"
    for path in ("/console/reviews", "/console/pools", "/console/versions", "/console/audit-log"):
        response = visitor.get(path)
        assert response.status_code == 403, path
        assert "The API key does not allow this" in response.text


def test_a_sign_in_is_a_new_session(console: Console) -> None:
    visitor = console.visitor()
    visitor.page("/console/sign-in")
    before = visitor.client.cookies["hardlook_console"]
    visitor.post("/console/sign-in", {"key": console.key("classify")})
    assert visitor.client.cookies["hardlook_console"] != before
    visitor.client.cookies.clear()
    visitor.client.cookies.set("hardlook_console", before, path="/console")
    assert visitor.get("/console").headers["location"] == "/console/sign-in"


def test_a_cookie_that_was_kept_does_not_outlive_the_sign_out(console: Console) -> None:
    visitor = console.visitor("classify")
    kept = visitor.client.cookies["hardlook_console"]
    assert visitor.post("/console/sign-out").headers["location"] == "/console/sign-in?notice=signed-out"
    assert "hardlook_console" not in visitor.client.cookies
    visitor.client.cookies.set("hardlook_console", kept, path="/console")
    assert visitor.get("/console").headers["location"] == "/console/sign-in"


def test_a_revoked_key_ends_its_sessions(console: Console) -> None:
    from service.key_file import revoke_key

    key = console.key("classify")
    visitor = console.visitor()
    visitor.post("/console/sign-in", {"key": key})
    assert visitor.get("/console").headers["location"] == "/console/classify"
    revoke_key(console.folder / "keys.json", key.split("_")[1])
    console.client.app.state.runtime.keys.reload_if_changed()  # type: ignore[attr-defined]
    assert visitor.get("/console").headers["location"] == "/console/sign-in"


def test_forms_of_others_are_refused(console: Console) -> None:
    key = console.key("classify")
    visitor, other = console.visitor(), console.visitor()
    token, foreign = visitor.token, other.token
    for fields in ({}, {FORM_TOKEN: ""}, {FORM_TOKEN: foreign}, {FORM_TOKEN: token + "A"}):
        response = visitor.client.post("/console/sign-in", data={"key": key, **fields}, follow_redirects=False)
        assert response.status_code == 403
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        response = visitor.post("/console/sign-in", {"key": key}, headers=headers)
        assert response.status_code == 403, headers
    response = visitor.post("/console/sign-in", {"key": key}, headers={"Origin": "http://testserver"})
    assert response.status_code == 303


@pytest.mark.parametrize(
    ("content", "content_type", "status"),
    [
        (b"{}", "application/json", 415),
        (b"a=%ff", "application/x-www-form-urlencoded", 400),
        (b"\xff\xfe", "application/x-www-form-urlencoded", 400),
        (b"&".join(b"f%d=" % i for i in range(200)), "application/x-www-form-urlencoded", 400),
        (b"a=" + b"b" * 100_000, "application/x-www-form-urlencoded", 413),
        (b"--x", "multipart/form-data", 400),
    ],
)
def test_what_is_no_form_is_refused_by_a_page(console: Console, content: bytes, content_type: str, status: int) -> None:
    client = console.visitor().client
    response = client.post("/console/sign-in", content=content, headers={"Content-Type": content_type})
    assert response.status_code == status
    assert response.headers["content-type"].startswith("text/html")


def test_pages_allow_no_inline_scripts_and_no_other_origin(console: Console) -> None:
    response = console.visitor().get("/console/sign-in")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert response.headers["cache-control"] == "no-store"
    assert not re.search(r"<script(?![^>]*src=)|<style|\son[a-z]+=|\sstyle=", response.text)


def test_assets_are_those_of_the_package(console: Console) -> None:
    text = console.visitor().page("/console/sign-in")
    paths = re.findall(r'(?:href|src)="(/console/static/[^"]+)"', text)
    assert len(paths) == 4
    for path in paths:
        response = console.client.get(path)
        assert response.status_code == 200
        assert "immutable" in response.headers["cache-control"]
    for path in ("/console/static/nothing.js", "/console/static/..%2fgate.py", "/console/static/htmx.LICENSE.txt"):
        assert console.client.get(path).status_code == 404


def test_callers_without_a_key_see_what_they_may_do(start_console: StartConsole) -> None:
    console = start_console(anonymous_scopes=("classify",))
    visitor = console.visitor()
    assert visitor.get("/console").headers["location"] == "/console/classify"
    assert visitor.get("/console/reviews").headers["location"] == "/console/sign-in"


def test_the_api_takes_no_cookie(console: Console) -> None:
    visitor = console.visitor("admin")
    assert visitor.client.get("/pools").status_code == 401
    visitor.client.cookies.set("hardlook_console", visitor.client.cookies["hardlook_console"], path="/")
    assert visitor.client.get("/pools").status_code == 401


def test_nobody_outside_can_vouch_for_himself(console: Console) -> None:
    headers = {VOUCHED_FOR: "admin", "X-Vouched-For": "admin"}
    assert console.client.get("/pools", headers=headers, params={VOUCHED_FOR: "admin"}).status_code == 401


def test_the_console_can_be_turned_off(start_console: StartConsole) -> None:
    console = start_console(console=False)
    for path in ("/console", "/console/sign-in", "/console/static/console.css"):
        assert console.client.get(path).status_code == 404


def test_sessions_hold_at_every_instance_that_has_the_secret(start_console: StartConsole, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"x" * 32)
    one = start_console(console_secret_file=secret)
    visitor = one.visitor("classify")
    other = start_console(console_secret_file=secret)
    elsewhere = other.visitor()
    elsewhere.client.cookies.set("hardlook_console", visitor.client.cookies["hardlook_console"], path="/console")
    assert elsewhere.get("/console").headers["location"] == "/console/classify"
    stranger = start_console().visitor()
    stranger.client.cookies.set("hardlook_console", visitor.client.cookies["hardlook_console"], path="/console")
    assert stranger.get("/console").headers["location"] == "/console/sign-in"


def test_a_bad_secret_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"HARDLOOK_CONSOLE_SECRET_FILE: .*missing cannot be read"):
        create_app(toy_settings(tmp_path, console_secret_file=tmp_path / "missing"))
    (tmp_path / "short").write_bytes(b"x" * 31)
    with pytest.raises(SettingsError, match="holds 31 bytes"):
        create_app(toy_settings(tmp_path, console_secret_file=tmp_path / "short"))


def test_a_service_that_is_starting_says_so(tmp_path: Path) -> None:
    client = TestClient(create_app(toy_settings(tmp_path)))  # not entered: nothing is loaded
    response = client.get("/console/sign-in")
    assert response.status_code == 503
    assert "the encoder is being loaded" in response.text
    assert response.headers["retry-after"] == "1"


def test_cookies_are_for_https_alone_where_there_is_https(console: Console) -> None:
    client = TestClient(console.client.app, base_url="https://testserver")
    assert "Secure" in client.get("/console/sign-in").headers["set-cookie"]
    assert "Secure" not in console.visitor().get("/console/sign-in").headers["set-cookie"]
