"""Long work has few places, and keeps them until it ends."""

import asyncio
import threading
from datetime import UTC, datetime

import numpy as np
import pytest

from indexer.catalog.state import State
from indexer.contents import Contents, Exemplar
from indexer.live.view import View
from indexer.snapshot import Snapshot
from service.curation import Desk, file_name, require_few
from service.errors import InvalidParameter, Overloaded
from tests.indexer.edited import STAMP

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_one_at_a_time_and_the_rest_is_refused() -> None:
    desk, release = Desk("curation"), threading.Event()
    first = asyncio.create_task(desk.work(release.wait))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="curation is full, its limit is 1"):
        await desk.work(lambda: None)
    release.set()
    assert await first
    assert await desk.work(lambda: 7) == 7


async def test_who_hangs_up_does_not_free_the_place_of_what_still_runs() -> None:
    desk, began, release = Desk("curation"), threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        release.wait()

    first = asyncio.create_task(desk.work(work))
    await asyncio.to_thread(began.wait)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    with pytest.raises(Overloaded):
        await desk.work(lambda: None)
    release.set()
    async with asyncio.timeout(10):
        while True:
            try:
                assert await desk.work(lambda: 7) == 7
            except Overloaded:
                await asyncio.sleep(0.001)
            else:
                break


async def test_a_failure_is_the_callers_and_frees_the_place() -> None:
    desk = Desk("curation")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            await desk.work(lambda: 1 // 0)


async def test_places_are_held_and_given_back() -> None:
    desk = Desk("pool files", 2)
    with desk.place(), desk.place(), pytest.raises(Overloaded):
        desk.place().__enter__()
    with pytest.raises(ZeroDivisionError), desk.place():
        _ = 1 // 0
    with desk.place(), desk.place():
        pass


async def test_what_would_take_too_long_is_refused() -> None:
    exemplars, rows = [Exemplar("a", "safe"), Exemplar("b", "unsafe")], np.eye(2, 12, dtype=np.float32)
    base = Snapshot.of(Contents.arrange("pools", "toy/0", STAMP.fingerprint, exemplars, rows))
    view = View(State("pools", STAMP, base.version), base, {}, datetime.now(UTC), STAMP)
    require_few(view, None, 2, "duplicates")
    require_few(view, "safe", 1, "duplicates")
    with pytest.raises(InvalidParameter, match="2 exemplars would have to be compared, the limit is 1"):
        require_few(view, None, 1, "duplicates")
    assert file_name(view, None) == f"pools-{view.version}.pool"
    assert file_name(view, "safe") == f"pools-safe-{view.version}.pool"
