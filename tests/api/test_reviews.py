"""From a wrong verdict to a right one: feedback, the queue, and the one call that corrects it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Connection

from indexer.catalog import reviews as queue
from indexer.catalog.edits import Disable
from indexer.catalog.entry import Entry
from perception.testing import encoded, synthetic_image
from service import wire_reviews
from service.runtime import Runtime
from tests.api.conftest import Start
from tests.service.key_files import make

# The toy pools have no answer to it: nearest is the buffer pool, or a safe exemplar by too small a margin.
PNG = encoded(synthetic_image(4244))
SHA256 = hashlib.sha256(PNG).hexdigest()
Team = tuple[TestClient, dict[str, str], dict[str, str], dict[str, str]]
REASON = {"reason": "it shows a dog"}


@pytest.fixture
def client(start: Start) -> TestClient:
    """Every verdict that would be safe is `review`, so that the queue fills."""
    return start(policy_min_margin=2.0, anonymous_scopes=("classify", "review", "admin"))


def assert_problem(response: Any, status: int, slug: str) -> None:
    assert (response.status_code, response.json()["type"].rpartition(":")[2]) == (status, slug), response.text


def classify(client: TestClient, image: bytes = PNG, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
    response = client.post("/classify", content=image, headers={"content-type": "image/png", **(headers or {})})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def report(client: TestClient, **body: Any) -> Any:
    return client.post("/feedback", json={"kind": "false-negative", **body})


def reported(client: TestClient, image: bytes = PNG, **body: Any) -> str:
    """A review item about an image."""
    answer = classify(client, image)
    kind = "false-positive" if answer["results"][0]["verdict"] == "unsafe" else "false-negative"
    response = report(client, request_id=answer["request_id"], **{"kind": kind, **body})
    assert response.status_code == 200, response.text
    return str(response.json()["review_id"])


def log(client: TestClient) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = client.get("/audit").json()["entries"]
    return entries


def pool(client: TestClient) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = client.get("/collections/pools/exemplars").json()["items"]
    return items


def test_the_words_are_those_of_the_queue() -> None:
    for name in ("Origin", "State", "Choice"):
        assert get_args(getattr(wire_reviews, name)) == get_args(getattr(queue, name))


def test_one_call_corrects_a_verdict(client: TestClient) -> None:
    answer = classify(client)
    taken = report(client, request_id=answer["request_id"], comment="two users say so")
    assert taken.status_code == 200, taken.text
    id = taken.json()["review_id"]
    item = client.get(f"/reviews/{id}").json()["review"]
    assert (item["origin"], item["state"], item["comment"]) == ("false-negative", "open", "two users say so")
    assert (item["image_sha256"], item["reporter"]) == (SHA256, "anonymous")
    assert item["evidence"]["neighbors"][0]["id"] == answer["results"][0]["neighbors"][0]["id"]
    decided = client.post(f"/reviews/{id}/decide", json={"label": "unsafe", "note": "as reported", **REASON})
    assert decided.status_code == 200, decided.text
    review = decided.json()["review"]
    assert (review["state"], review["decision"], review["exemplar_id"]) == ("decided", "unsafe", SHA256[:16])
    again = classify(client)
    [result] = again["results"]
    assert (result["verdict"], result["neighbors"][0]["id"]) == ("unsafe", SHA256[:16])
    assert result["neighbors"][0]["similarity"] == pytest.approx(1.0)
    assert again["snapshot"]["version"] != answer["snapshot"]["version"]
    assert again["snapshot"]["revision"] >= decided.json()["revision"]
    [exemplar] = [e for e in pool(client) if e["id"] == SHA256[:16]]
    assert (exemplar["label"], exemplar["note"], exemplar["source"]) == ("unsafe", "as reported", f"review {id}")
    mine = [e for e in log(client) if e["request_id"] == decided.json()["request_id"]]
    assert [e["kind"] for e in mine][:2] == ["exemplar.add", "review.decide"]
    assert {e["actor"] for e in mine} == {"anonymous"}
    assert [e["reason"] for e in mine[:2]] == [REASON["reason"]] * 2
    assert mine[1]["body"]["exemplar_id"] == SHA256[:16]


def test_what_people_write_is_not_in_the_log(client: TestClient) -> None:
    reported(client, comment="my name is Ann")
    assert any(entry["kind"] == "review.open" for entry in log(client))
    assert "Ann" not in str(log(client))


def test_a_second_decision_about_an_image_moves_it(client: TestClient) -> None:
    first = reported(client)
    assert client.post(f"/reviews/{first}/decide", json={"label": "unsafe"}).status_code == 200
    second = reported(client)
    assert second != first
    response = client.post(f"/reviews/{second}/decide", json={"label": "buffer"})
    assert response.status_code == 200, response.text
    assert [e["label"] for e in pool(client) if e["sha256"] == SHA256] == ["buffer"]


def test_dismissing_changes_no_pool(client: TestClient) -> None:
    id, before = reported(client), pool(client)
    response = client.post(f"/reviews/{id}/decide", json={"label": "dismiss", **REASON})
    assert response.status_code == 200
    assert response.json()["review"]["exemplar_id"] is None
    assert pool(client) == before
    assert_problem(client.post(f"/reviews/{id}/decide", json={"label": "safe"}), 409, "review-taken")
    assert pool(client) == before


def test_an_exemplar_of_another_image_stays_and_so_does_the_item(client: TestClient) -> None:
    id, taken = reported(client), pool(client)[0]["id"]
    response = client.post(f"/reviews/{id}/decide", json={"label": "unsafe", "exemplar_id": taken})
    assert_problem(response, 409, "exemplar-exists")
    assert client.get(f"/reviews/{id}").json()["review"]["state"] == "open"
    assert not [entry for entry in log(client) if entry["kind"] == "review.decide"]


def test_verdicts_for_review_are_in_the_queue(client: TestClient) -> None:
    images = [encoded(synthetic_image(7000 + i)) for i in range(12)]
    verdicts = [classify(client, image)["results"][0]["verdict"] for image in images]
    expected = [hashlib.sha256(i).hexdigest() for i, v in zip(images, verdicts, strict=True) if v == "review"]
    assert len(expected) >= 3
    # A report waits until what was answered before it is recorded.
    assert_problem(report(client, sha256="0" * 64), 404, "unknown-decision")
    found: list[str] = []
    page = client.get("/reviews", params={"state": "open", "limit": 2}).json()
    assert page["counts"] == {"open": len(expected), "claimed": 0, "decided": 0, "skipped": 0}
    while True:
        found += [item["image_sha256"] for item in page["reviews"]]
        if page["next"] is None:
            break
        page = client.get("/reviews", params={"state": "open", "limit": 2, "after": page["next"]}).json()
    assert found == expected
    assert client.get("/reviews", params={"origin": "false-positive"}).json()["reviews"] == []


@pytest.fixture
def team(start: Start, tmp_path: Path) -> Team:
    """A service with two reviewers and somebody who classifies, each as the headers of their requests."""
    path = tmp_path / "keys.json"
    ann, bob = make(path, "ann", ("review",)), make(path, "bob", ("review",))
    caller = make(path, "caller", ("classify",))
    client = start(keys_file=path, policy_min_margin=2.0)
    return client, {"x-api-key": ann}, {"x-api-key": bob}, {"x-api-key": caller}


def test_a_claim_keeps_others_away(team: Team) -> None:
    client, ann, bob, caller = team
    answer = classify(client, headers=caller)
    kind = "false-positive" if answer["results"][0]["verdict"] == "unsafe" else "false-negative"
    body = {"kind": kind, "request_id": answer["request_id"]}
    id = client.post("/feedback", json=body, headers=caller).json()["review_id"]
    claimed = client.post(f"/reviews/{id}/claim", headers=ann)  # without a body
    assert claimed.status_code == 200, claimed.text
    who = claimed.json()["review"]["claimed_by"]
    assert who == "key:" + ann["x-api-key"].split("_")[1]
    for step, body in (("claim", {"for_s": 5}), ("release", {}), ("skip", {}), ("decide", {"label": "unsafe"})):
        problem = client.post(f"/reviews/{id}/{step}", json=body, headers=bob)
        assert_problem(problem, 409, "review-taken")
        assert who in problem.json()["reason"]
    assert client.post(f"/reviews/{id}/release", json=REASON, headers=ann).json()["review"]["state"] == "open"
    assert client.post(f"/reviews/{id}/skip", json=REASON, headers=bob).json()["review"]["state"] == "skipped"
    assert client.post(f"/reviews/{id}/decide", json={"label": "safe"}, headers=bob).status_code == 200


def test_scopes(team: Team) -> None:
    client, ann, _, caller = team
    assert_problem(client.get("/reviews", headers=caller), 403, "forbidden")
    assert_problem(client.get("/reviews"), 401, "unauthenticated")
    body = {"kind": "false-negative", "sha256": SHA256}
    assert_problem(client.post("/feedback", json=body, headers=ann), 403, "forbidden")
    for step in ("claim", "release", "skip", "decide"):
        assert_problem(client.post(f"/reviews/{'0' * 32}/{step}", json={}, headers=caller), 403, "forbidden")
        body = {"label": "safe"} if step == "decide" else {}
        answer = client.post(f"/reviews/{'0' * 32}/{step}", json=body, headers=ann)
        assert_problem(answer, 404, "unknown-review")


def test_feedback_about_what_is_not_remembered(client: TestClient) -> None:
    problem = report(client, request_id="never")
    assert_problem(problem, 404, "unknown-decision")
    assert (problem.json()["by"], problem.json()["value"]) == ("request_id", "never")


def test_feedback_about_one_of_several_images(client: TestClient) -> None:
    other = encoded(synthetic_image(4243))
    files = [("image", ("a.png", PNG, "image/png")), ("image", ("b.png", other, "image/png"))]
    answer = client.post("/classify", files=files).json()
    kinds = ["false-positive" if r["verdict"] == "unsafe" else "false-negative" for r in answer["results"]]
    assert_problem(report(client, request_id=answer["request_id"]), 400, "invalid-parameter")
    taken = report(client, request_id=answer["request_id"], sha256=SHA256, kind=kinds[0])
    assert taken.status_code == 200, taken.text
    assert client.get(f"/reviews/{taken.json()['review_id']}").json()["review"]["image_sha256"] == SHA256


def test_feedback_that_contradicts_the_verdict(client: TestClient, pool_images: dict[str, list[Any]]) -> None:
    answer = classify(client, encoded(pool_images["unsafe"][0]))
    assert answer["results"][0]["verdict"] == "unsafe"
    problem = report(client, request_id=answer["request_id"], kind="false-negative")
    assert_problem(problem, 400, "invalid-parameter")
    assert report(client, request_id=answer["request_id"], kind="false-positive").status_code == 200


MISFITS: list[tuple[str, dict[str, Any]]] = [
    ("feedback", {"kind": "false-negative"}),
    ("feedback", {"kind": "wrong", "request_id": "x"}),
    ("feedback", {"kind": "false-negative", "sha256": "AB" * 32}),
    ("feedback", {"kind": "false-negative", "request_id": "x", "comment": "a\0b"}),
    ("feedback", {"kind": "false-negative", "request_id": "x", "comment": "a" * 4001}),
    ("feedback", {"kind": "false-negative", "request_id": "x", "more": 1}),
    ("reviews/{id}/decide", {"label": "nice"}),
    ("reviews/{id}/decide", {"label": "dismiss", "note": "x"}),
    ("reviews/{id}/decide", {"label": "safe", "exemplar_id": "a\0"}),
    ("reviews/{id}/decide", {}),
    ("reviews/{id}/claim", {"for_s": 0}),
    ("reviews/{id}/claim", {"for_s": "60"}),
    ("reviews/{id}/skip", {"reason": 3}),
]


def test_what_does_not_fit_is_refused(client: TestClient) -> None:
    for path, body in MISFITS:
        response = client.post(f"/{path.format(id='0' * 32)}", json=body)
        assert response.status_code == 400, (path, body, response.text)
    for query in ({"limit": 0}, {"limit": 201}, {"state": "lost"}, {"after": "x"}, {"more": 1}):
        assert_problem(client.get("/reviews", params=query), 400, "invalid-parameter")


def test_an_item_about_a_flood_puts_its_exemplar_back(client: TestClient) -> None:
    runtime: Runtime = client.app.state.runtime  # type: ignore[attr-defined]
    id = pool(client)[0]["id"]
    embedding = runtime.published.pools().embedding(id)
    item = queue.NewItem("flood", "pools", "e" * 64, embedding, "buffer", {"exemplar": id})
    opened: list[str | None] = []

    async def quarantine() -> None:
        def report(connection: Connection, entry: Entry | None) -> None:
            opened.extend(queue.open_items(connection, [item], limit=5))

        edit = Disable("pools", id, by="quarantine")
        await runtime.require_editor().apply([edit], actor="flood-guard", also=report)

    assert client.portal is not None
    client.portal.call(quarantine)
    assert pool(client)[0]["state"] == "quarantined"
    other = client.post(f"/reviews/{opened[0]}/decide", json={"label": "safe", "exemplar_id": "x"})
    assert_problem(other, 400, "invalid-parameter")
    decided = client.post(f"/reviews/{opened[0]}/decide", json={"label": "safe"})
    assert decided.status_code == 200, decided.text
    assert decided.json()["review"]["exemplar_id"] == id
    assert (pool(client)[0]["state"], pool(client)[0]["label"]) == ("active", "safe")


def test_a_full_queue_takes_no_report(start: Start) -> None:
    client = start(policy_min_margin=2.0, max_open_reviews=1, anonymous_scopes=("classify", "review"))
    assert reported(client)
    other = classify(client, encoded(synthetic_image(1)))
    kind = "false-positive" if other["results"][0]["verdict"] == "unsafe" else "false-negative"
    assert_problem(report(client, request_id=other["request_id"], kind=kind), 503, "overloaded")


def test_without_a_catalogue_there_is_no_queue(start: Start) -> None:
    client = start(catalog="off", anonymous_scopes=("classify", "review"))
    assert_problem(client.get("/reviews"), 409, "editing-disabled")
    assert_problem(report(client, sha256=SHA256), 409, "editing-disabled")
