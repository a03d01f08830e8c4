"""The review queue: its states, who gets an item, what gives way, and what stays of an image."""

import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from sqlalchemy import Connection

from indexer.catalog import reviews
from indexer.catalog.reviews import Item
from indexer.errors import ReviewTaken, UnknownReview
from tests.indexer.catalog.queues import Queue, in_state, new, unit

START = datetime(2026, 11, 21, 12, tzinfo=UTC)
FOR_S = 60.0


def test_an_item_says_what_it_was_opened_with(queue: Queue) -> None:
    id = queue.one(new(3, comment="ü: no", reporter="key:1", origin="false-negative", evidence={"a": [1, None]}))
    item = queue.get(id)
    assert (item.id, item.time, item.state, item.seen) == (id, queue.at, "open", 1)
    assert (item.origin, item.collection, item.image_sha256, item.verdict) == (
        "false-negative",
        "pools",
        f"{3:064x}",
        "review",
    )
    assert (item.comment, item.reporter, item.request_id, item.evidence) == ("ü: no", "key:1", "r3", {"a": [1, None]})
    assert (item.claimed_by, item.claimed_until, item.decided_by, item.decided_at) == (None, None, None, None)
    assert (item.decision, item.exemplar_id) == (None, None)
    assert np.array_equal(queue.embedding(id), unit(3))


# ---- states


STEPS: dict[str, Callable[[Connection, str, str, datetime], Item]] = {
    "claim": lambda c, id, who, at: reviews.claim(c, id, who, FOR_S, at=at),
    "release": lambda c, id, who, at: reviews.release(c, id, who, at=at),
    "skip": lambda c, id, who, at: reviews.skip(c, id, who, at=at),
    "decide": lambda c, id, who, at: reviews.decide(c, id, who, "unsafe", "x2", at=at),
}
# What each step leads to from each state, for 'ann', who brought it there, and for 'bob'; None where it is refused.
AFTER: dict[str, dict[str, tuple[str | None, str | None]]] = {
    "open": {
        "claim": ("claimed", "claimed"),
        "release": ("open", "open"),
        "skip": ("skipped", "skipped"),
        "decide": ("decided", "decided"),
    },
    "claimed": {
        "claim": ("claimed", None),
        "release": ("open", None),
        "skip": ("skipped", None),
        "decide": ("decided", None),
    },
    "run out": {
        "claim": ("claimed", "claimed"),
        "release": ("open", "open"),
        "skip": ("skipped", "skipped"),
        "decide": ("decided", "decided"),
    },
    "skipped": {
        "claim": ("claimed", "claimed"),
        "release": ("skipped", "skipped"),
        "skip": ("skipped", "skipped"),
        "decide": ("decided", "decided"),
    },
    "decided": dict.fromkeys(STEPS, (None, None)),
}


@pytest.mark.parametrize("state", AFTER)
def test_every_step_from_every_state(queue: Queue, state: str) -> None:
    number = 0
    for step, expected in AFTER[state].items():
        for who, after in zip(("ann", "bob"), expected, strict=True):
            number += 1
            id = in_state(queue, state, number)
            before = queue.get(id)
            assert before.state == ("open" if state == "run out" else state)
            if after is None:
                with pytest.raises(ReviewTaken) as refused, queue.database.writing() as connection:
                    STEPS[step](connection, id, who, queue.at)
                assert "ann" in str(refused.value)
                assert queue.get(id) == before
                continue
            with queue.database.writing() as connection:
                item = STEPS[step](connection, id, who, queue.at)
            assert item == queue.get(id)
            assert item.state == after
            assert (item.claimed_by, item.claimed_until) == (
                (who, queue.at + timedelta(seconds=FOR_S)) if after == "claimed" else (None, None)
            )
            decided = (who, queue.at, "unsafe", "x2") if after == "decided" else (None, None, None, None)
            assert (item.decided_by, item.decided_at, item.decision, item.exemplar_id) == decided


