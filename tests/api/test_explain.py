"""POST /explain: the verdict of /classify with its reasons, and nothing of it left behind."""

import asyncio
import base64
import io
import os
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from torch import Tensor

from perception.encoder import encode_images
from perception.testing import ToyEncoder, encoded, synthetic_image
from service import explaining
from service.saliency import Abandoned
from service.testing import publish, toy_pools, toy_settings
from tests.api.conftest import Serve, Start, served
from tests.api.test_error_shape import assert_problem
from tests.service.key_files import key_of

PNG = {"content-type": "image/png"}
ARCHIVE = "hostile/hostile_images.tar.xz"
DATA = Path(os.environ.get("HARDLOOK_DATA", Path(__file__).parents[3] / "shared" / "data"))
EVERY = 7  # of the files of that archive


def picture(seed: int = 7) -> bytes:
    return encoded(synthetic_image(seed))


def explained(client: TestClient, data: bytes, **parameters: Any) -> dict[str, Any]:
    response = client.post("/explain", content=data, headers=PNG, params=parameters)
    assert response.status_code == 200, response.text
    return dict(response.json())


def files() -> Iterator[tuple[str, bytes]]:
    """Every kind of answer: verdicts, frames and backgrounds, and files that are no images."""
    for pool, images in toy_pools(per_pool=1).items():
        yield pool, encoded(images[0])
    yield "between", picture()
    frames = [synthetic_image(seed) for seed in (0, 100, 200)]
    yield "animation", encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    see_through = synthetic_image(200).convert("RGBA")
    see_through.putalpha(Image.linear_gradient("L").resize(see_through.size))
    yield "transparent", encoded(see_through)
    yield "grey", encoded(Image.new("RGB", (40, 40), (128, 128, 128)))
    yield "strip", encoded(Image.new("RGB", (1, 3000), (200, 10, 10)))
    yield "jpeg", encoded(synthetic_image(100), "JPEG")
    yield "large", encoded(Image.new("1", (2000, 2000)))
    yield "cut", picture()[:200]
    yield "no image", b"no image"
    yield "empty", b""


def assert_same(client: TestClient, data: bytes, **parameters: Any) -> None:
    ours = client.post("/explain", content=data, headers=PNG, params=parameters)
    theirs = client.post("/classify", content=data, headers=PNG)
    assert ours.status_code == theirs.status_code, ours.text
    mine, other = ours.json(), theirs.json()
    if ours.status_code == 200:
        assert mine["result"] == other["results"][0]
        assert {name: mine[name] for name in ("model", "snapshot", "policy")} == {
            name: other[name] for name in ("model", "snapshot", "policy")
        }
        assert mine["decision"]["margin"] == mine["result"]["margin"]
        assert mine["decision"]["winner"] == mine["result"]["pool"]
    else:
        assert mine["type"] == other["type"]


@pytest.mark.parametrize("name", [name for name, _ in files()])
def test_the_verdict_is_that_of_classify(client_of_all: TestClient, name: str) -> None:
    assert_same(client_of_all, dict(files())[name])


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / ARCHIVE).is_file(), reason=f"HARDLOOK_DATA has no {ARCHIVE}")
def test_hostile_files_get_what_they_get_from_classify(serve: Serve) -> None:
    client, seen = serve(probing_limit=0), 0
    with tarfile.open(DATA / ARCHIVE) as archive:
        for number, member in enumerate(archive):
            content = archive.extractfile(member) if member.isfile() and number % EVERY == 0 else None
            if content is not None and not member.name.endswith(".csv"):
                assert_same(client, content.read(), attribute=False)
                seen += 1
    assert seen > 100


@pytest.mark.parametrize("rule", [{"policy_rule": "vote", "policy_k": 3}, {"policy_min_margin": 0.9}])
def test_other_policies_too(serve: Serve, rule: dict[str, Any]) -> None:
    client = serve(**rule)
    for _, data in list(files())[:6]:
        assert_same(client, data, attribute=False)
    decision = explained(client, picture(), attribute=False)["decision"]
    assert (sum(pool["votes"] or 0 for pool in decision["pools"]) == 3) == (decision["rule"] == "vote")
    assert decision["what_would_change"]


@pytest.fixture(scope="module")
def client_of_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    root = tmp_path_factory.mktemp("pools")
    publish(root, ToyEncoder(), toy_pools())
    settings = toy_settings(root, anonymous_scopes=("admin",), max_pixels=1_000_000, probing_limit=0)
    with served(settings, ToyEncoder()) as client:
        yield client


