"""FlatIndex: exact search by FAISS, ranked in float64.

FAISS proposes candidates in float32, whose last bits depend on kernel, machine and batch; an exact tie between pools
decides a verdict. So the candidates are ranked again in float64, and the search is widened until the error bound
proves that no other row can belong to the answer.
"""

from collections.abc import Sequence

import faiss
import numpy as np
from numpy.typing import NDArray

from indexer.index import check_search, unit_rows

_SPARE = 8  # candidates beyond k, mostly enough to prove the answer in one search
_WIDEN = 8  # factor by which an unproven search is widened
_RANK_DIRECTLY = 256  # rows; of more, float32 first finds those that matter: float64 takes several times as long
_CHUNK_ROWS = 4096  # bounds the float64 copies of a wide search
# FAISS multiplies matrices by BLAS from this many query entries (queries x d) on. Its own default, 128,000, is 6 times
# slower for 16 queries against 100,000 x 512. The setting is FAISS's and process-wide; no answer depends on it.
_BLAS_FROM_ENTRIES = 2048
# Multiplications from which a search runs on all cores: smaller ones are over before the other threads are awake, which
# then spin for a while and take a core from whoever needs it. No answer depends on it.
_PARALLEL_FROM = 50_000_000
_THREADS = int(faiss.omp_get_max_threads())


class FlatIndex:
    """Brute force over all rows; the reference for other backends."""

    def __init__(self, embeddings: NDArray[np.float32]) -> None:
        """Copy the embeddings into FAISS; the array may be dropped afterwards.

        Args:
            embeddings: (n, d) float32 of unit L2 norm; n may be 0.

        Raises:
            ValueError: another shape or type, or rows that are not of unit norm.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] < 1 or embeddings.dtype != np.float32:
            raise ValueError(f"embeddings must be (n, d) float32, got {embeddings.shape} {embeddings.dtype}")
        if not unit_rows(embeddings).all():
            raise ValueError("embeddings must be finite and of unit L2 norm")
        n, dim = embeddings.shape
        faiss.cvar.distance_compute_blas_threshold = _BLAS_FROM_ENTRIES
        self._index = faiss.IndexFlatIP(dim)
        self._index.add(np.ascontiguousarray(embeddings))
        # FAISS's own memory, seen through numpy: one copy of the vectors. It is valid as long as the index lives and
        # nothing is added, so it never leaves this class.
        self._vectors = (
            faiss.rev_swig_ptr(self._index.get_xb(), n * dim).reshape(n, dim) if n else np.zeros((0, dim), np.float32)
        )
        # |float32 dot product - true one| <= d * 2^-24 for unit vectors in any order of summation; doubled, since
        # norms are only nearly 1.
        self._slack = dim * 2.0**-23

    @property
    def dim(self) -> int:
        """d, the length of an embedding."""
        return int(self._vectors.shape[1])

    def __len__(self) -> int:
        return len(self._vectors)

    def embeddings_at(self, rows: Sequence[int]) -> NDArray[np.float32]:
        """A copy of the embeddings at some row positions: (len(rows), d) float32."""
        return self._vectors[np.asarray(rows, np.int64)]

    def search(self, queries: NDArray[np.float32], k: int, rows: range | None = None) -> list[list[tuple[int, float]]]:
        """See `VectorIndex.search`."""
        rows = check_search(queries, k, rows, (len(self), self.dim))
        if not len(queries) or not len(rows):
            return [[] for _ in queries]
        approximate, positions = self._candidates(queries, k + _SPARE, rows)
        return [
            self._certain(query, k, rows, found, at)
            for query, found, at in zip(queries, approximate, positions, strict=True)
        ]

    def _candidates(
        self, queries: NDArray[np.float32], n: int, rows: range
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The n best rows by FAISS: approximate similarities and positions, (b, min(n, len(rows))) each."""
        work = len(queries) * len(rows) * self.dim
        faiss.omp_set_num_threads(_THREADS if work >= _PARALLEL_FROM else 1)  # of the thread that calls it
        parameters = faiss.SearchParameters()
        selector = faiss.IDSelectorRange(rows.start, rows.stop)
        parameters.sel = selector
        return self._index.search(np.ascontiguousarray(queries), min(n, len(rows)), params=parameters)

    def rank(self, query: NDArray[np.float32], k: int, positions: NDArray[np.int64]) -> list[tuple[int, float]]:
        """The first k of some rows, by cosine similarity in float64, ties by lower position.

        Backends that find candidates in another way rank them here, so that all give the same similarities.

        Args:
            query: (d,) of unit L2 norm, which is not checked.
            k: how many; fewer come back where there are fewer.
            positions: (m,) different rows, in any order.
        """
        if len(positions) > max(k, _RANK_DIRECTLY):
            positions = self._narrowed(query, k, positions)
        similarities = self._similarities(query, positions)
        best = np.lexsort((positions, -similarities))[:k]
        return [(int(positions[i]), float(similarities[i])) for i in best]

    def _narrowed(self, query: NDArray[np.float32], k: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of many rows that float64 can still put among the first k."""
        query, positions = np.ascontiguousarray(query), np.ascontiguousarray(positions)
        found = np.empty(len(positions), np.float32)
        self._index.compute_distance_subset(  # type: ignore[attr-defined]  # missing in FAISS's type information
            1, faiss.swig_ptr(query), len(positions), faiss.swig_ptr(found), faiss.swig_ptr(positions)
        )
        # The k-th similarity is at least this. It is clipped, as all are in the end: beyond 1 and -1 rows tie.
        kth = min(float(np.partition(found, len(found) - k)[len(found) - k]) - self._slack, 1.0)
        near: NDArray[np.bool_] = found >= kth - self._slack
        return positions if kth <= -1.0 else positions[near]

    def _certain(
        self,
        query: NDArray[np.float32],
        k: int,
        rows: range,
        approximate: NDArray[np.float32],
        positions: NDArray[np.int64],
    ) -> list[tuple[int, float]]:
        """Order the candidates of one query (d,), and look at more of them until the first k are certain."""
        while True:
            best = self.rank(query, k, positions)
            upper_bound_of_others = max(float(approximate[-1]) + self._slack, -1.0)
            if len(positions) == len(rows) or upper_bound_of_others < best[-1][1]:
                return best
            wider = self._candidates(query[np.newaxis], _WIDEN * len(positions), rows)
            approximate, positions = wider[0][0], wider[1][0]

    def _similarities(self, query: NDArray[np.float32], positions: NDArray[np.int64]) -> NDArray[np.float64]:
        """Cosine similarities of one query (d,) and some rows, each row summed by itself: equal rows tie exactly."""
        wide = query.astype(np.float64)
        parts = [
            (self._vectors[positions[start : start + _CHUNK_ROWS]] * wide).sum(axis=1)
            for start in range(0, len(positions), _CHUNK_ROWS)
        ]
        similarities: NDArray[np.float64] = np.clip(np.concatenate(parts), -1.0, 1.0)
        return similarities
