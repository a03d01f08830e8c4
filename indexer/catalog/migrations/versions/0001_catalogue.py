"""The tables of the catalogue, its two chains, and the triggers that make them append-only.

There is no way back: a system of record is not downgraded, it is restored.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_NO_HASH = "0" * 64

_SQLITE_TRIGGERS = (
    """
    CREATE TRIGGER entries_no_update BEFORE UPDATE ON entries
    BEGIN SELECT RAISE(ABORT, 'entries are append-only: UPDATE refused'); END
    """,
    """
    CREATE TRIGGER entries_no_delete BEFORE DELETE ON entries
    WHEN NOT EXISTS (SELECT 1 FROM chains WHERE name = OLD.chain AND first_seq > OLD.seq)
    BEGIN SELECT RAISE(ABORT, 'entries are append-only: DELETE refused'); END
    """,
    # INSERT OR REPLACE would delete without asking the trigger above.
    """
    CREATE TRIGGER entries_no_replace BEFORE INSERT ON entries
    WHEN EXISTS (SELECT 1 FROM entries WHERE chain = NEW.chain AND seq = NEW.seq)
    BEGIN SELECT RAISE(ABORT, 'entries are append-only: REPLACE refused'); END
    """,
    """
    CREATE TRIGGER embeddings_no_update BEFORE UPDATE ON embeddings
    BEGIN SELECT RAISE(ABORT, 'embeddings are named by their content: UPDATE refused'); END
    """,
    """
    CREATE TRIGGER chains_no_delete BEFORE DELETE ON chains
    BEGIN SELECT RAISE(ABORT, 'chains stay: DELETE refused'); END
    """,
    """
    CREATE TRIGGER chains_no_return BEFORE UPDATE ON chains
    WHEN NEW.name <> OLD.name OR NEW.head_seq < OLD.head_seq OR NEW.first_seq < OLD.first_seq
    BEGIN SELECT RAISE(ABORT, 'chains only grow: UPDATE refused'); END
    """,
)

_POSTGRES_TRIGGERS = (
    """
    CREATE FUNCTION catalogue_refuse() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION '% are append-only: % refused', TG_TABLE_NAME, TG_OP
            USING ERRCODE = 'integrity_constraint_violation';
    END $$
    """,
    # Once a statement: pruning deletes many rows at a time.
    """
    CREATE FUNCTION catalogue_keep_entries() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF EXISTS (
            SELECT 1 FROM gone WHERE NOT EXISTS (
                SELECT 1 FROM chains WHERE chains.name = gone.chain AND chains.first_seq > gone.seq
            )
        ) THEN
            RAISE EXCEPTION 'entries are append-only: DELETE refused'
                USING ERRCODE = 'integrity_constraint_violation';
        END IF;
        RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER entries_no_update BEFORE UPDATE OR TRUNCATE ON entries
    FOR EACH STATEMENT EXECUTE FUNCTION catalogue_refuse()
    """,
    """
    CREATE TRIGGER entries_no_delete AFTER DELETE ON entries REFERENCING OLD TABLE AS gone
    FOR EACH STATEMENT EXECUTE FUNCTION catalogue_keep_entries()
    """,
    """
    CREATE TRIGGER embeddings_no_update BEFORE UPDATE ON embeddings
    FOR EACH STATEMENT EXECUTE FUNCTION catalogue_refuse()
    """,
    """
    CREATE TRIGGER chains_no_delete BEFORE DELETE OR TRUNCATE ON chains
    FOR EACH STATEMENT EXECUTE FUNCTION catalogue_refuse()
    """,
    """
    CREATE TRIGGER chains_no_return BEFORE UPDATE ON chains FOR EACH ROW
    WHEN (NEW.name <> OLD.name OR NEW.head_seq < OLD.head_seq OR NEW.first_seq < OLD.first_seq)
    EXECUTE FUNCTION catalogue_refuse()
    """,
)


def upgrade() -> None:
    """Create everything."""
    _create_log()
    _create_traffic()
    _create_queues()
    _create_jobs()
    triggers = {"sqlite": _SQLITE_TRIGGERS, "postgresql": _POSTGRES_TRIGGERS}
    for statement in triggers[op.get_context().dialect.name]:
        op.execute(statement)


def _create_log() -> None:
    chains = op.create_table(
        "chains",
        sa.Column("name", sa.String(16), primary_key=True),
        sa.Column("head_seq", sa.BigInteger, nullable=False),
        sa.Column("head_hash", sa.String(64), nullable=False),
        sa.Column("first_seq", sa.BigInteger, nullable=False),
        sa.Column("first_prev", sa.String(64), nullable=False),
    )
    empty = {"head_seq": 0, "head_hash": _NO_HASH, "first_seq": 1, "first_prev": _NO_HASH}
    op.bulk_insert(chains, [{"name": name, **empty} for name in ("changes", "decisions")])
    op.create_table(
        "entries",
        sa.Column("chain", sa.String(16), nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("time", sa.String(32), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("request_id", sa.Text, nullable=False),
        sa.Column("collection", sa.String(64), nullable=False),
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("prev", sa.String(64), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("chain", "seq"),
    )
    op.create_index("entries_collection", "entries", ["chain", "collection", "seq"])
    op.create_index("entries_kind", "entries", ["chain", "kind", "seq"])
    op.create_index("entries_subject", "entries", ["chain", "subject", "seq"])
    op.create_table(
        "embeddings",
        sa.Column("sha256", sa.String(64), primary_key=True),
        sa.Column("dim", sa.Integer, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "checkpoints",
        sa.Column("collection", sa.String(64), nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("collection", "revision"),
    )


def _create_traffic() -> None:
    op.create_table(
        "traffic",
        sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("time", sa.String(32), nullable=False),
        sa.Column("request_id", sa.Text, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("encoder_fingerprint", sa.Text, nullable=False),
        sa.Column("embedding", sa.LargeBinary, nullable=False),
        sa.Column("verdict", sa.String(16), nullable=False),
        sa.Column("pool", sa.String(16)),
        sa.Column("margin", sa.Float),
        sa.Column("nearest", sa.Text, nullable=False),
        sa.Column("version", sa.String(16), nullable=False),
        sa.Column("shadow_fingerprint", sa.Text),
        sa.Column("shadow_embedding", sa.LargeBinary),
    )
    op.create_index("traffic_request", "traffic", ["request_id"])
    op.create_index("traffic_image", "traffic", ["sha256"])


def _create_queues() -> None:
    op.create_table(
        "reviews",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("time", sa.String(32), nullable=False),
        sa.Column("origin", sa.String(16), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("collection", sa.String(64), nullable=False),
        sa.Column("image_sha256", sa.String(64), nullable=False),
        sa.Column("embedding_sha256", sa.String(64), nullable=False),
        sa.Column("verdict", sa.String(16), nullable=False),
        sa.Column("evidence", sa.Text, nullable=False),
        sa.Column("comment", sa.Text, nullable=False),
        sa.Column("request_id", sa.Text, nullable=False),
        sa.Column("reporter", sa.Text, nullable=False),
        sa.Column("claimed_by", sa.Text),
        sa.Column("claimed_until", sa.String(32)),
        sa.Column("decided_by", sa.Text),
        sa.Column("decided_at", sa.String(32)),
        sa.Column("decision", sa.String(16)),
        sa.Column("exemplar_id", sa.Text),
        sa.Column("seen", sa.Integer, nullable=False),
    )
    op.create_index("reviews_state", "reviews", ["state", "time"])
    op.create_index("reviews_image", "reviews", ["image_sha256"])
    op.create_table(
        "deliveries",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("time", sa.String(32), nullable=False),
        sa.Column("event", sa.String(32), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("next_at", sa.String(32), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("last_error", sa.Text, nullable=False),
    )
    op.create_index("deliveries_state", "deliveries", ["state", "next_at"])


def _create_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("time", sa.String(32), nullable=False),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("total", sa.Integer, nullable=False),
        sa.Column("done", sa.Integer, nullable=False),
        sa.Column("failed", sa.Integer, nullable=False),
        sa.Column("parameters", sa.Text, nullable=False),
        sa.Column("finished_at", sa.String(32)),
        sa.Column("lease_by", sa.Text),
        sa.Column("lease_until", sa.String(32)),
    )
    op.create_index("jobs_state", "jobs", ["state", "time"])
    op.create_table(
        "job_items",
        sa.Column("job_id", sa.String(32), nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("image_id", sa.Text, nullable=False),
        sa.Column("url", sa.Text),
        sa.Column("data", sa.LargeBinary),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("answer", sa.Text),
        sa.PrimaryKeyConstraint("job_id", "position"),
    )
    op.create_index("job_items_state", "job_items", ["job_id", "state"])
