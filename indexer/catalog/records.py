"""Record: one exemplar as it is after a change, in the words of the log.

Owns its JSON form, which hashes depend on. Knows nothing of databases or search.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from indexer.catalog.clock import parse_time, text_of
from indexer.contents import Exemplar
from indexer.errors import ContentsError
from indexer.index import unit_rows

SUPPRESS = "suppress"  # the label of suppress items, which lie in no pool
MAX_TEXT_CHARS = 4000
MAX_METADATA = 64
DisabledBy = Literal["operator", "quarantine"]


@dataclass(frozen=True)
class Disabled:
    """Why an exemplar takes no part in searches.

    Attributes:
        by: an operator, or the flood guard.
        until: from when on it takes part again; None for until somebody enables it.
    """

    by: DisabledBy
    until: datetime | None = None

    def holds(self, now: datetime) -> bool:
        """Whether it is still so."""
        return self.until is None or now < self.until


@dataclass(frozen=True)
class Record:
    """One exemplar, or one suppress item, of a collection.

    Attributes:
        exemplar: id, label, sha256 of the image file, source, metadata.
        embedding_sha256: of the (d,) little-endian float32 bytes of its embedding.
        note: of an operator.
        disabled: None where it takes part in searches.
        suppresses: ids of exemplars that are not evidence for what is similar to this one; a suppress item has at
            least one and the label 'suppress', an exemplar has none.
        min_similarity: cosine from which on something is similar to a suppress item; None for an exemplar.
    """

    exemplar: Exemplar
    embedding_sha256: str
    note: str = ""
    disabled: Disabled | None = None
    suppresses: tuple[str, ...] = ()
    min_similarity: float | None = None

    def __post_init__(self) -> None:
        exemplar, id = self.exemplar, self.exemplar.id
        if bool(self.suppresses) != (self.min_similarity is not None):
            raise ContentsError(f"{id!r}: a suppress item has ids and min_similarity, an exemplar neither")
        if self.suppresses and exemplar.label != SUPPRESS:
            raise ContentsError(f"{id!r}: a suppress item has the label {SUPPRESS!r}, got {exemplar.label!r}")
        if self.min_similarity is not None and not 0.0 < self.min_similarity <= 1.0:
            raise ContentsError(f"{id!r}: min_similarity must be in (0, 1], got {self.min_similarity}")
        if not _is_unicode(self.note):
            raise ContentsError(f"{id!r}: the note is not Unicode")

    def require_sizes(self) -> None:
        """Bound what people may write; snapshots built offline may hold more.

        Raises:
            ContentsError: a text or the metadata are too long; names the limit and the value.
        """
        id, exemplar = self.id, self.exemplar
        own = (("id", id), ("source", exemplar.source), ("note", self.note))
        for name, text in (*own, *exemplar.metadata.items()):
            if len(text) > MAX_TEXT_CHARS or len(name) > MAX_TEXT_CHARS:
                long = max(len(text), len(name))
                raise ContentsError(f"{id[:64]!r}: {name[:64]!r} has {long} characters, the limit is {MAX_TEXT_CHARS}")
        if len(exemplar.metadata) > MAX_METADATA:
            raise ContentsError(f"{id!r}: {len(exemplar.metadata)} metadata, the limit is {MAX_METADATA}")

    @property
    def id(self) -> str:
        """Of the exemplar."""
        return self.exemplar.id

    @property
    def is_plain(self) -> bool:
        """Whether a snapshot on disk can hold it: no note, not disabled, no suppress item."""
        return not self.note and self.disabled is None and not self.suppresses

    def to_json(self) -> dict[str, Any]:
        """As in the log; the inverse of `from_json`."""
        value: dict[str, Any] = {
            "id": self.id,
            "label": self.exemplar.label,
            "sha256": self.exemplar.sha256,
            "source": self.exemplar.source,
            "metadata": dict(self.exemplar.metadata),
            "note": self.note,
            "embedding_sha256": self.embedding_sha256,
        }
        if self.disabled is not None:
            until = self.disabled.until
            value["disabled"] = {"by": self.disabled.by, "until": until and text_of(until)}
        if self.suppresses:
            value |= {"suppresses": list(self.suppresses), "min_similarity": self.min_similarity}
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Record":
        """Read what `to_json` made.

        Raises:
            KeyError, TypeError, ValueError, ContentsError: it is something else.
        """
        disabled = value.get("disabled")
        return cls(
            Exemplar(value["id"], value["label"], value["sha256"], value["source"], value["metadata"]),
            value["embedding_sha256"],
            value["note"],
            disabled and Disabled(disabled["by"], disabled["until"] and parse_time(disabled["until"])),
            tuple(value.get("suppresses", ())),
            value.get("min_similarity"),
        )

    @property
    def digest(self) -> int:
        """sha256 of its JSON form, as a number."""
        return digest_of(self.to_json())


def digest_of(value: Mapping[str, Any]) -> int:
    """sha256 of the canonical JSON of a value, as a number."""
    return int.from_bytes(hashlib.sha256(canonical_json(value).encode()).digest(), "big")


def canonical_json(value: object) -> str:
    """One text for one value: sorted keys, no spaces, no NaN.

    Raises:
        ValueError: a number is not finite.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def embedding_bytes(embedding: NDArray[np.float32]) -> bytes:
    """The (d,) unit embedding as it is stored: little-endian float32.

    Raises:
        ContentsError: another shape or type, not finite, or not of unit norm.
    """
    if embedding.ndim != 1 or not embedding.size or embedding.dtype != np.float32:
        raise ContentsError(f"an embedding must be (d,) float32, got {embedding.shape} {embedding.dtype}")
    if not unit_rows(embedding[np.newaxis])[0]:
        raise ContentsError("the embedding is not finite and of unit L2 norm")
    return embedding.astype("<f4").tobytes()


def embedding_sha256(embedding: NDArray[np.float32]) -> str:
    """The name of an embedding (d,) in the catalogue. Errors are those of `embedding_bytes`."""
    return hashlib.sha256(embedding_bytes(embedding)).hexdigest()


def embedding_from(data: bytes) -> NDArray[np.float32]:
    """The inverse of `embedding_bytes`: (d,) float32."""
    return np.frombuffer(data, "<f4").astype(np.float32)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
