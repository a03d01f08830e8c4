"""The recorder, over a real database: what is durable when, and what happens while the database fails."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from sqlalchemy import Connection

from indexer.catalog import chain, reviews
from indexer.catalog.clock import now
from indexer.catalog.database import Database
from indexer.catalog.traffic import Decision, recent
from indexer.errors import CatalogError
from perception.verdict import Neighbor, PoolLabel, VerdictLabel
from service.flood import Flood, FloodGuard
from service.recording import Outcome, Recorder, Recording

T = TypeVar("T")
LONG_S = 30.0
ENCODER = "ab" * 32


def decision(number: int = 0, verdict: VerdictLabel = VerdictLabel.UNSAFE, exemplar: str = "u1") -> Decision:
    row = np.random.default_rng(number).normal(size=12)
    return Decision(
        time=now(),
        request_id=f"request-{number}",
        caller="anonymous:203.0.113.9",
        image_id="0",
        sha256=f"{number:064x}",
        route="/classify",
        frame_index=0,
        background=None,
        encoder_fingerprint=ENCODER,
        collection="pools",
        version="4b1f0c9d2e8a7356",
        revision=1,
        policy_version="nearest-3f5a9c0e1b2d",
        verdict=verdict,
        pool=PoolLabel.UNSAFE,
        margin=0.1,
        neighbors=(Neighbor(exemplar, "unsafe", 0.5),),
        embedding=(row / np.linalg.norm(row)).astype(np.float32),
    )


@dataclass
class Desk:
    """A writer to a real database that can be told to fail or to wait, and all that the recorder reported."""

    database: Database
    refuses: bool = False
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    groups: list[int] = field(default_factory=list)
    attempts: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    floods: list[Flood] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    async def write(self, function: Callable[[Connection], T]) -> T:
        self.attempts += 1
        await self.gate.wait()

        def transaction() -> T:
            with self.database.writing() as connection:
                result = function(connection)
                if self.refuses:
                    raise CatalogError("there", "the disk is full")
                return result

        return await asyncio.to_thread(transaction)

    def counted(self, outcome: Outcome, n: int) -> None:
        self.counts[outcome] += n

    async def on_flood(self, flood: Flood) -> None:
        assert self.logged() >= flood.decisions  # what made it is durable
        self.floods.append(flood)

    async def on_decisions(self, decisions: Sequence[Decision]) -> None:
        self.groups.append(len(decisions))
        self.told += [made.request_id for made in decisions]
        assert set(self.told) <= set(self.requests())

    def recorder(self, recording: Recording | None = None, guard: FloodGuard | None = None, **options: Any) -> Recorder:
        return Recorder(
            self,
            recording or Recording(),
            guard,
            **{
                "on_flood": self.on_flood,
                "on_decisions": self.on_decisions,
                "counted": self.counted,
                **options,
            },
        )

    def requests(self) -> list[str]:
        with self.database.reading() as connection:
            return [entry.request_id for entry in chain.read(connection, chain.DECISIONS)]

    def logged(self) -> int:
        return len(self.requests())

    def in_ring(self) -> list[str]:
        with self.database.reading() as connection:
            rows = recent(connection, encoder_fingerprint=ENCODER, limit=100_000)
        return [seen.request_id for seen in rows.seen]

    def queued(self) -> list[reviews.Item]:
        with self.database.reading() as connection:
            return reviews.list_items(connection, limit=1000)


def work(tmp_path: Path, scenario: Callable[[Desk], Awaitable[None]]) -> Desk:
    with closing(Database.open(f"sqlite:///{tmp_path / 'catalog.sqlite3'}")) as database:

        async def run() -> Desk:
            desk = Desk(database)
            desk.gate.set()
            await asyncio.wait_for(_as_coroutine(scenario, desk), LONG_S)
            return desk

        return asyncio.run(run())


async def _as_coroutine(scenario: Callable[[Desk], Awaitable[None]], desk: Desk) -> None:
    await scenario(desk)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(4000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("the condition did not come true")


def test_decisions_are_durable_soon_and_together(tmp_path: Path) -> None:
    async def scenario(desk: Desk) -> None:
        async with desk.recorder() as recorder:
            for number in range(20):
                recorder.observe(decision(number))
            assert recorder.depth == 20
            await until(lambda: recorder.depth == 0)  # nobody asks for it
            assert desk.attempts == 1
            assert desk.requests() == [f"request-{n}" for n in range(20)]
            assert desk.in_ring() == desk.requests()[::-1]
            recorder.observe(decision(20))
            assert await recorder.settled(LONG_S)
            assert desk.logged() == 21
            assert await recorder.settled(0.0)
        assert desk.groups == [20, 1]
        assert desk.counts == {"recorded": 21}

    work(tmp_path, scenario)


def test_large_numbers_go_in_groups_and_in_order(tmp_path: Path) -> None:
    async def scenario(desk: Desk) -> None:
        async with desk.recorder(Recording(keep=700)) as recorder:
            for number in range(1234):
                recorder.observe(decision(number))
            assert await recorder.settled(LONG_S)
        assert desk.groups == [500, 500, 234]
        assert desk.told == [f"request-{n}" for n in range(1234)] == desk.requests()
        assert desk.in_ring() == desk.told[:-701:-1]

    work(tmp_path, scenario)


def test_the_end_writes_what_is_left(tmp_path: Path) -> None:
    async def scenario(desk: Desk) -> None:
        async with desk.recorder() as recorder:
            for number in range(777):
                recorder.observe(decision(number))
        assert desk.logged() == 777
        assert recorder.depth == 0

    work(tmp_path, scenario)


def test_a_failing_database_loses_nothing_and_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(desk: Desk) -> None:
        desk.refuses = True
        async with desk.recorder(limit=5) as recorder:
            for number in range(4):
                recorder.observe(decision(number))
            await until(lambda: desk.attempts >= 3)
            full = [recorder.full]
            recorder.observe(decision(4))
            full.append(recorder.full)
            recorder.observe(decision(5))  # of a request that was in progress
            assert not await recorder.settled(0.01)
            assert desk.logged() == 0
            assert desk.told == []
            desk.refuses = False
            assert await recorder.settled(LONG_S)
            full.append(recorder.full)
            assert full == [False, True, False]
            assert desk.requests() == [f"request-{n}" for n in range(6)]
        assert desk.counts["failed"] >= 3 * 4
        assert desk.counts["recorded"] == 6

    work(tmp_path, scenario)
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [record.getMessage() for record in errors] == [
        "decisions cannot be recorded, 4 wait: catalogue there: the disk is full"
    ]


def test_a_database_that_fails_until_the_end_does_not_hold_it_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(desk: Desk) -> None:
        desk.refuses = True
        async with desk.recorder(last_s=0.05) as recorder:
            recorder.observe(decision())
        assert desk.counts["lost"] == 1

    work(tmp_path, scenario)
    assert "1 decisions are lost" in caplog.text


def test_observing_waits_for_nothing(tmp_path: Path) -> None:
    async def scenario(desk: Desk) -> None:
        desk.gate.clear()
        async with desk.recorder(limit=3000) as recorder:
            recorder.observe(decision(0))
            await until(lambda: desk.attempts == 1)  # the writer is busy and stays so
            made = decision(1)
            for _ in range(2999):
                recorder.observe(made)
            assert recorder.full
            assert desk.attempts == 1
            desk.gate.set()
        assert desk.logged() == 3000

    work(tmp_path, scenario)


def test_verdicts_for_review_get_into_the_queue(tmp_path: Path) -> None:
    async def scenario(desk: Desk) -> None:
        async with desk.recorder(Recording(reviews=2)) as recorder:
            recorder.observe(decision(0))
            recorder.observe(decision(1, VerdictLabel.REVIEW))
            recorder.observe(decision(1, VerdictLabel.REVIEW))
            assert await recorder.settled(LONG_S)
            [item] = desk.queued()
            assert (item.origin, item.state, item.seen, item.image_sha256) == ("verdict", "open", 2, f"{1:064x}")
            assert (item.verdict, item.request_id, item.reporter) == ("review", "request-1", "hardlook-serve")
            assert item.evidence["neighbors"] == [{"id": "u1", "pool": "unsafe", "similarity": 0.5}]
            for image in (1, 0):
                with desk.database.writing() as connection:
                    new = reviews.NewItem("flood", "pools", f"{image + 90:064x}", _unit(image), "review", {})
                    reviews.open_items(connection, [new], limit=5)
            recorder.observe(decision(2, VerdictLabel.REVIEW))
            assert await recorder.settled(LONG_S)
        assert desk.counts["not-queued"] == 1
        assert desk.logged() == 4  # it is in the log all the same

    work(tmp_path, scenario)


def _unit(axis: int) -> Any:
    return np.eye(12, dtype=np.float32)[axis]


def test_what_belongs_to_the_decisions_is_written_with_them(tmp_path: Path) -> None:
    async def scenario(desk: Desk) -> None:
        calls: list[int] = []

        def also(connection: Connection, group: Sequence[Decision]) -> None:
            calls.append(len(group))
            reviews.open_items(connection, [reviews.NewItem("flood", "pools", "f" * 64, _unit(0), "", {})], limit=5)

        desk.refuses = True
        async with desk.recorder(also=also) as recorder:
            recorder.observe(decision())
            await until(lambda: len(calls) == 2)
            assert desk.queued() == []
            desk.refuses = False
            assert await recorder.settled(LONG_S)
            assert [item.origin for item in desk.queued()] == ["flood"]
        assert set(calls) == {1}

    work(tmp_path, scenario)


def test_what_is_turned_off_is_not_recorded(tmp_path: Path) -> None:
    async def scenario(desk: Desk) -> None:
        async with desk.recorder(Recording(log=False, keep=0, reviews=0), on_decisions=_ignore) as recorder:
            recorder.observe(decision(1, VerdictLabel.REVIEW))
            assert await recorder.settled(LONG_S)
        assert (desk.logged(), desk.in_ring(), desk.queued()) == (0, [], [])

    work(tmp_path, scenario)


async def _ignore(decisions: Sequence[Decision]) -> None:
    pass


def test_a_flood_is_reported_once_after_the_decisions_are_durable(tmp_path: Path) -> None:
    async def scenario(desk: Desk) -> None:
        guard = FloodGuard(100, 10, 0.05, lambda id: id == "blank", lambda: 1000)
        async with desk.recorder(guard=guard) as recorder:
            for number in range(40):
                recorder.observe(decision(number, exemplar="blank" if number % 2 else f"u{number}"))
            assert await recorder.settled(LONG_S)
            await until(lambda: bool(desk.floods))
        assert desk.floods == [Flood("blank", 10, 20, True)]

    work(tmp_path, scenario)


def test_a_listener_that_fails_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def fail(_: object) -> None:
        raise RuntimeError("no")

    async def scenario(desk: Desk) -> None:
        guard = FloodGuard(10, 1, 0.01, lambda id: True, lambda: 1000)
        async with desk.recorder(guard=guard, on_flood=fail, on_decisions=fail) as recorder:
            for number in range(3):
                recorder.observe(decision(number))
                assert await recorder.settled(LONG_S)
        assert desk.logged() == 3

    work(tmp_path, scenario)
    assert caplog.text.count("a listener failed") == 4
