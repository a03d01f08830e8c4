"""States made by hand, the views of them, and the naive twin of an overlay."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

import numpy as np
from numpy.typing import NDArray

from indexer.backends.flat import FlatIndex
from indexer.catalog.records import Disabled, Record, embedding_sha256
from indexer.catalog.state import Stamp, State
from indexer.contents import POOL_LABELS, Contents, Exemplar
from indexer.live.view import View
from indexer.snapshot import MakeIndex, Snapshot

Embedding = NDArray[np.float32]
Change = tuple[Record, Embedding] | None
Changes = dict[str, Change]
Merged = dict[str, tuple[Exemplar, Embedding]]

FINGERPRINT = "ab" * 32
NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)
DIM = 5
LABELS = {"pools": POOL_LABELS, "shop": ("", "cat", "dog")}


def unit(seed: int, n: int, dim: int = DIM) -> Embedding:
    rows = np.random.default_rng(seed).normal(size=(n, dim))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32)


def contents_of(merged: Merged, collection: str, dim: int = DIM) -> Contents:
    embeddings = np.stack([e for _, e in merged.values()]) if merged else np.zeros((0, dim), np.float32)
    return Contents.arrange(collection, "toy/0", FINGERPRINT, [e for e, _ in merged.values()], embeddings)


def make_base(
    exemplars: Sequence[Exemplar], embeddings: Embedding, collection: str = "pools", index: MakeIndex = FlatIndex
) -> Snapshot:
    return Snapshot.of(Contents.arrange(collection, "toy/0", FINGERPRINT, exemplars, embeddings), index)


def record(
    id: str,
    label: str,
    embedding: Embedding,
    disabled: Disabled | None = None,
    suppresses: tuple[str, ...] = (),
    min_similarity: float | None = None,
) -> tuple[Record, Embedding]:
    exemplar = Exemplar(id, label, source=f"run time/{id}")
    hashed = embedding_sha256(embedding)
    return Record(exemplar, hashed, disabled=disabled, suppresses=suppresses, min_similarity=min_similarity), embedding


def view_of(
    base: Snapshot | None,
    changed: Mapping[str, Change],
    collection: str = "pools",
    now: datetime = NOW,
    dim: int = DIM,
) -> View:
    state = State(collection, base=None if base is None else base.version)
    state = state.with_records({id: change and change[0] for id, change in changed.items()}, 7)
    embeddings = {change[0].embedding_sha256: change[1] for change in changed.values() if change}
    return View(state, base, embeddings, now, Stamp("toy/0", FINGERPRINT, dim))


def merge(base: Snapshot | None, changed: Mapping[str, Change], now: datetime) -> Merged:
    """Naive twin of the overlay: what can be found, by id."""
    merged = {e.id: (e, base.embedding(e.id)) for e in base.exemplars} if base is not None else {}
    for id, change in changed.items():
        merged.pop(id, None)
        if change and not change[0].suppresses and not (change[0].disabled and change[0].disabled.holds(now)):
            merged[id] = (change[0].exemplar, change[1])
    return merged
