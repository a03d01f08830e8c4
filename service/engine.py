"""Engine: what runs in the thread of one replica; pixels or prompts in, embeddings and their neighbours out.

Owns the order encode -> finite check -> search. Knows nothing of asyncio, files, verdicts or HTTP.
"""

import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from indexer.live.suppression import Evidence, Suppressed
from indexer.live.surroundings import surroundings
from indexer.live.view import View
from indexer.snapshot import Snapshot
from perception.certified_decision import Surroundings
from perception.counterattack import Counterattack
from perception.encoder import Encoder, Precision, unit_embeddings
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
        certify: neighbours of each pool that are looked at for a certificate; 0 for no certificate. The encoder must
            have `features`, as every one has of which a Lipschitz constant is proven.
    """

    snapshot: View | Snapshot
    k: int
    label: str | None = None
    each_pool: bool = False
    certify: int = 0


@dataclass(frozen=True, eq=False)
class Query:
    """One thing to look up.

    Attributes:
        subject: pixels (3, h, w) uint8, or a prompt.
        search: where; None where only the embedding is asked for.
        defended: through the defence, where there is one; not so what is to become an exemplar.
    """

    subject: NDArray[np.uint8] | str
    search: Search | None
    defended: bool = True


@dataclass(frozen=True, eq=False)
class Sighting:
    """One answered query.

    Attributes:
        embedding: (d,) unit float32, which was searched with.
        undefended: (d,) what the encoder itself makes of the image; the same where no defence perturbed it.
        neighbors: as the search ordered them.
        suppressed: what suppress items took away from them, where the nearest of each pool were asked for.
        features: (d,) float32, of which `embedding` is the direction; where the search certifies an image.
        around: what a certificate is made from; there, too.
        timings: stage, begin and end of what its batch went through, in nanoseconds of the wall clock.
    """

    embedding: NDArray[np.float32]
    undefended: NDArray[np.float32]
    neighbors: tuple[Neighbor, ...]
    timings: tuple[tuple[str, int, int], ...] = ()
    suppressed: tuple[Suppressed, ...] = ()
    features: NDArray[np.float32] | None = None
    around: Surroundings | None = None


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
            embeddings, undefended, features = self._encode(queries)
        encoded_ns = time.time_ns()
        bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
        if bad.size:
            raise NonFiniteEmbedding(tuple(int(row) for row in bad))
        with self._stage("search"):
            found = self._search(queries, embeddings)
            around = _around(queries, embeddings, features)
        timings = (("encode", began_ns, encoded_ns), ("search", encoded_ns, time.time_ns()))
        return [
            Sighting(
                embeddings[row].copy(),
                undefended[row].copy(),
                evidence.neighbors,
                timings,
                evidence.suppressed,
                features.get(row),
                around.get(row),
            )
            for row, evidence in enumerate(found)
        ]

    def _encode(
        self, queries: Sequence[Query]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], dict[int, NDArray[np.float32]]]:
        """(n, d) unit embeddings, through the defence where it is asked for and without it, not checked.

        And by row the features of images that are to be certified, which have no defence.
        """
        features: dict[int, NDArray[np.float32]] = {}
        embeddings = np.empty((len(queries), self._encoder.dim), np.float32)
        through = self._encoder if isinstance(self._encoder, Counterattack) else None
        images = [(row, q.subject, q.defended) for row, q in enumerate(queries) if not isinstance(q.subject, str)]
        plain = [(row, pixels) for row, pixels, defended in images if through is None or not defended]
        guarded = [(row, pixels) for row, pixels, defended in images if through is not None and defended]
        prompts = [(row, q.subject) for row, q in enumerate(queries) if isinstance(q.subject, str)]
        with torch.inference_mode():
            if plain:
                encoder = self._encoder if through is None else through.encoder
                batch = to_pixels([pixels for _, pixels in plain])
                if any(_certify(queries[row]) for row, _ in plain):
                    whole: Tensor = encoder.features(batch)  # type: ignore[attr-defined]  # see `Search.certify`
                    encoded, kept = unit_embeddings(whole), whole.cpu().numpy()
                    features = {row: kept[at].copy() for at, (row, _) in enumerate(plain) if _certify(queries[row])}
                else:
                    encoded = encoder.encode(batch)
                embeddings[[row for row, _ in plain]] = encoded.cpu().numpy()
            if prompts:
                if self._text is None:
                    raise TextUnsupported(self._encoder.name)
                encoded = self._text.encode_text([prompt for _, prompt in prompts])
                embeddings[[row for row, _ in prompts]] = encoded.cpu().numpy()
            undefended = embeddings.copy() if guarded else embeddings
            if guarded and through is not None:
                encoded, itself = through.encode_both(to_pixels([pixels for _, pixels in guarded]))
                rows = [row for row, _ in guarded]
                embeddings[rows], undefended[rows] = encoded.cpu().numpy(), itself.cpu().numpy()
        return embeddings, undefended, features

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


def _certify(query: Query) -> bool:
    return query.search is not None and query.search.certify > 0


def _around(
    queries: Sequence[Query], embeddings: NDArray[np.float32], features: Iterable[int]
) -> dict[int, Surroundings]:
    """What certificates of some rows are made from."""
    found = {}
    for row in features:
        search = queries[row].search
        assert search is not None  # else nothing is certified
        [found[row]] = surroundings(search.snapshot, embeddings[row : row + 1], search.certify)
    return found


def _find(search: Search, queries: NDArray[np.float32]) -> list[Evidence]:
    """What one search finds for queries (b, d)."""
    if not search.each_pool:
        hits = search.snapshot.search(queries, search.k, label=search.label)
    elif isinstance(search.snapshot, View):
        return search.snapshot.evidence(queries, search.k)
    else:
        hits = search.snapshot.search_each(queries, search.k)
    return [Evidence(tuple(neighbors)) for neighbors in hits]