def test_an_answer_has_all_that_explains_it(client_of_all: TestClient) -> None:
    data, encoder = picture(), ToyEncoder()
    answer = explained(client_of_all, data)
    decision, attributions = answer["decision"], answer["attributions"]
    with Image.open(io.BytesIO(base64.b64decode(answer["input_png"]))) as shown:
        assert shown.format == "PNG"
        np.testing.assert_array_equal(
            np.asarray(shown).transpose(2, 0, 1), encoder.preprocess.apply(synthetic_image(7))
        )
    assert answer["undefended"] is False
    best = {pool["pool"]: pool["best"] for pool in decision["pools"]}
    assert decision["margin"] == pytest.approx(
        best[decision["winner"]]["similarity"] - best[decision["runner_up"]]["similarity"]
    )
    assert [found["exemplar"] for found in attributions] == [
        best[decision["winner"]]["id"], best[decision["runner_up"]]["id"]
    ]  # fmt: skip
    for found in attributions:
        grid = np.array(found["grid"])
        assert grid.shape == (16, 16)
        gained = found["similarity"] - found["baseline_similarity"]
        assert found["completeness_error"] == pytest.approx(abs(grid.sum() - gained), abs=1e-9)
        assert found["completeness_error"] < 0.02
        assert found["judged_similarity"] == pytest.approx(found["similarity"], abs=1e-5)
        for cells, extreme in ((found["supporting"], grid.max()), (found["opposing"], grid.min())):
            assert cells[0]["value"] == extreme
            assert grid[cells[0]["row"] - 1, cells[0]["column"] - 1] == extreme
            assert cells[0]["text"] == f"row {cells[0]['row']}, column {cells[0]['column']} of 16"
            assert [abs(cell["value"]) for cell in cells] == sorted((abs(c["value"]) for c in cells), reverse=True)


def test_three_forms_of_one_image_give_the_same_answer(client_of_all: TestClient) -> None:
    data = picture()
    text, against = base64.b64encode(data).decode(), "unsafe-1"
    answers = [
        client_of_all.post("/explain", content=data, headers=PNG, params={"against": against}),
        client_of_all.post("/explain", files={"image": ("a.png", data)}, data={"against": against}),
        client_of_all.post("/explain", json={"images": [{"data": text}], "against": [against]}),
    ]
    assert [answer.status_code for answer in answers] == [200] * 3, [answer.text for answer in answers]
    bodies = [answer.json() for answer in answers]
    assert [body["result"]["id"] for body in bodies] == ["0", "a.png", "0"]
    for body in bodies:
        assert [found["exemplar"] for found in body["attributions"]] == [against]
        assert body["attributions"] == bodies[0]["attributions"]


def test_other_exemplars_can_be_named(client_of_all: TestClient) -> None:
    answer = explained(client_of_all, picture(), against=["buffer-2", "safe-0"], k=1)
    assert [found["exemplar"] for found in answer["attributions"]] == ["buffer-2", "safe-0"]
    assert [found["label"] for found in answer["attributions"]] == ["buffer", "safe"]
    names = {neighbor["id"] for neighbor in answer["result"]["neighbors"]}
    for found in answer["attributions"]:
        assert (found["judged_similarity"] is None) == (found["exemplar"] not in names)
    twice = explained(client_of_all, picture(), against=["safe-0", "safe-0"])
    assert [found["exemplar"] for found in twice["attributions"]] == ["safe-0"]


def test_the_decision_alone(client_of_all: TestClient) -> None:
    answer = explained(client_of_all, picture(), attribute=False, against="safe-0")
    assert answer["attributions"] == []
    assert answer["decision"]["what_would_change"]


def test_bad_requests(client_of_all: TestClient) -> None:
    two = [("image", ("a.png", picture())), ("image", ("b.png", picture()))]
    entry = {"data": base64.b64encode(picture()).decode()}
    post = client_of_all.post
    assert_problem(post("/explain", files=two), 413, "too-many-images", limit=1)
    assert_problem(post("/explain", json={"images": [entry, entry]}), 413, "too-many-images", limit=1)
    assert_problem(post("/explain", json={"images": []}), 400, "malformed-body")
    assert_problem(post("/explain", json={"images": [{"data": "?"}]}), 400, "malformed-body")
    raw: dict[str, Any] = {"content": picture(), "headers": PNG}
    assert_problem(post("/explain?against=nobody", **raw), 404, "unknown-exemplar", id="nobody")
    for query in ("against=a&against=b&against=c", "k=0", "k=101", "attribute=perhaps", "color=red", "attribute="):
        assert_problem(post(f"/explain?{query}", **raw), 400, "invalid-parameter")
    assert_problem(post("/explain", content=b"x", headers={"content-type": "text/plain"}), 415, "unsupported-body")


