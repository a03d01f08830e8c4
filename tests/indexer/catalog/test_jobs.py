"""Jobs in the database: turns, leases, answers exactly once, what is erased when, and pages of results."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Connection, func, select, update

from indexer.catalog import jobs
from indexer.catalog.clock import now_text
from indexer.catalog.database import Database
from indexer.catalog.jobs import FAILED, Job, NewItem
from indexer.catalog.tables import job_items
from indexer.catalog.tables import jobs as jobs_table
from indexer.errors import UnknownJob

Submit = Callable[..., str]
LONG_S = 60.0


@pytest.fixture
def submit(database: Database) -> Submit:
    """(items=3, owner='ann') -> id."""

    def store(items: int = 3, owner: str = "ann") -> str:
        id = jobs.new_id()
        new = [NewItem(f"image {i}", data=bytes([i]) * 10) for i in range(items)]
        with database.writing() as connection:
            jobs.submit(connection, id, owner, new, {"k": 3})
        return id

    return store


def kept(connection: Connection, id: str) -> int:
    """Items of a job whose image or URL is there."""
    there = job_items.c.data.is_not(None) | job_items.c.url.is_not(None)
    query = select(func.count()).select_from(job_items).where(job_items.c.job_id == id, there)
    return int(connection.execute(query).scalar_one())


def finish(database: Database, id: str, position: int, outcome: str = "safe") -> Job | None:
    with database.writing() as connection:
        return jobs.finish_item(connection, id, position, outcome, f'{{"n":{position}}}')


def test_life_of_a_job(database: Database, submit: Submit) -> None:
    id = submit(3)
    with database.writing() as connection:
        fresh = jobs.get(connection, id)
        assert (fresh.state, fresh.total, fresh.waiting, fresh.finished_at) == ("queued", 3, 3, None)
        assert jobs.waiting_bytes(connection) == 30
        claimed = jobs.claim(connection, "p", LONG_S)
        assert claimed is not None
        assert (claimed.id, claimed.state, claimed.parameters) == (id, "running", {"k": 3})
        item = jobs.waiting_item(connection, id, 1)
        assert item is not None
        assert (item.image_id, item.url, item.data) == ("image 1", None, bytes([1]) * 10)
        assert jobs.waiting(connection, id, 2, skipping=[0]) == [1, 2]
    assert finish(database, id, 1, "unsafe") is None
    with database.reading() as connection:
        assert kept(connection, id) == 2
        assert jobs.waiting(connection, id, 5) == [0, 2]
        assert jobs.waiting_item(connection, id, 1) is None
    assert finish(database, id, 0, FAILED) is None
    last = finish(database, id, 2)
    assert last is not None
    assert (last.state, last.done, last.failed, last.outcomes) == ("done", 2, 1, {"unsafe": 1, "safe": 1})
    assert last.finished_at is not None
    with database.writing() as connection:
        assert (kept(connection, id), jobs.waiting_bytes(connection), jobs.open_jobs(connection)) == (0, 0, 0)
        assert jobs.claim(connection, "p", LONG_S) is None


def test_an_item_is_answered_once(database: Database, submit: Submit) -> None:
    """Whoever lost a lease and finishes late changes nothing."""
    id = submit(2)
    finish(database, id, 0, "safe")
    assert finish(database, id, 0, "unsafe") is None
    with database.reading() as connection:
        assert jobs.get(connection, id).outcomes == {"safe": 1}
    assert finish(database, id, 1) is not None
    assert finish(database, id, 1) is None
    assert finish(database, "none", 0) is None


def test_what_has_an_answer_from_the_start_is_not_worked_on(database: Database) -> None:
    with database.writing() as connection:
        some = jobs.submit(connection, "a", "ann", [NewItem("x", url="https://a.org/"), NewItem("y", answer="{}")], {})
        assert (some.state, some.failed, jobs.waiting(connection, "a", 9)) == ("queued", 1, [0])
        none = jobs.submit(connection, "b", "ann", [NewItem("y", answer="{}")], {})
        assert (none.state, none.failed, none.finished_at) == ("done", 1, none.time)


def test_jobs_take_turns(database: Database, submit: Submit) -> None:
    first, second = submit(), submit()
    turns = []
    with database.writing() as connection:
        for _ in range(4):
            job = jobs.claim(connection, "p", LONG_S)
            assert job is not None
            turns.append(job.id)
            jobs.release(connection, job.id, "p")
    assert turns == [first, second, first, second]


def test_a_lease_holds_until_it_runs_out(database: Database, submit: Submit) -> None:
    id = submit()
    with database.writing() as connection:
        assert jobs.claim(connection, "p", LONG_S) is not None
        assert jobs.claim(connection, "q", LONG_S) is None
        assert not jobs.renew(connection, id, "q", LONG_S)
        jobs.release(connection, id, "q")
        assert jobs.claim(connection, "q", LONG_S) is None
        assert jobs.renew(connection, id, "p", -1.0)  # p is killed, and time passes
        assert jobs.claim(connection, "q", LONG_S) is not None
        assert not jobs.renew(connection, id, "p", LONG_S)


def test_several_processes_answer_every_item_once(database: Database, submit: Submit) -> None:
    """Their leases run out at once, so that they always get in each other's way."""
    ids = [submit(12) for _ in range(3)]
    together = Barrier(4)

    def work(number: int) -> list[str]:
        ended: list[str] = []
        together.wait(10)
        while True:
            with database.writing() as connection:
                job = jobs.claim(connection, f"p{number}", 0.0)
                if job is None:
                    return ended
                found = jobs.waiting(connection, job.id, 2)
            for position in found:
                if finish(database, job.id, position) is not None:
                    ended.append(job.id)

    with ThreadPoolExecutor(4) as threads:
        ended = [id for mine in threads.map(work, range(4)) for id in mine]
    assert sorted(ended) == sorted(ids)
    with database.reading() as connection:
        for id in ids:
            job = jobs.get(connection, id)
            assert (job.state, job.done, job.outcomes) == ("done", 12, {"safe": 12})


