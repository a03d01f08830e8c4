"""The audit log and the health of the service in a browser."""

import json
import re

from playwright.sync_api import expect

from tests.browser.conftest import Served, Visitors, axe, screenshot


def test_the_log_is_read_verified_and_saved(visit: Visitors, served: Served) -> None:
    page = visit("admin", "/console/audit-log")
    expect(page.locator("tbody tr").first).to_be_visible()
    page.get_by_text("All of it").first.click()
    expect(page.get_by_label("Body of entry 1")).to_be_visible()
    assert axe(page) == []
    screenshot(page, "audit-log")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    assert download.value.suggested_filename == "hardlook-changes.jsonl"
    lines = download.value.path().read_text("utf8").splitlines()
    assert [json.loads(line)["seq"] for line in lines] == list(range(1, len(lines) + 1))
    page.get_by_label("Kind").fill("version.base")
    page.get_by_role("button", name="Show").click()
    expect(page.locator("tbody tr")).to_have_count(1)
    page.get_by_role("button", name="Verify the whole log").click()
    expect(page.get_by_role("status")).to_contain_text("It is whole.")
    assert axe(page) == []
    screenshot(page, "audit-log-verified")
    page.get_by_role("link", name="Audit log", exact=True).last.click()
    page.get_by_role("link", name="Decisions on images").click()
    expect(page.get_by_text("There are no such entries.")).to_be_visible()


def test_health_is_looked_at_again_and_again(visit: Visitors, served: Served) -> None:
    page = visit("admin", "/console/health")
    time = page.locator("#health time")
    at = time.inner_text()
    assert axe(page) == []
    screenshot(page, "health")
    expect(time).not_to_have_text(at)
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    expect(page.locator("#health")).to_have_count(1)
    expect(page.locator("#announcer")).to_be_empty()  # nobody is told every five seconds
    again = time.inner_text()
    expect(time).not_to_have_text(again)  # and once more: the new part looks again too


def test_health_rests_while_nobody_looks(visit: Visitors, served: Served) -> None:
    page = visit("admin", "/console/health")
    look = "document.getElementById('health').dispatchEvent(new CustomEvent('every'))"
    hide = "value => Object.defineProperty(document, 'hidden', {get: () => value, configurable: true})"
    page.evaluate(hide, True)
    looks: list[str] = []
    page.on("request", lambda request: looks.append(request.url) if "/console/health" in request.url else None)
    for _ in range(3):
        page.evaluate(look)
    assert looks == []
    page.evaluate(hide, False)
    with page.expect_request("**/console/health"):
        page.evaluate(look)


def test_health_says_when_it_cannot_look(visit: Visitors, served: Served) -> None:
    visit.forgive("ERR_FAILED", "fetch")
    page = visit("admin", "/console/health")
    at = page.locator("#health time").inner_text()
    page.route("**/console/health", lambda route: route.abort())
    stale = page.get_by_text("has not answered the last look")
    expect(stale).to_be_visible()
    expect(page.locator("#health time")).to_have_text(at)
    page.unroute("**/console/health")
    expect(stale).to_be_hidden()


def test_health_leads_to_the_form_once_the_sign_in_has_ended(visit: Visitors) -> None:
    page = visit("admin", "/console/health")
    page.context.clear_cookies()
    expect(page).to_have_url(re.compile("/console/sign-in$"))


def test_health_without_scripts_and_with_few_scopes(visit: Visitors) -> None:
    page = visit("uploader", "/console/health", scripts=False, scheme="dark")
    at = page.locator("#health time").inner_text()
    expect(page.get_by_text("How full it is")).to_have_count(0)
    page.wait_for_timeout(1000)
    page.get_by_role("link", name="Refresh").click()
    expect(page.locator("#health time")).not_to_have_text(at)
    screenshot(page, "health-of-an-uploader")
