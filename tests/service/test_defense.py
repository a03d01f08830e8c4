"""The service behind a counterattack: what answers is named, stays the same, and pools know nothing of it."""

import base64
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from indexer.contents import Contents
from indexer.snapshot import Snapshot
from perception.counterattack import Counterattack, CounterattackSettings
from perception.testing import ToyEncoder, encoded, synthetic_image
from service.engine import Engine, Query, Search
from service.errors import SettingsError
from service.settings import Settings, read_settings
from service.startup import load
from service.testing import publish, toy_pools, toy_settings
from tests.api.conftest import served

SEED = b"a seed that nobody can guess"
ALWAYS = 1e9
PNG = {"content-type": "image/png"}


@pytest.fixture
def seed_file(tmp_path: Path) -> Path:
    path = tmp_path / "seed"
    path.write_bytes(SEED + b"\n")
    return path


@pytest.fixture
def pools(tmp_path: Path) -> Path:
    publish(tmp_path / "pools", ToyEncoder(), toy_pools())
    return tmp_path / "pools"


def picture(seed: int = 7) -> bytes:
    return encoded(synthetic_image(seed))


def ttc(pools: Path, **changes: Any) -> Settings:
    """Settings under which every image is counterattacked, by far."""
    asked = {"defense": "ttc", "ttc_threshold": ALWAYS, "ttc_eps": 0.2, "ttc_step_size": 0.1, "catalog": "off"}
    return toy_settings(pools, **{**asked, **changes})


def classified(settings: Settings, data: bytes) -> dict[str, Any]:
    with served(settings, ToyEncoder()) as client:
        answer: dict[str, Any] = client.post("/classify", content=data, headers=PNG).json()
    return answer


def nearest(answer: Mapping[str, Any]) -> dict[str, float]:
    return {n["id"]: n["similarity"] for n in answer["results"][0]["neighbors"]}


def test_answers_name_the_defence_and_are_those_of_the_library(pools: Path, seed_file: Path) -> None:
    settings = ttc(pools, ttc_seed_file=seed_file)
    encoder = ToyEncoder()
    defended = Counterattack(encoder, CounterattackSettings(eps=0.2, step_size=0.1, threshold=ALWAYS), seed=SEED)
    answer = classified(settings, picture())
    assert answer["model"]["defense"] == defended.defense
    assert answer["model"]["fingerprint"] == encoder.fingerprint
    pixels = torch.from_numpy(encoder.preprocess.apply(synthetic_image(7)))[None] / 255
    with torch.no_grad():
        [ours], [plain] = defended.encode(pixels), encoder.encode(pixels)
        exemplars = {
            f"{pool}-{i}": encoder.encode(torch.from_numpy(encoder.preprocess.apply(image))[None] / 255)[0]
            for pool, images in toy_pools().items()
            for i, image in enumerate(images)
        }
    for id, similarity in nearest(answer).items():
        assert similarity == pytest.approx(float(ours @ exemplars[id]), abs=1e-5)
    assert any(abs(s - float(plain @ exemplars[id])) > 1e-3 for id, s in nearest(answer).items())
    assert classified(toy_settings(pools, catalog="off"), picture())["model"]["defense"] is None


def test_equal_requests_get_equal_answers_as_long_as_the_seed_is_the_same(pools: Path, seed_file: Path) -> None:
    first, again = (classified(ttc(pools, ttc_seed_file=seed_file), picture()) for _ in "ab")
    assert first["model"] == again["model"]
    assert first["results"] == again["results"]
    unseeded = [classified(ttc(pools), picture()) for _ in "ab"]
    versions = {answer["model"]["defense"] for answer in (first, *unseeded)}
    assert len(versions) == 3
    assert nearest(unseeded[0]) != nearest(unseeded[1])


def test_similar_is_defended_where_that_is_asked_for(pools: Path, seed_file: Path) -> None:
    def found(**changes: Any) -> Any:
        with served(ttc(pools, ttc_seed_file=seed_file, **changes), ToyEncoder()) as client:
            return client.post("/similar", content=picture(), headers=PNG).json()["results"][0]["neighbors"]

    with served(toy_settings(pools, catalog="off"), ToyEncoder()) as client:
        plain = client.post("/similar", content=picture(), headers=PNG).json()["results"][0]["neighbors"]
    assert found() == plain
    assert [n["similarity"] for n in found(ttc_similar=True)] != [n["similarity"] for n in plain]


class Counting(ToyEncoder):
    """Counts the images that it is asked about."""

    seen = 0

    def features(self, pixels: Tensor) -> Tensor:
        self.seen += len(pixels)
        return super().features(pixels)


def test_what_is_kept_of_an_image_is_the_encoder_s_own() -> None:
    """Exemplars, reviews and the watch for near-duplicates are not to hold the noise of one day's seed."""
    encoder = Counting()
    defended = Counterattack(encoder, CounterattackSettings(eps=0.2, threshold=ALWAYS), seed=SEED)
    empty = Contents("pools", encoder.name, encoder.fingerprint, (), np.zeros((0, encoder.dim), np.float32))
    search = Search(Snapshot.of(empty), 1)
    pixels = encoder.preprocess.apply(synthetic_image(7))
    with torch.no_grad():
        [plain] = encoder.encode(torch.from_numpy(pixels)[None] / 255).numpy()
        [through] = defended.encode(torch.from_numpy(pixels)[None] / 255).numpy()
    judged, kept = Engine(defended, None).answer([Query(pixels, search), Query(pixels, None, defended=False)])
    np.testing.assert_allclose(judged.embedding, through, atol=1e-6)
    np.testing.assert_allclose(judged.undefended, plain, atol=1e-6)
    assert np.abs(through - plain).max() > 1e-3
    for embedding in (kept.embedding, kept.undefended):
        np.testing.assert_allclose(embedding, plain, atol=1e-6)
    [bare] = Engine(encoder, None).answer([Query(pixels, search)])
    np.testing.assert_array_equal(bare.embedding, bare.undefended)


