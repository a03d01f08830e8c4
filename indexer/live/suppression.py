"""Suppression: exemplars that are no evidence for what is similar to a suppress item, and the trace it leaves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from indexer.catalog.records import Record
from perception.certified_decision import Gates
from perception.verdict import Neighbor

# The matrix product that looks for similar items rounds otherwise than the cosine that decides, by far less than this.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Suppressed:
    """One exemplar that would have been a neighbour.

    Attributes:
        exemplar_id: of the exemplar.
        by: id of the suppress item; of several the one most similar to the query.
        similarity_to_item: cosine of the query and that item, in [-1, 1].
    """

    exemplar_id: str
    by: str
    similarity_to_item: float


@dataclass(frozen=True)
class Evidence:
    """What there is to decide from for one query.

    Attributes:
        neighbors: as `search_each` orders them; in the place of suppressed ones are the next of the same pool.
        suppressed: what was left out, in the order in which it would have been found.
    """

    neighbors: tuple[Neighbor, ...]
    suppressed: tuple[Suppressed, ...] = ()


class SuppressItems:
    """The active suppress items of a collection.

    Args:
        items: records that suppress something.
        embeddings: (len(items), d) float32 of unit L2 norm.
    """

    def __init__(self, items: Sequence[Record], embeddings: NDArray[np.float32]) -> None:
        self._items = tuple(items)
        self._embeddings = embeddings.astype(np.float64)
        self._directions = self._embeddings / np.linalg.norm(self._embeddings, axis=1, keepdims=True)
        self._thresholds = np.array([item.min_similarity for item in items], np.float64)

    def __len__(self) -> int:
        return len(self._items)

    @property
    def gates(self) -> Gates:
        """On which sides of which thresholds queries must be for the same items to match."""
        return Gates(self._directions, self._thresholds)

    def matches(self, queries: NDArray[np.float32]) -> list[Mapping[str, Suppressed]]:
        """What is suppressed for each query: by id of the exemplar.

        The answer to a query does not depend on the other queries of the batch.

        Args:
            queries: (b, d) float32 of unit L2 norm.
        """
        wide = queries.astype(np.float64)
        wide_norms = np.linalg.norm(wide, axis=1, keepdims=True)
        near = (wide / wide_norms) @ self._directions.T >= self._thresholds - _ROUNDING
        return [self._of(query, np.flatnonzero(row)) for query, row in zip(wide, near, strict=True)]

    def _of(self, query: NDArray[np.float64], candidates: NDArray[np.intp]) -> dict[str, Suppressed]:
        """What the candidates suppress for one query (d,), after a look at the exact cosines."""
        found: dict[str, Suppressed] = {}
        matching = [
            (-similarity, item)
            for item, at in ((self._items[at], at) for at in candidates)
            if (similarity := _cosine(query, self._embeddings[at])) >= self._thresholds[at]
        ]
        for negative, item in sorted(matching, key=lambda match: (match[0], match[1].id)):
            for id in item.suppresses:
                found.setdefault(id, Suppressed(id, item.id, -negative))
        return found


def _cosine(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    """Of two vectors (d,), exactly 1 for equal ones: stored norms are 1 only nearly."""
    cosine = (left * right).sum() / np.sqrt((left * left).sum() * (right * right).sum())
    return float(np.clip(cosine, -1.0, 1.0))
