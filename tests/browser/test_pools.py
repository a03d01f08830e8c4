"""Pools in a browser: search in words and by an image, change exemplars, and clean up."""

import base64
import re
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from perception.testing import encoded, synthetic_image
from tests.browser.conftest import Served, Visitors, axe, screenshot
from tests.browser.test_classify import give, hit

PAGE = "/console/pools"
POOLS = f"{PAGE}/pools"
SETTINGS = {"keep_images": "review"}


def asked(served: Served, data: bytes) -> dict[str, Any]:
    answer = served.server.client.post("/classify", content=data, headers=served.headers("ops"))
    return dict(answer.json()["results"][0])


def add(served: Served, id: str, data: bytes, label: str = "safe", **more: Any) -> None:
    item = {"id": id, "label": label, "data": base64.b64encode(data).decode(), **more}
    answer = served.server.client.post(
        "/collections/pools/exemplars", json={"items": [item]}, headers=served.headers("ops")
    )
    assert answer.status_code == 200, answer.text


def done(page: Page, words: str = "The change is in force.") -> None:
    expect(page.get_by_role("status").first).to_contain_text(words)


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no-scripts"])
def test_a_search_in_words(visit: Visitors, scripts: bool) -> None:
    page = visit("ops", PAGE, scripts=scripts)
    page.get_by_label("What the images should show").fill("a sports car")
    page.get_by_label("Within").first.select_option("pool:safe")
    page.get_by_label("At most").first.fill("5")
    page.get_by_role("button", name="Search").click()
    expect(page.locator("#result h2")).to_have_text("Most similar to the text “a sports car”")
    rows = page.get_by_role("table", name="most similar first").locator("tbody tr")
    expect(rows).to_have_count(5)
    expect(rows.filter(has_text="sports_car").first).to_be_visible()
    rows.first.get_by_role("link").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Exemplar")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_in_order(visit: Visitors, served: Served, scheme: Any) -> None:
    more: dict[str, Any] = {"source": "s" * 4000, "note": "'\"<script>" * 100, "metadata": {"k" * 4000: "v" * 4000}}
    add(served, "<b>“odd”/\u202eid", encoded(synthetic_image(55)), **more)
    page = visit("ops", PAGE, scheme=scheme)
    for path, name in (
        (PAGE, "pools"),
        (f"{PAGE}?text=a+dog&k=4", "pools-search"),
        (POOLS, "pools-collection"),
        (f"{POOLS}?id=%3Cb%3E%E2%80%9Codd%E2%80%9D/%E2%80%AEid", "exemplar"),
        (f"{POOLS}?view=duplicates&min_similarity=0.99", "duplicates"),
        (f"{POOLS}?view=contradictions", "contradictions"),
        (f"{POOLS}?view=suppress", "suppress-items"),
    ):
        page.goto(path)
        expect(page.get_by_role("heading", level=1)).to_have_count(1)
        assert axe(page) == [], name
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
        screenshot(page, f"{name}-{scheme}")


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_a_search_by_an_image(visit: Visitors, event: str) -> None:
    page = visit("ops", PAGE)
    give(page, event, hit(), name="found.png")
    expect(page.get_by_role("heading", name="Most similar to the image found.png")).to_be_focused()
    first = page.get_by_role("table", name="most similar first").locator("tbody tr").first
    expect(first).to_contain_text("✕ unsafe")
    expect(first).to_contain_text(re.compile(r"\+(1\.0000|0\.99)"))


