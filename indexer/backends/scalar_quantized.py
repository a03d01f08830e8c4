"""ScalarQuantizedIndex: exact search that reads a byte a component instead of four.

Every component is rounded to one of 255 steps between the least and the greatest of its kind, and a search scans these
codes. How far rounding has moved a row is known, so an approximate similarity plus that is an upper bound of the true
one. A sample of the rows gives a similarity that the k-th neighbour reaches at least; the few rows whose upper bound
reaches it too are ranked from their float32 embeddings. The answers are those of FlatIndex to the last bit: the codes
decide what a search costs, never what it finds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from indexer.backends.flat import FlatIndex
from indexer.index import UNIT_TOLERANCE, check_search

_STEPS = 127  # to either side of the centre
_BLOCK_ROWS = 8192  # one list of FAISS, a thread's portion: 5 MB of codes at d = 640
# Every 16th row is in the sample. Its k-th is about the 16 k-th of all, so that some 100 rows are ranked for k = 10,
# and near-duplicates, which may stand side by side, are in it in proportion.
_SAMPLE_EVERY = 16
_SPARE = 8  # ranked beyond k, since neighbours change places
# Components from which a scan runs on all cores; below, waking them takes longer. No answer depends on it.
_PARALLEL_FROM = 20_000_000
_THREADS = int(faiss.omp_get_max_threads())


@dataclass(frozen=True, eq=False)
class _Scale:
    """How components become codes: code = (x - centre) / step, rounded.

    Attributes:
        centre, step: (d,) float32; step is 0 where all rows are equal.
    """

    centre: NDArray[np.float32]
    step: NDArray[np.float32]

    @classmethod
    def of(cls, embeddings: NDArray[np.float32]) -> "_Scale":
        """The scale that just holds all rows of (n, d)."""
        if not len(embeddings):
            nothing = np.zeros(embeddings.shape[1], np.float32)
            return cls(nothing, nothing)
        low, high = embeddings.min(axis=0), embeddings.max(axis=0)
        return cls((low + high) / 2, (high - low) / np.float32(2 * _STEPS))

    def round(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        """Whole numbers in [-127, 127] for some of the rows."""
        steps = embeddings - self.centre
        np.divide(steps, self.step, out=steps, where=self.step > 0)  # elsewhere it is 0 already
        np.rint(steps, out=steps)
        return np.clip(steps, -_STEPS, _STEPS, out=steps)


class ScalarQuantizedIndex:
    """FlatIndex's answers from a quarter of its reading, for a quarter more memory."""

    def __init__(self, embeddings: NDArray[np.float32]) -> None:
        """Copy and encode the embeddings; the array may be dropped afterwards.

        Args:
            embeddings: (n, d) float32 of unit L2 norm; n may be 0.

        Raises:
            ValueError: another shape or type, or rows that are not of unit norm.
        """
        self._flat = FlatIndex(embeddings)
        n, dim = embeddings.shape
        self._scale = _Scale.of(embeddings)
        # Lists of FAISS are blocks of rows in order here, first of all rows, then of the sample, so that threads share
        # out one query, which IndexScalarQuantizer cannot, and a range of rows is some of the lists.
        self._blocks = _ceil(n, _BLOCK_ROWS)
        self._coarse = faiss.IndexFlatIP(dim)  # never asked, but FAISS needs one
        # Any: FAISS's type information lacks its own low-level calls.
        self._codes: Any = faiss.IndexIVFScalarQuantizer(
            self._coarse,
            dim,
            max(1, self._blocks + _ceil(_ceil(n, _SAMPLE_EVERY), _BLOCK_ROWS)),
            faiss.ScalarQuantizer.QT_8bit_uniform,
            faiss.METRIC_INNER_PRODUCT,
            False,
        )
        self._codes.parallel_mode = 1  # over the lists of one query
        # Code c stands for c - 127. QT_8bit_direct_signed would do, but rounds the query as well where 32 divides d.
        faiss.copy_array_to_vector(np.array([-_STEPS - 0.5, 2 * _STEPS + 1], np.float32), self._codes.sq.trained)
        self._codes.is_trained = True
        self._slack = self._encode(embeddings)

    def _encode(self, embeddings: NDArray[np.float32]) -> float:
        """Fill the lists; returns how far an approximate similarity can be from the true one."""
        moved = reach = 0.0
        for start in range(0, len(embeddings), _BLOCK_ROWS):
            exact = embeddings[start : start + _BLOCK_ROWS]
            codes = self._codes.sq.compute_codes(self._scale.round(exact))
            positions = np.arange(start, start + len(exact), dtype=np.int64)
            self._add(start // _BLOCK_ROWS, positions, codes)
            first = start // _SAMPLE_EVERY  # of a block that begins with a row of the sample
            self._add(self._blocks + first // _BLOCK_ROWS, positions[::_SAMPLE_EVERY], codes[::_SAMPLE_EVERY])
            rounded = self._codes.sq.decode(codes) * self._scale.step
            reach = max(reach, _longest(rounded))
            moved = max(moved, _longest(exact - self._scale.centre - rounded))
        # |query . (row - rounded row)| <= |query| |row - rounded row|. To that come float32 errors, each doubled: of a
        # scan, which sums d products with a vector no longer than `reach`; of `moved`, by less than that; and of a code
        # as a scan reads it, which is within 255 * 2^-22 steps of a whole number.
        rounding = (self.dim + 2) * 2.0**-23 * (reach + 1.0) + 2.0**-13 * float(np.linalg.norm(self._scale.step))
        return (1.0 + UNIT_TOLERANCE) * (moved + rounding)

    def _add(self, number: int, positions: NDArray[np.int64], codes: NDArray[np.uint8]) -> None:
        """Append rows to one list."""
        positions, codes = np.ascontiguousarray(positions), np.ascontiguousarray(codes)
        self._codes.invlists.add_entries(number, len(positions), faiss.swig_ptr(positions), faiss.swig_ptr(codes))

    @property
    def dim(self) -> int:
        """d, the length of an embedding."""
        return self._flat.dim

    def __len__(self) -> int:
        return len(self._flat)

    def embeddings_at(self, rows: Sequence[int]) -> NDArray[np.float32]:
        """A copy of the embeddings at some row positions: (len(rows), d) float32."""
        return self._flat.embeddings_at(rows)

    def search(self, queries: NDArray[np.float32], k: int, rows: range | None = None) -> list[list[tuple[int, float]]]:
        """See `VectorIndex.search`."""
        rows = check_search(queries, k, rows, (len(self), self.dim))
        if not len(rows):
            return [[] for _ in queries]
        faiss.omp_set_num_threads(_THREADS if len(rows) * self.dim >= _PARALLEL_FROM else 1)  # of the thread that calls
        return [self._search_one(query, k, rows) for query in queries]

    def _search_one(self, query: NDArray[np.float32], k: int, rows: range) -> list[tuple[int, float]]:
        """The certain answer to one query (d,)."""
        sample = range(_ceil(rows.start, _SAMPLE_EVERY), _ceil(rows.stop, _SAMPLE_EVERY))  # of its own positions
        if len(sample) < k:
            return self._flat.rank(query, k, np.arange(rows.start, rows.stop))
        # query . (centre + step * code) = query . centre + (query * step) . code
        scaled = np.ascontiguousarray(query * self._scale.step)
        constant = float(query.astype(np.float64) @ self._scale.centre.astype(np.float64))
        likely = self._nearest_of_sample(scaled, k + _SPARE, sample)
        # The k-th of any k rows is a lower bound of the k-th of all, and what cannot reach it is not in the answer.
        kth = self._flat.rank(query, k, likely)[-1][1]
        bar = kth - self._slack if kth > -1.0 else -np.inf  # similarities are clipped, so that rows beyond -1 tie
        return self._flat.rank(query, k, self._reaching(scaled, bar - constant, rows))

    def _nearest_of_sample(self, scaled: NDArray[np.float32], n: int, sample: range) -> NDArray[np.int64]:
        """The n rows of the sample that look nearest."""
        lists = _Lists.holding(sample, self._blocks)
        selector = faiss.IDSelectorRange(sample.start * _SAMPLE_EVERY, sample.stop * _SAMPLE_EVERY, True)  # ids ascend
        n = min(n, len(sample))
        found, positions = np.empty(n, np.float32), np.empty(n, np.int64)
        self._codes.search_preassigned_c(
            1,
            faiss.swig_ptr(scaled),
            n,
            *lists.pointers,
            faiss.swig_ptr(found),
            faiss.swig_ptr(positions),
            False,
            lists.parameters(selector),
        )
        return positions

    def _reaching(self, scaled: NDArray[np.float32], bar: float, rows: range) -> NDArray[np.int64]:
        """All rows whose approximate similarity is at least `bar`, in order."""
        lists = _Lists.holding(rows, 0)
        result = faiss.RangeSearchResult(1)
        above = float(np.nextafter(np.float32(bar), np.float32(-np.inf)))
        self._codes.range_search_preassigned_c(
            1, faiss.swig_ptr(scaled), above, *lists.pointers, result, False, lists.parameters(None)
        )
        count = int(faiss.rev_swig_ptr(result.lims, 2)[1])
        found: NDArray[np.int64] = np.sort(faiss.rev_swig_ptr(result.labels, count))  # a copy of FAISS's memory
        return found[slice(*np.searchsorted(found, (rows.start, rows.stop)))]  # the first and last list hold others too


@dataclass(frozen=True, eq=False)
class _Lists:
    """Some of the lists, as FAISS takes them.

    Attributes:
        numbers: (m,).
        distances: (m,) zeros, of lists that have no centroid.
    """

    numbers: NDArray[np.int64]
    distances: NDArray[np.float32]

    @classmethod
    def holding(cls, rows: range, first: int) -> "_Lists":
        """The lists that hold some rows, where the list number `first` begins with row 0."""
        numbers = np.arange(first + rows.start // _BLOCK_ROWS, first + _ceil(rows.stop, _BLOCK_ROWS), dtype=np.int64)
        return cls(numbers, np.zeros(len(numbers), np.float32))

    @property
    def pointers(self) -> tuple[object, object]:
        """Both arrays; valid while this object lives."""
        return faiss.swig_ptr(self.numbers), faiss.swig_ptr(self.distances)

    def parameters(self, selector: faiss.IDSelector | None) -> faiss.SearchParametersIVF:
        """To search all of them."""
        parameters = faiss.SearchParametersIVF()
        parameters.nprobe, parameters.sel = len(self.numbers), selector
        return parameters


def _ceil(count: int, size: int) -> int:
    """How many portions of a size hold a count."""
    return -(-count // size)


def _longest(rows: NDArray[np.float32]) -> float:
    """The greatest L2 norm of some rows."""
    return float(np.sqrt(np.einsum("ij,ij->i", rows, rows).max()))
