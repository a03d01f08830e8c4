"""The editor: durable and visible when it answers, together where many ask at once, honest where it fails."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import Connection, text

from indexer.catalog import chain
from indexer.catalog.clock import now
from indexer.catalog.database import Database
from indexer.catalog.edits import Add, Create, Delete, Disable, Move
from indexer.catalog.ledger import CHANGES, Catalog
from indexer.catalog.state import Stamp
from indexer.contents import Exemplar
from indexer.errors import CatalogError, UnknownExemplar
from service.editing import MAX_WAITING, Editor
from service.errors import NotReady, Overloaded
from service.published import Published

STAMP = Stamp("toy", "toy-fingerprint", 4)


def add(id: str) -> Add:
    row = np.random.default_rng(sum(map(ord, id))).normal(size=STAMP.dim)
    return Add("pools", Exemplar(id, "safe"), np.asarray(row / np.linalg.norm(row), np.float32), STAMP)


@asynccontextmanager
async def editing(database: Database, root: Path, poll_s: float = 0.01) -> AsyncIterator[tuple[Editor, Published]]:
    published = Published(root, STAMP)
    catalog = Catalog(database, root, published.base)
    published.open(catalog)
    async with Editor(catalog, published, poll_s) as editor:
        yield editor, published


@pytest.mark.anyio
async def test_two_hundred_at_once_are_all_there_and_share_transactions(catalog_url: str, tmp_path: Path) -> None:
    with closing(Database.open(catalog_url)) as database:
        async with editing(database, tmp_path) as (editor, published):
            await editor.apply([Create("pools", STAMP)], actor="ann")

            async def one(number: int) -> None:
                [outcome] = await editor.apply([add(f"x{number}")], actor="ann", reason="r", request_id=str(number))
                assert outcome.entry is not None
                assert published.pools().is_active(f"x{number}")
                assert published.pools().revision >= outcome.state.revision

            await asyncio.gather(*(one(number) for number in range(200)))
            assert len(published.pools()) == 200
        with database.reading() as connection:
            assert chain.verify(connection, CHANGES).n == 201
        assert Catalog(database, tmp_path).state("pools") == editor.catalog.state("pools")


@pytest.mark.anyio
async def test_one_refusal_says_nothing_of_the_others(tmp_path: Path) -> None:
    with closing(Database.open(f"sqlite:///{tmp_path}/c.sqlite3")) as database:
        async with editing(database, tmp_path) as (editor, published):
            await editor.apply([Create("pools", STAMP), add("a")], actor="ann")
            outcomes = await asyncio.gather(
                editor.apply([Move("pools", "a", "unsafe")], actor="ann"),
                editor.apply([Delete("pools", "nobody")], actor="ann"),
                editor.apply([add("b"), Delete("pools", "nobody")], actor="ann"),
                return_exceptions=True,
            )
            assert [type(outcome) for outcome in outcomes] == [list, UnknownExemplar, UnknownExemplar]
            assert published.pools().counts == {"buffer": 0, "safe": 0, "unsafe": 1}


@pytest.mark.anyio
async def test_changes_of_another_process_are_seen(catalog_url: str, tmp_path: Path) -> None:
    with closing(Database.open(catalog_url)) as database:
        async with editing(database, tmp_path) as (editor, _), editing(database, tmp_path) as (_, elsewhere):
            await editor.apply([Create("pools", STAMP), add("a")], actor="ann")
            await _eventually(lambda: "pools" in elsewhere.snapshots and len(elsewhere.pools()) == 1)


@pytest.mark.anyio
async def test_what_is_disabled_comes_back_by_itself(tmp_path: Path) -> None:
    with closing(Database.open(f"sqlite:///{tmp_path}/c.sqlite3")) as database:
        async with editing(database, tmp_path) as (editor, published):
            await editor.apply([Create("pools", STAMP), add("a"), add("b")], actor="ann")
            await editor.apply([Disable("pools", "a", now() + timedelta(seconds=0.5))], actor="ann")
            assert len(published.pools()) == 1
            await _eventually(lambda: len(published.pools()) == 2)


@pytest.mark.anyio
async def test_what_cannot_be_written_is_an_error_and_the_next_is_written_again(tmp_path: Path) -> None:
    with closing(Database.open(f"sqlite:///{tmp_path}/c.sqlite3")) as database:
        async with editing(database, tmp_path) as (editor, published):
            await editor.apply([Create("pools", STAMP), add("a")], actor="ann")
            await editor.write(lambda connection: connection.execute(text("ALTER TABLE embeddings RENAME TO away")))
            with pytest.raises(CatalogError):
                await editor.apply([add("b")], actor="ann")
            assert len(published.pools()) == 1
            await editor.write(lambda connection: connection.execute(text("ALTER TABLE away RENAME TO embeddings")))
            await editor.apply([add("b")], actor="ann")
            assert len(published.pools()) == 2


@pytest.mark.anyio
async def test_functions_write_in_the_one_thread_and_fail_alone(tmp_path: Path) -> None:
    with closing(Database.open(f"sqlite:///{tmp_path}/c.sqlite3")) as database:
        async with editing(database, tmp_path) as (editor, _):

            def fail(connection: Connection) -> None:
                raise LookupError("mine")

            names, failure = await asyncio.gather(
                editor.write(lambda connection: threading.current_thread().name),
                editor.write(fail),
                return_exceptions=True,
            )
            assert names == "editor"
            assert isinstance(failure, LookupError)
            assert await editor.read(lambda connection: connection.execute(text("SELECT 7")).scalar()) == 7


@pytest.mark.anyio
async def test_who_hangs_up_does_not_stop_the_change(tmp_path: Path) -> None:
    with closing(Database.open(f"sqlite:///{tmp_path}/c.sqlite3")) as database:
        async with editing(database, tmp_path) as (editor, published):
            await editor.apply([Create("pools", STAMP)], actor="ann")
            task = asyncio.create_task(editor.apply([add("a")], actor="ann"))
            await asyncio.sleep(0)
            task.cancel()
            await _eventually(lambda: len(published.get("pools")) == 1)


@pytest.mark.anyio
async def test_too_much_at_once_is_refused_and_a_closed_editor_says_so(tmp_path: Path) -> None:
    with closing(Database.open(f"sqlite:///{tmp_path}/c.sqlite3")) as database:
        async with editing(database, tmp_path) as (editor, _):
            entered, gate = threading.Event(), threading.Event()

            def hold(connection: Connection) -> None:
                entered.set()
                assert gate.wait(30)

            held = asyncio.create_task(editor.write(hold))
            await _eventually(entered.is_set)
            waiting = [asyncio.create_task(editor.write(lambda connection: None)) for _ in range(MAX_WAITING)]
            await asyncio.sleep(0)
            with pytest.raises(Overloaded, match=str(MAX_WAITING)):
                await editor.write(lambda connection: None)
            gate.set()
            await asyncio.gather(held, *waiting)
        with pytest.raises(NotReady):
            await editor.write(lambda connection: None)


async def _eventually(condition: object) -> None:
    assert callable(condition)
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the condition did not come true")
