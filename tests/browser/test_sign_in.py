"""Signing in and out, and what somebody who has not signed in, or may not do much, gets to see."""

import re

from playwright.sync_api import expect

from tests.browser.conftest import Served, Visitors, axe, screenshot
from tests.service.key_files import make


def test_a_wrong_key_is_refused_in_words(visit: Visitors) -> None:
    visit.forgive("status of 401")
    page = visit(None, "/console/sign-in")
    assert axe(page) == []
    screenshot(page, "sign-in")
    page.get_by_label("API key").fill("hlk_000000000000_" + "a" * 43)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_contain_text("unknown, expired or revoked")
    assert axe(page) == []
    screenshot(page, "sign-in-refused")
    page.goto("/console/pools")
    expect(page).to_have_url(re.compile("/console/sign-in$"))


def test_signing_in_and_out_without_scripts(visit: Visitors) -> None:
    page = visit("uploader", scripts=False)
    expect(page.get_by_text("uploader (classify)")).to_be_visible()
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("status")).to_have_text("You have signed out.")
    page.goto("/console/classify")
    expect(page).to_have_url(re.compile("/console/sign-in$"))


def test_the_navigation_has_what_the_key_may_see(visit: Visitors) -> None:
    links = visit("uploader").get_by_role("navigation").get_by_role("link")
    expect(links).to_have_text(["Classify", "Health"])
    links = visit("ops").get_by_role("navigation").get_by_role("link")
    expect(links).to_have_text(["Classify", "Reviews", "Pools", "Versions", "Thresholds", "Robustness", "Health"])
    links = visit("admin").get_by_role("navigation").get_by_role("link")
    expect(links).to_have_count(8)


def test_a_page_beyond_the_scopes_is_refused_in_words(visit: Visitors) -> None:
    visit.forgive("status of 403")
    page = visit("uploader", "/console/reviews")
    expect(page.get_by_role("alert")).to_contain_text("review")
    assert axe(page) == []


def test_the_cookie_is_out_of_reach(visit: Visitors) -> None:
    page = visit("ops")
    [cookie] = page.context.cookies()
    assert (cookie["name"], cookie["path"]) == ("hardlook_console", "/console")
    assert cookie["httpOnly"]
    assert cookie["sameSite"] == "Strict"
    assert page.evaluate("document.cookie") == ""


def test_a_key_that_expires_ends_its_sessions(visit: Visitors, served: Served) -> None:
    key = make(served.folder / "keys.json", "leaver", ("classify",))
    page = visit(None, "/console/sign-in")
    for _ in range(100):  # until the service has taken up the new key
        if served.server.client.get("/pools", headers={"X-API-Key": key}).status_code == 200:
            break
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_text("leaver (classify)")).to_be_visible()
    from service.key_file import revoke_key

    revoke_key(served.folder / "keys.json", key.split("_")[1])
    for _ in range(1000):
        if served.server.client.get("/pools", headers={"X-API-Key": key}).status_code == 401:
            break
    page.goto("/console/classify")
    expect(page).to_have_url(re.compile("/console/sign-in$"))
