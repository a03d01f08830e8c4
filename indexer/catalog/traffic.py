"""Traffic: what was decided, in the log of decisions and in a ring of the newest embeddings.

The log is for explaining a decision a year later, and keeps what it takes to reproduce one given the image. It can
never forget, so it holds no image, no embedding and no address. Embeddings are in the ring alone: the newest few
thousand, for dry runs, retroactive matches and feedback.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Row, Select, delete, func, insert, select, update

from indexer.catalog import chain
from indexer.catalog.clock import parse_time, text_of
from indexer.catalog.entry import Draft
from indexer.catalog.records import embedding_bytes, embedding_from
from indexer.catalog.tables import chains, entries, traffic
from indexer.errors import ContentsError
from indexer.live.suppression import Suppressed
from perception.verdict import Neighbor, PoolLabel, VerdictLabel

Embedding = NDArray[np.float32]
ANONYMOUS = "anonymous"
KIND = "decision"
_SAME_IMAGE_AGAIN = 64  # more rows than one request can have of one image
_SEPARATORS = (":", "/")  # what may follow 'anonymous' in the name of a caller


@dataclass(frozen=True, eq=False)
class Shadow:
    """What a candidate encoder made of the same image.

    Attributes:
        fingerprint: of that encoder.
        embedding: (d,) float32 of unit L2 norm, of the same frame; its d may be another.
        verdict: with that encoder's pools.
    """

    fingerprint: str
    embedding: Embedding
    verdict: VerdictLabel


@dataclass(frozen=True, eq=False)
class Decision:
    """One image that was judged.

    Attributes:
        time: of the verdict, aware.
        request_id: of the request.
        caller: 'key:<id>' or 'anonymous'; whatever follows 'anonymous:' is not kept.
        image_id: the caller's name of the image.
        sha256: of the file, 64 hex digits.
        route: that answered, such as '/classify'.
        frame_index, background: of the frame that decided.
        encoder_fingerprint, collection, version, revision: what it was compared with.
        policy_version: of the rule.
        verdict, pool, margin: as answered.
        neighbors: the evidence, most similar first: as many of each pool as the policy needs.
        suppressed: what suppress items took away from it.
        embedding: (d,) float32 of unit L2 norm, of the frame that decided; None where it is not to be kept at all.
        shadow: of a candidate encoder; None without one.
        draft: its entry of the log.

    Raises:
        ContentsError: it could not be recorded as it is.
    """

    time: datetime
    request_id: str
    caller: str
    image_id: str
    sha256: str
    route: str
    frame_index: int
    background: str | None
    encoder_fingerprint: str
    collection: str
    version: str
    revision: int
    policy_version: str
    verdict: VerdictLabel
    pool: PoolLabel | None
    margin: float | None
    neighbors: tuple[Neighbor, ...]
    suppressed: tuple[Suppressed, ...] = ()
    embedding: Embedding | None = None
    shadow: Shadow | None = None
    draft: Draft = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.sha256) != 64 or not set(self.sha256) <= set("0123456789abcdef"):
            raise ContentsError(f"sha256 {self.sha256!r} is not 64 hex digits")
        if any(self.caller.startswith(ANONYMOUS + separator) for separator in _SEPARATORS):
            object.__setattr__(self, "caller", ANONYMOUS)
        # A file name may hold what no text column can: half a surrogate pair, or NUL.
        image_id = self.image_id.encode(errors="replace").decode().replace("\0", "\ufffd")
        object.__setattr__(self, "image_id", image_id)
        shadowed = None if self.shadow is None else self.shadow.embedding
        for embedding in (self.embedding, shadowed):
            if embedding is not None:
                embedding_bytes(embedding)
        object.__setattr__(self, "draft", self._draft())

    @property
    def deciding(self) -> Neighbor | None:
        """The exemplar that decided: the most similar one of the pool that won; None where none did."""
        return next((neighbor for neighbor in self.neighbors if neighbor.pool == self.pool), None)

    @property
    def evidence(self) -> dict[str, Any]:
        """What it was decided from, of JSON's types; similarities that are not finite are null."""
        return {
            "encoder_fingerprint": self.encoder_fingerprint,
            "version": self.version,
            "revision": self.revision,
            "policy_version": self.policy_version,
            "frame": {"index": self.frame_index, "background": self.background},
            "verdict": str(self.verdict),
            "pool": None if self.pool is None else str(self.pool),
            "margin": _finite(self.margin),
            "neighbors": [
                {"id": n.id, "pool": str(n.pool), "similarity": _finite(n.similarity)} for n in self.neighbors
            ],
            "suppressed": [
                {"exemplar_id": s.exemplar_id, "by": s.by, "similarity_to_item": s.similarity_to_item}
                for s in self.suppressed
            ],
        }

    def _draft(self) -> Draft:
        shadow = self.shadow and {"fingerprint": self.shadow.fingerprint, "verdict": str(self.shadow.verdict)}
        body = {
            **self.evidence,
            "time": text_of(self.time),
            "route": self.route,
            "image_id": self.image_id,
            "shadow": shadow,
        }
        return Draft(KIND, self.caller, "", self.request_id, self.collection, self.sha256, body)


