"""The certified radius in answers, over an isometric encoder: pixels of a PNG are what the features are made of."""

import base64
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from numpy.typing import NDArray
from PIL import Image

from perception.certificates import FeatureBound
from perception.certified_decision import Surroundings, decision_radius
from perception.encoder import encode_images
from perception.preprocess import to_pixels
from perception.testing import encoded
from perception.verdict import DecisionPolicy, Neighbor
from service.testing import publish, toy_settings
from tests.api.conftest import served
from tests.lipschitz_toy import IsometricEncoder

SIZE_PX = 8
BOUND = FeatureBound(1.0, 3 * SIZE_PX * SIZE_PX)
Pixels = NDArray[np.uint8]


def drawn(seed: int) -> Image.Image:
    """An image in whose pixels a decoder changes nothing."""
    return Image.fromarray(np.random.default_rng(seed).integers(40, 216, (SIZE_PX, SIZE_PX, 3), dtype=np.uint8))


POOLS = {pool: [drawn(100 * i + j) for j in range(25)] for i, pool in enumerate(("safe", "buffer", "unsafe"))}


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "bias"])
def isometry(request: pytest.FixtureRequest) -> IsometricEncoder:
    return IsometricEncoder(12, size_px=SIZE_PX, bias_dim=request.param)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    with ExitStack() as stack:

        def serve(isometry: IsometricEncoder, **changes: Any) -> TestClient:
            publish(tmp_path, isometry, POOLS)
            settings = toy_settings(tmp_path, **{"anonymous_scopes": ("admin",), **changes})
            return stack.enter_context(served(settings, isometry))

        yield serve


def ask(client: TestClient, data: bytes) -> dict[str, Any]:
    response = client.post("/classify", content=data, headers={"content-type": "image/png"})
    assert response.status_code == 200, response.text
    return dict(response.json()["results"][0])


def library_radius(isometry: IsometricEncoder, image: Image.Image, policy: DecisionPolicy, left: str = "") -> Any:
    """From all exemplars, looked at one by one."""
    names = [(pool, f"{pool}-{i}") for pool, images in POOLS.items() for i in range(len(images))]
    kept = [at for at, (_, name) in enumerate(names) if name != left]
    embeddings = encode_images(isometry, [image for images in POOLS.values() for image in images]).numpy()[kept]
    pixels = to_pixels([np.asarray(image).transpose(2, 0, 1)])
    similarities = (embeddings.astype(float) @ isometry.encode(pixels)[0].double().numpy()).tolist()
    around = [Neighbor(names[at][1], names[at][0], s) for at, s in zip(kept, similarities, strict=True)]
    bound = FeatureBound(1.0, BOUND.values, int(isometry.bias_dim))
    return decision_radius(isometry.features(pixels)[0].numpy(), Surroundings(tuple(around), embeddings), policy, bound)


@pytest.mark.parametrize("changes", [{}, {"search": "fast"}, {"policy_rule": "vote", "policy_k": 3}])
def test_answers_carry_what_the_library_certifies(
    start: Any, isometry: IsometricEncoder, changes: dict[str, Any]
) -> None:
    client = start(isometry, **changes)
    policy = DecisionPolicy("vote", 3) if changes.get("policy_rule") else DecisionPolicy()
    several = 0
    for seed in range(1000, 1012):
        image = drawn(seed)
        item, whole = ask(client, encoded(image)), library_radius(isometry, image, policy)
        assert (item["certified_radius_l2"] is None) is (whole is None)
        if whole is not None:
            assert 0 <= item["certified_radius_l2"] <= whole + 1e-6  # what was not looked at is bounded, not known
            several += item["certified_radius_l2"] > 0.5 * whole
    assert several >= 4


def test_no_png_within_the_radius_has_another_verdict(start: Any, isometry: IsometricEncoder) -> None:
    """Straight towards exemplars of other pools, rounded to whole levels; and a little further verdicts do change."""
    client = start(isometry)
    flipped = inside = 0
    others = encode_images(isometry, [image for images in POOLS.values() for image in images]).numpy().astype(float)
    moves = isometry.dim - isometry.bias_dim
    rows = isometry.rows.numpy().astype(float)
    for seed in range(2000, 2006):
        image = drawn(seed)
        item = ask(client, encoded(image))
        radius = item["certified_radius_l2"]
        if not radius:
            continue
        pixels = np.asarray(image).astype(float) / 255
        at = encode_images(isometry, [image]).numpy()[0].astype(float)
        nearest = others[np.argsort(-(others @ at))]
        for target in nearest[1:9]:
            way = ((target - nearest[0])[:moves] @ rows).reshape(3, SIZE_PX, SIZE_PX).transpose(1, 2, 0)
            for far in (0.98, 1.5, 3.0):
                moved = np.clip(pixels + far * radius * way / np.linalg.norm(way), 0, 1)
                sent = (moved * 255).round().astype(np.uint8)
                distance = float(np.linalg.norm(sent / 255 - pixels))
                same = ask(client, encoded(Image.fromarray(sent)))["verdict"] == item["verdict"]
                if distance <= radius:
                    inside += 1
                    assert same
                flipped += not same
    assert inside >= 8
    assert flipped > 0


