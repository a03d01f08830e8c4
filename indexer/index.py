"""VectorIndex: the contract of everything that finds nearest embeddings, and the input checks that all share."""

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

# How far a stored norm may be from 1; the same as in perception.gallery, so that every gallery can be imported.
UNIT_TOLERANCE = 1e-3


@runtime_checkable
class VectorIndex(Protocol):
    """An immutable set of unit embeddings that can be searched from many threads at once.

    There is no `add`: a FAISS search during an `add` kills the process. What changes is built anew and swapped.
    """

    @property
    def dim(self) -> int:
        """d, the length of an embedding."""

    def __len__(self) -> int:
        """n, the number of embeddings."""

    def search(self, queries: NDArray[np.float32], k: int, rows: range | None = None) -> list[list[tuple[int, float]]]:
        """Find the most similar embeddings.

        The answer to a query does not depend on the other queries of the batch.

        Args:
            queries: (b, d) unit L2 norm.
            k: how many.
            rows: search only these row positions, a contiguous range; all where None.

        Returns:
            For each query min(k, n) pairs (row position, cosine similarity in [-1, 1]), most similar first, ties by
            lower position. Never padded.

        Raises:
            ValueError: queries of another shape, not finite or not of unit norm; k below 1; rows out of range.
        """


def unit_rows(embeddings: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which rows of (n, d) are finite and of unit L2 norm: (n,)."""
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.linalg.norm(embeddings, axis=1)
        return np.asarray(np.abs(norms - 1.0) < UNIT_TOLERANCE)  # false for NaN


def check_search(queries: NDArray[np.float32], k: int, rows: range | None, shape: tuple[int, int]) -> range:
    """Check the arguments of `VectorIndex.search` on an index of `shape` (n, d); returns the rows to search.

    Backends call it first, so that all refuse alike: FAISS answers a NaN query with ids -1 and no error.

    Raises:
        ValueError: see `VectorIndex.search`.
    """
    n, dim = shape
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise ValueError(f"queries must be (b, {dim}), got {queries.shape}")
    if queries.dtype != np.float32:
        raise ValueError(f"queries must be float32, got {queries.dtype}")
    bad = np.flatnonzero(~unit_rows(queries))
    if bad.size:
        raise ValueError(f"queries must be finite and of unit L2 norm; {bad.size} are not, the first is row {bad[0]}")
    if rows is None:
        return range(n)
    if rows.step != 1 or (rows and not 0 <= rows.start <= rows.stop <= n):
        raise ValueError(f"rows must be a contiguous range within [0, {n}], got {rows}")
    return rows
