"""Starts, ids, plans, what is inverted, and file names."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offline.errors import DataError, DataMissing, PlanError
from offline.inversion import InversionPlan, search_generator, start_pixels
from offline.inversion.apgd import ApgdInversion
from offline.inversion.sources import ImageSources, SourceImage, public_photographs, read_folder, read_images
from offline.inversion.store import file_names
from perception.testing import ToyEncoder, synthetic_image
from tests.offline.inversion_toys import write_images


def test_starts_are_noisy_grey() -> None:
    starts = start_pixels(4, 64, 0, list("abcd"))
    assert starts.shape == (4, 3, 64, 64)
    assert float((starts - 0.5).abs().max()) <= 8 / 255
    assert float((starts - 0.5).abs().max()) > 0.99 * 8 / 255
    assert float(starts.mean()) == pytest.approx(0.5, abs=1e-3)
    assert float(starts.std()) == pytest.approx(8 / 255 / math.sqrt(3), rel=0.02)


def test_a_start_is_that_of_its_target_and_seed_alone() -> None:
    three = start_pixels(3, 16, 5, ["a", "b", "c"])
    assert torch.equal(start_pixels(1, 16, 5, ["b"])[0], three[1])
    assert torch.equal(start_pixels(2, 16, 5, ["c", "a"]), three[[2, 0]])
    assert not torch.equal(three[0], three[1])
    assert not torch.equal(start_pixels(1, 16, 6, ["a"])[0], three[0])


def test_a_search_draws_other_numbers_than_its_start() -> None:
    drawn = torch.rand(3, 16, 16, generator=search_generator("a", 0))
    start = (start_pixels(1, 16, 0, ["a"])[0] - 0.5) / (8 / 255)
    assert float((drawn - (start + 1) / 2).abs().max()) > 0.1
    assert torch.equal(drawn, torch.rand(3, 16, 16, generator=search_generator("a", 0)))


def test_impossible_starts_are_refused() -> None:
    for count, size_px, seed, ids in ((2, 16, 0, ["a"]), (0, 16, 0, []), (1, 0, 0, ["a"]), (1, 16, -1, ["a"])):
        with pytest.raises(PlanError):
            start_pixels(count, size_px, seed, ids)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"encoders": ()}, "encoders must be one or several different ones"),
        ({"encoders": ("a", "a")}, "encoders must be one or several different ones"),
        ({"seeds": ()}, "seeds must be one or several different ones"),
        ({"seeds": (1, 1)}, "seeds must be one or several different ones"),
        ({"seeds": (0, -1)}, "must not be negative, got -1"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"radius": 0.0}, "radius must be positive and finite, got 0.0"),
        ({"radius": -1.0}, "radius must be positive and finite, got -1.0"),
        ({"radius": math.nan}, "radius must be positive and finite, got nan"),
        ({"radius": math.inf}, "radius must be positive and finite, got inf"),
        ({"optimiser": "sgd"}, "optimiser must be one of apgd, multi-view, got 'sgd'"),
        ({"optimiser": "multi-view", "radius": 3.0}, "multi-view optimiser has no radius"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        InversionPlan(**{"encoders": ("a",), **wrong})


def test_the_published_numbers_are_the_default() -> None:
    assert InversionPlan(("a",)).make_optimiser() == ApgdInversion(steps=500, radius=None, alpha=2.0)
    assert InversionPlan(("a",), optimiser="multi-view").make_optimiser().steps == 1000
    assert InversionPlan(("a",), steps=7, radius=9.0).make_optimiser() == ApgdInversion(steps=7, radius=9.0)
    assert InversionPlan(("a",)).as_dict()["optimiser"]["radius_at_224"] == 100


@given(st.lists(st.text(max_size=120), min_size=1, max_size=8, unique=True))
def test_file_names_are_different_and_plain(ids: list[str]) -> None:
    names = file_names(ids)
    assert list(names) == ids
    assert len({name.casefold() for name in names.values()}) == len(ids)
    for name in names.values():
        assert name.replace("-", "a").replace(".", "a").replace("_", "a").isalnum()
        assert name.isascii()
        assert not name.startswith(".")
        assert len(name) < 100


def test_a_plain_id_is_its_own_file_name() -> None:
    assert file_names(["bundled/clean", "a.png"]) == {"bundled/clean": "bundled-clean", "a.png": "a.png"}
    both = file_names(["a/b.png", "a-b.png", "A-b.png"])
    assert len(set(both.values())) == 3


def test_images_become_targets_of_what_the_encoder_sees() -> None:
    encoder = ToyEncoder(size_px=16)
    image = synthetic_image(0, (48, 40))
    (target,) = ImageSources((SourceImage("a", image),)).targets(encoder)
    assert target.picture is not None
    assert target.picture.size == (16, 16)
    pixels = torch.from_numpy(encoder.preprocess.apply(image))[None].float() / 255
    torch.testing.assert_close(target.embedding, encoder.encode(pixels)[0].detach())
    assert not target.embedding.requires_grad


def test_files_and_folders_are_read(tmp_path: Path) -> None:
    paths = write_images(tmp_path / "images" / "deep", ["b.png", "a.png"])
    assert read_images(paths).ids == ("b.png", "a.png")
    folder = read_folder(tmp_path / "images")
    assert folder.ids == ("deep/a.png", "deep/b.png")
    digests = {image.id: image.digest for image in folder.images}
    assert digests["deep/b.png"] == read_images(paths).images[0].digest
    assert digests["deep/a.png"] != digests["deep/b.png"]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"this is not an image")
    for path in (tmp_path / "broken.png", tmp_path / "absent.png", tmp_path):
        with pytest.raises(DataError, match=str(path)):
            read_images([path])
    with pytest.raises(DataError, match=r"broken\.png"):
        read_folder(tmp_path)
    with pytest.raises(DataMissing):
        read_folder(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        read_folder(tmp_path / "empty")


def test_an_id_is_used_once(tmp_path: Path) -> None:
    first, second = write_images(tmp_path / "1", ["a.png"]) + write_images(tmp_path / "2", ["a.png"])
    with pytest.raises(PlanError, match="have the same name"):
        read_images([first, second])
    with pytest.raises(PlanError, match="two targets have the id 'a'"):
        ImageSources((SourceImage("a", synthetic_image(0)), SourceImage("a", synthetic_image(1))))
    with pytest.raises(PlanError, match="at least one"):
        read_images([])


def test_the_public_photographs_are_there() -> None:
    pytest.importorskip("skimage", reason="the photographs are in the [demo] extra")
    pytest.importorskip("sklearn", reason="the photographs are in the [demo] extra")
    found = public_photographs()
    assert found.ids == ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "china.jpg", "flower.jpg")
    assert all(min(image.image.size) > 200 for image in found.images)


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offline.inversion.sources.find_spec", lambda name: None)
    with pytest.raises(PlanError, match=r"skimage, which is not installed: install hardlook\[demo\]"):
        public_photographs()
