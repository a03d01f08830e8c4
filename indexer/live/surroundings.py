"""What lies around queries in the pools, with embeddings: what certificates of verdicts are made from."""

import numpy as np
from numpy.typing import NDArray

from indexer.live.suppression import Evidence
from indexer.live.view import View
from indexer.snapshot import Snapshot
from perception.certified_decision import Surroundings


def surroundings(pools: View | Snapshot, queries: NDArray[np.float32], k: int) -> list[Surroundings]:
    """The k nearest exemplars of each pool that take part, their embeddings as they are searched, and what may change.

    Suppress items take part in a verdict by the image's cosine to them; those are the gates. What an operator changes,
    and what takes part again at a time, makes another state, of which nothing is said.

    Args:
        pools: one state of the moderation pools.
        queries: (b, d) float32 of unit L2 norm.
        k: of each pool; more make certificates larger.

    Raises:
        ValueError: see `VectorIndex.search`.
    """
    if isinstance(pools, View):
        found, gates = pools.evidence(queries, k), pools.gates
    else:
        found, gates = [Evidence(tuple(neighbors)) for neighbors in pools.search_each(queries, k)], None
    return [Surroundings.of(evidence.neighbors, _embeddings(pools, evidence), k, gates) for evidence in found]


def _embeddings(pools: View | Snapshot, evidence: Evidence) -> NDArray[np.float32]:
    rows = [pools.embedding(neighbor.id) for neighbor in evidence.neighbors]
    return np.stack(rows) if rows else np.zeros((0, pools.dim), np.float32)
