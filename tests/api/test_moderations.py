"""POST /v1/moderations: what clients of OpenAI send and read, and that nothing passes which nobody judged."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from indexer.contents import POOLS, Contents, Exemplar
from indexer.store import SnapshotStore
from perception.encoder import encode_images
from perception.testing import ToyEncoder, encoded, synthetic_image
from perception.verdict import VerdictLabel
from service.app import create_app
from service.schemas_adapters import categories_of, most_cautious_verdict, unsafe_score
from service.startup import load
from service.testing import toy_pools, toy_settings
from service.wire import ClassifyItem, DecidingFrame, NeighborItem, Policy
from service.wire import Image as ImageFacts
from service.wire_adapters import OPENAI_CATEGORIES, OPENAI_IMAGE_CATEGORIES
from tests.api.conftest import Start
from tests.api.test_error_shape import assert_problem
from tests.service.key_files import key_of

PATH = "/v1/moderations"
# As version 3.54.0 of the `openai` package for Python writes it.
RECORDED = (
    '{{"model":"omni-moderation-latest",'
    '"input":[{{"type":"image_url","image_url":{{"url":"data:image/png;base64,{data}"}}}}]}}'
)
CATEGORY_OF = {"unsafe-0": "violence/graphic", "unsafe-1": "hate", "unsafe-2": "weapons"}


def part(image: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(image).decode()}"}}


TEXT = {"type": "text", "text": "a caption"}


def ask(client: TestClient, *parts: Any, **more: Any) -> dict[str, Any]:
    response = client.post(PATH, json={"input": list(parts)}, **more)
    assert response.status_code == 200, response.text
    return dict(response.json())


def result(answer: dict[str, Any]) -> dict[str, Any]:
    [only] = answer["results"]
    return dict(only)


def assert_refused(response: Any, status: int, slug: str, param: str | None, code: str, **members: Any) -> None:
    """A problem, and in it what clients of OpenAI read."""
    body = assert_problem(response, status, slug, **members)
    kind = "server_error" if status >= 500 else "requests" if status == 429 else "invalid_request_error"
    assert body["error"] == {"message": body["detail"], "type": kind, "param": param, "code": code}
    assert "flagged" not in response.text


@pytest.fixture(scope="module")
def images() -> dict[str, Image.Image]:
    """The exemplars of the pools by id; each is its own nearest neighbour."""
    return {f"{pool}-{i}": image for pool, group in toy_pools().items() for i, image in enumerate(group)}


@pytest.fixture(scope="module")
def files(images: dict[str, Image.Image]) -> dict[str, bytes]:
    return {id: encoded(image) for id, image in images.items()}


@pytest.fixture(scope="module")
def categorised(
    tmp_path_factory: pytest.TempPathFactory, images: dict[str, Image.Image]
) -> Iterator[dict[bool, TestClient]]:
    """Services whose unsafe exemplars say what they show, by whether they flag `review`."""
    root, encoder = tmp_path_factory.mktemp("pools"), ToyEncoder()
    exemplars = [
        Exemplar(id, id.split("-")[0], metadata={"category": CATEGORY_OF[id]} if id in CATEGORY_OF else {})
        for id in images
    ]
    embeddings = encode_images(encoder, list(images.values())).numpy()
    contents = Contents.arrange(POOLS, encoder.name, encoder.fingerprint, exemplars, embeddings)
    SnapshotStore(root, POOLS).publish(contents)
    clients = {}
    for flag in (True, False):
        settings = toy_settings(root, moderations_flag_review=flag, max_images_per_request=4, max_pixels=100_000)
        clients[flag] = TestClient(create_app(settings, load(settings, encoder)), raise_server_exceptions=False)
        clients[flag].__enter__()
    yield clients
    for client in clients.values():
        client.__exit__(None, None, None)


@pytest.fixture
def service(categorised: dict[bool, TestClient]) -> TestClient:
    return categorised[True]


def test_a_recorded_request_gets_the_answer_that_its_client_reads(service: TestClient, files: dict[str, bytes]) -> None:
    body = RECORDED.format(data=base64.b64encode(files["unsafe-0"]).decode())
    response = service.post(
        PATH, content=body, headers={"content-type": "application/json", "accept": "application/json"}
    )
    assert response.status_code == 200
    answer = response.json()
    assert answer.keys() == {"id", "model", "results"}
    assert answer["id"] == f"modr-{response.headers['x-request-id']}"
    found = result(answer)
    assert found.keys() == {"flagged", "categories", "category_scores", "category_applied_input_types", "hardlook"}
    for name in OPENAI_CATEGORIES:
        assert isinstance(found["categories"][name], bool)
        assert isinstance(found["category_scores"][name], float)
        # Clients that are generated from OpenAI's description accept "image" under these alone.
        assert set(found["category_applied_input_types"][name]) <= (
            {"image"} if name in OPENAI_IMAGE_CATEGORIES else set()
        )


def test_a_verdict_is_the_one_of_classify(service: TestClient, files: dict[str, bytes]) -> None:
    for id, file in files.items():
        found = result(ask(service, part(file)))
        plain = service.post("/classify", content=file).json()
        [expected] = plain["results"]
        [item] = found["hardlook"]["images"]
        assert item == {**expected, "id": "0"}
        assert {name: found["hardlook"][name] for name in ("model", "snapshot", "policy")} == {
            name: plain[name] for name in ("model", "snapshot", "policy")
        }
        assert found["hardlook"]["verdict"] == expected["verdict"]
        assert found["flagged"] == (not id.startswith("safe"))
        assert found["categories"]["unsafe"] == id.startswith("unsafe")
        assert found["categories"]["review"] == id.startswith("buffer")


def test_a_category_is_true_only_where_the_exemplar_that_decided_has_it(
    service: TestClient, files: dict[str, bytes]
) -> None:
    named = {
        id: {name for name, on in result(ask(service, part(file)))["categories"].items() if on}
        for id, file in files.items()
    }
    assert named["unsafe-0"] == {"unsafe", "violence/graphic"}
    assert named["unsafe-1"] == {"unsafe", "hate"}
    assert named["unsafe-2"] == {"unsafe"}  # its category is none of OpenAI's
    assert all(named[id] == set() for id in named if id.startswith("safe"))
    assert all(named[id] == {"review"} for id in named if id.startswith("buffer"))
    applied = result(ask(service, part(files["unsafe-0"])))["category_applied_input_types"]
    assert {name for name, kinds in applied.items() if kinds} == {"violence/graphic", "unsafe", "review"}
    scores = result(ask(service, part(files["unsafe-0"])))["category_scores"]
    assert scores["violence/graphic"] == scores["unsafe"] > 0.5
    assert scores["sexual"] == 0


def test_all_images_of_a_request_get_one_result_and_the_worst_counts(
    service: TestClient, files: dict[str, bytes]
) -> None:
    found = result(ask(service, *(part(files[id]) for id in ("safe-0", "unsafe-0", "buffer-0", "unsafe-1"))))
    assert found["flagged"]
    assert {name for name, on in found["categories"].items() if on} == {"unsafe", "review", "violence/graphic", "hate"}
    assert [item["id"] for item in found["hardlook"]["images"]] == ["0", "1", "2", "3"]
    assert found["hardlook"]["verdict"] == "unsafe"
    alone = [result(ask(service, part(files[id])))["category_scores"]["unsafe"] for id in ("unsafe-0", "unsafe-1")]
    assert found["category_scores"]["unsafe"] == max(alone)
    found = result(ask(service, part(files["safe-0"]), part(files["buffer-0"])))
    assert found["hardlook"]["verdict"] == "review"
    assert not found["categories"]["unsafe"]


def test_what_is_to_be_reviewed_is_flagged_unless_the_operator_says_otherwise(
    categorised: dict[bool, TestClient], files: dict[str, bytes]
) -> None:
    for flag, client in categorised.items():
        found = result(ask(client, part(files["buffer-0"])))
        assert found["flagged"] == flag
        assert found["categories"]["review"]
        assert found["category_scores"]["review"] == 1
        assert found["category_scores"]["unsafe"] == 0.5
        assert result(ask(client, part(files["unsafe-0"])))["flagged"]
        assert not result(ask(client, part(files["safe-0"])))["flagged"]


@pytest.mark.parametrize("input", ["a text", "", ["a text", "another"], [TEXT], [TEXT, "a text"]])
@pytest.mark.parametrize("text", ["refuse", "ignore"])
def test_text_alone_is_refused_since_nobody_would_judge_it(service: TestClient, input: Any, text: str) -> None:
    response = service.post(PATH, json={"input": input, "model": "omni-moderation-latest"}, params={"text": text})
    assert_refused(response, 400, "invalid-parameter", "input", "invalid_parameter", name="input")
    assert "images alone" in response.json()["error"]["message"]


def test_text_beside_images_is_refused_unless_the_caller_leaves_it_out(
    service: TestClient, files: dict[str, bytes]
) -> None:
    image = part(files["safe-0"])
    response = service.post(PATH, json={"input": [image, TEXT]})
    assert_refused(response, 400, "invalid-parameter", "input", "invalid_parameter")
    assert "text=ignore" in response.json()["error"]["message"]
    found = result(ask(service, TEXT, image, "and more", params={"text": "ignore"}))
    assert found["hardlook"]["not_judged"] == ["input[0]", "input[2]"]
    assert [item["id"] for item in found["hardlook"]["images"]] == ["1"]
    assert not found["flagged"]
    assert "text" not in {kind for kinds in found["category_applied_input_types"].values() for kind in kinds}
    assert result(ask(service, image))["hardlook"]["not_judged"] == []


PIXEL = part(encoded(synthetic_image(1)))
BROKEN = part(encoded(synthetic_image(1))[:60])
HUGE = part(encoded(Image.new("1", (1000, 101))))


@pytest.mark.parametrize(
    ("body", "status", "slug", "param", "code"),
    [
        ({"input": [BROKEN]}, 422, "corrupt-image", "input", "corrupt_image"),
        ({"input": [PIXEL, BROKEN]}, 422, "corrupt-image", "input[1]", "corrupt_image"),
        ({"input": [PIXEL, HUGE, BROKEN]}, 422, "too-many-pixels", "input[1]", "too_many_pixels"),
        ({"input": [part(b"hello")]}, 415, "unsupported-format", "input", "unsupported_format"),
        ({"input": [PIXEL] * 5}, 413, "too-many-images", "input", "too_many_images"),
        ({"input": [{"type": "image_url", "image_url": {"url": "data:image/png,x"}}]}, 400, "malformed-body",
         "input", "malformed_body"),
        ({"input": [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]}, 422, "fetch-disabled",
         "input", "fetch_disabled"),
        ({"input": [PIXEL, {"type": "image_url", "image_url": {"url": "h" * 2049}}]}, 400, "malformed-body",
         "input[1]", "malformed_body"),
        ({"input": [{"type": "image_url", "image_url": "data:"}]}, 400, "malformed-body", "input", "malformed_body"),
        ({"input": [{"type": "audio", "audio": {}}]}, 400, "malformed-body", "input", "malformed_body"),
        ({"input": [{"type": ["image_url"]}]}, 400, "malformed-body", "input", "malformed_body"),
        ({"input": []}, 400, "malformed-body", "input", "malformed_body"),
        ({"input": ["x"] * 257}, 400, "malformed-body", "input", "malformed_body"),
        ({"input": 3}, 400, "invalid-parameter", "input", "invalid_parameter"),
        ({"input": None}, 400, "invalid-parameter", "input", "invalid_parameter"),
        ({}, 400, "invalid-parameter", "input", "invalid_parameter"),
        ({"input": [PIXEL], "model": 3}, 400, "invalid-parameter", "model", "invalid_parameter"),
        ({"input": [PIXEL], "modle": "x"}, 400, "invalid-parameter", "modle", "invalid_parameter"),
        ([], 400, "malformed-body", "input", "malformed_body"),
    ],
)  # fmt: skip
def test_whatever_cannot_be_judged_is_an_error_of_the_whole_request(
    service: TestClient, body: Any, status: int, slug: str, param: str, code: str
) -> None:
    assert_refused(service.post(PATH, json=body), status, slug, param, code)


def test_errors_that_are_not_of_the_body(service: TestClient) -> None:
    assert_refused(service.post(PATH, content=b"{"), 400, "malformed-body", "input", "malformed_body")
    response = service.post(PATH, content=b"x", headers={"content-type": "image/png"})
    assert_refused(response, 415, "unsupported-body", "input", "unsupported_body")
    response = service.post(PATH, json={"input": [PIXEL]}, params={"text": "judge"})
    assert_refused(response, 400, "invalid-parameter", "text", "invalid_parameter", name="text")
    response = service.post(PATH, json={"input": [PIXEL]}, params={"k": "3"})
    assert_refused(response, 400, "invalid-parameter", "k", "invalid_parameter", name="k")


def test_keys_and_limits_as_clients_of_openai_know_them(start: Start, tmp_path: Path) -> None:
    key = key_of(tmp_path, "classify")
    client = start(keys_file=tmp_path / "keys.json", rate_limit="3/minute", max_images_per_request=4)
    bearer = {"authorization": f"Bearer {key}"}
    response = client.post(PATH, json={"input": [PIXEL]}, headers={"authorization": "Bearer sk-nonsense"})
    assert_refused(response, 401, "unauthenticated", None, "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"
    assert "nonsense" not in response.text
    assert_refused(
        client.post(PATH, json={"input": [PIXEL] * 4}, headers=bearer),
        413,
        "too-many-images",
        "input",
        "too_many_images",
    )
    assert client.post(PATH, json={"input": [PIXEL] * 2}, headers=bearer).status_code == 200
    response = client.post(PATH, json={"input": [PIXEL]}, headers=bearer)
    assert_refused(response, 429, "rate-limited", None, "rate_limit_exceeded")
    assert int(response.headers["retry-after"]) >= 1


def test_problems_and_verdicts_are_counted(start: Start) -> None:
    client = start()
    client.post(PATH, json={"input": [BROKEN]})
    ask(client, PIXEL)
    metrics = client.get("/metrics").text
    assert 'hardlook_problems_total{type="corrupt-image"} 1.0' in metrics
    assert f'hardlook_requests_total{{method="POST",route="{PATH}",status="422"}} 1.0' in metrics
    assert "hardlook_images_judged_total 1.0" in metrics


def test_a_caller_who_probes_gets_the_verdict_alone(start: Start) -> None:
    client = start(probing_limit=2, probing_anonymous=True)
    rng = np.random.default_rng(0)
    clean = np.asarray(toy_pools()["unsafe"][0], np.int16)
    for _ in range(4):
        noisy = np.clip(clean + rng.integers(-2, 3, clean.shape), 0, 255).astype(np.uint8)
        found = result(ask(client, part(encoded(Image.fromarray(noisy)))))
    [item] = found["hardlook"]["images"]
    assert (item["detail"], item["margin"], item["neighbors"]) == ("coarse", None, [])
    assert found["flagged"]
    assert found["category_scores"]["unsafe"] == 1


# --- scores and categories -------------------------------------------------------------------------------------------

POLICY = Policy(
    version="nearest-0", rule="nearest", k=3, min_similarity=-1, min_margin=0, min_margin_unsafe=0, name=None,
    sha256=None, audited_gallery=None,
)  # fmt: skip


def item(verdict: str, margin: float | None, neighbors: list[NeighborItem] | None = None) -> ClassifyItem:
    return ClassifyItem(
        id="0",
        verdict=VerdictLabel(verdict),
        pool=None,
        margin=margin,
        reason="",
        frame=DecidingFrame(index=0, background=None, frames_examined=1),
        image=ImageFacts(format="PNG", width_px=1, height_px=1, frames_in_file=1),
        neighbors=neighbors or [],
        flip_rate_at_eps=None,
    )


def neighbor(pool: str, similarity: float, category: str = "") -> NeighborItem:
    return NeighborItem(
        id=f"{pool}{similarity}",
        pool=pool,
        label=pool,
        similarity=similarity,
        source="",
        metadata={"category": category},
    )


MARGINS = st.one_of(st.none(), st.floats(-2, 2))


@given(MARGINS, MARGINS)
def test_scores_never_contradict_verdicts(one: float | None, other: float | None) -> None:
    safe, review, unsafe = (unsafe_score(item(verdict, one)) for verdict in ("safe", "review", "unsafe"))
    assert 0 <= safe <= review == 0.5 <= unsafe <= 1
    if one is not None and other is not None and one <= other:
        assert unsafe <= unsafe_score(item("unsafe", other))
        assert safe >= unsafe_score(item("safe", other))


def test_a_score_is_half_the_margin_from_the_middle() -> None:
    assert unsafe_score(item("unsafe", 0.134)) == pytest.approx(0.567)
    assert unsafe_score(item("safe", 0.134)) == pytest.approx(0.433)
    assert unsafe_score(item("unsafe", -0.3)) == 0.5  # a vote against the nearest


def test_the_exemplars_that_decided_name_the_categories() -> None:
    near = [neighbor("unsafe", 0.9, "sexual"), neighbor("safe", 0.8, "hate"), neighbor("unsafe", 0.7, "violence"),
            neighbor("unsafe", 0.6, "illicit")]  # fmt: skip
    found = item("unsafe", 0.1, near)
    assert categories_of(found, POLICY) == {"sexual"}
    assert categories_of(found, POLICY.model_copy(update={"rule": "vote"})) == {"sexual", "violence"}
    assert categories_of(item("review", 0.1, near), POLICY) == frozenset()
    assert categories_of(item("safe", 0.1, near), POLICY) == frozenset()
    assert categories_of(item("unsafe", None), POLICY) == frozenset()
    tied = [neighbor("safe", 0.9), neighbor("unsafe", 0.9, "sexual")]  # the more cautious of equals decides
    assert categories_of(item("unsafe", 0.0, tied), POLICY) == {"sexual"}


def test_nothing_judged_is_no_verdict() -> None:
    with pytest.raises(ValueError, match="empty"):
        most_cautious_verdict([])
