"""Classifying on a page: the verdict and why, what is shown of the image, and what may be done then."""

import base64
import html
import io
import re
from collections.abc import Iterator

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from perception.testing import encoded, synthetic_image
from tests.console.conftest import Console, StartConsole, Visitor
from tests.console.visiting import HOSTILE, PNG, asked, in_words, reason_of, shared_console, upload

PAGE = "/console/classify"
CELL = re.compile(r'<th scope="row">([1-3a-c])</th><td>row (\d+), column (\d+) .*?</td><td class="number">(.*?)</td>')


def classified(visitor: Visitor, data: bytes = PNG, name: str = "a.png", **fields: str) -> str:
    response = visitor.post(PAGE, fields, files=upload(data, name))
    assert response.status_code == 200, response.text
    return response.text


def request_id(text: str) -> str:
    [found] = re.findall(r'name="request_id" value="([^"]+)"', text)
    return html.unescape(found)


@pytest.fixture(scope="module")
def console(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    """One service for all tests of this module that need no settings of their own."""
    limits = {"max_pixels": 100_000, "max_image_bytes": 200_000, "max_body_bytes": 500_000}
    with shared_console(tmp_path_factory.mktemp("published"), **limits) as console:
        yield console


@pytest.fixture
def visitor(console: Console) -> Visitor:
    return console.visitor("classify")


def test_the_form_waits_for_an_image(visitor: Visitor) -> None:
    text = visitor.page(PAGE)
    assert 'enctype="multipart/form-data"' in text
    assert '<label for="image">' in text
    assert "Verdict" not in text


def test_the_page_says_what_the_api_says(console: Console, visitor: Visitor) -> None:
    answer = asked(console)
    [item] = answer["results"]
    said = in_words(classified(visitor))
    assert f"Verdict {'✓' if item['verdict'] == 'safe' else '?'} {item['verdict']}" in said
    assert item["reason"] in said
    assert f"Margin {item['margin']:+.4f}" in said
    for part in (answer["model"]["name"], answer["snapshot"]["version"], answer["policy"]["version"]):
        assert part in said
    for near in item["neighbors"]:
        assert f"{near['id']} {near['similarity']:+.4f} {near['source']} seed : {near['metadata']['seed']}" in said


def test_the_verdict_is_recorded_like_any_other(console: Console, visitor: Visitor) -> None:
    # An image of its own: several reports of one image are one item, which names the first request.
    id = request_id(classified(visitor, encoded(synthetic_image(4244), "BMP")))
    assert visitor.sent(f"{PAGE}/report", {"kind": "false-negative", "request_id": id, "comment": "look"})
    key = console.key("review")
    reviews = console.client.get("/reviews", headers={"X-API-Key": key}).json()["reviews"]
    found = [(each["comment"], each["origin"]) for each in reviews if each["request_id"] == id]
    assert ("look", "false-negative") in found


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"kind": "false-negative", "request_id": "nothing-such"}, 404),
        ({"kind": "wrong", "request_id": "x"}, 400),
        ({}, 400),
        ({"kind": "false-positive", "request_id": "", "comment": "x"}, 400),
        ({"kind": "false-positive", "request_id": "x", "comment": "c" * 4001}, 400),
    ],
)
def test_a_report_of_nothing_is_refused_in_words(visitor: Visitor, fields: dict[str, str], status: int) -> None:
    response = visitor.post(f"{PAGE}/report", fields)
    assert response.status_code == status
    assert 'role="alert"' in response.text


def test_the_picture_is_made_of_pixels_and_of_nothing_else(visitor: Visitor) -> None:
    secret, file = PngInfo(), io.BytesIO()
    secret.add_text("Comment", "SECRET-OF-THE-FILE")
    synthetic_image(7).save(file, "PNG", pnginfo=secret)
    data = file.getvalue() + b"<script>TRAILER</script>"
    text = classified(visitor, data)
    [picture] = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', text)
    sent = base64.b64decode(picture)
    assert Image.open(io.BytesIO(sent)).format == "JPEG"
    assert b"SECRET-OF-THE-FILE" not in sent
    assert b"TRAILER" not in sent
    assert base64.b64encode(data).decode() not in text