def test_an_exemplar_from_a_dropped_file_to_its_end(visit: Visitors, served: Served) -> None:
    data = encoded(synthetic_image(81))
    page = visit("ops", POOLS)
    assert give(page, "drop", data)
    expect(page.locator("#image")).to_be_focused()
    page.locator("#label").select_option("unsafe")
    page.locator("#exemplar_id").fill("life/of one")
    page.get_by_label("Reason, for the audit log").fill("seen")
    page.get_by_role("button", name="Add", exact=True).click()
    done(page, "The exemplar was added.")
    assert (asked(served, data)["verdict"], asked(served, data)["neighbors"][0]["id"]) == ("unsafe", "life/of one")

    picture = page.locator(".veil img")
    for _ in range(50):  # pictures are kept in the background
        if picture.count():
            break
        page.reload()
    assert "blur(" in picture.evaluate("(each) => getComputedStyle(each).filter")
    page.get_by_label("Show clearly").check()
    assert picture.evaluate("(each) => getComputedStyle(each).filter") == "none"
    assert picture.evaluate("(each) => each.complete && each.naturalWidth > 0")
    screenshot(page, "exemplar-picture")

    page.get_by_label("To the pool").select_option("safe")
    page.get_by_label("Reason").first.fill("a mistake")
    page.get_by_role("button", name="Move").click()
    done(page)
    assert asked(served, data)["verdict"] == "safe"

    page.get_by_role("button", name="Disable").click()
    done(page)
    expect(page.get_by_text("searches do not find it")).to_be_visible()
    assert asked(served, data)["neighbors"][0]["id"] != "life/of one"
    page.get_by_role("button", name="Enable").click()
    done(page)
    assert asked(served, data)["neighbors"][0]["id"] == "life/of one"

    page.locator("#note").fill("one\ntwo")
    page.get_by_role("button", name="Save", exact=True).click()
    done(page)
    expect(page.locator("#note")).to_have_value("one\ntwo")
    page.get_by_label("A JSON object of texts").fill('{"category": "test"}')
    page.get_by_role("button", name="Save metadata").click()
    done(page)
    expect(page.locator("dl.facts").last).to_contain_text("category")

    page.get_by_role("button", name="Delete").click()
    assert page.get_by_label("Yes, delete it").evaluate("(box) => box.validity.valueMissing"), "asked first"
    page.get_by_label("Yes, delete it").check()
    page.get_by_role("button", name="Delete").click()
    done(page, "The exemplar was deleted.")
    assert asked(served, data)["neighbors"][0]["id"] != "life/of one"


def test_copies_are_deleted(visit: Visitors, served: Served) -> None:
    data = encoded(synthetic_image(91))
    for id in ("copy 1", "copy 2", "copy/3"):
        add(served, id, data, "buffer")
    page = visit("ops", POOLS)
    page.get_by_role("link", name="Duplicates").click()
    page.get_by_label("From a similarity of").fill("0.999")
    page.locator("#filter-label").select_option("buffer")
    page.get_by_role("button", name="Look for duplicates").click()
    group = page.locator("table", has_text="copy 1")
    expect(group.locator("tbody tr")).to_have_count(3)
    expect(group.get_by_role("checkbox", checked=True)).to_have_count(2)
    expect(group.locator("tbody tr").nth(1)).to_contain_text("✓ yes")
    group.get_by_role("checkbox").last.uncheck()
    left = group.locator("tbody tr").last.get_by_role("link").inner_text()
    kept = group.locator("tbody tr").first.get_by_role("link").inner_text()
    for box in page.locator("form[method=post] table").get_by_role("checkbox", checked=True).all():
        if "copy" not in str(box.get_attribute("value")):
            box.uncheck()
    page.get_by_label("Reason, for the audit log").fill("copies")
    page.get_by_label("Yes, delete what is ticked").check()
    page.get_by_role("button", name="Delete the copies").click()
    done(page, "The copies were deleted.")
    listed = served.server.client.get(
        "/collections/pools/exemplars?limit=1000&after=cop", headers=served.headers("ops")
    )
    there = {each["id"] for each in listed.json()["items"] if each["id"].startswith("copy")}
    assert there == {left, kept}


def test_without_scripts(visit: Visitors, served: Served) -> None:
    add(served, "..", encoded(synthetic_image(95)), "buffer")
    page = visit("ops", f"{POOLS}?label=buffer", scripts=False)
    page.get_by_role("link", name="..", exact=True).click()
    page.get_by_label("To the pool").select_option("unsafe")
    page.get_by_role("button", name="Move").click()
    done(page)
    expect(page.locator("dl.facts").first).to_contain_text("✕ unsafe")
    page.get_by_label("Yes, delete it").check()
    page.get_by_role("button", name="Delete").click()
    done(page, "The exemplar was deleted.")
