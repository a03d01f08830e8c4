"""Catalogues for tests: edits by a few words, and what they left in the log."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from indexer.catalog import chain
from indexer.catalog.edits import (
    Add,
)
from indexer.catalog.entry import Entry
from indexer.catalog.ledger import CHANGES, Catalog, EditRequest, Outcome
from indexer.catalog.situation import Edit
from indexer.catalog.state import Stamp
from indexer.contents import Contents, Exemplar
from indexer.store import SnapshotStore

STAMP = Stamp("toy", "toy-fingerprint", 4)
POOLS = ("safe", "buffer", "unsafe")


def unit(seed: int) -> NDArray[np.float32]:
    row = np.random.default_rng(seed).normal(size=STAMP.dim)
    return np.asarray(row / np.linalg.norm(row), np.float32)


def add(id: str, label: str = "safe", seed: int | None = None, **more: object) -> Add:
    seed = sum(map(ord, id)) if seed is None else seed
    return Add("pools", Exemplar(id, label), unit(seed), STAMP, **more)  # type: ignore[arg-type]


def make(catalog: Catalog, *edits: Edit) -> list[Outcome]:
    """Make edits one by one, as 'ann'; the first refusal is raised."""
    outcomes = []
    for edit in edits:
        [made] = catalog.apply([[EditRequest(edit, "ann", "since", "r1")]])
        if isinstance(made, Exception):
            raise made
        outcomes += made
    return outcomes


def entries(catalog: Catalog) -> list[Entry]:
    with catalog.database.reading() as connection:
        return list(chain.read(connection, CHANGES))


def published_base(root: Path, *rows: tuple[str, str]) -> str:
    exemplars = [Exemplar(id, label, source=f"{id}.png") for id, label in rows]
    embeddings = np.stack([unit(1000 + n) for n in range(len(rows))])
    contents = Contents.arrange("pools", STAMP.name, STAMP.fingerprint, exemplars, embeddings)
    return SnapshotStore(root, "pools").publish(contents)
