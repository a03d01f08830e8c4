"""Galleries: what goes in comes out, and damage is noticed."""

from pathlib import Path

import numpy as np
import pytest

from perception.errors import FingerprintMismatch, GalleryError
from perception.gallery import Gallery


def gallery(n: int = 5, d: int = 4) -> Gallery:
    rows = np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return Gallery(tuple(f"i{k}" for k in range(n)), tuple("ab"[k % 2] for k in range(n)), rows, "f" * 64)


def test_round_trip_is_exact(tmp_path: Path) -> None:
    original = gallery()
    original.save(tmp_path / "g.safetensors")
    loaded = Gallery.load(tmp_path / "g.safetensors")
    assert (loaded.ids, loaded.labels, loaded.encoder_fingerprint) == (original.ids, original.labels, "f" * 64)
    assert np.array_equal(loaded.embeddings, original.embeddings)
    assert loaded.sha256 == original.sha256


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    gallery().save(tmp_path / "g.safetensors")
    data = (tmp_path / "g.safetensors").read_bytes()
    reference = Gallery.load(tmp_path / "g.safetensors")
    for position in range(0, len(data), 7):
        changed = bytearray(data)
        changed[position] ^= 1
        (tmp_path / "bad.safetensors").write_bytes(changed)
        try:
            loaded = Gallery.load(tmp_path / "bad.safetensors")
        except GalleryError:
            continue
        assert loaded.sha256 == reference.sha256, position  # only padding may differ


def test_subset_keeps_rows_together() -> None:
    part = gallery().subset("a")
    assert part.ids == ("i0", "i2", "i4")
    assert np.array_equal(part.embeddings, gallery().embeddings[::2])


def test_another_encoder_is_refused_with_both_fingerprints() -> None:
    with pytest.raises(FingerprintMismatch, match="e" * 64) as caught:
        gallery().require_encoder("e" * 64)
    assert "f" * 64 in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 2.0])
def test_rows_must_be_finite_and_of_unit_norm(value: float) -> None:
    rows = gallery().embeddings.copy()
    rows[2] = value
    with pytest.raises(GalleryError, match="unit L2 norm"):
        Gallery(gallery().ids, gallery().labels, rows, "f")


def test_parts_must_fit() -> None:
    g = gallery()
    with pytest.raises(GalleryError, match="4 ids, 5 labels"):
        Gallery(g.ids[:4], g.labels, g.embeddings, "f")
    with pytest.raises(GalleryError, match="not unique"):
        Gallery(("a",) * 5, g.labels, g.embeddings, "f")
    with pytest.raises(GalleryError, match="float32"):
        Gallery(g.ids, g.labels, g.embeddings.astype(np.float64), "f")


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff" * 100])
def test_no_gallery_is_a_gallery_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "g").write_bytes(content)
    with pytest.raises(GalleryError):
        Gallery.load(tmp_path / "g")
    with pytest.raises(GalleryError):
        Gallery.load(tmp_path / "absent")