def test_cancelling_erases_what_waits_and_keeps_what_is_answered(database: Database, submit: Submit) -> None:
    id = submit(4)
    finish(database, id, 2)
    with database.writing() as connection:
        jobs.claim(connection, "p", LONG_S)
        job = jobs.cancel(connection, id, "ann")
        assert (job.state, job.done, job.waiting, kept(connection, id)) == ("cancelled", 1, 3, 0)
        assert not jobs.renew(connection, id, "p", LONG_S)
        page = jobs.answers(connection, id, after=-1, limit=10, max_chars=100)
        assert (page.answers, page.more) == (((2, '{"n":2}'),), False)
        assert jobs.cancel(connection, id).finished_at == job.finished_at
    assert finish(database, id, 0) is None  # its image was in work
    with database.reading() as connection:
        assert jobs.get(connection, id).done == 1


def test_a_job_is_its_owners(database: Database, submit: Submit) -> None:
    anns, bobs = submit(owner="ann"), submit(owner="bob")
    with database.writing() as connection:
        assert jobs.get(connection, anns, "ann").id == anns
        assert jobs.get(connection, anns, None).id == anns
        for id in (anns, "0" * 32):
            with pytest.raises(UnknownJob, match=id):
                jobs.get(connection, id, "bob")
            with pytest.raises(UnknownJob):
                jobs.cancel(connection, id, "bob")
        assert jobs.get(connection, anns).state == "queued"
        assert [job.id for job in jobs.list_jobs(connection, "bob", limit=9)] == [bobs]
        assert [job.id for job in jobs.list_jobs(connection, None, limit=9)] == [bobs, anns]


def test_the_list_is_paged_newest_first(database: Database, submit: Submit) -> None:
    ids = [submit(1) for _ in range(5)]
    with database.writing() as connection:
        connection.execute(update(jobs_table).where(jobs_table.c.id.in_(ids[1:3])).values(time=now_text()))
        found: list[str] = []
        while page := jobs.list_jobs(connection, "ann", limit=2, before=found[-1] if found else None):
            found += [job.id for job in page]
        assert len(found) == 5
        assert set(found[:2]) == set(ids[1:3])
        assert found[2:] == [ids[4], ids[3], ids[0]]
        with pytest.raises(UnknownJob):
            jobs.list_jobs(connection, "bob", limit=2, before=ids[0])


def test_pages_end_at_what_waits_and_at_their_size(database: Database, submit: Submit) -> None:
    id = submit(6)
    for position in (0, 1, 2, 4):
        finish(database, id, position)

    def page(after: int, limit: int = 9, max_chars: int = 99) -> tuple[list[int], bool]:
        with database.reading() as connection:
            found = jobs.answers(connection, id, after=after, limit=limit, max_chars=max_chars)
        assert all(answer == f'{{"n":{position}}}' for position, answer in found.answers)
        return [position for position, _ in found.answers], found.more

    assert page(-1) == ([0, 1, 2], True)  # 3 waits
    assert page(2) == ([], True)
    assert page(-1, limit=2) == ([0, 1], True)
    assert page(-1, max_chars=14) == ([0, 1], True)
    assert page(-1, max_chars=1) == ([0], True)
    for position in (3, 5):
        finish(database, id, position)
    assert page(2) == ([3, 4, 5], False)
    assert page(2, limit=3) == ([3, 4, 5], False)
    assert page(5) == ([], False)


def test_whoever_follows_the_pages_has_every_answer_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever order the items are answered in, and whenever one looks."""
    database = Database.open(f"sqlite:///{tmp_path_factory.mktemp('jobs') / 'c.sqlite3'}")

    @given(order=st.permutations(range(6)), looks=st.sets(st.integers(0, 5)), limit=st.integers(1, 4))
    def check(order: list[int], looks: set[int], limit: int) -> None:
        id = jobs.new_id()
        with database.writing() as connection:
            jobs.submit(connection, id, "ann", [NewItem(str(i), data=b"x") for i in range(6)], {})
            seen: list[int] = []
            more = True
            for step, position in enumerate(order):
                jobs.finish_item(connection, id, position, "safe", "{}")
                while step in looks or step == 5:
                    page = jobs.answers(connection, id, after=max(seen, default=-1), limit=limit, max_chars=99)
                    seen += [position for position, _ in page.answers]
                    more = page.more
                    if not page.answers or not more:
                        break
        assert seen == list(range(6))
        assert not more

    check()
    database.close()


def test_jobs_are_purged_some_time_after_their_end(database: Database, submit: Submit) -> None:
    ended, runs = submit(1), submit(1)
    finish(database, ended, 0)
    with database.writing() as connection:
        assert jobs.purge(connection, 60.0) == 0
        assert jobs.purge(connection, -1.0) == 1
        assert [job.id for job in jobs.list_jobs(connection, None, limit=9)] == [runs]
        assert set(connection.execute(select(job_items.c.job_id)).scalars()) == {runs}


def test_an_image_is_in_no_repr() -> None:
    assert "secret" not in repr(NewItem("x", data=b"secret"))
