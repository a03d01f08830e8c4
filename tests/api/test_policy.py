"""A calibrated policy decides, is named in every answer, and says how often such verdicts flipped."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from indexer.store import SnapshotStore
from perception.encoder import encode_images
from perception.policy_file import CalibratedPolicy, FlipBin
from perception.testing import ToyEncoder, encoded, synthetic_image
from perception.verdict import DecisionPolicy, Neighbor, VerdictLabel
from service.app import create_app
from service.startup import load
from service.testing import toy_settings
from tests.perception.calibrated_policies import a_policy

PNG = {"content-type": "image/png"}
NAMES = ("name", "sha256", "audited_gallery")
POLICY = DecisionPolicy("nearest", 1, -1.0, 0.04, 0.04)


@pytest.fixture(scope="module")
def calibrated(root: Path, encoder: ToyEncoder) -> CalibratedPolicy:
    """Of the published pools, with bins for `safe` from 0.04 on, and for `unsafe` below 0.2."""
    return a_policy(
        policy=POLICY,
        encoder_fingerprint=encoder.fingerprint,
        gallery_sha256=SnapshotStore(root, "pools").load(encoder.fingerprint).to_gallery().sha256,
        flips=(
            FlipBin("linf", 4 / 255, 10, VerdictLabel.SAFE, 0.04, 2.0, 5, 20),
            FlipBin("linf", 8 / 255, 10, VerdictLabel.SAFE, 0.04, 2.0, 15, 20),
            FlipBin("linf", 8 / 255, 10, VerdictLabel.UNSAFE, 0.04, 0.2, 6, 30),
        ),
    )


@pytest.fixture(scope="module")
def with_policy(
    root: Path, encoder: ToyEncoder, calibrated: CalibratedPolicy, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TestClient]:
    path = tmp_path_factory.mktemp("policies") / "policy.json"
    calibrated.save(path)
    settings = toy_settings(root, policy_file=path)
    with TestClient(create_app(settings, load(settings, encoder))) as client:
        yield client


def classified(client: TestClient, data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    answer = client.post("/classify", content=data, headers=PNG).json()
    [result] = answer["results"]
    return answer["policy"], result


def library_verdict(root: Path, encoder: ToyEncoder, data: bytes) -> VerdictLabel:
    gallery = SnapshotStore(root, "pools").load(encoder.fingerprint).to_gallery()
    similarities = gallery.embeddings @ encode_images(encoder, [data]).numpy()[0]
    rows = zip(gallery.ids, gallery.labels, similarities, strict=True)
    return POLICY.decide(Neighbor(id, label, float(similarity)) for id, label, similarity in rows).label


def test_every_answer_names_it(with_policy: TestClient, calibrated: CalibratedPolicy, unsafe_png: bytes) -> None:
    policies = [
        with_policy.post("/classify", content=unsafe_png, headers=PNG).json()["policy"],
        with_policy.post("/similar", content=unsafe_png, headers=PNG).json()["policy"],
        with_policy.get("/pools").json()["policy"],
    ]
    assert policies[0] == policies[1] == policies[2]
    assert policies[0] == {
        "version": POLICY.version,
        "rule": "nearest",
        "k": 1,
        "min_similarity": -1.0,
        "min_margin": 0.04,
        "min_margin_unsafe": 0.04,
        "name": calibrated.name,
        "sha256": calibrated.sha256,
        "audited_gallery": calibrated.gallery_sha256,
    }


def test_without_one_there_is_nothing_to_name(client: TestClient, unsafe_png: bytes) -> None:
    policy, result = classified(client, unsafe_png)
    assert [policy[name] for name in NAMES] == [None] * 3
    assert policy["min_margin_unsafe"] == 0
    assert result["flip_rate_at_eps"] is None


def test_it_decides_and_its_bins_are_shown(
    client: TestClient, with_policy: TestClient, calibrated: CalibratedPolicy, root: Path, encoder: ToyEncoder
) -> None:
    seen = set()
    for seed in range(3000, 3060):
        data = encoded(synthetic_image(seed))
        _, result = classified(with_policy, data)
        _, plain = classified(client, data)
        label = VerdictLabel(result["verdict"])
        assert label is library_verdict(root, encoder, data)
        assert (result["margin"], result["pool"]) == pytest.approx((plain["margin"], plain["pool"]))
        expected = calibrated.flip_rates(label, result["margin"])
        shown = result["flip_rate_at_eps"]
        assert shown == ([{**vars(rate), "interval95": list(rate.interval95)} for rate in expected] or None)
        seen.add((plain["verdict"], result["verdict"], len(expected)))
    # Both thresholds, every label, and a margin that no bin holds.
    assert {("safe", "review", 0), ("unsafe", "review", 0), ("safe", "safe", 2), ("unsafe", "unsafe", 1)} <= seen
    assert ("unsafe", "unsafe", 0) in seen


def test_figures_are_those_of_the_file(with_policy: TestClient, pool_images: dict[str, list[Image.Image]]) -> None:
    _, result = classified(with_policy, encoded(pool_images["safe"][0]))
    assert result["verdict"] == "safe"
    weak, strong = result["flip_rate_at_eps"]
    assert weak == {
        "norm": "linf",
        "eps": 4 / 255,
        "steps": 10,
        "value": 0.25,
        "interval95": weak["interval95"],
        "n": 20,
    }
    assert strong["value"] == 0.75
    assert weak["interval95"] == pytest.approx([0.1119, 0.4687], abs=1e-4)


def test_several_frames_have_no_flip_rate(with_policy: TestClient, pool_images: dict[str, list[Image.Image]]) -> None:
    first, second = pool_images["safe"][:2]
    data = encoded(first, "WEBP", save_all=True, append_images=[second], lossless=True, duration=100)
    _, result = classified(with_policy, data)
    assert result["verdict"] == "safe"
    assert result["frame"]["frames_examined"] == 2
    assert result["flip_rate_at_eps"] is None


@pytest.mark.parametrize("gallery", [None, "00" * 32])
def test_other_pools_than_audited_are_noted(
    root: Path, encoder: ToyEncoder, calibrated: CalibratedPolicy, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    gallery: str | None,
) -> None:  # fmt: skip
    path = tmp_path / "policy.json"
    a_policy(
        encoder_fingerprint=encoder.fingerprint, gallery_sha256=gallery or calibrated.gallery_sha256
    ).save(path)  # fmt: skip
    with caplog.at_level(logging.WARNING, "hardlook"):
        load(toy_settings(root, policy_file=path), encoder)
    assert any("audited with other pools" in line for line in caplog.messages) is (gallery is not None)
