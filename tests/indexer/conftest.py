"""Small collections and image files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from indexer.contents import POOL_LABELS, Contents, Exemplar
from perception.testing import encoded, synthetic_image

FINGERPRINT = "ab" * 32


def _unit(seed: int, n: int, dim: int = 12) -> NDArray[np.float32]:
    rows = np.random.default_rng(seed).normal(size=(n, dim))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32)


def _contents(collection: str = "pools", n: int = 30, seed: int = 0, fingerprint: str = FINGERPRINT) -> Contents:
    labels = POOL_LABELS if collection == "pools" else ("cat", "", "dog")
    exemplars = [
        Exemplar(f"x{i:03d}", labels[i % 3], f"{i:064x}", f"made/{i}.png", {"n": str(i), "ü": "ß\n"}) for i in range(n)
    ]
    return Contents.arrange(collection, "toy/0", fingerprint, exemplars, _unit(seed, n))


@pytest.fixture(scope="session")
def fingerprint() -> str:
    """Of the encoder that `make_contents` pretends to have used."""
    return FINGERPRINT


@pytest.fixture(scope="session")
def unit() -> Callable[..., NDArray[np.float32]]:
    """(seed, n, dim=12) -> n random unit rows."""
    return _unit


@pytest.fixture(scope="session")
def make_contents() -> Callable[..., Contents]:
    """(collection='pools', n=30, seed=0, fingerprint=FINGERPRINT) -> Contents."""
    return _contents


@pytest.fixture
def write_images(tmp_path: Path) -> Callable[..., Path]:
    """Write n different PNG files a label: <tmp>/<folder>/<label>/<i>.png; returns <tmp>/<folder>."""

    def write(n: int, labels: tuple[str, ...] = ("safe", "unsafe"), folder: str = "images") -> Path:
        for number, label in enumerate(labels):
            (tmp_path / folder / label).mkdir(parents=True, exist_ok=True)
            for i in range(n):
                image = synthetic_image(1000 * number + i, (20, 18))
                (tmp_path / folder / label / f"{i:03d}.png").write_bytes(encoded(image))
        return tmp_path / folder

    return write
