"""Pools on pages: what is in them, searches, and everything that may be done to an exemplar."""

import html
import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from perception.testing import encoded, synthetic_image
from service.console import listing
from service.console.places import exemplar_place
from tests.api.conftest import ToyClip
from tests.console.conftest import Console, StartConsole, Visitor
from tests.console.visiting import HOSTILE, PNG, asked, in_words, reason_of, shared_console, upload

PAGE = "/console/pools"
POOLS = f"{PAGE}/pools"
ODD_IDS = ("a/b", "/", ".", "..", "../x", "a?b#c%&d=e", "ü ñ 猫", HOSTILE, "a\\b", "duplicates", "x" * 256, "  s ")


@pytest.fixture(scope="module")
def console(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    """One service for all tests of this module that need no settings of their own."""
    with shared_console(tmp_path_factory.mktemp("published"), probing_limit=0) as console:
        yield console


@pytest.fixture
def ops(console: Console) -> Visitor:
    return console.visitor("classify", "similar", "pools:write")


def image(number: int) -> bytes:
    return encoded(synthetic_image(number))


def api(console: Console, method: str, path: str, **options: Any) -> Any:
    key = console.key("pools:write")
    response = console.client.request(method, path, headers={"X-API-Key": key}, **options)
    assert response.status_code == 200, response.text
    return response.json()


def item(console: Console, id: str) -> dict[str, Any]:
    quoted = id.replace(".", "%2E") if id in (".", "..") else quote(id, safe="")
    found: dict[str, Any] = api(console, "GET", f"/collections/pools/exemplars/{quoted}")["item"]
    return found


def added(visitor: Visitor, id: str, data: bytes, label: str = "safe", **more: str) -> str:
    """Add an exemplar on the page of its collection; its page."""
    fields = {"action": "add", "label": label, "exemplar_id": id, **more}
    return visitor.sent(POOLS, fields, files=upload(data))


def test_the_overview_counts_what_the_api_counts(console: Console, ops: Visitor) -> None:
    said = in_words(ops.page(PAGE))
    for each in api(console, "GET", "/pools")["collections"]:
        assert each["version"] in said
        for label, n in each["counts"].items():
            assert re.search(rf"{label} {n}\b", said)


def test_pools_are_for_those_who_may_change_them(console: Console) -> None:
    reviewer = console.visitor("classify", "similar", "review")
    for path in (PAGE, POOLS, f"{POOLS}?view=duplicates", f"{POOLS}/safe-0", f"{PAGE}?text=x"):
        assert reviewer.get(path).status_code == 403
    for path in (PAGE, POOLS, f"{POOLS}/safe-0"):
        assert reviewer.post(path, {"action": "delete", "sure": "yes"}).status_code == 403
    assert item(console, "safe-0")["state"] == "active"


def test_a_search_in_words(console: Console, ops: Visitor) -> None:
    key = console.key("similar")
    for within, query in (("", {}), ("pool:unsafe", {"pool": "unsafe"})):
        body = {"text": "a tree", "k": 2, **query}
        answer = console.client.post("/similar", json=body, headers={"X-API-Key": key}).json()
        text = ops.page(PAGE, text="a tree", within=within, k="2")
        said = in_words(text)
        assert "Most similar to the text “ a tree ”" in said
        for near in answer["results"][0]["neighbors"]:
            assert f"{near['id']} {near['similarity']:+.4f}" in said
            assert f'href="{POOLS}/{near["id"]}"' in text


def test_a_search_by_an_image(ops: Visitor) -> None:
    response = ops.post(PAGE, {"within": "pool:buffer", "k": "1"}, files=upload(image(101), HOSTILE))
    said = in_words(response.text)
    assert "buffer-1 +1.0000" in said
    assert "<script>alert" not in response.text
    assert said.count("? buffer buffer-") == 1


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"text": "  "}, "empty"),
        ({"text": "w" * 4001}, "4000"),
        ({"text": "x", "within": "mars"}, "within"),
        ({"text": "x", "within": "pool:mars"}, "pool"),
        ({"text": "x", "within": "gallery:mars"}, "mars"),
        ({"text": "x", "k": "0"}, "k"),
        ({"text": "x", "k": "many"}, "k"),
        ({"text": "x", "k": "1001"}, "k"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_words(ops: Visitor, query: dict[str, str], words: str) -> None:
    response = ops.get(PAGE, **query)
    assert response.status_code in (400, 404)
    assert 'role="alert"' in response.text
    assert words in in_words(response.text)


@pytest.mark.parametrize("data", [b"", b"text", PNG[:100]])
def test_a_search_by_what_is_no_image_is_refused_in_words(ops: Visitor, data: bytes) -> None:
    response = ops.post(PAGE, {}, files=upload(data))
    assert response.status_code in (415, 422)
    assert 'role="alert"' in response.text


def test_without_the_scope_to_search_there_are_no_forms_for_it(console: Console) -> None:
    visitor = console.visitor("pools:write")
    assert "a key needs the scope similar" in visitor.page(PAGE)
    assert visitor.get(PAGE, text="x").status_code == 403


def test_a_gallery_is_searched_and_browsed(console: Console, ops: Visitor) -> None:
    api(console, "POST", "/collections", json={"name": "views"})
    fields = {"action": "add", "label": HOSTILE, "exemplar_id": "v 1"}
    assert "v 1" in ops.sent(f"{PAGE}/views", fields, files=upload(image(2001)))
    found = ops.post(PAGE, {"within": "gallery:views"}, files=upload(image(2001))).text
    assert f'href="{PAGE}/views/v%201"' in found
    text = ops.page(f"{PAGE}/views", label=HOSTILE)
    assert "<script>alert" not in text + found
    assert f'href="{PAGE}/views/v%201"' in text
    assert "There are none." in ops.page(f"{PAGE}/views", label="other")
    assert "view=contradictions" not in text
    assert ops.get(f"{PAGE}/views", view="contradictions").status_code == 400


def test_exemplars_are_leafed_through(console: Console, ops: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "SHOWN", 2)
    monkeypatch.setattr(listing, "_FETCHED", 3)
    place, seen = f"{POOLS}?label=unsafe", []
    while True:
        text = ops.page(place)
        seen += re.findall(r'<th scope="row"><a href="/console/pools/pools/([^"]+)"', text)
        following = re.findall(r'href="([^"]+)" rel="next"', text)
        if not following:
            break
        place = html.unescape(following[0])
    listed = api(console, "GET", "/collections/pools/exemplars?label=unsafe")["items"]
    assert seen == [quote(each["id"], safe="") for each in listed]
    assert len(seen) > 2


def test_a_filter_that_fits_little_goes_on_where_it_stopped(ops: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "_FETCHED", 2)
    monkeypatch.setattr(listing, "_MOST_LOOKED_THROUGH", 2)
    text = ops.page(POOLS, state="quarantined")
    assert "None among the 2 that were looked at." in text
    assert 'rel="next"' in text


@pytest.mark.parametrize("params", [{"state": "gone"}, {"label": "mars"}, {"view": "mars"}])
def test_what_no_collection_has_is_refused_in_words(ops: Visitor, params: dict[str, str]) -> None:
    response = ops.get(POOLS, **params)
    assert response.status_code in (400, 422)
    assert 'role="alert"' in response.text
    assert ops.get(f"{PAGE}/mars").status_code == 404
    assert ops.get(f"{POOLS}/mars").status_code == 404


@pytest.mark.parametrize("id", ODD_IDS)
def test_ids_of_any_characters_have_a_page_that_works(console: Console, ops: Visitor, id: str) -> None:
    number = 3000 + ODD_IDS.index(id)
    api(
        console,
        "POST",
        "/collections/pools/exemplars",
        json={"items": [{"id": id, "label": "safe", "embedding": unit(number), "fingerprint": fingerprint(console)}]},
    )
    listed = ops.page(POOLS)
    [place] = {
        html.unescape(found)
        for found in re.findall(r'<th scope="row"><a href="([^"]+)"', listed)
        if html.unescape(found) == exemplar_place("pools", id)
    }
    assert "<script>alert" not in listed + ops.page(place)
    assert "The change is in force." in ops.sent(place, {"action": "move", "label": "buffer"})
    assert item(console, id)["label"] == "buffer"
    assert "The exemplar was deleted." in ops.sent(place, {"action": "delete", "sure": "yes"})


def fingerprint(console: Console) -> str:
    return str(api(console, "GET", "/pools")["model"]["fingerprint"])


def unit(seed: int) -> list[float]:
    vector = np.random.default_rng(seed).normal(size=ToyClip().dim)
    return [float(value) for value in (vector / np.linalg.norm(vector))]


def test_everything_that_is_known_is_shown_as_text(console: Console, ops: Visitor) -> None:
    note, source = HOSTILE + "\n" + "n" * 3000, "\u202e" + "'\"&<s>" * 20
    text = added(ops, "known", image(4001), source=source, note=note)
    changed = {"metadata": {HOSTILE: "<b>", "k" * 4000: "</textarea><script>1</script>"}}
    api(console, "PATCH", "/collections/pools/exemplars/known", json=changed)
    text = ops.page(f"{POOLS}/known")
    assert "<script>alert" not in text
    assert "<script>1" not in text
    assert "<s>" not in text
    assert html.escape(note, quote=False).replace("'", "&#39;") in text
    found = item(console, "known")
    assert (found["note"], found["source"]) == (note, source)
    assert found["sha256"] in text
    for page in (ops.page(POOLS), text):
        assert page.count("<tr") == page.count("</tr>")
    assert "k" * 200 not in ops.page(POOLS)


def test_an_exemplar_is_moved_disabled_enabled_and_deleted(console: Console, ops: Visitor) -> None:
    data = image(4002)
    place = f"{POOLS}/life"
    added(ops, "life", data, "unsafe", reason="seen")
    assert asked(console, data)["results"][0]["verdict"] == "unsafe"
    ops.sent(place, {"action": "move", "label": "safe", "reason": HOSTILE})
    assert asked(console, data)["results"][0]["verdict"] == "safe"
    assert reason_of(console, "exemplar.move") == HOSTILE
    text = ops.sent(place, {"action": "disable", "until": "2126-01-02T03:04", "reason": "rest"})
    assert "disabled until 2126-01-02 03:04:00 UTC" in in_words(text)
    assert reason_of(console, "exemplar.disable") == "rest"
    assert asked(console, data)["results"][0]["neighbors"][0]["id"] != "life"
    assert "life" in in_words(ops.page(POOLS, state="disabled"))
    assert "Nothing was changed" in ops.sent(place, {"action": "move", "label": "safe"})
    text = ops.sent(place, {"action": "enable", "reason": "again"})
    assert "State ✓ active" in in_words(text)
    assert reason_of(console, "exemplar.enable") == "again"
    assert ops.post(place, {"action": "delete", "reason": "x"}).status_code == 400
    assert item(console, "life")
    text = ops.sent(place, {"action": "delete", "sure": "yes", "reason": "gone"})
    assert "The exemplar was deleted." in text
    assert reason_of(console, "exemplar.delete") == "gone"
    assert ops.get(place).status_code == 404


def seen_of(text: str) -> str:
    return str(re.findall(r'name="seen" value="([^"]+)"', text)[0])


def test_texts_are_edited_unless_somebody_was_faster(console: Console, ops: Visitor) -> None:
    place = f"{POOLS}/texts"
    seen = seen_of(added(ops, "texts", image(4003), source="old"))
    fields = {"action": "annotate", "note": "one\r\ntwo", "source": "new", "seen": seen, "reason": "why"}
    text = ops.sent(place, fields)
    assert (item(console, "texts")["note"], item(console, "texts")["source"]) == ("one\ntwo", "new")
    assert reason_of(console, "exemplar.annotate") == "why"
    assert "changed meanwhile" in ops.post(place, {**fields, "note": "three"}).text
    assert item(console, "texts")["note"] == "one\ntwo"
    metadata = {"category": HOSTILE, "": "empty"}
    ops.sent(place, {"action": "describe", "seen": seen_of(text), "metadata": json.dumps(metadata)})
    assert item(console, "texts")["metadata"] == metadata
    for wrong in ("{", "[]", '{"a": 1}', '{"a": null}', "[" * 5000, '{"a": "\\ud800"}', '{"a": NaN}'):
        fields = {"action": "describe", "seen": seen_of(ops.page(place)), "metadata": wrong}
        response = ops.post(place, fields)
        assert (response.status_code, 'role="alert"' in response.text) == (400, True), wrong
    assert item(console, "texts")["metadata"] == metadata


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"action": "explode"},
        {"action": "move"},
        {"action": "move", "label": "mars"},
        {"action": "disable", "until": "tomorrow"},
        {"action": "disable", "until": "2001-01-01T00:00"},
        {"action": "move", "label": "buffer", "reason": "r" * 4001},
    ],
)
def test_what_cannot_be_done_is_refused_in_words(console: Console, ops: Visitor, fields: dict[str, str]) -> None:
    response = ops.post(f"{POOLS}/safe-0", fields)
    assert response.status_code in (400, 409, 422)
    assert 'role="alert"' in response.text
    assert (item(console, "safe-0")["label"], item(console, "safe-0")["state"]) == ("safe", "active")


