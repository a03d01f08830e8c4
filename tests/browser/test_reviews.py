"""The review queue in a browser: by keyboard, with a veil, and with somebody else at it."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from perception.testing import encoded, synthetic_image
from tests.browser.conftest import Served, Visitors, axe, screenshot

# What would be safe is `review`.
SETTINGS = {"policy_min_margin": 1.9, "keep_images": "review", "flood_share": 0}
HOSTILE = "<script>window.hacked = 1</script>\"'>"
NUMBERS = iter(range(4244, 5000))


def classify(served: Served, image: bytes) -> dict[str, Any]:
    files = {"image": ("a.png", image, "image/png")}
    response = served.server.client.post("/classify", headers=served.headers("uploader"), files=files)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def queue(served: Served, *states: str) -> list[dict[str, Any]]:
    found = []
    for state in states:
        found += served.server.client.get(f"/reviews?state={state}", headers=served.headers("ops")).json()["reviews"]
    return found


def in_queue(served: Served) -> tuple[bytes, str]:
    """A new image with the verdict `review`, and the id of its item."""
    seen = {item["id"] for item in queue(served, "open")}
    image = encoded(synthetic_image(next(NUMBERS)))
    answer = classify(served, image)
    assert answer["results"][0]["verdict"] == "review"
    for _ in range(1000):  # it is queued, and its picture kept, a moment after its answer
        fresh = [item for item in queue(served, "open") if item["id"] not in seen and item["image_kept"]]
        if fresh:
            return image, str(fresh[0]["id"])
    raise AssertionError("it is not in the queue")


@pytest.fixture(autouse=True)
def _as_it_was(served: Served) -> Iterator[None]:
    """Afterwards nothing waits, and the pools are those of before: the images of these tests are much alike."""
    client, headers = served.server.client, served.headers("ops")
    version = client.get("/pools", headers=headers).json()["collections"][0]["version"]
    yield
    for item in queue(served, "open", "skipped"):
        client.post(f"/reviews/{item['id']}/decide", headers=headers, json={"label": "dismiss"})
    client.post("/collections/pools/rollback", headers=headers, json={"version": version})


def press(page: Page, key: str) -> None:
    """Press a key, and wait for the page that it leads to."""
    with page.expect_navigation():
        page.keyboard.press(key)


def test_from_the_queue_into_a_pool_by_keyboard(visit: Visitors, served: Served) -> None:
    image, id = in_queue(served)
    _, second = in_queue(served)
    page = visit("reviewer", "/console/reviews")
    expect(page.locator("tbody tr")).to_have_count(2)
    assert axe(page) == []
    screenshot(page, "reviews")
    page.keyboard.press("j")
    press(page, "Enter")
    expect(page).to_have_url(re.compile(f"/console/reviews/{id}"))
    assert axe(page) == []
    press(page, "c")
    expect(page.get_by_role("status")).to_have_text("The item is yours for a while.")
    expect(page.locator("#claim-state")).to_contain_text("You have this item")
    screenshot(page, "review-claimed")
    page.get_by_label("Reason").fill("shows what it should not: sbuxd")  # typing decides nothing
    page.get_by_label("Reason").blur()
    press(page, "u")
    expect(page).to_have_url(re.compile(f"/console/reviews/{second}"))
    [result] = classify(served, image)["results"]
    assert result["verdict"] == "unsafe"
    assert result["neighbors"][0]["similarity"] == pytest.approx(1.0)
    entry = served.server.client.get("/audit?kind=review.decide&limit=1000", headers=served.headers("admin")).json()[
        "entries"
    ][-1]
    assert (entry["subject"], entry["reason"]) == (id, "shows what it should not: sbuxd")
    assert axe(page) == []
    screenshot(page, "review-after-a-decision")


def test_every_key_does_what_the_help_says(visit: Visitors, served: Served) -> None:
    ids = [in_queue(served)[1] for _ in range(3)]
    page = visit("ops", f"/console/reviews/{ids[0]}")
    page.keyboard.press("?")
    help = page.get_by_role("dialog")
    expect(help).to_be_visible()
    assert help.locator("kbd").all_inner_texts() == ["j", "k", "v", "c", "s", "b", "u", "d", "x", "?"]
    assert axe(page) == []
    screenshot(page, "review-keys")
    page.keyboard.press("u")  # nothing behind the dialog is decided
    page.keyboard.press("Escape")
    expect(help).to_be_hidden()
    press(page, "j")
    expect(page).to_have_url(re.compile(ids[1]))
    press(page, "j")
    expect(page).to_have_url(re.compile(ids[2]))
    press(page, "k")
    expect(page).to_have_url(re.compile(ids[1]))
    press(page, "x")
    expect(page).to_have_url(re.compile(ids[2]))
    press(page, "d")
    expect(page).to_have_url(re.compile(ids[0]))
    states = {item["id"]: (item["state"], item["decision"]) for item in queue(served, "open", "skipped", "decided")}
    assert [states[id] for id in ids] == [("open", None), ("skipped", None), ("decided", "dismiss")]


@pytest.mark.parametrize(("key", "decision"), [("s", "safe"), ("b", "buffer")])
def test_the_other_pools_have_keys_too(visit: Visitors, served: Served, key: str, decision: str) -> None:
    _, id = in_queue(served)
    page = visit("reviewer", f"/console/reviews/{id}")
    press(page, key)
    assert [item["decision"] for item in queue(served, "decided") if item["id"] == id] == [decision]


def test_an_image_is_veiled_until_it_is_asked_for(visit: Visitors, served: Served) -> None:
    _, id = in_queue(served)
    page = visit("reviewer", f"/console/reviews/{id}")
    image = page.get_by_role("img", name="The image of this item")
    expect(image).to_have_css("filter", re.compile(r"blur\(.*grayscale\(1\)"))
    assert image.evaluate("image => image.complete && image.naturalWidth") > 0
    screenshot(page, "review-veiled")
    page.keyboard.press("v")
    expect(page.get_by_label("Show clearly")).to_be_checked()
    expect(image).to_have_css("filter", "none")
    screenshot(page, "review-shown-clearly")
    page.reload()
    expect(image).to_have_css("filter", re.compile("blur"))


def test_somebody_elses_claim_is_seen_and_respected(visit: Visitors, served: Served) -> None:
    visit.forgive("status of 409")
    _, id = in_queue(served)
    first, second = visit("ops", f"/console/reviews/{id}"), visit("reviewer", f"/console/reviews/{id}")
    press(first, "c")
    # The second page is from before the claim: what it sends is refused in words.
    press(second, "u")
    expect(second.get_by_role("heading", level=1)).to_have_text("Somebody was quicker")
    expect(second.get_by_role("alert")).to_contain_text("has this item")
    assert axe(second) == []
    screenshot(second, "review-taken")
    second.get_by_role("link", name="This item").click()
    expect(second.locator("#claim-state")).to_contain_text(re.compile(r"key:[0-9a-f]{12} has this item"))
    for name in ("Safe", "Buffer", "Unsafe", "Dismiss", "Skip", "Release", "Claim"):
        expect(second.get_by_role("button", name=name, exact=True)).to_be_disabled()
    second.keyboard.press("u")
    assert axe(second) == []
    screenshot(second, "review-claimed-by-somebody-else")
    left = second.locator("[data-left]")
    before = left.inner_text()
    expect(left).not_to_have_text(before)  # the time runs
    press(first, "d")
    second.reload()
    expect(second.get_by_role("heading", name="Decided")).to_be_visible()


def test_keys_can_be_turned_off(visit: Visitors, served: Served) -> None:
    _, id = in_queue(served)
    page = visit("reviewer", f"/console/reviews/{id}")
    page.get_by_role("checkbox", name="Keyboard shortcuts").uncheck()
    for key in ("u", "s", "x", "v", "?"):
        page.keyboard.press(key)
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page.get_by_label("Show clearly")).not_to_be_checked()
    page.reload()
    expect(page.get_by_role("checkbox", name="Keyboard shortcuts")).not_to_be_checked()  # the browser remembers
    page.keyboard.press("u")
    assert [item["id"] for item in queue(served, "open")] == [id]
    page.get_by_role("checkbox", name="Keyboard shortcuts").check()
    page.keyboard.press("v")
    expect(page.get_by_label("Show clearly")).to_be_checked()


def test_what_people_write_stays_text(visit: Visitors, served: Served) -> None:
    image, id = in_queue(served)
    body = {"kind": "false-negative", "request_id": classify(served, image)["request_id"], "comment": HOSTILE}
    response = served.server.client.post("/feedback", headers=served.headers("uploader"), json=body)
    assert response.json()["review_id"] == id
    page = visit("reviewer", f"/console/reviews/{id}", scheme="dark")
    expect(page.get_by_text(HOSTILE)).to_be_visible()
    assert page.evaluate("window.hacked") is None
    assert axe(page) == []
    screenshot(page, "review-dark")


def test_deciding_without_scripts(visit: Visitors, served: Served) -> None:
    image, id = in_queue(served)
    page = visit("reviewer", "/console/reviews", scripts=False)
    page.get_by_role("button", name="Take the next").click()
    expect(page.locator("#claim-state")).to_contain_text("You have this item")
    expect(page.get_by_role("img", name="The image of this item")).to_have_css("filter", re.compile("blur"))
    page.get_by_label("Show clearly").check()
    expect(page.get_by_role("img", name="The image of this item")).to_have_css("filter", "none")
    page.get_by_role("button", name="Unsafe").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Reviews")
    assert classify(served, image)["results"][0]["verdict"] == "unsafe"
    assert [item["decision"] for item in queue(served, "decided") if item["id"] == id] == ["unsafe"]