@dataclass(frozen=True)
class Seen:
    """What the ring knows of one decision besides the embedding.

    Attributes:
        request_id, sha256, time, verdict, pool, margin, version: as in `Decision`.
        nearest: id of the exemplar that decided; empty where none did.
    """

    request_id: str
    sha256: str
    time: datetime
    verdict: VerdictLabel
    pool: PoolLabel | None
    margin: float | None
    nearest: str
    version: str


@dataclass(frozen=True, eq=False)
class Recent:
    """The newest decisions of the ring, the newest first.

    Attributes:
        embeddings: (n, d) float32 of unit L2 norm.
        seen: n, in the same order.
        shadow_embeddings: (n, d') of the shadow encoder that was asked for; None where none was.
    """

    embeddings: Embedding
    seen: tuple[Seen, ...]
    shadow_embeddings: Embedding | None = None

    def __len__(self) -> int:
        return len(self.seen)


@dataclass(frozen=True, eq=False)
class Found:
    """One decision of the ring.

    Attributes:
        seen: what the ring knows of it.
        encoder_fingerprint: of the encoder of its embedding.
        embedding: (d,) float32 of unit L2 norm.
        evidence: body of its entry in the log; None where decisions are not logged, or this one was pruned.
    """

    seen: Seen
    encoder_fingerprint: str
    embedding: Embedding
    evidence: Mapping[str, Any] | None


def record_decisions(connection: Connection, decisions: Sequence[Decision], *, log: bool, keep: int) -> int:
    """Add decisions to the log and to the ring.

    Args:
        connection: of a transaction that writes.
        decisions: in their order.
        log: whether the log gets them.
        keep: rows of the ring that stay, the newest ones; 0 keeps none, not even of before.

    Returns:
        Number of the last one; 0 where neither the log nor the ring got any.
    """
    first = _next_in_ring(connection) if keep and decisions else 1
    if log:
        logged = chain.append(connection, chain.DECISIONS, [decision.draft for decision in decisions])
        # Equal to the numbers of the log, unless it was off for a while and the ring went on.
        first = max(first, logged[0].seq) if logged else first
    numbered = list(enumerate(decisions, first))
    rows = [
        _row(number, decision, decision.embedding) for number, decision in numbered if decision.embedding is not None
    ]
    if rows and keep:
        connection.execute(insert(traffic), rows[-keep:])
    _forget(connection, keep)
    return numbered[-1][0] if numbered and (log or keep) else 0


def attach_shadow(connection: Connection, *, request_id: str, sha256: str, shadow: Shadow) -> int:
    """Put what a candidate encoder made of an image beside its decision; how many rows of the ring have it now."""
    values = {"shadow_fingerprint": shadow.fingerprint, "shadow_embedding": embedding_bytes(shadow.embedding)}
    found = update(traffic).where(traffic.c.request_id == request_id, traffic.c.sha256 == sha256)
    return connection.execute(found.values(**values)).rowcount


def recent(
    connection: Connection, *, encoder_fingerprint: str, limit: int, shadow_fingerprint: str | None = None
) -> Recent:
    """The newest decisions with embeddings of one encoder.

    Args:
        connection: of a transaction.
        encoder_fingerprint: of that encoder.
        limit: the most.
        shadow_fingerprint: only those that this encoder has embedded too, as a shadow.

    Raises:
        ContentsError: embeddings of one encoder differ in length.
    """
    unread = () if shadow_fingerprint is not None else ("shadow_embedding",)
    query: Select[Any] = select(*(column for column in traffic.c if column.name not in unread))
    query = query.where(traffic.c.encoder_fingerprint == encoder_fingerprint)
    if shadow_fingerprint is not None:
        query = query.where(traffic.c.shadow_fingerprint == shadow_fingerprint)
    rows = connection.execute(query.order_by(traffic.c.seq.desc()).limit(limit)).all()
    return Recent(
        _matrix([row.embedding for row in rows]),
        tuple(_seen(row) for row in rows),
        None if shadow_fingerprint is None else _matrix([row.shadow_embedding for row in rows]),
    )