def test_every_picture_is_veiled_until_asked_for(console: Console) -> None:
    text = classified(console.visitor("classify", "review"), explain="yes")
    pictures = text.count("<img ")
    assert pictures == 3  # what was sent, and what the encoder saw beside two exemplars
    boxes = re.findall(r'<input type="checkbox" class="reveal"[^>]*>', text)
    assert len(boxes) == pictures == text.count('<figure class="veiled">')
    assert not any(" checked" in box for box in boxes)


def test_saliency_is_in_shapes_words_and_sums(console: Console) -> None:
    visitor = console.visitor("classify", "review")
    text = classified(visitor, explain="yes")
    key = console.key("review")
    answer = console.client.post("/explain", files=upload(), headers={"X-API-Key": key}).json()
    assert len(answer["attributions"]) == 2
    sections = re.findall(r'<section class="card" aria-labelledby="map-.*?</section>', text, re.S)
    for item, section in zip(answer["attributions"], sections, strict=True):
        said = in_words(section)
        assert item["exemplar"] in said
        assert f"similarity of {item['baseline_similarity']:+.4f} to it, this image {item['similarity']:+.4f}" in said
        values = sorted(value for row in item["grid"] for value in row)
        assert f"All that add come to {sum(v for v in values if v > 0):+.4f}" in said
        cells = {mark: (int(row), int(column), value) for mark, row, column, value in CELL.findall(section)}
        assert list(cells) == list("123abc")
        for row, column, value in cells.values():
            assert value == f"{item['grid'][row - 1][column - 1]:+.4f}"
        assert (cells["1"][2], cells["a"][2]) == (f"{values[-1]:+.4f}", f"{values[0]:+.4f}")
        assert section.count("<rect ") >= 3
        assert 'role="img"' in section
        assert "style=" not in section
    assert "rect" not in classified(visitor), "it was not asked for"


def test_without_the_scope_the_arithmetic_is_there_all_the_same(visitor: Visitor) -> None:
    said = in_words(classified(visitor, explain="yes"))
    assert "Not shown: your key has not the scope review" in said
    assert "The winner is" in said
    assert "The runner-up is" in said
    assert "Add the image to a pool" not in said


def test_where_the_explanation_fails_the_verdict_stands(start_console: StartConsole) -> None:
    console = start_console(rate_limit="1/hour")
    said = in_words(classified(console.visitor("classify", "review"), explain="yes"))
    assert "Verdict" in said
    assert re.search(r"Not shown: .*limit", said)


def test_a_coarse_answer_is_shown_as_one(start_console: StartConsole) -> None:
    console = start_console(probing_limit=1)
    visitor = console.visitor("classify", "review")
    for number in range(3):
        image = synthetic_image(4244)
        image.putpixel((number, 0), (255, 0, 0))
        said = in_words(classified(visitor, encoded(image), explain="yes"))
    assert "coarse: the verdict alone" in said
    assert "does not say which exemplars decided" in said
    assert "Not shown: there is no exemplar in the answer" in said


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (b"", 415, "format"),
        (b"no image at all", 415, "format"),
        (PNG[: len(PNG) // 2], 422, "decoded"),
        (encoded(Image.new("RGB", (400, 300))), 422, "limit is 100000"),
        (PNG + bytes(200_001), 413, "limit is 200000"),
        (bytes(600_000), 413, "500000"),
    ],
    ids=["empty", "text", "half", "many-pixels", "many-bytes", "large-body"],
)
def test_what_is_no_image_gets_a_reason(visitor: Visitor, data: bytes, status: int, words: str) -> None:
    response = visitor.post(PAGE, files=upload(data))
    assert response.status_code == status, response.text
    assert 'role="alert"' in response.text
    assert words in in_words(response.text)
    assert "Traceback" not in response.text


