"""Pairs: which of many embeddings are near each other, found block by block.

Comparing every row with every other is quadratic, so most pairs are ruled out in a few dimensions. In an orthogonal
basis whose first axes hold most of the rows' energy, x . y <= x1 . y1 + |x2| |y2|, where x1 are the coordinates on the
first axes and x2 the rest: a product in one dimension more than there are first axes, which is never below the true
one. Only pairs that it leaves are compared in full, in float64 and as searches do, so what is found is exact and the
same on every machine.
"""

import hashlib
from collections.abc import Callable, Iterator

import faiss
import numpy as np
from numpy.typing import NDArray

Progress = Callable[[int, int], None]  # what is done, and how much there is in all
Rows = NDArray[np.int64]
_AXES = 64  # first axes; at d = 640 a tenth of the work
_SAMPLE_ROWS = 8192  # that the axes are chosen by
_BLOCK_COLUMNS = 16_384  # with _BLOCK_ROWS a bound of the pairs that are held at a time
_BLOCK_ROWS = 1024
_CHUNK_PAIRS = 4096  # that are compared in float64 at a time
_THREADS = int(faiss.omp_get_max_threads())


class Groups:
    """A partition of n rows, which only grows coarser: a union-find whose roots are the lowest rows."""

    def __init__(self, n: int) -> None:
        self._parents = np.arange(n, dtype=np.int64)

    def roots(self, rows: Rows) -> Rows:
        """The lowest row of the group of each row."""
        roots = self._parents[rows]
        while True:
            above = self._parents[roots]
            if np.array_equal(above, roots):
                self._parents[rows] = roots
                return roots
            roots = above

    def join(self, left: Rows, right: Rows) -> None:
        """Put the groups of left[i] and right[i] together, for every i."""
        for a, b in zip(left.tolist(), right.tolist(), strict=True):
            low, high = sorted((self._root(a), self._root(b)))
            self._parents[high] = low

    def larger_than_one(self) -> Iterator[Rows]:
        """The groups of at least two rows, rows ascending, by lowest row."""
        roots = self.roots(np.arange(len(self._parents), dtype=np.int64))
        order = np.argsort(roots, kind="stable")
        starts = np.flatnonzero(np.diff(roots[order], prepend=-1))
        for group in np.split(order, starts[1:]):
            if len(group) > 1:
                yield group

    def _root(self, row: int) -> int:
        while (above := int(self._parents[row])) != row:
            self._parents[row] = row = int(self._parents[above])
        return row


def join_near(
    groups: Groups,
    embeddings: NDArray[np.float32],
    min_similarity: float,
    progress: Progress | None = None,
    threads: int | None = None,
) -> None:
    """Join rows whose cosine is at least `min_similarity`, and so what is connected through others.

    Takes time in proportion to the square of the rows, and 500 bytes of memory a row beside the embeddings.

    Args:
        groups: of the rows; what it has joined already is not compared.
        embeddings: (n, d) float32 of unit L2 norm.
        min_similarity: in (0, 1]; the lower, the fewer pairs are ruled out quickly.
        progress: told after every block how many of how many pairs are done.
        threads: that look for pairs; None for one for each core.

    Raises:
        ValueError: `min_similarity` is out of range.
    """
    if not 0.0 < min_similarity <= 1.0:
        raise ValueError(f"min_similarity must be in (0, 1], got {min_similarity}")
    distinct = _join_equal(groups, embeddings)
    bounds = _bounds(embeddings, distinct)
    # The float32 errors of a product of such rows, whose norms are nearly 1; doubled.
    bar = min_similarity - (bounds.shape[1] + 3) * 2.0**-23 * 1.01
    total, done = len(distinct) * (len(distinct) + 1) // 2, 0
    faiss.omp_set_num_threads(threads or _THREADS)  # for this thread
    for start in range(0, len(distinct), _BLOCK_COLUMNS):
        columns = faiss.IndexFlatIP(bounds.shape[1])
        columns.add(bounds[start : start + _BLOCK_COLUMNS])
        for first in range(start, len(distinct), _BLOCK_ROWS):
            block = bounds[first : first + _BLOCK_ROWS]
            limits, _, found = columns.range_search(block, bar)
            left = np.repeat(np.arange(first, first + len(block)), (limits[1:] - limits[:-1]).astype(np.int64))
            right = start + found.astype(np.int64)
            once = left > right
            _join_pairs(groups, embeddings, distinct[left[once]], distinct[right[once]], min_similarity)
            done += int(np.clip(np.arange(first, first + len(block)) + 1 - start, 0, columns.ntotal).sum())
            if progress is not None:
                progress(done, total)


def similarities(embeddings: NDArray[np.float32], left: Rows, right: Rows) -> NDArray[np.float64]:
    """The cosine of each pair of rows, (len(left),) in [-1, 1], to the bit as `FlatIndex` gives it."""
    parts = [np.zeros(0)]
    for start in range(0, len(left), _CHUNK_PAIRS):
        wide = embeddings[right[start : start + _CHUNK_PAIRS]].astype(np.float64)
        parts.append((embeddings[left[start : start + _CHUNK_PAIRS]] * wide).sum(axis=1))
    found: NDArray[np.float64] = np.clip(np.concatenate(parts), -1.0, 1.0)
    return found


def _join_equal(groups: Groups, embeddings: NDArray[np.float32]) -> Rows:
    """Join rows of equal bytes; returns the first of each. So a pool of one image a million times stays linear."""
    first: dict[bytes, int] = {}
    equal: list[tuple[int, int]] = []
    for row, embedding in enumerate(embeddings):
        same = first.setdefault(hashlib.sha256(embedding).digest(), row)
        if same != row:
            equal.append((row, same))
    groups.join(*np.array(equal, np.int64).reshape(-1, 2).T)
    return np.fromiter(first.values(), np.int64, len(first))


def _bounds(embeddings: NDArray[np.float32], rows: Rows) -> NDArray[np.float32]:
    """For some rows of (n, d), vectors whose products are at least those of the rows, but for float32 errors."""
    dim = embeddings.shape[1]
    if dim <= 2 * _AXES or not len(rows):
        return np.ascontiguousarray(embeddings[rows])
    sample = embeddings[rows[:: -(-len(rows) // _SAMPLE_ROWS)]].astype(np.float64)
    _, axes = np.linalg.eigh(sample.T @ sample)  # by ascending energy
    axes = axes[:, -_AXES:]
    bounds = np.empty((len(rows), _AXES + 1), np.float32)
    for start in range(0, len(rows), _BLOCK_COLUMNS):
        wide = embeddings[rows[start : start + _BLOCK_COLUMNS]].astype(np.float64)
        along = wide @ axes
        rest = (wide * wide).sum(axis=1) - (along * along).sum(axis=1)
        bounds[start : start + len(wide), :_AXES] = along
        # More than float64 can have lost of it, so that a rest of nothing is no less than it is.
        bounds[start : start + len(wide), _AXES] = np.sqrt(np.maximum(rest, 0.0) + 1e-12)
    return bounds


def _join_pairs(
    groups: Groups, embeddings: NDArray[np.float32], left: Rows, right: Rows, min_similarity: float
) -> None:
    """Compare pairs in full and join those that are near, without those that are together by then."""
    for start in range(0, len(left), _CHUNK_PAIRS):
        a, b = left[start : start + _CHUNK_PAIRS], right[start : start + _CHUNK_PAIRS]
        apart = groups.roots(a) != groups.roots(b)
        a, b = a[apart], b[apart]
        near = similarities(embeddings, a, b) >= min_similarity
        groups.join(a[near], b[near])