def find_decisions(
    connection: Connection, *, request_id: str | None = None, sha256: str | None = None, limit: int = 1
) -> list[Found]:
    """Decisions that the ring still has, the newest first, each image of a request once.

    Args:
        connection: of a transaction.
        request_id, sha256: of which at least one; what both match where both are given.
        limit: the most; with 2 it shows whether a request had several images.
    """
    if request_id is None and sha256 is None:
        raise ValueError("name a request or an image")
    query: Select[Any] = select(traffic)
    if request_id is not None:
        query = query.where(traffic.c.request_id == request_id)
    if sha256 is not None:
        query = query.where(traffic.c.sha256 == sha256)
    found: dict[tuple[str, str], Row[Any]] = {}
    for row in connection.execute(query.order_by(traffic.c.seq.desc()).limit(limit + _SAME_IMAGE_AGAIN)):
        found.setdefault((row.request_id, row.sha256), row)
    return [
        Found(_seen(row), row.encoder_fingerprint, embedding_from(row.embedding), _logged(connection, row))
        for row in list(found.values())[:limit]
    ]


def _row(number: int, decision: Decision, embedding: Embedding) -> dict[str, Any]:
    shadow, deciding = decision.shadow, decision.deciding
    return {
        "seq": number,
        "time": text_of(decision.time),
        "request_id": decision.request_id,
        "sha256": decision.sha256,
        "encoder_fingerprint": decision.encoder_fingerprint,
        "embedding": embedding_bytes(embedding),
        "verdict": str(decision.verdict),
        "pool": None if decision.pool is None else str(decision.pool),
        "margin": _finite(decision.margin),
        "nearest": "" if deciding is None else deciding.id,
        "version": decision.version,
        "shadow_fingerprint": None if shadow is None else shadow.fingerprint,
        "shadow_embedding": None if shadow is None else embedding_bytes(shadow.embedding),
    }


def _next_in_ring(connection: Connection) -> int:
    """One more than the newest number of the ring; the lock of the log is held from here on."""
    connection.execute(select(chains.c.name).where(chains.c.name == chain.DECISIONS).with_for_update())
    newest: int | None = connection.execute(select(func.max(traffic.c.seq))).scalar()
    return 1 if newest is None else newest + 1


def _forget(connection: Connection, keep: int) -> None:
    newest_first = select(traffic.c.seq).order_by(traffic.c.seq.desc())
    oldest = connection.execute(newest_first.offset(keep).limit(1)).scalar()
    if oldest is not None:
        connection.execute(delete(traffic).where(traffic.c.seq <= oldest))


def _seen(row: Row[Any]) -> Seen:
    pool = None if row.pool is None else PoolLabel(row.pool)
    verdict, time = VerdictLabel(row.verdict), parse_time(row.time)
    return Seen(row.request_id, row.sha256, time, verdict, pool, row.margin, row.nearest, row.version)


def _logged(connection: Connection, row: Row[Any]) -> Mapping[str, Any] | None:
    """The body of the log's entry about a row of the ring."""
    query = (
        select(entries.c.body)
        .where(entries.c.chain == chain.DECISIONS, entries.c.subject == row.sha256)
        .where(entries.c.request_id == row.request_id)
        .order_by(entries.c.seq.desc())
        .limit(1)
    )
    text: str | None = connection.execute(query).scalar()
    if text is None:
        return None
    body: dict[str, Any] = json.loads(text)
    return body


def _matrix(rows: Sequence[bytes]) -> Embedding:
    """(n, d) from the bytes of n embeddings; (0, 0) of none."""
    if len({len(row) for row in rows}) > 1:
        raise ContentsError("embeddings of one encoder differ in length")
    flat = np.frombuffer(b"".join(rows), "<f4").astype(np.float32)
    return flat.reshape(len(rows), -1 if rows else 0)


def _finite(value: float | None) -> float | None:
    """JSON knows no NaN; a verdict on one is `review`, and its reason says so."""
    return value if value is not None and math.isfinite(value) else None
