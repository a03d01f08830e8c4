"""How many items the review queue has, in which order they are listed, and what becomes of their embeddings."""

from collections.abc import Callable
from datetime import UTC, datetime

import numpy as np
import pytest

from indexer.catalog import reviews
from indexer.errors import ContentsError, IndexerError, ReviewTaken, UnknownReview
from tests.indexer.catalog.queues import Queue, in_state, new, unit

START = datetime(2026, 11, 21, 12, tzinfo=UTC)
FOR_S = 60.0


def test_the_oldest_verdicts_give_way_but_nothing_that_a_person_has_to_do_with(queue: Queue) -> None:
    feedback, claimed, skipped, old = queue.open(new(1, origin="false-positive"), new(2), new(3), new(4), limit=4)
    assert claimed
    assert skipped
    queue.do(reviews.claim, claimed, "ann", 1000)
    queue.do(reviews.skip, skipped, "ann")
    [a] = queue.open(new(5), limit=4)
    assert queue.list() == [feedback, claimed, old, a]
    [b] = queue.open(new(6, origin="false-negative"), limit=4)
    assert queue.list() == [feedback, claimed, a, b]
    [c] = queue.open(new(7, origin="retroactive"), limit=4)
    assert queue.list() == [feedback, claimed, b, c]
    [d] = queue.open(new(8, origin="false-negative"), limit=4)
    assert queue.open(new(9), new(10, origin="false-positive"), limit=4) == [None, None]
    assert queue.list() == [feedback, claimed, b, d]
    assert queue.open(new(8), limit=4) == [d]  # noted all the same
    assert queue.kept() == 4
    queue.do(reviews.decide, claimed, "ann", "safe", "x")
    [e] = queue.open(new(11), limit=4)
    assert queue.list() == [feedback, claimed, b, d, e]  # what is decided takes no room


def test_a_group_larger_than_the_queue(queue: Queue) -> None:
    opened = queue.open(*(new(i) for i in range(10)), limit=3)
    assert queue.list() == opened[-3:]
    assert queue.kept() == 3
    assert queue.open(new(20), limit=0) == [None]


def test_where_there_is_not_room_for_all_people_come_first_then_the_newest(queue: Queue) -> None:
    items = [new(1), new(2, origin="false-positive"), new(3), new(2), new(1, origin="false-negative"), new(4)]
    opened = queue.open(*items, limit=3)
    assert [id is not None for id in opened] == [True, True, False, True, True, True]
    assert (opened[0], opened[1]) == (opened[4], opened[3])
    assert [queue.get(id).origin for id in queue.list()] == ["false-negative", "false-positive", "verdict"]
    assert [queue.get(id).seen for id in queue.list()] == [2, 2, 1]
    assert queue.kept() == 3


def test_a_smaller_limit_makes_the_queue_smaller(queue: Queue) -> None:
    queue.open(*(new(i) for i in range(6)))
    [id] = queue.open(new(7), limit=3)
    assert len(queue.list()) == 3
    assert queue.list()[-1] == id


# ---- lists


def test_pages_give_every_item_once_the_oldest_first(queue: Queue) -> None:
    ids = [id for _ in range(4) for id in queue.open(*(new(len(queue.list()) + i) for i in range(3)))]
    assert queue.list() == sorted(map(str, ids))
    pages, after = [], ""
    while page := queue.list(after=after, limit=5):
        pages.append(page)
        after = page[-1]
    assert [len(page) for page in pages] == [5, 5, 2]
    assert [id for page in pages for id in page] == queue.list()


def test_a_page_goes_on_where_its_last_item_has_gone(queue: Queue) -> None:
    queue.open(*(new(i) for i in range(5)), limit=5)
    first = queue.list(limit=2)
    rest = queue.list()[2:]
    [added] = queue.open(new(10), new(11), limit=5)[1:]
    assert first[1] not in queue.list()
    assert queue.list(after=first[1])[:3] == rest
    assert queue.list(after=first[1])[-1] == added


def test_lists_by_state_and_origin(queue: Queue) -> None:
    by_state = {state: in_state(queue, state, number) for number, state in enumerate(("open", "skipped", "decided"))}
    by_state["claimed"] = in_state(queue, "claimed", 5)
    reported = queue.one(new(9, origin="false-positive"))
    for state, id in by_state.items():
        assert queue.list(state=state) == ([id, reported] if state == "open" else [id])
    assert queue.list(origin="false-positive") == [reported]
    assert queue.list(origin="verdict", state="decided") == [by_state["decided"]]
    with queue.database.reading() as connection:
        assert reviews.counts(connection, at=queue.at) == {"open": 2, "claimed": 1, "decided": 1, "skipped": 1}


def test_a_page_after_what_cannot_be_an_id(queue: Queue) -> None:
    for after in ("x", "f" * 32, "a" * 31, "a\0"):
        with pytest.raises(UnknownReview):
            queue.list(after=after)


# ---- embeddings


def test_the_embedding_goes_when_the_item_is_decided(queue: Queue) -> None:
    one, other = queue.one(new(1)), queue.one(new(2, embedding=unit(1)))
    assert queue.kept() == 2  # each its own, although they are equal
    queue.do(reviews.decide, one, "ann", "dismiss", None)
    assert queue.kept() == 1
    assert np.array_equal(queue.embedding(other), unit(1))
    with pytest.raises(ReviewTaken, match="decided by ann: dismiss"):
        queue.embedding(one)


def test_a_damaged_embedding_is_not_put_into_a_pool(queue: Queue, tamper: Callable[[str], None]) -> None:
    id, other = queue.one(new(1)), queue.one(new(2))
    tamper(
        "UPDATE embeddings SET data = (SELECT data FROM embeddings e JOIN reviews r ON e.sha256 = r.embedding_sha256"
        f" WHERE r.id = '{other}') WHERE sha256 = (SELECT embedding_sha256 FROM reviews WHERE id = '{id}')"
    )
    with pytest.raises(ContentsError, match="damaged"):
        queue.embedding(id)


def test_deciding_that_is_undone_leaves_the_item_and_its_embedding(queue: Queue) -> None:
    id = queue.one(new(1))

    def fail() -> None:
        with queue.database.writing() as connection:
            reviews.decide(connection, id, "ann", "safe", "x")
            raise IndexerError("the pool refuses it")

    with pytest.raises(IndexerError, match="refuses"):
        fail()
    assert queue.get(id).state == "open"
    assert np.array_equal(queue.embedding(id), unit(1))
