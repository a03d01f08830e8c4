"""The tables of the catalogue. A change here needs a migration: a test compares them with what migrations make."""

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
)

metadata = MetaData()

chains = Table(
    "chains",
    metadata,
    Column("name", String(16), primary_key=True),
    Column("head_seq", BigInteger, nullable=False),
    Column("head_hash", String(64), nullable=False),
    Column("first_seq", BigInteger, nullable=False),
    Column("first_prev", String(64), nullable=False),
)

entries = Table(
    "entries",
    metadata,
    Column("chain", String(16), nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("time", String(32), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("actor", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("request_id", Text, nullable=False),
    Column("collection", String(64), nullable=False),
    Column("subject", Text, nullable=False),
    Column("body", Text, nullable=False),
    Column("prev", String(64), nullable=False),
    Column("hash", String(64), nullable=False),
    PrimaryKeyConstraint("chain", "seq"),
    Index("entries_collection", "chain", "collection", "seq"),
    Index("entries_kind", "chain", "kind", "seq"),
    Index("entries_subject", "chain", "subject", "seq"),
)

embeddings = Table(
    "embeddings",
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("dim", Integer, nullable=False),
    Column("data", LargeBinary, nullable=False),
)

traffic = Table(
    "traffic",
    metadata,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("time", String(32), nullable=False),
    Column("request_id", Text, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("encoder_fingerprint", Text, nullable=False),
    Column("embedding", LargeBinary, nullable=False),
    Column("verdict", String(16), nullable=False),
    Column("pool", String(16)),
    Column("margin", Float),
    Column("nearest", Text, nullable=False),
    Column("version", String(16), nullable=False),
    Column("shadow_fingerprint", Text),
    Column("shadow_embedding", LargeBinary),
    Index("traffic_request", "request_id"),
    Index("traffic_image", "sha256"),
)

reviews = Table(
    "reviews",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("time", String(32), nullable=False),
    Column("origin", String(16), nullable=False),
    Column("state", String(16), nullable=False),
    Column("collection", String(64), nullable=False),
    Column("image_sha256", String(64), nullable=False),
    Column("embedding_sha256", String(64), nullable=False),
    Column("verdict", String(16), nullable=False),
    Column("evidence", Text, nullable=False),
    Column("comment", Text, nullable=False),
    Column("request_id", Text, nullable=False),
    Column("reporter", Text, nullable=False),
    Column("claimed_by", Text),
    Column("claimed_until", String(32)),
    Column("decided_by", Text),
    Column("decided_at", String(32)),
    Column("decision", String(16)),
    Column("exemplar_id", Text),
    Column("seen", Integer, nullable=False),
    Index("reviews_state", "state", "time"),
    Index("reviews_image", "image_sha256"),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("time", String(32), nullable=False),
    Column("owner", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("total", Integer, nullable=False),
    Column("done", Integer, nullable=False),
    Column("failed", Integer, nullable=False),
    Column("parameters", Text, nullable=False),
    Column("finished_at", String(32)),
    Column("lease_by", Text),
    Column("lease_until", String(32)),
    Index("jobs_state", "state", "time"),
)

job_items = Table(
    "job_items",
    metadata,
    Column("job_id", String(32), nullable=False),
    Column("position", Integer, nullable=False),
    Column("image_id", Text, nullable=False),
    Column("url", Text),
    Column("data", LargeBinary),
    Column("state", String(16), nullable=False),
    Column("answer", Text),
    PrimaryKeyConstraint("job_id", "position"),
    Index("job_items_state", "job_id", "state"),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("time", String(32), nullable=False),
    Column("event", String(32), nullable=False),
    Column("body", Text, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("next_at", String(32), nullable=False),
    Column("state", String(16), nullable=False),
    Column("last_error", Text, nullable=False),
    Index("deliveries_state", "state", "next_at"),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("collection", String(64), nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("state", Text, nullable=False),
    PrimaryKeyConstraint("collection", "revision"),
)
