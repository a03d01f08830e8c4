"""What a snapshot is made of, before it has a place on disk: a collection's exemplars and their embeddings.

Owns collection names, labels and the order of rows. Knows nothing of files or of search.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from indexer.errors import ContentsError, DuplicateId, InvalidLabel, InvalidName
from indexer.index import unit_rows
from perception.gallery import Gallery
from perception.verdict import PoolLabel

POOLS = "pools"  # the moderation collection; every other collection is a gallery
POOL_LABELS = tuple(str(label) for label in PoolLabel)
Kind = Literal["pools", "gallery"]
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}|")


def collection_kind(name: str) -> Kind:
    """Check a collection's name, and tell its kind.

    Raises:
        InvalidName: it could be a path, or be taken for a pool.
    """
    if not _NAME.fullmatch(name):
        raise InvalidName(name, "use 1 to 64 of a-z, 0-9, '-' and '_', beginning with a letter or digit")
    if name in POOL_LABELS:
        raise InvalidName(name, f"a gallery cannot be called like a pool; the pools are one collection, {POOLS!r}")
    return "pools" if name == POOLS else "gallery"


@dataclass(frozen=True)
class Exemplar:
    """One image of a collection.

    Attributes:
        id: unique within the collection.
        label: the pool in the moderation collection; in a gallery a class or the empty string.
        sha256: of the image file's bytes; empty where unknown.
        source: where it came from, for a person.
        metadata: what else is known of it.
    """

    id: str
    label: str
    sha256: str = ""
    source: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not self.id:
            raise ContentsError("an exemplar's id is empty")
        if not _SHA256.fullmatch(self.sha256):
            raise ContentsError(f"exemplar {self.id!r}: sha256 {self.sha256!r} is not 64 hex digits")
        try:
            "".join((self.id, self.label, self.source, *self.metadata, *self.metadata.values())).encode()
        except UnicodeEncodeError as error:  # a lone surrogate could be written, but no answer could carry it
            raise ContentsError(f"exemplar {self.id!r} has text that is not Unicode: {error.reason}") from None


@dataclass(frozen=True, eq=False)
class Contents:
    """Exemplars and embeddings of one collection, rows ordered by label, then id.

    The order is part of the contract: a label's rows are contiguous, and equal contents have equal bytes whatever
    order they were read in.

    Attributes:
        collection: its name.
        encoder_name: of the encoder that made the embeddings, for a person.
        encoder_fingerprint: of that encoder.
        exemplars: n, of unique ids.
        embeddings: (n, d) float32 of unit L2 norm.
    """

    collection: str
    encoder_name: str
    encoder_fingerprint: str
    exemplars: tuple[Exemplar, ...]
    embeddings: NDArray[np.float32]

    def __post_init__(self) -> None:
        kind = collection_kind(self.collection)
        if not self.encoder_fingerprint:
            raise ContentsError("the encoder fingerprint is empty")
        if self.embeddings.ndim != 2 or self.embeddings.shape[1] < 1 or self.embeddings.dtype != np.float32:
            found = f"{self.embeddings.shape} {self.embeddings.dtype}"
            raise ContentsError(f"embeddings must be (n, d) float32, got {found}")
        if len(self.exemplars) != len(self.embeddings):
            raise ContentsError(f"{len(self.exemplars)} exemplars and {len(self.embeddings)} embeddings do not fit")
        bad = np.flatnonzero(~unit_rows(self.embeddings))
        if bad.size:
            raise ContentsError(f"the embedding of {self.exemplars[bad[0]].id!r} is not finite and of unit L2 norm")
        ids = set()
        for exemplar in self.exemplars:
            if exemplar.id in ids:
                raise DuplicateId(exemplar.id)
            ids.add(exemplar.id)
            if kind == "pools" and exemplar.label not in POOL_LABELS:
                raise InvalidLabel(exemplar.label, POOL_LABELS, f"exemplar {exemplar.id!r}")
        keys = [_row_order(e) for e in self.exemplars]
        if any(a > b for a, b in pairwise(keys)):
            raise ContentsError("exemplars are not ordered by label and id")
        self.embeddings.setflags(write=False)

    @classmethod
    def arrange(
        cls,
        collection: str,
        encoder_name: str,
        encoder_fingerprint: str,
        exemplars: Sequence[Exemplar],
        embeddings: NDArray[np.float32],
    ) -> "Contents":
        """Bring exemplars and their embeddings (n, d), in any order, into the order of rows.

        Raises:
            ContentsError, InvalidLabel, InvalidName: they do not fit together.
        """
        if len(exemplars) != len(embeddings):
            raise ContentsError(f"{len(exemplars)} exemplars and {len(embeddings)} embeddings do not fit")
        order = sorted(range(len(exemplars)), key=lambda row: _row_order(exemplars[row]))
        ordered = np.ascontiguousarray(embeddings[order])
        return cls(collection, encoder_name, encoder_fingerprint, tuple(exemplars[row] for row in order), ordered)

    @property
    def kind(self) -> Kind:
        """'pools' for the moderation collection, else 'gallery'."""
        return collection_kind(self.collection)

    @property
    def dim(self) -> int:
        """d, the length of an embedding."""
        return int(self.embeddings.shape[1])

    @property
    def counts(self) -> dict[str, int]:
        """Exemplars by label, in the order of rows; the moderation collection counts empty pools too."""
        counts = Counter(exemplar.label for exemplar in self.exemplars)
        labels = sorted({*counts, *(POOL_LABELS if self.kind == "pools" else ())})
        return {label: counts[label] for label in labels}

    def to_gallery(self) -> Gallery:
        """The same as a perception Gallery, which offline work takes; sha256, source and metadata stay behind."""
        ids, labels = tuple(e.id for e in self.exemplars), tuple(e.label for e in self.exemplars)
        return Gallery(ids, labels, self.embeddings, self.encoder_fingerprint)


def _row_order(exemplar: Exemplar) -> tuple[str, str]:
    return exemplar.label, exemplar.id
