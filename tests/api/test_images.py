"""Kept pictures: none by default; where they are turned on, of what is in the queue and of exemplars, for as long."""

import base64
import hashlib
import io
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from perception.testing import encoded, synthetic_image
from service.errors import SettingsError
from service.kept_images import KeptImages
from service.settings import Scope
from service.startup import load
from service.testing import publish, toy_pools, toy_settings
from tests.api.conftest import Start, ToyClip, served
from tests.service.key_files import make

PNG = encoded(synthetic_image(4244))
SHA256 = hashlib.sha256(PNG).hexdigest()
OTHER = encoded(synthetic_image(4245))
REVIEW = {"policy_min_margin": 2.0, "policy_min_margin_unsafe": 2.0}  # every verdict is `review`
ADMIN = {"anonymous_scopes": ("admin",), "decode_timeout_s": 30.0}  # pictures give way to all else on busy cores
ABSENT = "0" * 64


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def assert_problem(response: Any, status: int, slug: str) -> None:
    assert (response.status_code, response.json()["type"].rpartition(":")[2]) == (status, slug), response.text


def classify(client: TestClient, data: bytes = PNG) -> str:
    response = client.post("/classify", content=data, headers={"content-type": "image/png"})
    assert response.status_code == 200, response.text
    return str(response.json()["results"][0]["verdict"])


def picture(client: TestClient, sha256: str) -> bytes | None:
    response = client.get(f"/images/{sha256}")
    if response.status_code == 404:
        return None
    assert response.status_code == 200, response.text
    return bytes(response.content)


def wait_for(condition: Callable[[], object]) -> None:
    """Pictures come soon after the answers."""
    until_s = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.02)


def outcomes(client: TestClient) -> dict[str, int]:
    lines = client.get("/metrics").text.splitlines()
    name = "hardlook_kept_images_total{outcome="
    return {line.split('"')[1]: int(float(line.rpartition(" ")[2])) for line in lines if line.startswith(name)}


def settled(client: TestClient, *, images: int) -> dict[str, int]:
    """What became of the pictures of some images, once something has of all."""
    gone = ("expired", "forgotten")
    wait_for(lambda: sum(n for kind, n in outcomes(client).items() if kind not in gone) >= images)
    return outcomes(client)


def kept(folder: Path) -> dict[str, str]:
    """The kind of each picture that a folder has."""
    return {path.stem: path.parent.parent.name for path in folder.rglob("*.jpg")}


def item_of(client: TestClient, data: bytes = PNG) -> dict[str, Any]:
    def find() -> list[dict[str, Any]]:
        found = client.get("/reviews").json()["reviews"]
        return [item for item in found if item["image_sha256"] == sha256_of(data)]

    wait_for(find)
    return find()[-1]


def add(client: TestClient, id: str, data: bytes = PNG, collection: str = "pools", **more: Any) -> Any:
    item = {"id": id, "label": "unsafe", "data": base64.b64encode(data).decode(), **more}
    response = client.post(f"/collections/{collection}/exemplars", json={"items": [item]})
    assert response.status_code == 200, response.text
    return response.json()


