"""The demo task: splits without overlap, and decisions equal to a brute-force 1-NN."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from offline import demo_pools
from offline.data.archives import Example
from offline.demo_pools import TaskImage, bucket, build, decide, exemplars_of, leave_one_out, measure
from perception.encoder import open_image
from perception.errors import FingerprintMismatch
from perception.gallery import Gallery
from perception.testing import ToyEncoder, benign_hits, synthetic_image
from perception.verdict import DecisionPolicy, PoolLabel


def task_image(i: int, pool: PoolLabel, is_exemplar: bool, source: str) -> TaskImage:
    example = Example(f"{i}.png", synthetic_image(i), "thing", {})
    return TaskImage(f"{source}/{i}.png", pool, is_exemplar, example)


@pytest.fixture
def small_task(monkeypatch: pytest.MonkeyPatch) -> list[TaskImage]:
    sources = ["guns", "caltech101", "imagenet1k", "flickr8k"]
    images = [
        task_image(i, PoolLabel.UNSAFE if i % 4 < 2 and i % 3 == 0 else PoolLabel.SAFE, i % 2 == 0, sources[i % 4])
        for i in range(48)
    ]
    images = [
        i
        if i.id.split("/")[0] != "guns"
        else task_image(int(i.example.id[:-4]), PoolLabel.UNSAFE, i.is_exemplar, "guns")
        for i in images
    ]
    images += [task_image(100 + i, PoolLabel.UNSAFE, False, s) for i, s in enumerate(["guns", "caltech101"])]
    images += [task_image(200 + i, PoolLabel.SAFE, False, s) for i, s in enumerate(sources[1:])]
    monkeypatch.setattr(demo_pools, "read_task", lambda data: iter(images))
    return images


def test_buckets_are_stable_and_even() -> None:
    counts = np.bincount([bucket(f"guns/{i}.jpeg", 4) for i in range(4000)], minlength=4)
    assert counts.min() > 900
    assert bucket("guns/263.jpeg", 4) == bucket("guns/263.jpeg", 4)


def test_unsafe_exemplars_come_in_four_views() -> None:
    unsafe, safe = task_image(1, PoolLabel.UNSAFE, True, "guns"), task_image(2, PoolLabel.SAFE, True, "x")
    found = list(exemplars_of([unsafe, safe, task_image(3, PoolLabel.UNSAFE, False, "guns")]))
    views = ["", "#mirrored", "#cropped", "#cropped-mirrored"]
    assert [i.id for i in found] == [*(f"guns/1.png{view}" for view in views), "x/2.png"]
    original, mirrored, cropped, both = (np.asarray(i.example.image) for i in found[:4])
    assert np.array_equal(original[:, ::-1], mirrored)
    assert np.array_equal(original[4:-4, 5:-5], cropped)
    assert np.array_equal(cropped[:, ::-1], both)


def test_leaving_an_image_out_takes_all_its_views_out() -> None:
    ids = ("guns/a", "guns/a#mirrored", "guns/b", "guns/c", "safe/x", "benign_hits/unsafe-1.png")
    angles = np.radians([0, 1, 40, 90, 85, 180])
    rows = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    gallery = Gallery(ids, ("unsafe",) * 4 + ("safe", "unsafe"), rows, "f")
    # a's nearest other image is b, b's is a#mirrored, c's is the safe x; the benign hit is no photograph.
    assert leave_one_out(gallery) == pytest.approx(66.7)


def test_build_and_measure_agree_with_brute_force(small_task: list[TaskImage], tmp_path: Path) -> None:
    encoder = ToyEncoder()
    gallery = build(encoder, Path(), tmp_path)
    assert Gallery.load(tmp_path / "pools.safetensors").sha256 == gallery.sha256
    assert {hit.id for hit in benign_hits()} <= set(gallery.ids)
    queries = [i for i in small_task if not i.is_exemplar]
    assert not {i.id for i in queries} & set(gallery.ids)
    rows = demo_pools._encode(encoder, queries)
    nearest = [gallery.labels[j] for j in (rows @ gallery.embeddings.T).argmax(1)]
    assert decide(gallery, rows, DecisionPolicy()) == nearest
    figures = measure(encoder, gallery, Path())
    unsafe = [p for p, i in zip(nearest, queries, strict=True) if i.pool is PoolLabel.UNSAFE]
    shares = "/".join(f"{100 * unsafe.count(p) / len(unsafe):.1f}" for p in PoolLabel)
    assert figures[f"query_unsafe n={len(unsafe)} S/B/U %"] == shares


def test_measuring_on_exemplars_or_with_another_encoder_is_refused(
    small_task: list[TaskImage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery = build(ToyEncoder(), Path(), tmp_path)
    with pytest.raises(FingerprintMismatch):
        measure(ToyEncoder(seed=1), gallery, Path())
    leaked = [TaskImage(i.id, i.pool, False, i.example) for i in small_task]
    monkeypatch.setattr(demo_pools, "read_task", lambda data: iter(leaked))
    with pytest.raises(ValueError, match="are exemplars of the pools"):
        measure(ToyEncoder(), gallery, Path())


def test_benign_hits_are_small_harmless_png_files() -> None:
    hits = benign_hits()
    assert {h.id.split("/")[1].rsplit("-", 1)[0] for h in hits} == {"unsafe", "buffer"}
    assert all(h.file.startswith(b"\x89PNG") and len(h.file) < 20_000 for h in hits)


def test_benign_hits_are_what_the_program_draws(tmp_path: Path) -> None:
    from offline.benign_hits import draw

    drawn = {path.name: Image.open(path) for path in draw(tmp_path)}
    for hit in benign_hits():
        shipped = np.asarray(open_image(hit.file), np.int16)
        difference = np.abs(shipped - np.asarray(drawn[hit.id.split("/")[1]], np.int16))
        assert difference.mean() < 2  # fonts may be hinted differently elsewhere