def test_an_upload_becomes_an_exemplar_without_the_defence(pools: Path, seed_file: Path) -> None:
    settings = ttc(pools, ttc_seed_file=seed_file, catalog="", anonymous_scopes=("admin",))
    with served(settings, ToyEncoder()) as client:
        item = {"label": "unsafe", "data": base64.b64encode(picture()).decode()}
        added = client.post("/collections/pools/exemplars", json={"items": [item], "reason": "a test"})
        assert added.status_code == 200, added.text
        [result] = client.post("/similar", content=picture(), headers=PNG).json()["results"]
    assert result["neighbors"][0]["id"] == added.json()["items"][0]["id"]
    assert result["neighbors"][0]["similarity"] == pytest.approx(1, abs=1e-5)


def test_the_log_says_which_defence_there_was_and_hides_the_seed(pools: Path, seed_file: Path) -> None:
    settings = ttc(pools, ttc_seed_file=seed_file, catalog="", anonymous_scopes=("admin",))
    with served(settings, ToyEncoder()) as client:
        version = client.get("/readyz").json()["model"]["defense"]
        entries = client.get("/audit", params={"limit": 1000}).json()["entries"]
    text = str(entries)
    [model] = [entry for entry in entries if entry["kind"] == "model.set"]
    assert model["body"]["defense"] == version
    [noted] = [entry for entry in entries if entry["kind"] == "settings.set"]
    assert noted["body"]["ttc_seed_file"] is True
    assert noted["body"]["ttc_threshold"] == ALWAYS
    assert SEED.decode() not in text
    assert str(seed_file) not in text


def test_the_start_says_what_it_costs(pools: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hardlook.defense"):
        load(ttc(pools), ToyEncoder()).close()
    cost, seed = sorted(record.getMessage() for record in caplog.records if record.name == "hardlook.defense")
    assert "times as long as without" in seed + cost
    assert "HARDLOOK_TTC_SEED_FILE is not set" in seed + cost


class NoFeatures:
    """An encoder of another make."""

    def __init__(self) -> None:
        self._toy = ToyEncoder()
        self.name, self.dim, self.fingerprint = "other", self._toy.dim, self._toy.fingerprint
        self.preprocess, self.precision = self._toy.preprocess, self._toy.precision

    def encode(self, pixels: Tensor) -> Tensor:
        return self._toy.encode(pixels)


def test_what_cannot_be_done_is_refused_at_the_start(pools: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="encoder other does not give its features"):
        load(ttc(pools), NoFeatures())
    with pytest.raises(SettingsError, match=r"HARDLOOK_TTC_SEED_FILE: .* cannot be read"):
        load(ttc(pools, ttc_seed_file=tmp_path / "absent"), ToyEncoder())
    short = tmp_path / "short"
    short.write_text("hunter2\n")
    with pytest.raises(SettingsError, match="holds 7 bytes, a secret that cannot be guessed has at least 16"):
        load(ttc(pools, ttc_seed_file=short), ToyEncoder())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("TTC_EPS", "five", "HARDLOOK_TTC_EPS: "),
        ("TTC_EPS", "4/0", "HARDLOOK_TTC_EPS: 4/0 has no value"),
        ("TTC_EPS", "4", "HARDLOOK_TTC_EPS: Input should be less than or equal to 1"),
        ("TTC_STEP_SIZE", "0", "HARDLOOK_TTC_STEP_SIZE: Input should be greater than 0"),
        ("TTC_STEPS", "0", "HARDLOOK_TTC_STEPS: "),
        ("TTC_THRESHOLD", "nan", "HARDLOOK_TTC_THRESHOLD: "),
        ("DEFENSE", "magic", "HARDLOOK_DEFENSE: "),
    ],
)
def test_impossible_settings_are_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
    monkeypatch.setenv("HARDLOOK_DEFENSE", "ttc")
    monkeypatch.setenv(f"HARDLOOK_{name}", value)
    with pytest.raises(SettingsError) as caught:
        read_settings({})
    assert str(caught.value).startswith(message)


def test_fractions_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARDLOOK_DEFENSE", "ttc")
    monkeypatch.setenv("HARDLOOK_TTC_EPS", "8/255")
    assert read_settings({}).ttc_eps == 8 / 255
    assert read_settings({}).ttc_step_size == 1 / 255


def test_parameters_of_a_defence_that_is_off_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who sets them believes that there is one."""
    monkeypatch.setenv("HARDLOOK_TTC_STEPS", "3")
    with pytest.raises(SettingsError, match="HARDLOOK_TTC_STEPS set what does not happen: HARDLOOK_DEFENSE is 'none'"):
        read_settings({})