def test_a_claim_ends_by_itself(queue: Queue) -> None:
    id = queue.one(new())
    assert queue.do(reviews.claim, id, "ann", FOR_S).claimed_by == "ann"
    queue.pass_s(FOR_S - 1)
    assert queue.list(state="claimed") == [id]
    assert queue.list(state="open") == []
    queue.pass_s(1)
    item = queue.get(id)
    assert (item.state, item.claimed_by, item.claimed_until) == ("open", None, None)
    assert queue.list(state="claimed") == []
    assert queue.list(state="open") == [id]
    assert queue.do(reviews.claim, id, "bob", FOR_S).claimed_by == "bob"
    with pytest.raises(ReviewTaken, match="bob has it until"):
        queue.do(reviews.claim, id, "ann", FOR_S)


def test_an_id_that_is_none(queue: Queue) -> None:
    queue.one(new())
    for id in ("", "a" * 32, "x\0y", "../etc", "A" * 32, "é" * 32):
        for step in STEPS.values():
            with pytest.raises(UnknownReview), queue.database.writing() as connection:
                step(connection, id, "ann", queue.at)
        with pytest.raises(UnknownReview):
            queue.get(id)
        with pytest.raises(UnknownReview):
            queue.embedding(id)


CLAIMER = """
import sys
from indexer.catalog import reviews
from indexer.catalog.database import Database
from indexer.errors import ReviewTaken
url, who = sys.stdin.readline().strip(), sys.argv[1]
database = Database.open(url)
print("ready", flush=True)
for id in sys.stdin.readline().split():
    try:
        with database.writing() as connection:
            reviews.claim(connection, id, who, 600)
        print(id, flush=True)
    except ReviewTaken:
        pass
"""


def test_of_two_processes_that_claim_at_once_exactly_one_gets_it(queue: Queue, catalog_url: str) -> None:
    ids = [id for id in queue.open(*(new(i) for i in range(40))) if id]
    claimers = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIMER, who], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        for who in ("ann", "bob")
    ]
    for process in claimers:
        assert process.stdin is not None
        process.stdin.write(catalog_url + "\n")
    for process in claimers:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in claimers:
        assert process.stdin is not None
        process.stdin.write(" ".join(ids) + "\n")
    won = [process.communicate(timeout=60)[0].split() for process in claimers]
    assert sorted(won[0] + won[1]) == sorted(ids)
    queue.at = datetime.now(UTC)
    assert {id: queue.get(id).claimed_by for id in ids} == dict.fromkeys(won[0], "ann") | dict.fromkeys(won[1], "bob")


# ---- one item an image


def test_an_image_that_comes_again_is_noted(queue: Queue) -> None:
    id = queue.one(new(1))
    assert queue.open(new(1), new(2), new(1)) == [id, queue.list()[1], id]
    assert queue.get(id).seen == 3
    queue.do(reviews.claim, id, "ann", FOR_S)
    assert queue.one(new(1)) == id
    assert queue.get(id).claimed_by == "ann"
    assert queue.kept() == 2


@pytest.mark.parametrize(("decision", "again"), [("dismiss", False), ("unsafe", True)])
def test_a_verdict_does_not_come_back_once_it_was_dismissed(queue: Queue, decision: str, again: bool) -> None:
    id = queue.one(new(1))
    queue.do(reviews.decide, id, "ann", decision, None)
    assert (queue.one(new(1)) != id) is again
    reported = queue.one(new(1, origin="false-negative"))
    assert reported != id
    assert queue.get(reported).state == "open"
    assert queue.get(id).state == "decided"


def test_what_a_person_reports_takes_over_what_a_program_opened(queue: Queue) -> None:
    id = queue.one(new(1))
    queue.do(reviews.skip, id, "ann")
    assert queue.one(new(1)) == id
    assert queue.get(id).state == "skipped"
    assert queue.one(new(1, origin="false-negative", comment="look", reporter="key:2")) == id
    item = queue.get(id)
    assert (item.state, item.origin, item.comment, item.reporter) == ("open", "false-negative", "look", "key:2")
    assert queue.one(new(1, origin="false-positive", comment="me too", reporter="key:3")) == id
    item = queue.get(id)
    assert (item.origin, item.comment, item.reporter, item.seen) == ("false-negative", "look", "key:2", 4)


# ---- bounds