def test_by_default_nothing_of_an_image_is_written(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    client = start(**REVIEW, **ADMIN)
    assert classify(client) == "review"
    add(client, "added", OTHER)
    id = item_of(client)["id"]
    assert client.get(f"/reviews/{id}").json()["review"]["image_kept"] is False
    assert client.post(f"/reviews/{id}/decide", json={"label": "unsafe"}).status_code == 200
    assert client.get("/collections/pools/exemplars/added").json()["item"]["image_kept"] is False
    assert_problem(client.get(f"/images/{SHA256}"), 404, "unknown-item")
    assert outcomes(client) == {}
    assert not (tmp_path / ".images").exists()
    marks = [data[start : start + 64] for data in (PNG, OTHER) for start in range(40, len(data) - 64, 200)]
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        assert not content.startswith((b"\xff\xd8", b"\x89PNG")), path
        assert not [mark for mark in marks if mark in content], path
    assert list((tmp_path / "temporary").iterdir()) == []


def test_what_is_in_the_review_queue_has_a_picture(start: Start, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "GPS of a home"
    data = encoded(synthetic_image(9, size_px=(1200, 800)), "JPEG", exif=exif, comment=b"GPS of a home")
    client = start(**REVIEW, **ADMIN, keep_images="review")
    assert classify(client, data) == "review"
    settled(client, images=1)
    response = client.get(f"/images/{sha256_of(data)}")
    assert response.status_code == 200
    assert response.headers["content-type"] == "image/jpeg"
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["content-disposition"] == f"inline; filename={sha256_of(data)}.jpg"
    assert response.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
    assert response.headers["x-content-type-options"] == "nosniff"
    with Image.open(io.BytesIO(response.content)) as image:
        assert (image.format, image.size) == ("JPEG", (341, 512))
        assert not image.getexif()
    assert b"GPS" not in response.content
    assert item_of(client, data)["image_kept"] is True
    assert kept(tmp_path / ".images") == {sha256_of(data): "recent"}
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        assert data[100:164] not in path.read_bytes(), path  # never the file itself


def test_other_verdicts_have_none_unless_all_do(start: Start, tmp_path: Path) -> None:
    client = start(**ADMIN, keep_images="review")
    verdicts = {classify(client, data): data for data in (encoded(synthetic_image(seed)) for seed in (0, 200))}
    assert verdicts.keys() == {"safe", "unsafe"}
    add(client, "marker", OTHER)  # comes after them
    settled(client, images=1)
    assert kept(tmp_path / ".images") == {sha256_of(OTHER): "exemplars"}


def test_every_verdict_has_one_where_all_are_kept(start: Start, tmp_path: Path) -> None:
    client = start(**ADMIN, keep_images="all")
    images = [encoded(synthetic_image(seed)) for seed in (0, 100, 200, 4244)]
    verdicts = [classify(client, data) for data in images]
    assert {"safe", "unsafe"} < set(verdicts)
    assert settled(client, images=4) == {"kept": 4}
    assert kept(tmp_path / ".images") == dict.fromkeys(map(sha256_of, images), "recent")
    assert classify(client, images[0]) == "safe"
    assert settled(client, images=5) == {"kept": 4, "present": 1}
    # So that a verdict that is reported later can be looked at, and stays when the report is dismissed.
    body = {"kind": "false-negative", "sha256": sha256_of(images[0])}
    id = client.post("/feedback", json=body).json()["review_id"]
    assert client.get(f"/reviews/{id}").json()["review"]["image_kept"] is True
    client.post(f"/reviews/{id}/decide", json={"label": "dismiss"})
    assert picture(client, sha256_of(images[0]))


def test_what_becomes_an_exemplar_stays(start: Start, tmp_path: Path) -> None:
    client = start(**REVIEW, **ADMIN, keep_images="review")
    classify(client)
    settled(client, images=1)
    id = item_of(client)["id"]
    decided = client.post(f"/reviews/{id}/decide", json={"label": "unsafe"}).json()
    assert decided["review"]["image_kept"] is True
    assert kept(tmp_path / ".images") == {SHA256: "exemplars"}
    exemplar = decided["review"]["exemplar_id"]
    assert client.get(f"/collections/pools/exemplars/{exemplar}").json()["item"]["image_kept"] is True
    assert client.delete(f"/collections/pools/exemplars/{exemplar}").status_code == 200
    assert kept(tmp_path / ".images") == {}
    assert picture(client, SHA256) is None
    assert outcomes(client)["forgotten"] == 1


def test_what_was_decided_before_there_was_a_picture_gets_one(start: Start, tmp_path: Path) -> None:
    client = start(**REVIEW, **ADMIN, keep_images="review")
    classify(client)
    id = item_of(client)["id"]  # as soon as it is there
    client.post(f"/reviews/{id}/decide", json={"label": "unsafe"})
    settled(client, images=1)
    assert kept(tmp_path / ".images") == {SHA256: "exemplars"}


def test_what_is_dismissed_is_forgotten_at_once(start: Start, tmp_path: Path) -> None:
    client = start(**REVIEW, **ADMIN, keep_images="review")
    classify(client)
    settled(client, images=1)
    id = item_of(client)["id"]
    decided = client.post(f"/reviews/{id}/decide", json={"label": "dismiss"}).json()
    assert decided["review"]["image_kept"] is False
    assert picture(client, SHA256) is None
    assert kept(tmp_path / ".images") == {}
    # It does not get into the queue again, and its picture not into the folder.
    assert classify(client) == "review"
    assert settled(client, images=2) == {"kept": 1, "forgotten": 1, "unwanted": 1}
    assert kept(tmp_path / ".images") == {}


def test_an_exemplars_picture_survives_a_dismissal(start: Start, tmp_path: Path) -> None:
    client = start(**REVIEW, **ADMIN, keep_images="review")
    add(client, "a")
    settled(client, images=1)
    classify(client)
    settled(client, images=2)
    client.post(f"/reviews/{item_of(client)['id']}/decide", json={"label": "dismiss"})
    assert kept(tmp_path / ".images") == {SHA256: "exemplars"}


def test_a_picture_goes_with_the_last_exemplar_of_its_file(start: Start, tmp_path: Path) -> None:
    client = start(**ADMIN, keep_images="review")
    client.post("/collections", json={"name": "landmarks"})
    [item] = add(client, "a")["items"]
    assert item["sha256"] == SHA256
    add(client, "b", collection="landmarks")
    body = {"id": "s", "suppresses": ["safe-0"], "data": base64.b64encode(PNG).decode()}
    assert client.post("/collections/pools/suppressions", json=body).status_code == 200
    settled(client, images=3)
    assert client.get("/collections/landmarks/exemplars/b").json()["item"]["image_kept"] is True
    listed = client.get("/collections/pools/exemplars").json()["items"]
    assert {each["id"] for each in listed if each["image_kept"]} == {"a", "s"}
    client.patch("/collections/pools/exemplars/s", json={"disabled": True})
    for gone in ("pools/exemplars/a", "landmarks/exemplars/b"):
        assert client.delete(f"/collections/{gone}").status_code == 200
        assert picture(client, SHA256)
    assert client.delete("/collections/pools/exemplars/s").status_code == 200
    assert picture(client, SHA256) is None


def test_an_embedding_has_no_picture(start: Start, tmp_path: Path) -> None:
    client = start(**ADMIN, keep_images="all")
    vector = np.zeros(ToyClip().dim)
    vector[0] = 1.0
    item = {"id": "e", "label": "unsafe", "embedding": vector.tolist(), "fingerprint": ToyClip().fingerprint}
    assert client.post("/collections/pools/exemplars", json={"items": [item]}).status_code == 200
    assert client.get("/collections/pools/exemplars/e").json()["item"]["image_kept"] is False
    assert client.delete("/collections/pools/exemplars/e").status_code == 200


def test_the_frame_is_the_one_that_decided(start: Start, tmp_path: Path) -> None:
    frames = [synthetic_image(seed) for seed in (0, 200, 1)]  # an unsafe one between safe ones
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    client = start(**ADMIN, keep_images="all")
    response = client.post("/classify", content=data, headers={"content-type": "image/webp"})
    [result] = response.json()["results"]
    assert (result["verdict"], result["frame"]["index"]) == ("unsafe", 1)
    settled(client, images=1)
    shown = np.asarray(Image.open(io.BytesIO(picture(client, sha256_of(data)) or b"")), np.float64)
    differences = [np.abs(shown - np.asarray(frame, np.float64)).mean() for frame in frames]
    assert differences[1] < 10 < min(differences[0], differences[2])
    add(client, "third", data, frame=2)
    settled(client, images=2)
    shown = np.asarray(Image.open(io.BytesIO(picture(client, sha256_of(data)) or b"")), np.float64)
    assert np.abs(shown - np.asarray(frames[2], np.float64)).mean() < 10


def test_every_way_to_a_verdict_keeps_pictures(start: Start, tmp_path: Path) -> None:
    client = start(**REVIEW, **ADMIN, keep_images="review")
    images = [encoded(synthetic_image(4300 + i)) for i in range(3)]
    coded = [base64.b64encode(data).decode() for data in images]
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{coded[0]}"}}
    assert client.post("/v1/moderations", json={"input": [part]}).status_code == 200
    headers = {"content-type": "image/png"}
    assert client.post("/adapters/pict-rs?review=accept", content=images[1], headers=headers).status_code == 200
    assert client.post("/jobs", json={"images": [{"data": coded[2]}]}).status_code == 202
    settled(client, images=3)
    assert kept(tmp_path / ".images") == dict.fromkeys(map(sha256_of, images), "recent")


def test_callers_who_probe_are_treated_alike(start: Start, tmp_path: Path) -> None:
    client = start(**REVIEW, **ADMIN, keep_images="review", probing_limit=1, probing_anonymous=True)
    base = synthetic_image(4400)
    images = [encoded(base.point(lambda value, i=i: min(255, value + i))) for i in range(4)]
    for data in images:
        assert classify(client, data) == "review"
    settled(client, images=4)
    assert kept(tmp_path / ".images") == dict.fromkeys(map(sha256_of, images), "recent")


def test_who_may_look(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    scopes = get_args(Scope)
    keys = {scope: {"x-api-key": make(path, scope.replace(":", "-"), (scope,))} for scope in scopes}
    client = start(**REVIEW, keys_file=path, keep_images="review")
    headers = {"content-type": "image/png", **keys["classify"]}
    assert client.post("/classify", content=PNG, headers=headers).status_code == 200
    url = f"/images/{SHA256}"
    wait_for(lambda: client.get(url, headers=keys["admin"]).status_code == 200)
    assert {s: client.get(url, headers=keys[s]).status_code for s in scopes} == {
        "review": 200, "pools:write": 200, "admin": 200, "classify": 403, "similar": 403, "metrics": 403,
    }  # fmt: skip
    assert_problem(client.get(url), 401, "unauthenticated")
    assert_problem(client.get(f"/images/{ABSENT}", headers=keys["classify"]), 403, "forbidden")  # learns nothing


@pytest.mark.parametrize(
    ("name", "status"),
    [
        (ABSENT, 404),
        (SHA256.upper(), 400),
        ("a" * 63, 400),
        ("a" * 64 + ".jpg", 400),
        ("a" * 64 + "%0A", 400),
        ("..%2F..%2Fcatalog.sqlite3", 404),  # a slash makes it another route, which there is not
        ("%2E%2E", 400),
        ("%00" * 64, 400),
    ],
)
def test_other_names_are_refused(start: Start, name: str, status: int) -> None:
    client = start(**ADMIN, keep_images="all")
    response = client.get(f"/images/{name}")
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"


def test_pictures_grow_old_and_stay_few(start: Start, tmp_path: Path) -> None:
    client = start(**ADMIN, keep_images="all", images=tmp_path / "elsewhere", images_bytes=20_000, images_kept_s=3600)
    for seed in range(30):
        classify(client, encoded(synthetic_image(seed, size_px=(200, 200))))
    settled(client, images=30)
    folder = tmp_path / "elsewhere"
    assert 2 < len(kept(folder)) < 30
    assert sum(path.stat().st_size for path in folder.rglob("*.jpg")) <= 20_000
    newest = sha256_of(encoded(synthetic_image(29, size_px=(200, 200))))
    assert picture(client, newest)
    long_ago_s = time.time() - 3601
    os.utime(folder / "recent" / newest[:2] / f"{newest}.jpg", (long_ago_s, long_ago_s))
    assert picture(client, newest) is None


def test_a_full_disk_costs_pictures_and_nothing_else(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    client = start(**REVIEW, **ADMIN, keep_images="review")
    with monkeypatch.context() as patch:
        patch.setattr(KeptImages, "keep", full)
        patch.setattr(KeptImages, "forget", full)
        patch.setattr(KeptImages, "kept", full)
        for seed in range(3):
            assert classify(client, encoded(synthetic_image(4500 + seed))) == "review"
        assert settled(client, images=3) == {"failed": 3}
        add(client, "a")
        item = item_of(client, encoded(synthetic_image(4500)))
        assert item["image_kept"] is False
        assert client.post(f"/reviews/{item['id']}/decide", json={"label": "dismiss"}).status_code == 200
    assert len([record for record in caplog.records if "No space" in record.message]) == 1
    classify(client)
    settled(client, images=5)
    assert picture(client, SHA256)


def test_an_unreadable_folder_is_no_absent_picture(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    client = start(**ADMIN, keep_images="review")
    monkeypatch.setattr(KeptImages, "read", refused)
    assert_problem(client.get(f"/images/{SHA256}"), 503, "not-ready")


def test_a_folder_that_cannot_be_made_keeps_nobody_from_answers(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    client = start(**REVIEW, **ADMIN, keep_images="review", images=tmp_path / "file" / "images")
    assert classify(client) == "review"
    assert settled(client, images=1) == {"failed": 1}
    assert len([record for record in caplog.records if record.name == "hardlook.images"]) == 1
    assert (tmp_path / "file").read_text() == "no folder"


def test_at_the_end_what_waits_is_kept(tmp_path: Path) -> None:
    publish(tmp_path, ToyClip(), toy_pools())
    with served(toy_settings(tmp_path, **REVIEW, **ADMIN, keep_images="review"), ToyClip()) as client:
        for seed in range(5):
            classify(client, encoded(synthetic_image(4600 + seed)))
    assert len(kept(tmp_path / ".images")) == 5


def test_without_a_catalogue_there_is_nothing_to_keep_pictures_of(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"HARDLOOK_KEEP_IMAGES is 'all'.*HARDLOOK_CATALOG is 'off'"):
        load(toy_settings(tmp_path, catalog="off", keep_images="all"), ToyClip())
