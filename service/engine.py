"""Engine: what runs in the thread of one replica; pixels or prompts in, embeddings and their neighbours out.

Owns the order encode -> finite check -> search. Knows nothing of asyncio, files, verdicts or HTTP.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from indexer.live.suppression import Evidence, Suppressed
from indexer.live.view import View
from indexer.snapshot import Snapshot
from perception.encoder import Encoder, Precision
from perception.errors import NonFiniteEmbedding
from perception.preprocess import to_pixels
from perception.verdict import Neighbor
from service.errors import TextUnsupported
from service.telemetry import Metrics


class ServingEncoder(Encoder, Protocol):
    """An Encoder that says in which precision it runs, as those of `perception.load_encoder` do."""

    @property
    def precision(self) -> Precision:
        """Of weights and activations."""


class TextTower(Protocol):
    """Encodes prompts into the space of the images; see `perception.text.TextEncoder`."""

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Encode n prompts: (n, d) unit float32."""


@dataclass(frozen=True)
class Search:
    """What to look for in one state of a collection; equal searches share a call.

    Attributes:
        snapshot: where; the reference is held for the whole request.
        k: how many neighbours, of each pool where `each_pool`.
        label: only exemplars of this label.
        each_pool: the nearest of each pool, which a verdict needs, instead of the nearest of all; without what suppress
            items take away.
    """

    snapshot: View | Snapshot
    k: int
    label: str | None = None
    each_pool: bool = False


@dataclass(frozen=True, eq=False)
class Query:
    """One thing to look up.

    Attributes:
        subject: pixels (3, h, w) uint8, or a prompt.
        search: where; None where only the embedding is asked for.
    """

    subject: NDArray[np.uint8] | str
    search: Search | None


@dataclass(frozen=True, eq=False)
class Sighting:
    """One answered query.

    Attributes:
        embedding: (d,) unit float32.
        neighbors: as the search ordered them.
        suppressed: what suppress items took away from them, where the nearest of each pool were asked for.
        timings: stage, begin and end of what its batch went through, in nanoseconds of the wall clock.
    """

    embedding: NDArray[np.float32]
    neighbors: tuple[Neighbor, ...]
    timings: tuple[tuple[str, int, int], ...] = ()
    suppressed: tuple[Suppressed, ...] = ()


class Engine:
    """Answers batches of queries.

    Args:
        encoder: of the images.
        text: its text tower, None where it has none.
        metrics: told how long batches take to encode and to search; None where nobody asks.
    """

    def __init__(self, encoder: ServingEncoder, text: TextTower | None, metrics: Metrics | None = None) -> None:
        self._encoder, self._text = encoder, text
        self._stage = nullcontext if metrics is None else metrics.stage

    def answer(self, queries: Sequence[Query]) -> list[Sighting]:
        """Answer a batch, in order.

        Raises:
            NonFiniteEmbedding: a query has no embedding to search with; `rows` are positions in the batch.
            TextUnsupported: a prompt, but no text tower.
        """
        began_ns = time.time_ns()
        with self._stage("encode"):
            embeddings = self._encode(queries)
        encoded_ns = time.time_ns()
        bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
        if bad.size:
            raise NonFiniteEmbedding(tuple(int(row) for row in bad))
        with self._stage("search"):
            found = self._search(queries, embeddings)
        timings = (("encode", began_ns, encoded_ns), ("search", encoded_ns, time.time_ns()))
        return [
            Sighting(embedding.copy(), evidence.neighbors, timings, evidence.suppressed)
            for embedding, evidence in zip(embeddings, found, strict=True)
        ]

    def _encode(self, queries: Sequence[Query]) -> NDArray[np.float32]:
        """(n, d) unit embeddings, not checked."""
        embeddings = np.empty((len(queries), self._encoder.dim), np.float32)
        images = [(row, q.subject) for row, q in enumerate(queries) if not isinstance(q.subject, str)]
        prompts = [(row, q.subject) for row, q in enumerate(queries) if isinstance(q.subject, str)]
        with torch.inference_mode():
            if images:
                encoded = self._encoder.encode(to_pixels([pixels for _, pixels in images]))
                embeddings[[row for row, _ in images]] = encoded.cpu().numpy()
            if prompts:
                if self._text is None:
                    raise TextUnsupported(self._encoder.name)
                encoded = self._text.encode_text([prompt for _, prompt in prompts])
                embeddings[[row for row, _ in prompts]] = encoded.cpu().numpy()
        return embeddings

    def _search(self, queries: Sequence[Query], embeddings: NDArray[np.float32]) -> list[Evidence]:
        """One call for all queries that ask the same of the same state."""
        rows_of: dict[Search, list[int]] = {}
        for row, query in enumerate(queries):
            if query.search is not None:
                rows_of.setdefault(query.search, []).append(row)
        found = dict.fromkeys(range(len(queries)), Evidence(()))
        for search, rows in rows_of.items():
            found.update(zip(rows, _find(search, embeddings[rows]), strict=True))
        return [found[row] for row in range(len(queries))]


def _find(search: Search, queries: NDArray[np.float32]) -> list[Evidence]:
    """What one search finds for queries (b, d)."""
    if not search.each_pool:
        hits = search.snapshot.search(queries, search.k, label=search.label)
    elif isinstance(search.snapshot, View):
        return search.snapshot.evidence(queries, search.k)
    else:
        hits = search.snapshot.search_each(queries, search.k)
    return [Evidence(tuple(neighbors)) for neighbors in hits]