def test_classify_keys_may_not(start: Start, tmp_path: Path) -> None:
    statuses: dict[Any, int] = {"classify": 403, "similar": 403, "pools:write": 403, "review": 200, "admin": 200}
    keys = {scope: key_of(tmp_path, scope) for scope in statuses}
    client = start(keys_file=tmp_path / "keys.json")
    for scope, status in statuses.items():
        headers = {**PNG, "x-api-key": keys[scope]}
        response = client.post("/explain?attribute=false", content=picture(), headers=headers)
        assert response.status_code == status, response.text
    assert_problem(client.post("/explain", content=picture(), headers=PNG), 401, "unauthenticated")


def counters(client: TestClient, *names: str) -> dict[str, float]:
    lines = (line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in lines if name.startswith(names)}


def test_nothing_of_it_is_recorded(serve: Serve) -> None:
    """Not in the log, not in the metrics of verdicts, not in the review queue, not as probing."""
    client = serve(probing_limit=5, probing_similarity=0.9, probing_anonymous=True, review_verdicts=True)
    judged = "hardlook_images_judged_total", "hardlook_verdicts", "hardlook_disagreements"
    before = counters(client, *judged)
    for _, data in list(files())[:6]:
        explained(client, data, attribute=False)
    for seed in range(12):
        explained(client, noisy(seed), attribute=False)
    assert before
    assert counters(client, *judged) == before
    decisions = client.get("/audit", params={"chain": "decisions"}).json()
    assert decisions["entries"] == [], decisions
    assert client.get("/reviews").json()["reviews"] == []
    answer = client.post("/classify", content=noisy(99), headers=PNG).json()
    assert answer["results"][0]["detail"] == "full"
    client.portal.call(client.app.state.runtime.settle, 30.0)  # type: ignore[union-attr, attr-defined]
    assert len(client.get("/audit", params={"chain": "decisions"}).json()["entries"]) == 1


def noisy(seed: int) -> bytes:
    """One of many near-duplicates."""
    image = np.asarray(synthetic_image(7), np.int16)
    noise = np.random.default_rng(seed).integers(-2, 3, image.shape)
    return encoded(Image.fromarray((image + noise).clip(0, 255).astype(np.uint8)))


def test_suppressed_exemplars_are_said(serve: Serve) -> None:
    client = serve()
    unsafe = encoded(toy_pools()["unsafe"][0])
    body = {"id": "not-this", "suppresses": ["unsafe-0"], "data": base64.b64encode(unsafe).decode()}
    assert client.post("/collections/pools/suppressions", json=body).status_code == 200
    assert_same(client, unsafe)
    answer = explained(client, unsafe, against="unsafe-0")
    assert [item["id"] for item in answer["result"]["suppressed"]] == ["unsafe-0"]
    assert any("exemplar 'unsafe-0' was left out" in fact for fact in answer["decision"]["what_would_change"])
    [found] = answer["attributions"]  # it can be looked at all the same
    assert found["judged_similarity"] is None
    assert found["similarity"] == pytest.approx(1.0, abs=1e-5)


def test_without_pools_and_with_empty_ones_it_is_as_classify(tmp_path: Path) -> None:
    with served(toy_settings(tmp_path / "none", anonymous_scopes=("admin",)), ToyEncoder()) as client:
        assert_problem(client.post("/explain", content=picture(), headers=PNG), 503, "not-ready")
    publish(tmp_path, ToyEncoder(), {"safe": toy_pools()["safe"]})
    with served(toy_settings(tmp_path, anonymous_scopes=("admin",)), ToyEncoder()) as client:
        assert_same(client, picture())
        answer = explained(client, picture())
        assert answer["result"]["verdict"] == "review"
        assert (answer["decision"]["winner"], answer["decision"]["runner_up"]) == (None, "safe")
        assert len(answer["attributions"]) == 1


