"""Decisions: what the log keeps of them, what the ring keeps, and what neither may ever hold."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sqlalchemy import select

from indexer.catalog import chain
from indexer.catalog.clock import now
from indexer.catalog.database import Database
from indexer.catalog.tables import traffic
from indexer.catalog.traffic import Decision, Found, Recent, Shadow, find_decisions, recent, record_decisions
from indexer.errors import ContentsError
from indexer.live.suppression import Suppressed
from perception.verdict import Neighbor, PoolLabel, VerdictLabel

DIM = 12
ENCODER, CANDIDATE = "ab" * 32, "cd" * 32


def unit(seed: int, dim: int = DIM) -> NDArray[np.float32]:
    row = np.random.default_rng(seed).normal(size=dim)
    return (row / np.linalg.norm(row)).astype(np.float32)


def decision(number: int = 0, **changes: Any) -> Decision:
    made = Decision(
        time=now(),
        request_id=f"request-{number}",
        caller="key:0a1b2c",
        image_id=f"upload {number}.png",
        sha256=f"{number:064x}",
        route="/classify",
        frame_index=3,
        background="black",
        encoder_fingerprint=ENCODER,
        collection="pools",
        version="4b1f0c9d2e8a7356",
        revision=17,
        policy_version="nearest-3f5a9c0e1b2d",
        verdict=VerdictLabel.UNSAFE,
        pool=PoolLabel.UNSAFE,
        margin=0.25,
        neighbors=(Neighbor("near-safe", "safe", 0.75), Neighbor("u1", "unsafe", 0.5), Neighbor("u2", "unsafe", 0.4)),
        suppressed=(Suppressed("gone", "item", 0.9),),
        embedding=unit(number),
    )
    return replace(made, **changes)


def record(database: Database, decisions: Sequence[Decision], *, log: bool = True, keep: int = 100) -> int:
    with database.writing() as connection:
        return record_decisions(connection, decisions, log=log, keep=keep)


def ring(database: Database, limit: int = 1000, **asked: Any) -> Recent:
    with database.reading() as connection:
        return recent(connection, **{"encoder_fingerprint": ENCODER, "limit": limit, **asked})


def found(database: Database, **asked: Any) -> list[Found]:
    with database.reading() as connection:
        return find_decisions(connection, **asked)


def test_the_log_says_all_that_it_takes_to_decide_again(database: Database) -> None:
    made = decision(5, shadow=Shadow(CANDIDATE, unit(9, 7), VerdictLabel.SAFE))
    assert record(database, [made]) == 1
    with database.reading() as connection:
        [entry] = chain.read(connection, chain.DECISIONS)
        assert chain.verify(connection, chain.DECISIONS).problems == ()
    assert (entry.kind, entry.actor, entry.subject) == ("decision", "key:0a1b2c", made.sha256)
    assert (entry.request_id, entry.collection) == ("request-5", "pools")
    body = entry.body
    assert (body["encoder_fingerprint"], body["version"], body["revision"]) == (ENCODER, made.version, 17)
    assert (body["policy_version"], body["frame"]) == (made.policy_version, {"index": 3, "background": "black"})
    assert (body["verdict"], body["pool"], body["margin"]) == ("unsafe", "unsafe", 0.25)
    assert body["neighbors"][1] == {"id": "u1", "pool": "unsafe", "similarity": 0.5}
    assert body["suppressed"] == [{"exemplar_id": "gone", "by": "item", "similarity_to_item": 0.9}]
    assert body["shadow"] == {"fingerprint": CANDIDATE, "verdict": "safe"}
    assert (body["route"], body["image_id"]) == ("/classify", "upload 5.png")


def test_neither_address_nor_embedding_is_ever_in_the_log(database: Database) -> None:
    record(
        database, [decision(1, caller="anonymous:203.0.113.9", shadow=Shadow(CANDIDATE, unit(2), VerdictLabel.SAFE))]
    )
    with database.reading() as connection:
        [entry] = chain.read(connection, chain.DECISIONS)
        tables = [connection.exec_driver_sql(f"SELECT * FROM {t}").all() for t in ("entries", "traffic")]
        kept = connection.exec_driver_sql("SELECT count(*) FROM embeddings").scalar()
    assert entry.actor == "anonymous"
    assert "203.0.113" not in str(tables)
    assert str(float(unit(1)[0]))[:8] not in entry.to_json_line()
    assert not {"embedding", "data", "image"} & set(entry.body)
    assert kept == 0


@settings(max_examples=12)
@given(groups=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7), st.booleans()), max_size=8))
def test_the_ring_holds_the_newest(
    tmp_path_factory: pytest.TempPathFactory, groups: list[tuple[int, int, bool]]
) -> None:
    """The twin is a list that is cut after each group; the log may be off for a while."""
    database = Database.open(f"sqlite:///{tmp_path_factory.mktemp('ring') / 'catalog.sqlite3'}")
    twin: list[str] = []
    logged = number = 0
    for count, keep, log in groups:
        decisions = [decision(number + i) for i in range(count)]
        record(database, decisions, log=log, keep=keep)
        number += count
        logged += count if log else 0
        twin = [*twin, *(made.sha256 for made in decisions)]
        twin = twin[len(twin) - min(keep, len(twin)) :]
        assert [seen.sha256 for seen in ring(database).seen] == twin[::-1]
    with database.reading() as connection:
        assert chain.head(connection, chain.DECISIONS).seq == logged
    database.close()


def test_ring_and_log_have_the_same_numbers(database: Database) -> None:
    assert record(database, [decision(i) for i in range(3)]) == 3
    assert record(database, [decision(i) for i in range(3, 5)], keep=3) == 5
    with database.reading() as connection:
        assert connection.execute(select(traffic.c.seq).order_by(traffic.c.seq)).scalars().all() == [3, 4, 5]
    assert record(database, []) == 0
    assert record(database, [decision(9)], log=False, keep=0) == 0


def test_the_ring_gives_back_what_was_put_in(database: Database) -> None:
    first, second = decision(1), decision(2, pool=None, margin=None, verdict=VerdictLabel.REVIEW)
    record(database, [first, second, decision(3, encoder_fingerprint=CANDIDATE), decision(4, embedding=None)])
    rows = ring(database)
    assert len(rows) == 2
    assert np.array_equal(rows.embeddings, np.stack([unit(2), unit(1)]))
    assert rows.embeddings.dtype == np.float32
    assert rows.shadow_embeddings is None
    older, newer = rows.seen[1], rows.seen[0]
    assert (older.request_id, older.sha256, older.time) == (first.request_id, first.sha256, first.time)
    assert (older.verdict, older.pool, older.margin, older.version) == ("unsafe", "unsafe", 0.25, first.version)
    assert older.nearest == "u1"  # of the pool that won, although another one is nearer
    assert (newer.pool, newer.margin, newer.nearest) == (None, None, "")
    assert [seen.sha256 for seen in ring(database, limit=1).seen] == [second.sha256]
    nothing = ring(database, encoder_fingerprint="ef" * 32)
    assert (len(nothing), nothing.embeddings.shape) == (0, (0, 0))


def test_shadow_embeddings_come_with_those_of_the_same_images(database: Database) -> None:
    record(
        database,
        [
            decision(1),
            decision(2, shadow=Shadow(CANDIDATE, unit(20, 7), VerdictLabel.SAFE)),
            decision(3),
            decision(4, shadow=Shadow("ef" * 32, unit(40, 5), VerdictLabel.SAFE)),
        ],
    )
    rows = ring(database, shadow_fingerprint=CANDIDATE)
    assert [seen.request_id for seen in rows.seen] == ["request-2"]
    assert np.array_equal(rows.embeddings, unit(2)[np.newaxis])
    assert rows.shadow_embeddings is not None
    assert np.array_equal(rows.shadow_embeddings, unit(20, 7)[np.newaxis])


def test_finding_a_decision(database: Database) -> None:
    again = decision(1, request_id="request-9", version="ffffffffffffffff")
    record(database, [decision(1), decision(2, request_id="request-1"), again])
    assert [f.seen.sha256 for f in found(database, request_id="request-1", limit=5)] == [f"{2:064x}", f"{1:064x}"]
    [newest] = found(database, sha256=f"{1:064x}")
    assert newest.seen.request_id == "request-9"
    assert newest.evidence is not None
    assert newest.evidence["version"] == "ffffffffffffffff"
    assert np.array_equal(newest.embedding, unit(1))
    [older] = found(database, sha256=f"{1:064x}", request_id="request-1", limit=5)
    assert older.evidence is not None
    assert older.evidence["version"] == decision().version
    assert found(database, sha256=f"{7:064x}") == []
    with pytest.raises(ValueError, match="name a request or an image"):
        found(database)


def test_an_image_that_came_twice_in_one_request_is_found_once(database: Database) -> None:
    record(database, [decision(1), decision(2, request_id="request-1"), decision(2, request_id="request-1")])
    assert [f.seen.sha256 for f in found(database, request_id="request-1", limit=2)] == [f"{2:064x}", f"{1:064x}"]


def test_without_the_log_a_decision_is_found_without_its_evidence(database: Database) -> None:
    record(database, [decision(1)], log=False)
    [only] = found(database, request_id="request-1")
    assert only.evidence is None
    assert only.seen.nearest == "u1"


def test_what_is_hostile_in_a_decision_is_recorded_all_the_same(database: Database) -> None:
    """A file name with half a surrogate pair and NUL, and a similarity that is not a number."""
    nan = (Neighbor("x", "safe", math.nan),)
    made = decision(1, image_id="\ud800\0ü" + "x" * 300, neighbors=nan, margin=math.nan, pool=None)
    record(database, [made])
    with database.reading() as connection:
        [entry] = chain.read(connection, chain.DECISIONS)
    assert entry.body["neighbors"][0]["similarity"] is None
    assert entry.body["margin"] is None
    assert entry.body["image_id"].startswith("?\ufffdü")


@pytest.mark.parametrize(
    "changes",
    [
        {"sha256": "AB" * 32},
        {"sha256": "ab"},
        {"embedding": 2 * unit(0)},
        {"embedding": unit(0)[np.newaxis]},
        {"shadow": Shadow(CANDIDATE, np.full(3, np.nan, np.float32), VerdictLabel.SAFE)},
        {"request_id": "a\0b"},
    ],
)
def test_what_cannot_be_recorded_is_refused_before_it_waits_to_be(changes: dict[str, Any]) -> None:
    with pytest.raises(ContentsError):
        decision(0, **changes)


def test_a_transaction_that_fails_leaves_neither_entry_nor_row(database: Database) -> None:
    def fail() -> None:
        with database.writing() as connection:
            record_decisions(connection, [decision(1)], log=True, keep=5)
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert len(ring(database)) == 0
    with database.reading() as connection:
        assert chain.head(connection, chain.DECISIONS).seq == 0
