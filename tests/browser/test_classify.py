"""Classifying in a browser: by drop, by paste, by keys alone; what is seen of the image, and what comes of it."""

import base64
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from perception.testing import benign_hits, encoded, synthetic_image
from tests.browser.conftest import Served, Visitors, axe, screenshot

PAGE = "/console/classify"
# A file of the browser's own making, in an event as the operating system would cause it.
EVENT = """([type, name, kind, data]) => {
    const bytes = Uint8Array.from(atob(data), (char) => char.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], name, {type: kind}));
    const options = {bubbles: true, cancelable: true};
    const event = type === "paste"
        ? new ClipboardEvent(type, {...options, clipboardData: transfer})
        : new DragEvent(type, {...options, dataTransfer: transfer});
    return !document.querySelector("main h1").dispatchEvent(event);
}"""


def hit() -> bytes:
    """The file of an exemplar of the unsafe pool."""
    return next(each.file for each in benign_hits() if each.pool == "unsafe")


def give(page: Page, event: str, data: bytes, kind: str = "image/png", name: str = "given.png") -> bool:
    """Drop or paste a file somewhere on the page; whether the page took it from the browser."""
    return bool(page.evaluate(EVENT, [event, name, kind, base64.b64encode(data).decode()]))


def filters(page: Page) -> list[str]:
    """How the pictures on the page are veiled."""
    return list(page.locator(".veil img").evaluate_all("all => all.map((each) => getComputedStyle(each).filter)"))


def asked(served: Served, data: bytes) -> dict[str, Any]:
    answer = served.server.client.post("/classify", content=data, headers=served.headers("ops"))
    return dict(answer.json()["results"][0])


def file_of(folder: Path, data: bytes) -> Path:
    path = folder / "chosen.png"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_an_image_is_judged_when_it_is_given(visit: Visitors, served: Served, event: str) -> None:
    page = visit("ops", PAGE)
    before = page.url
    assert give(page, "dragover", hit())
    expect(page.locator("#upload")).to_have_class("drop dropping")
    assert give(page, event, hit())
    expect(page.get_by_role("heading", name="Verdict unsafe")).to_be_focused()
    assert page.url == before, "the page was not left"
    expected = asked(served, hit())
    expect(page.locator("#result")).to_contain_text(expected["reason"])
    expect(page.get_by_role("table", name="nearest exemplars").locator("tbody tr")).to_have_count(
        len(expected["neighbors"])
    )
    expect(page.locator("#announcer")).to_contain_text("unsafe")
    expect(page.get_by_role("img", name="Heat map over the image")).to_have_count(2)
    if event == "drop":
        assert give(page, "drop", encoded(synthetic_image(31)), name="another.png")
        expect(page.locator("#result")).to_contain_text("another.png")
        assert axe(page) == []
        screenshot(page, "classify-light")


def test_pictures_are_blurred_and_grey_until_asked_for(visit: Visitors) -> None:
    page = visit("ops", PAGE, scheme="dark")
    give(page, "drop", hit())
    expect(page.locator(".verdict")).to_be_visible()
    veiled = filters(page)
    assert len(veiled) == 3
    assert all("blur(" in each and "grayscale(1)" in each for each in veiled)
    assert axe(page) == []
    screenshot(page, "classify-dark")
    page.locator(".verdict").press("v")
    expect(page.locator("#show-picture")).to_be_checked()
    assert filters(page) == ["none", *veiled[1:]], "the others stay as they are"
    page.get_by_label("Show clearly").nth(1).check()
    assert filters(page) == ["none", "none", veiled[2]]
    screenshot(page, "classify-shown")
    page.locator("#show-picture").uncheck()
    assert filters(page)[0] == veiled[0]