def test_behind_a_defence_the_encoder_itself_is_explained(tmp_path: Path) -> None:
    publish(tmp_path, ToyEncoder(), toy_pools())
    ttc = {"defense": "ttc", "ttc_threshold": 1e9, "ttc_eps": 0.2, "ttc_step_size": 0.1}
    with served(toy_settings(tmp_path, anonymous_scopes=("admin",), **ttc), ToyEncoder()) as client:
        assert_same(client, picture())
        answer = explained(client, picture())
    assert answer["undefended"] is True
    embedding = encode_images(ToyEncoder(), [picture()]).numpy()[0]
    exemplars = {f"{p}-{i}": im for p, images in toy_pools().items() for i, im in enumerate(images)}
    for found in answer["attributions"]:
        itself = float(encode_images(ToyEncoder(), [exemplars[found["exemplar"]]]).numpy()[0] @ embedding)
        assert found["similarity"] == pytest.approx(itself, abs=1e-5)
        assert abs(found["similarity"] - found["judged_similarity"]) > 1e-3


class Kinked(ToyEncoder):
    """An encoder whose gradients are not finite."""

    def features(self, pixels: Tensor) -> Tensor:
        found = super().features(pixels)
        return found + (torch.zeros_like(found) * found).sqrt()


def test_without_finite_gradients_there_is_an_error_and_a_decision(tmp_path: Path) -> None:
    publish(tmp_path, Kinked(), toy_pools())
    with served(toy_settings(tmp_path, anonymous_scopes=("admin",)), Kinked()) as client:
        response = client.post("/explain", content=picture(), headers=PNG)
        assert_problem(response, 422, "no-attribution", reason="an attribution is not a finite number")
        assert_same(client, picture(), attribute=False)


def test_few_at_a_time(serve: Serve) -> None:
    client = serve()
    explainer = client.app.state.runtime.explainer  # type: ignore[attr-defined]
    places = [explainer.place() for _ in range(explaining.PLACES)]
    for place in places:
        place.__enter__()
    response = client.post("/explain", content=picture(), headers=PNG)
    assert_problem(response, 503, "overloaded", queue="explanations", limit=explaining.PLACES)
    assert int(response.headers["retry-after"]) >= 1
    assert client.post("/classify", content=picture(), headers=PNG).status_code == 200
    places[0].__exit__(None, None, None)
    for _ in range(3):  # an error gives its place back too
        assert client.post("/explain", content=b"no image", headers=PNG).status_code == 415
    explained(client, picture())


def test_it_ends_at_the_deadline_and_classify_is_answered_meanwhile(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, gone = threading.Event(), threading.Event()

    def endless(*_: Any, wanted: Any, **__: Any) -> None:
        began.set()
        while wanted():
            gone.wait(0.01)
        gone.set()
        raise Abandoned

    monkeypatch.setattr(explaining, "attribute", endless)
    client = serve(deadline_s=1.5)
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(client.post("/explain", content=picture(), headers=PNG)))
    asking.start()
    assert began.wait(30)
    assert client.post("/classify", content=picture(), headers=PNG).status_code == 200
    asking.join()
    assert_problem(answers[0], 504, "deadline-exceeded", limit_s=1.5)
    assert gone.wait(30)


def test_it_ends_when_the_caller_hangs_up(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    began, gone = threading.Event(), threading.Event()

    def endless(*_: Any, wanted: Any, **__: Any) -> None:
        began.set()
        while wanted():
            gone.wait(0.01)
        gone.set()
        raise Abandoned

    monkeypatch.setattr(explaining, "attribute", endless)
    client = serve()
    sent: list[Any] = []
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": "/explain",
        "raw_path": b"/explain", "query_string": b"", "headers": [(b"content-type", b"image/png")],
        "client": ("127.0.0.1", 1), "server": ("test", 80), "scheme": "http", "root_path": "",
    }  # fmt: skip
    messages = iter([{"type": "http.request", "body": picture(), "more_body": False}])

    async def receive() -> dict[str, Any]:
        message = next(messages, None)
        if message is None:
            await asyncio.to_thread(began.wait, 30)
            return {"type": "http.disconnect"}
        return message

    async def send(message: Any) -> None:
        sent.append(message)

    async def ask() -> None:
        await client.app(scope, receive, send)

    assert client.portal is not None
    client.portal.call(ask)
    assert began.is_set()
    assert gone.wait(30)
    assert not any(message.get("status") == 200 for message in sent)
    assert client.app.state.runtime.explainer._desk._taken == 0  # type: ignore[attr-defined]
