"""Which VectorIndex holds a collection: one rule, kept here.

All of them give the same answers, to the last bit; the choice is one of time and memory.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from indexer.backends.flat import FlatIndex
from indexer.backends.scalar_quantized import ScalarQuantizedIndex

IndexMode = Literal["auto", "exact", "fast"]

# n x d up to which "auto" takes FlatIndex, about 8,000 rows of 640: half a millisecond a query there, and from there on
# ScalarQuantizedIndex is quicker (benchmarks/search.py, docs/decisions/014).
AUTO_FLAT_COMPONENTS = 5_000_000


def build_index(embeddings: NDArray[np.float32], mode: IndexMode = "auto") -> FlatIndex | ScalarQuantizedIndex:
    """Index embeddings; the array may be dropped afterwards.

    Args:
        embeddings: (n, d) float32 of unit L2 norm; n may be 0.
        mode: "exact" for FlatIndex, "fast" for ScalarQuantizedIndex; "auto" for FlatIndex up to `AUTO_FLAT_COMPONENTS`.

    Raises:
        ValueError: another shape or type, or rows that are not of unit norm.
    """
    flat = mode == "exact" or (mode == "auto" and embeddings.size <= AUTO_FLAT_COMPONENTS)
    return FlatIndex(embeddings) if flat else ScalarQuantizedIndex(embeddings)