def test_what_is_no_image_is_refused_where_it_is_given(visit: Visitors) -> None:
    visit.forgive("status of 415", "status of 422")
    page = visit("ops", PAGE)
    assert give(page, "drop", b"text", kind="text/plain")
    expect(page.get_by_text("What was dropped is no image file.")).to_be_visible()
    give(page, "drop", b"no image at all")
    expect(page.get_by_role("alert")).to_contain_text("format")
    give(page, "drop", hit()[:100])
    expect(page.get_by_role("alert")).to_contain_text("cannot be decoded")
    give(page, "drop", hit())
    expect(page.get_by_role("heading", name="Verdict unsafe")).to_be_visible()
    give(page, "drop", b"")
    expect(page.get_by_role("alert")).to_contain_text("format")
    assert axe(page) == []
    screenshot(page, "classify-refused")


def test_by_the_keyboard_alone(visit: Visitors, tmp_path: Path) -> None:
    chosen = file_of(tmp_path, hit())
    page = visit("ops", PAGE)
    page.on("filechooser", lambda chooser: chooser.set_files(chosen))
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "image":
            break
    expect(page.locator("#image")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#image")).to_have_value(re.compile("chosen.png"))
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Classify")).to_be_focused()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Verdict unsafe")).to_be_focused()
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "show-picture":
            break
    page.keyboard.press("Space")
    assert filters(page)[0] == "none"


def test_an_image_is_added_and_the_verdict_follows(visit: Visitors, served: Served) -> None:
    data = encoded(synthetic_image(77))
    page = visit("ops", PAGE)
    give(page, "drop", data)
    expect(page.locator(".verdict")).to_be_visible()
    page.get_by_label("Id", exact=False).first.fill("taken/by drop")
    page.get_by_label("Reason, for the audit log").fill("as seen")
    page.get_by_role("button", name="Add to unsafe").click()
    expect(page.get_by_role("status").first).to_contain_text("The exemplar was added.")
    expect(page.get_by_role("heading", level=1)).to_contain_text("taken/by drop")
    found = asked(served, data)
    assert (found["verdict"], found["neighbors"][0]["id"]) == ("unsafe", "taken/by drop")
    page.goto(PAGE)
    give(page, "paste", data)
    expect(page.get_by_role("heading", name="Verdict unsafe")).to_be_visible()
    page.get_by_role("button", name="Find similar exemplars").click()
    expect(page.get_by_role("row", name="taken/by drop")).to_contain_text("+1.0000")


def test_a_wrong_verdict_is_reported(visit: Visitors, served: Served) -> None:
    page = visit("uploader", PAGE)
    give(page, "drop", hit())
    expect(page.locator("#saliency")).to_contain_text("your key has not the scope review")
    expect(page.get_by_role("button", name="Add to unsafe")).to_have_count(0)
    page.get_by_label("Comment for the reviewer").fill("a test picture")
    page.get_by_role("button", name="Report").click()
    expect(page.get_by_role("status").first).to_contain_text("reported")
    reviews = served.server.client.get("/reviews", headers=served.headers("reviewer")).json()["reviews"]
    assert "a test picture" in [each["comment"] for each in reviews]


def test_without_scripts(visit: Visitors, served: Served, tmp_path: Path) -> None:
    page = visit("ops", PAGE, scripts=False)
    page.get_by_label("Image file").set_input_files(file_of(tmp_path, hit()))
    page.get_by_role("button", name="Classify").click()
    expect(page.get_by_role("heading", name="Verdict unsafe")).to_be_visible()
    expect(page.locator(".script-only").first).to_be_hidden()
    page.get_by_label("Show clearly").first.check()
    screenshot(page, "classify-without-scripts")
    page.get_by_label("Image file").set_input_files(file_of(tmp_path, hit()))
    page.get_by_label("Id", exact=False).first.fill("without scripts")
    page.get_by_role("button", name="Add to buffer").click()
    expect(page.get_by_role("status").first).to_contain_text("The exemplar was added.")
    headers = served.headers("ops")
    assert served.server.client.delete("/collections/pools/exemplars/without%20scripts", headers=headers)


def test_narrow_windows_do_not_scroll_sideways(visit: Visitors) -> None:
    page = visit("ops", PAGE, viewport={"width": 390, "height": 800})
    give(page, "drop", hit(), name="\u202e" + "n" * 240 + '"><b>.png')
    expect(page.locator(".verdict")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    screenshot(page, "classify-narrow")