def test_forms_of_other_pages_are_refused(console: Console, ops: Visitor) -> None:
    fields = {"action": "delete", "sure": "yes", "label": "unsafe"}
    for path in (PAGE, POOLS, f"{POOLS}/safe-1"):
        assert ops.client.post(path, data=fields, follow_redirects=False).status_code == 403
        assert ops.post(path, fields, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert item(console, "safe-1")["state"] == "active"


def test_suppress_items_are_listed_apart(console: Console, ops: Visitor) -> None:
    body = {"id": "near it", "suppresses": ["unsafe-0"], "embedding": unit(9), "fingerprint": fingerprint(console)}
    api(console, "POST", "/collections/pools/suppressions", json=body)
    assert "near it" not in ops.page(POOLS)
    text = ops.page(POOLS, view="suppress")
    assert "near it unsafe-0 +0.9500 ✓ active" in in_words(text)
    said = in_words(ops.page(f"{POOLS}/near%20it"))
    assert "Suppress item near it" in said
    assert "To the pool" not in said


def test_an_encoder_without_texts_says_so(start_console: StartConsole, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.api.conftest.ToyClip.text", None)
    visitor = start_console().visitor("similar", "pools:write")
    response = visitor.get(PAGE, text="a tree")
    assert (response.status_code, 'role="alert"' in response.text) == (422, True)
    assert "text" in in_words(response.text)


def test_an_added_image_is_one_that_the_service_takes(ops: Visitor) -> None:
    clear = Image.new("RGBA", (40, 40))
    for data in (b"", b"text", PNG[:200]):
        response = ops.post(POOLS, {"action": "add", "label": "safe"}, files=upload(data))
        assert (response.status_code in (415, 422), 'role="alert"' in response.text) == (True, True)
    assert "The exemplar was added." in added(ops, "clear", encoded(clear), frame="1")
    response = ops.post(POOLS, {"action": "add", "label": "safe", "frame": "2"}, files=upload(encoded(clear)))
    assert (response.status_code, "frame" in in_words(response.text)) == (400, True)
