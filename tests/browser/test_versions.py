"""Versions in a browser: compare, try out, and go back; the verdict is as it was before."""

import base64
import re
from typing import Any

from playwright.sync_api import Page, expect

from perception.testing import encoded, synthetic_image
from tests.browser.conftest import Served, Visitors, axe, screenshot

SETTINGS = {"flood_share": 0}
IMAGE = encoded(synthetic_image(4244))


def verdict(served: Served) -> dict[str, Any]:
    files = {"image": ("a.png", IMAGE, "image/png")}
    response = served.server.client.post("/classify", headers=served.headers("uploader"), files=files)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()["results"][0]
    return found


def publish(page: Page, name: str) -> None:
    page.goto("/console/versions")
    page.get_by_label("Name", exact=True).fill(name)
    page.get_by_role("button", name="Publish").click()
    expect(page.get_by_role("status")).to_have_text("The present state is a version now.")


def add(served: Served) -> None:
    """Make the image an exemplar of the pool that it is not in."""
    label = "safe" if verdict(served)["verdict"] == "unsafe" else "unsafe"
    items = [{"id": "mistake", "label": label, "data": base64.b64encode(IMAGE).decode()}]
    path = "/collections/pools/exemplars"
    response = served.server.client.post(path, headers=served.headers("ops"), json={"items": items})
    assert response.status_code == 200, response.text


def test_rolling_back_gives_the_verdict_of_before(visit: Visitors, served: Served) -> None:
    before = verdict(served)
    page = visit("ops")
    publish(page, "before the mistake")
    add(served)
    wrong = verdict(served)
    assert wrong["verdict"] != before["verdict"]
    page.goto("/console/versions")
    assert axe(page) == []
    screenshot(page, "versions")
    row = page.get_by_role("row").filter(has_text="before the mistake")
    row.get_by_role("link", name="Changes since").click()
    expect(page.get_by_role("heading", name="Added")).to_contain_text("1")
    expect(page.get_by_role("link", name="mistake")).to_be_visible()
    assert axe(page) == []
    screenshot(page, "versions-diff")
    page.get_by_role("link", name=re.compile("Roll back to")).click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Roll back pools?")
    assert axe(page) == []
    screenshot(page, "versions-roll-back")
    assert verdict(served) == wrong  # asking changes nothing
    page.get_by_label("Reason").fill("it was a mistake")
    page.get_by_role("button", name="Roll back").click()
    expect(page.get_by_role("status")).to_have_text("The earlier state is the present one again.")
    assert verdict(served) == before
    expect(page.get_by_role("row").filter(has_text="it was a mistake")).to_contain_text("gone back to")


def test_rolling_back_without_scripts(visit: Visitors, served: Served) -> None:
    before = verdict(served)
    page = visit("ops", scripts=False)
    publish(page, "without scripts")
    add(served)
    page.goto("/console/versions")
    row = page.get_by_role("row").filter(has_text="without scripts")
    row.get_by_role("link", name="roll back").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Roll back pools?")
    page.get_by_role("button", name="Roll back").click()
    expect(page.get_by_role("status")).to_have_text("The earlier state is the present one again.")
    assert verdict(served) == before


def test_a_dry_run_and_a_shadow(visit: Visitors, served: Served) -> None:
    page = visit("ops", scheme="dark")
    publish(page, "to be tried")
    add(served)
    assert verdict(served)["neighbors"][0]["id"] == "mistake"
    page.goto("/console/versions")
    page.get_by_role("row").filter(has_text="to be tried").get_by_role("link", name="dry run").click()
    page.get_by_role("button", name="Judge them again").click()
    result = page.locator("#result")
    expect(result.get_by_role("heading")).to_be_focused()
    expect(result).to_contain_text(re.compile(r"[1-9]\d* of [1-9]\d* verdicts would have been others"))
    assert axe(page) == []
    screenshot(page, "versions-dry-run")
    page.get_by_role("link", name="Versions", exact=True).last.click()
    shadows = page.get_by_role("region", name="Shadows")
    chosen = shadows.get_by_label("Let a version see")
    version = chosen.locator("option", has_text="to be tried").first.get_attribute("value")
    chosen.select_option(version)
    shadows.get_by_role("button", name="Start").click()
    expect(page.get_by_role("region", name="Shadows").get_by_role("row").last).to_contain_text(f"version {version}")
    for _ in range(200):  # it sees what is answered from now on, a moment later
        verdict(served)
        page.reload()
        if re.search(r"[1-9]\d*\s+100\.0 %", page.get_by_role("region", name="Shadows").inner_text()):
            break
    expect(page.get_by_role("region", name="Shadows").get_by_role("row").last).to_contain_text("100.0 %")
    assert axe(page) == []
    screenshot(page, "versions-shadow")
    page.get_by_role("button", name="Stop the version").click()
    expect(page.get_by_role("region", name="Shadows")).to_contain_text("No candidate sees the traffic.")
