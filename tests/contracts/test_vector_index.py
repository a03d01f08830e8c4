"""One contract for every VectorIndex: what numpy finds by brute force is what a backend has to find."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from indexer.backends.flat import FlatIndex
from indexer.backends.scalar_quantized import ScalarQuantizedIndex
from indexer.index import VectorIndex

Embeddings = NDArray[np.float32]
Backend = Callable[[Embeddings], VectorIndex]

BACKENDS = [FlatIndex, ScalarQuantizedIndex]  # a new backend joins here

every_backend = pytest.mark.parametrize("backend", BACKENDS)


def unit(rng: np.random.Generator, n: int, dim: int) -> Embeddings:
    rows = rng.normal(size=(n, dim))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32)


def brute_force(embeddings: Embeddings, query: Embeddings, k: int, rows: range) -> list[tuple[int, float]]:
    """Naive twin: every similarity in float64, sorted by (-similarity, position)."""
    found = [(row, float(np.clip(np.dot(embeddings[row].astype(float), query.astype(float)), -1, 1))) for row in rows]
    return sorted(found, key=lambda hit: (-round(hit[1], 13), hit[0]))[:k]


def assert_same(found: list[tuple[int, float]], expected: list[tuple[int, float]]) -> None:
    assert [row for row, _ in found] == [row for row, _ in expected]
    assert [s for _, s in found] == pytest.approx([s for _, s in expected], abs=1e-12)


@every_backend
@pytest.mark.parametrize(("n", "dim"), [(1, 1), (7, 3), (300, 16), (2000, 64), (500, 255)])
@pytest.mark.parametrize("k", [1, 5, 40, 5000])
def test_finds_what_brute_force_finds(backend: Backend, n: int, dim: int, k: int) -> None:
    rng = np.random.default_rng(n + dim)
    embeddings, queries = unit(rng, n, dim), unit(rng, 6, dim)
    index = backend(embeddings)
    assert (len(index), index.dim) == (n, dim)
    for found, query in zip(index.search(queries, k), queries, strict=True):
        assert len(found) == min(k, n)
        assert_same(found, brute_force(embeddings, query, k, range(n)))


@every_backend
@given(st.data())
def test_ties_and_near_ties_go_by_position(backend: Backend, data: st.DataObject) -> None:
    """Few distinct directions, many of them repeated or an ulp apart: the case in which float32 ranks at random."""
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    dim = data.draw(st.integers(1, 20))
    directions = unit(rng, data.draw(st.integers(1, 4)), dim)
    embeddings = directions[rng.integers(0, len(directions), data.draw(st.integers(1, 120)))]
    nudged = np.nextafter(embeddings, np.float32(2), dtype=np.float32)
    embeddings = np.where(rng.random(embeddings.shape) < data.draw(st.sampled_from([0.0, 0.3])), nudged, embeddings)
    k = data.draw(st.integers(1, 130))
    found = backend(embeddings).search(directions, k)
    for hits, query in zip(found, directions, strict=True):
        exact = dict(brute_force(embeddings, query, len(embeddings), range(len(embeddings))))
        assert hits == sorted(hits, key=lambda hit: (-hit[1], hit[0]))
        assert [s for _, s in hits] == pytest.approx([exact[row] for row, _ in hits], abs=1e-12)
        left_out = [s for row, s in exact.items() if row not in dict(hits)]
        assert len(hits) == min(k, len(embeddings))
        assert not left_out or max(left_out) <= hits[-1][1] + 1e-12


@every_backend
def test_equal_rows_tie_exactly_wherever_they_stand(backend: Backend) -> None:
    rng = np.random.default_rng(5)
    embeddings = unit(rng, 203, 77)
    copies = [3, 50, 100, 199, 202]
    embeddings[copies] = embeddings[3]
    (found,) = backend(embeddings).search(unit(rng, 1, 77), 203)
    similarity = dict(found)
    assert len({similarity[row] for row in copies}) == 1
    assert [row for row, _ in found if row in copies] == copies


@every_backend
def test_more_equal_rows_than_asked_for(backend: Backend) -> None:
    rng = np.random.default_rng(6)
    embeddings = np.repeat(unit(rng, 1, 24), 1000, axis=0)
    (found,) = backend(embeddings).search(embeddings[:1], 12)
    assert [row for row, _ in found] == list(range(12))


@every_backend
def test_similarity_stays_within_its_range(backend: Backend) -> None:
    rng = np.random.default_rng(7)
    embeddings = unit(rng, 400, 33)
    found = backend(embeddings).search(np.concatenate([embeddings, -embeddings]), 400)
    assert max(s for hits in found for _, s in hits) <= 1.0
    assert min(s for hits in found for _, s in hits) >= -1.0


@every_backend
@pytest.mark.parametrize("split", [1, 2, 3, 7, 19, 20, 21, 33])
def test_answers_do_not_depend_on_the_batch(backend: Backend, split: int) -> None:
    rng = np.random.default_rng(8)
    index, queries = backend(unit(rng, 1500, 48)), unit(rng, 64, 48)
    together = index.search(queries, 10)
    apart = [hits for start in range(0, 64, split) for hits in index.search(queries[start : start + split], 10)]
    assert apart == together  # to the last bit
    assert index.search(queries[::-1], 10) == together[::-1]


@every_backend
def test_fewer_neighbours_are_the_first_of_more(backend: Backend) -> None:
    rng = np.random.default_rng(9)
    index, queries = backend(unit(rng, 300, 16)), unit(rng, 4, 16)
    for few, more in zip(index.search(queries, 5), index.search(queries, 200), strict=True):
        assert few == more[:5]


@every_backend
@pytest.mark.parametrize("rows", [range(300), range(100, 200), range(299, 300), range(5), range(42, 42), range(0)])
def test_search_within_rows(backend: Backend, rows: range) -> None:
    rng = np.random.default_rng(10)
    embeddings, queries = unit(rng, 300, 16), unit(rng, 3, 16)
    for found, query in zip(backend(embeddings).search(queries, 120, rows), queries, strict=True):
        assert_same(found, brute_force(embeddings, query, 120, rows))


@every_backend
def test_empty_index_and_empty_batch(backend: Backend) -> None:
    empty = backend(np.zeros((0, 8), np.float32))
    queries = unit(np.random.default_rng(11), 3, 8)
    assert (len(empty), empty.dim) == (0, 8)
    assert empty.search(queries, 4) == [[], [], []]
    assert backend(queries).search(queries[:0], 4) == []


def with_entry(value: float) -> Embeddings:
    queries = unit(np.random.default_rng(12), 3, 8)
    queries[1, 2] = value
    return queries


@every_backend
@pytest.mark.parametrize("n", [0, 5])
@pytest.mark.parametrize(
    ("queries", "k", "rows", "complaint"),
    [
        (with_entry(np.nan), 1, None, "finite"),
        (with_entry(np.inf), 1, None, "finite"),
        (with_entry(1e30), 1, None, "unit"),
        (np.zeros((1, 8), np.float32), 1, None, "unit"),
        (np.ones((2, 7), np.float32), 1, None, r"\(b, 8\)"),
        (np.ones(8, np.float32), 1, None, r"\(b, 8\)"),
        (np.eye(8), 1, None, "float32"),
        (np.eye(8, dtype=np.float32), 0, None, "k must be"),
        (np.eye(8, dtype=np.float32), -3, None, "k must be"),
        (np.eye(8, dtype=np.float32), 1, range(0, 4, 2), "rows"),
        (np.eye(8, dtype=np.float32), 1, range(3, 9), "rows"),
        (np.eye(8, dtype=np.float32), 1, range(-1, 2), "rows"),
    ],
)
def test_refuses_bad_arguments(
    backend: Backend, n: int, queries: Embeddings, k: int, rows: range | None, complaint: str
) -> None:
    index = backend(np.eye(8, dtype=np.float32)[:n])
    with pytest.raises(ValueError, match=complaint):
        index.search(queries, k, rows)


@every_backend
@pytest.mark.parametrize(
    "embeddings",
    [with_entry(np.nan), with_entry(2.0), np.zeros((1, 8), np.float32), np.eye(8), np.ones(8, np.float32)],
)
def test_refuses_bad_embeddings(backend: Backend, embeddings: Embeddings) -> None:
    with pytest.raises(ValueError, match="embeddings must be"):
        backend(embeddings)


@every_backend
def test_later_changes_of_the_array_do_not_reach_the_index(backend: Backend) -> None:
    rng = np.random.default_rng(13)
    embeddings = unit(rng, 50, 8)
    index, queries = backend(embeddings), unit(rng, 2, 8)
    before = index.search(queries, 5)
    embeddings[:] = 0
    assert index.search(queries, 5) == before


@every_backend
def test_is_a_vector_index(backend: Backend) -> None:
    assert isinstance(backend(np.eye(2, dtype=np.float32)), VectorIndex)
