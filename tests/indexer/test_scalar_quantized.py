"""ScalarQuantizedIndex beyond the contract: many rows, several blocks, and data on which rounding decides nothing."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray

from indexer.backends.choice import AUTO_FLAT_COMPONENTS, IndexMode, build_index
from indexer.backends.flat import FlatIndex
from indexer.backends.scalar_quantized import ScalarQuantizedIndex

Embeddings = NDArray[np.float32]

DIM = 24
ROWS = 20_000  # three blocks of codes


def unit(rows: NDArray[np.floating]) -> Embeddings:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def gaussian(rng: np.random.Generator) -> Embeddings:
    return unit(rng.normal(size=(ROWS, DIM)))


def clusters(rng: np.random.Generator) -> Embeddings:
    """From near-duplicates, closer together than a step of the codes, to loose groups."""
    centres, widths = gaussian(rng)[:100], 10 ** rng.uniform(-5, -0.5, 100)
    of = rng.integers(0, 100, ROWS)
    return unit(centres[of] + widths[of, None] * rng.normal(size=(ROWS, DIM)))


def side_by_side(rng: np.random.Generator) -> Embeddings:
    """Thousands of near-duplicates in one place, the rest elsewhere."""
    rows = gaussian(rng)
    rows[7000:13000] = unit(rows[:1] + 1e-4 * rng.normal(size=(6000, DIM)))
    return rows


def equal_codes(rng: np.random.Generator) -> Embeddings:
    """Two opposite rows stretch the steps, so that all others have one code."""
    axis = unit(rng.normal(size=(1, DIM)))
    rows = unit(axis + 1e-4 * rng.normal(size=(ROWS, DIM)))
    rows[5] = -axis
    return rows


def odd_rows(rng: np.random.Generator) -> Embeddings:
    """Unit vectors along the axes, which stretch every step."""
    rows = unit(rng.normal(size=(ROWS, 200)))
    rows[::100] = np.eye(200, dtype=np.float32)
    return rows


@pytest.mark.parametrize("data", [gaussian, clusters, side_by_side, equal_codes, odd_rows])
def test_answers_are_those_of_the_flat_index(data: Callable[[np.random.Generator], Embeddings]) -> None:
    rng = np.random.default_rng(1)
    embeddings = data(rng)
    fresh = unit(rng.normal(size=(4, embeddings.shape[1])))
    near = unit(embeddings[:: ROWS // 4] + 1e-3 * rng.normal(size=(4, embeddings.shape[1])))
    queries = np.concatenate([fresh, near, embeddings[:2]])
    flat, quantized = FlatIndex(embeddings), ScalarQuantizedIndex(embeddings)
    for rows in [None, range(8192), range(8191, 16385), range(3, 9000), range(12000, 12100), range(19999, ROWS)]:
        for k in (1, 10, 700):
            assert quantized.search(queries, k, rows) == flat.search(queries, k, rows)  # to the last bit


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("kind", [FlatIndex, ScalarQuantizedIndex])
def test_rows_beyond_the_ends_of_the_range_tie(kind: type[FlatIndex | ScalarQuantizedIndex], sign: int) -> None:
    """Norms may be a little more than 1; what is clipped to 1 or -1 goes by position."""
    rng = np.random.default_rng(4)
    axis = unit(rng.normal(size=(1, DIM)))
    embeddings = (axis * rng.uniform(1.0001, 1.0009, (ROWS, 1))).astype(np.float32)
    (found,) = kind(embeddings).search(sign * axis, 12)
    assert found == [(row, float(sign)) for row in range(12)]


def test_threads_may_share_it() -> None:
    rng = np.random.default_rng(2)
    embeddings = clusters(rng)
    index, queries = ScalarQuantizedIndex(embeddings), embeddings[:40]
    one_by_one = [index.search(query[None], 10) for query in queries]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda query: index.search(query[None], 10), queries)) == one_by_one


def test_embeddings_come_back_as_they_were() -> None:
    embeddings = gaussian(np.random.default_rng(3))
    assert np.array_equal(ScalarQuantizedIndex(embeddings).embeddings_at(range(len(embeddings))), embeddings)


@pytest.mark.parametrize(
    ("mode", "more", "kind"),
    [
        ("exact", 1, FlatIndex),
        ("fast", 0, ScalarQuantizedIndex),
        ("auto", 0, FlatIndex),
        ("auto", 1, ScalarQuantizedIndex),
    ],
)
def test_the_choice_of_a_backend(mode: IndexMode, more: int, kind: type) -> None:
    dim = 100_000  # few rows, quickly made
    embeddings = np.zeros((AUTO_FLAT_COMPONENTS // dim + more, dim), np.float32)
    embeddings[:, 0] = 1.0
    assert type(build_index(embeddings, mode)) is kind
