"""The review queue as pages: what is shown, who may do what to an item, and what becomes of it."""

import html
import io
import re
from typing import Any

import pytest
from PIL import Image

from indexer.catalog.reviews import NewItem, open_items
from perception.testing import encoded, synthetic_image
from service.console.pages import reviews
from tests.console.conftest import Console, StartConsole, Visitor

PNG = encoded(synthetic_image(4244))
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
HEADING = re.compile(r"<h1>(.*?)</h1>", re.S)


def ask(console: Console, key: str, method: str, path: str, **options: Any) -> Any:
    response = console.client.request(method, path, headers={"X-API-Key": key}, **options)
    assert response.status_code == 200, response.text
    return response.json()


def verdict(console: Console, image: bytes = PNG) -> str:
    answer = ask(console, console.key("classify"), "POST", "/classify", files={"image": ("a.png", image)})
    return str(answer["results"][0]["verdict"])


def queued(console: Console, image: bytes = PNG, comment: str = "") -> str:
    """The id of an item that somebody has reported."""
    key = console.key("classify")
    answer = ask(console, key, "POST", "/classify", files={"image": ("a.png", image)})
    kind = "false-positive" if answer["results"][0]["verdict"] == "unsafe" else "false-negative"
    body = {"kind": kind, "request_id": answer["request_id"], "comment": comment}
    return str(ask(console, key, "POST", "/feedback", json=body)["review_id"])


def review(console: Console, id: str) -> dict[str, Any]:
    found: dict[str, Any] = ask(console, console.key("review"), "GET", f"/reviews/{id}")["review"]
    return found


def place(id: str) -> str:
    return f"/console/reviews/{id}"


@pytest.fixture
def reviewer(console: Console) -> Visitor:
    return console.visitor("review")


def test_the_queue_counts_and_filters(console: Console, reviewer: Visitor) -> None:
    first, second = queued(console), queued(console, encoded(synthetic_image(4245)))
    assert reviewer.post(f"{place(second)}/skip").status_code == 303
    text = reviewer.page("/console/reviews")
    assert re.findall(r'class="count">(\d+)<', text) == ["1", "0", "1", "0", "2"]
    assert place(first) in text
    assert place(second) not in text
    assert place(second) in reviewer.page("/console/reviews", state="skipped")
    both = reviewer.page("/console/reviews", state="all")
    assert both.index(place(first)) < both.index(place(second))
    assert "Nothing here." in reviewer.page("/console/reviews", state="all", origin="flood")
    assert place(first) in reviewer.page("/console/reviews", origin="false-negative")


def test_the_queue_is_leafed_through(console: Console, reviewer: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reviews, "PAGE", 2)
    ids = [queued(console, encoded(synthetic_image(4244 + number))) for number in range(3)]
    text = reviewer.page("/console/reviews")
    assert [place(id) in text for id in ids] == [True, True, False]
    [following] = re.findall(r'href="([^"]+)" rel="next"', text)
    text = reviewer.page(html.unescape(following))
    assert [place(id) in text for id in ids] == [False, False, True]
    assert 'rel="next"' not in text


@pytest.mark.parametrize("params", [{"state": "gone"}, {"origin": "mars"}, {"after": "x"}])
def test_what_no_queue_has_is_refused_in_words(reviewer: Visitor, params: dict[str, str]) -> None:
    response = reviewer.get("/console/reviews", **params)
    assert response.status_code == 400
    assert 'role="alert"' in response.text


def test_an_item_shows_its_evidence_and_hostile_text_as_text(console: Console, reviewer: Visitor) -> None:
    id = queued(console, comment=HOSTILE)
    found = review(console, id)
    text = reviewer.page(place(id))
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    assert html.escape(HOSTILE, quote=False).replace('"', "&#34;").replace("'", "&#39;") in text
    for neighbor in found["evidence"]["neighbors"]:
        assert f"<code>{neighbor['id']}</code>" in text  # no link: the key may not change pools
        assert f"{neighbor['similarity']:+.4f}" in text
    assert f"{found['evidence']['margin']:+.4f}" in text
    assert "No picture is kept" in text
    text = console.visitor("review", "pools:write").page(place(id))
    assert f'href="/console/pools/pools/{found["evidence"]["neighbors"][0]["id"]}"' in text