def test_edits_and_suppressions_count(start: Any, isometry: IsometricEncoder) -> None:
    client, policy = start(isometry), DecisionPolicy()
    image, before = next(
        (image, item)
        for image, item in ((image, ask(client, encoded(image))) for image in map(drawn, range(3000, 3100)))
        if (item["certified_radius_l2"] or 0) > 0.1
        and (library_radius(isometry, image, policy, left=item["neighbors"][0]["id"]) or 0) > 0.1
    )
    nearest = before["neighbors"][0]["id"]
    gone = client.delete(f"/collections/pools/exemplars/{nearest}")
    assert gone.status_code == 200, gone.text
    after = ask(client, encoded(image))
    assert after["neighbors"][0]["id"] != nearest
    whole = library_radius(isometry, image, policy, left=nearest)
    assert whole is not None
    assert 0.05 < after["certified_radius_l2"] <= whole + 1e-6
    # An item that just does not match yet: a small change of the image takes an exemplar away.
    here = encode_images(isometry, [image]).numpy()[0].astype(float)
    other, cosine = next(
        (each, cosine)
        for each in map(drawn, range(3101, 3200))
        if (cosine := float(encode_images(isometry, [each]).numpy()[0] @ here)) > 0.2
    )
    suppressed = client.post(
        "/collections/pools/suppressions",
        json={
            "suppresses": [after["neighbors"][0]["id"]],
            "data": base64.b64encode(encoded(other)).decode(),
            "min_similarity": cosine + 1e-4,
        },
    )
    assert suppressed.status_code == 200, suppressed.text
    last = ask(client, encoded(image))
    assert last["suppressed"] == []
    assert last["certified_radius_l2"] < 0.05


def test_of_several_frames_all_must_stay(start: Any, isometry: IsometricEncoder) -> None:
    client = start(isometry)
    frames: dict[str, list[tuple[int, float]]] = {}
    for seed in range(4000, 4030):
        item = ask(client, encoded(drawn(seed)))
        frames.setdefault(item["verdict"], []).append((seed, item["certified_radius_l2"]))
    for verdict, smallest in (("safe", min), ("unsafe", max)):
        (one, first), (two, second) = frames[verdict][:2]
        data = encoded(drawn(one), "WEBP", save_all=True, append_images=[drawn(two)], lossless=True, duration=100)
        item = ask(client, data)
        assert (item["verdict"], item["frame"]["frames_examined"]) == (verdict, 2)
        assert item["certified_radius_l2"] == pytest.approx(smallest(first, second))


def test_who_probes_learns_no_radius(start: Any, isometry: IsometricEncoder) -> None:
    client = start(isometry, probing_limit=3, probing_similarity=0.9, probing_anonymous=True)
    pixels = np.asarray(drawn(5000)).astype(int)
    answers = []
    for seed in range(8):
        noise = np.random.default_rng(seed).integers(-2, 3, pixels.shape)
        answers.append(ask(client, encoded(Image.fromarray((pixels + noise).astype(np.uint8)))))
    assert answers[0]["detail"] == "full"
    assert answers[0]["certified_radius_l2"] is not None
    assert answers[-1]["detail"] == "coarse"
    assert answers[-1]["certified_radius_l2"] is None


def test_review_by_a_threshold_and_other_encoders_have_none(
    start: Any, isometry: IsometricEncoder, client: TestClient, unsafe_png: bytes
) -> None:
    strict = start(isometry, policy_min_similarity=1.0)
    item = ask(strict, encoded(drawn(6000)))
    assert (item["verdict"], item["certified_radius_l2"]) == ("review", None)
    plain = ask(client, unsafe_png)
    assert plain["verdict"] == "unsafe"
    assert plain["certified_radius_l2"] is None