def test_a_form_without_an_image_is_refused(visitor: Visitor) -> None:
    response = visitor.post(PAGE, {})
    assert (response.status_code, "no image was chosen" in response.text) == (403, True)


def test_frames_and_backgrounds_are_named(visitor: Visitor) -> None:
    frames = [synthetic_image(number) for number in (1, 2, 3)]
    animated = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], duration=100, lossless=True)
    assert "3 examined of 3; number" in in_words(classified(visitor, animated))
    clear = synthetic_image(5).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    said = in_words(classified(visitor, encoded(clear)))
    assert re.search(r"2 examined of 1; number 0 decided, laid on (white|black)", said)


def test_a_hostile_file_name_is_text(visitor: Visitor) -> None:
    text = classified(visitor, name=HOSTILE)
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "<bdi" in text[text.index("&lt;script&gt;alert(1)") - 40 :]
    assert classified(visitor, name="n" * 4000).count("n" * 300) == 0


def judged_sha256(text: str) -> str:
    [found] = re.findall(r'name="sha256" value="([0-9a-f]{64})"', text)
    return str(found)


def test_the_image_can_be_added_and_the_verdict_follows(console: Console) -> None:
    visitor = console.visitor("classify", "pools:write")
    text = classified(visitor)
    assert asked(console)["results"][0]["verdict"] != "unsafe"
    fields = {"label": "unsafe", "sha256": judged_sha256(text), "reason": "as seen", "note": HOSTILE}
    shown = visitor.sent(f"{PAGE}/add", fields, files=upload())
    assert "The exemplar was added." in shown
    assert "<script>alert" not in shown
    assert re.search(r"Of the last \d+ verdicts, \d+ would be others? now|would be another now", in_words(shown))
    [item] = asked(console)["results"]
    assert (item["verdict"], item["neighbors"][0]["id"]) == ("unsafe", judged_sha256(text)[:16])
    assert reason_of(console, "exemplar.add") == "as seen"
    again = visitor.sent(f"{PAGE}/add", fields, files=upload())
    assert "Nothing was changed" in again


def test_another_file_than_the_judged_one_is_not_added(console: Console) -> None:
    visitor = console.visitor("classify", "pools:write")
    fields = {"label": "unsafe", "sha256": judged_sha256(classified(visitor))}
    response = visitor.post(f"{PAGE}/add", fields, files=upload(encoded(synthetic_image(4245))))
    assert (response.status_code, "another file was chosen" in response.text) == (403, True)
    assert asked(console)["snapshot"]["version"] in in_words(visitor.page("/console/pools"))


@pytest.mark.parametrize("fields", [{"label": ""}, {"label": "mars"}, {"label": "safe", "frame": "x"}])
def test_what_cannot_be_added_is_refused_in_words(console: Console, fields: dict[str, str]) -> None:
    visitor = console.visitor("classify", "pools:write")
    fields = {**fields, "sha256": judged_sha256(classified(visitor))}
    response = visitor.post(f"{PAGE}/add", fields, files=upload())
    assert response.status_code in (400, 422)
    assert 'role="alert"' in response.text


def test_only_who_may_change_pools_adds(console: Console, visitor: Visitor) -> None:
    assert "/console/classify/add" not in classified(visitor)
    assert visitor.post(f"{PAGE}/add", {"label": "unsafe"}, files=upload()).status_code == 403


@pytest.mark.parametrize("path", [PAGE, f"{PAGE}/add", f"{PAGE}/report"])
def test_forms_of_other_pages_are_refused(console: Console, path: str) -> None:
    visitor = console.visitor("classify", "pools:write")
    before = asked(console)["snapshot"]["version"]
    response = visitor.client.post(path, data={"label": "unsafe"}, files=upload(), follow_redirects=False)
    assert response.status_code == 403
    response = visitor.post(path, {"label": "unsafe"}, files=upload(), headers={"Sec-Fetch-Site": "cross-site"})
    assert response.status_code == 403
    assert asked(console)["snapshot"]["version"] == before