def test_there_is_a_next_and_a_previous_item(console: Console, reviewer: Visitor) -> None:
    ids = [queued(console, encoded(synthetic_image(4244 + number))) for number in range(3)]
    text = reviewer.page(place(ids[1]))
    assert re.findall(r'href="([^"?]+)" rel="(?:prev|next)" data-key="(.)"', text) == [
        (place(ids[0]), "k"),
        (place(ids[2]), "j"),
    ]
    assert 'rel="prev"' not in reviewer.page(place(ids[0]))
    assert 'rel="next"' not in reviewer.page(place(ids[2]))


def test_keys_are_named_where_they_work(console: Console, reviewer: Visitor) -> None:
    queued(console, encoded(synthetic_image(4245)))
    text = reviewer.page(place(queued(console)))
    for key in "sbudcx?k":
        assert text.count(f'data-key="{key}"') == 1, key
    assert re.findall(r"<dt><kbd>(.)</kbd></dt>", text) == list("jkvcsbudx?")


def test_from_a_wrong_verdict_to_a_right_one_without_scripts(console: Console, reviewer: Visitor) -> None:
    assert verdict(console) != "unsafe"
    id = queued(console)
    fields = {"label": "unsafe", "reason": "as reported", "note": HOSTILE}
    text = reviewer.sent(f"{place(id)}/decide", fields)
    assert "Every verdict from now on knows it." in text
    assert "<h1>Reviews</h1>" in text  # there is no other item
    assert verdict(console) == "unsafe"
    assert (review(console, id)["decision"], review(console, id)["state"]) == ("unsafe", "decided")
    assert "No pool was changed" not in reviewer.page(place(id))
    entry = ask(console, console.key("admin"), "GET", "/audit?kind=review.decide")["entries"][0]
    assert entry["reason"] == "as reported"


def test_after_a_decision_comes_the_next_open_item(console: Console, reviewer: Visitor) -> None:
    ids = [queued(console, encoded(synthetic_image(4244), compress_level=level)) for level in (1, 5, 9)]
    response = reviewer.post(f"{place(ids[1])}/decide", {"label": "dismiss", "origin": "false-negative"})
    assert response.headers["location"] == f"{place(ids[2])}?origin=false-negative&notice=dismissed"
    response = reviewer.post(f"{place(ids[2])}/skip")
    assert response.headers["location"] == f"{place(ids[0])}?notice=skipped"  # behind the last comes the first


def test_what_an_exemplar_would_have_caught_is_shown(console: Console, reviewer: Visitor) -> None:
    id = queued(console)
    with Image.open(io.BytesIO(PNG)) as image:
        again = encoded(image, compress_level=1)
    assert again != PNG
    other = queued(console, again)
    response = reviewer.post(f"{place(id)}/decide", {"label": "unsafe"})
    assert response.status_code == 200
    assert "1 other recent request would have been answered otherwise" in response.text
    assert f'data-address="{place(other)}"' in response.text
    assert f'action="{place(other)}/decide"' in response.text


def test_a_claim_keeps_others_away(console: Console, reviewer: Visitor) -> None:
    id = queued(console)
    assert "The item is yours" in reviewer.sent(f"{place(id)}/claim")
    text = reviewer.page(place(id))
    assert "<strong>You have this item</strong>" in text
    assert "disabled" not in text
    [left_s] = re.findall(r'data-left="(\d+)"', text)
    assert 0 < int(left_s) <= 900
    other = console.visitor("review")
    text = other.page(place(id))
    by = review(console, id)["claimed_by"]
    assert f"<strong>{by} has this item</strong>" in text
    buttons = re.findall(r"<button type=\"submit\"[^>]*>", text.partition('id="decide-heading"')[2])
    assert len([button for button in buttons if " disabled " in button]) == 7  # claim, release, skip, four decisions
    for step, fields in (("decide", {"label": "safe"}), ("skip", {}), ("release", {}), ("claim", {})):
        response = other.post(f"{place(id)}/{step}", fields)
        assert response.status_code == 409
        assert f"<strong>{by}</strong>" in response.text
        assert "Nothing that you sent was done." in response.text
    assert reviewer.post(f"{place(id)}/release").status_code == 303
    assert other.post(f"{place(id)}/decide", {"label": "safe"}).status_code == 303


