"""The figures on the bundled encoder's card are those that its commands print."""

import tomllib
from pathlib import Path

import pytest

import perception
from offline.benchmarks.embedding import EmbeddingBenchmark
from offline.data.archives import data_root
from offline.demo_pools import measure
from perception import Gallery, load_encoder

ROOT = Path(perception.__file__).parents[1]
CARD = tomllib.loads((ROOT / "perception/bundled/clean/card.toml").read_text())["measured"]
DATA = data_root()
# What the bundled encoder was asked to reach.
FLOORS = {
    "caltech101_1nn": 0.70,
    "grocery_loo_1nn": 0.75,
    "tiny_imagenet_zero_shot": 0.40,
    "flickr8k_text_to_image_r10": 0.15,
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not (DATA / "bench").is_dir(), reason="HARDLOOK_DATA has no bench/: figures cannot be re-measured"
    ),
]


def test_clean_embedding_figures() -> None:
    encoder = load_encoder("bundled/clean")
    figures = dict(EmbeddingBenchmark(DATA).run(encoder, encoder.text))
    for name, floor in FLOORS.items():
        assert figures[name] >= floor
        assert figures[name] == pytest.approx(CARD[name], abs=0.003), name


def test_demo_pool_figures() -> None:
    gallery = Gallery.load(ROOT / "indexer/demo/clean/pools.safetensors")
    figures = measure(load_encoder("bundled/clean"), gallery, DATA)
    shares = {name.split(" n=")[0]: str(value) for name, value in figures.items()}
    for name, column in (("query_safe", 0), ("query_unsafe", 2)):
        found, printed = (float(text.split("/")[column]) for text in (shares[name], CARD["demo_pools"][name]))
        assert found >= 85
        assert found == pytest.approx(printed, abs=0.5 if column == 0 else 4.0)  # one of 26 images is 3.8
    left_out = next(value for name, value in figures.items() if name.startswith("unsafe exemplars"))
    assert left_out == pytest.approx(CARD["demo_pools"]["unsafe_leave_one_out"], abs=0.8)