def test_who_is_too_late_is_told_and_led_on(console: Console, reviewer: Visitor) -> None:
    id, following = queued(console), queued(console, encoded(synthetic_image(4245)))
    assert reviewer.post(f"{place(id)}/decide", {"label": "safe"}).status_code in (200, 303)
    response = console.visitor("review").post(f"{place(id)}/decide", {"label": "unsafe"})
    assert response.status_code == 409
    assert HEADING.findall(response.text) == ["Somebody was quicker"]
    assert review(console, id)["decided_by"] in response.text
    assert f'href="{place(following)}"' in response.text
    assert review(console, id)["decision"] == "safe"


def test_a_button_that_is_pressed_twice_decides_once(console: Console, reviewer: Visitor) -> None:
    id = queued(console)
    first = reviewer.post(f"{place(id)}/decide", {"label": "dismiss"})
    again = reviewer.post(f"{place(id)}/decide", {"label": "dismiss"})
    assert again.headers["location"] == first.headers["location"] == "/console/reviews?notice=dismissed"
    changed = reviewer.post(f"{place(id)}/decide", {"label": "unsafe"})
    assert HEADING.findall(changed.text) == ["You have decided this already"]


def test_the_next_is_claimed_and_there_may_be_none(console: Console, reviewer: Visitor) -> None:
    assert "Nothing is open" in reviewer.sent("/console/reviews/next")
    first, second = queued(console), queued(console, encoded(synthetic_image(4245)))
    assert reviewer.post("/console/reviews/next").headers["location"].startswith(place(first))
    assert console.visitor("review").post("/console/reviews/next").headers["location"].startswith(place(second))


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"label": "dismiss", "note": "x"}, "dismiss makes no exemplar"), ({"label": "sage"}, "label"), ({}, "label")],
)
def test_what_cannot_be_decided_is_refused_in_words(
    console: Console, reviewer: Visitor, fields: dict[str, str], said: str
) -> None:
    id = queued(console)
    response = reviewer.post(f"{place(id)}/decide", fields)
    assert response.status_code == 400
    assert said in response.text
    assert review(console, id)["state"] == "open"


@pytest.mark.parametrize("id", ["x", "0" * 32, "%2e%2e"])
def test_an_unknown_item_is_a_page_too(reviewer: Visitor, id: str) -> None:
    response = reviewer.get(place(id))
    assert response.status_code == 404
    assert 'role="alert"' in response.text


@pytest.mark.parametrize("step", ["claim", "release", "skip", "decide"])
def test_a_form_of_another_session_is_refused(console: Console, reviewer: Visitor, step: str) -> None:
    id = queued(console)
    response = reviewer.client.post(f"{place(id)}/{step}", data={"label": "safe", "form_token": "x"})
    assert response.status_code == 403
    assert review(console, id)["state"] == "open"


def test_who_may_not_review_sees_nothing(console: Console) -> None:
    id = queued(console)
    visitor = console.visitor("classify", "pools:write", "metrics")
    for path in ("/console/reviews", place(id)):
        assert visitor.get(path).status_code == 403
    assert visitor.post(f"{place(id)}/decide", {"label": "safe"}).status_code == 403


def test_an_exemplar_that_decides_too_much_is_an_item_too(console: Console, reviewer: Visitor) -> None:
    view = console.client.app.state.runtime.published.pools()  # type: ignore[attr-defined]
    item = NewItem(
        origin="flood",
        collection="pools",
        image_sha256="0" * 64,
        embedding=view.embedding("safe-0"),
        verdict="safe",
        evidence={"exemplar": "safe-0", "matches": 31, "decisions": 99, "new": True},
        comment=HOSTILE,
        reporter="flood-guard",
    )
    with console.client.app.state.runtime.editor.catalog.database.writing() as connection:  # type: ignore[attr-defined]
        [id] = open_items(connection, [item], limit=10)
    assert id is not None
    assert "safe-0" in reviewer.page("/console/reviews", origin="flood")
    text = reviewer.page(place(id))
    assert "decided 31 kinds of image among the last 99, and is new" in text
    assert "<script>alert" not in text
    assert "exemplar_id" not in text  # it has one
    assert "notice=decided" in reviewer.post(f"{place(id)}/decide", {"label": "buffer"}).headers["location"]
    moved = ask(console, console.key("pools:write"), "GET", "/collections/pools/exemplars/safe-0")
    assert moved["item"]["label"] == "buffer"


def test_without_a_catalogue_there_is_no_queue(start_console: StartConsole) -> None:
    response = start_console(catalog="off").visitor("review").get("/console/reviews")
    assert response.status_code == 409
    assert "HARDLOOK_CATALOG" in response.text
