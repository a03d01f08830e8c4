"""The runner of jobs: every image is answered once, whatever is loaded, fails or is cancelled."""

import asyncio
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from indexer.catalog import deliveries, jobs
from indexer.catalog.jobs import Job, NewItem
from indexer.catalog.tables import deliveries as deliveries_table
from indexer.catalog.tables import job_items
from indexer.errors import CatalogError, UnknownJob
from service.errors import DeadlineExceeded, FetchDisabled, Overloaded
from service.jobs import JobImage, JobRunner, failed_item
from service.webhooks import Webhooks
from service.wire_jobs import JobItem, JobItemError
from tests.service.editors import opened
from tests.service.job_doubles import judged
from tests.service.running_jobs import ended, judge, outcomes, quick, results, run, submit, working
from tests.service.webhook_receivers import hook


def test_every_image_gets_a_verdict_or_an_error_of_its_own(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as editor:
            runner = quick(editor, concurrency=3)
            items = [
                NewItem("a", data=b"unsafe"),
                NewItem("b", data=b"nothing"),
                NewItem("c", url="https://example.org/c.png"),
                NewItem("d", answer=failed_item("j", 3, "d", FetchDisabled()).model_dump_json()),
                NewItem("e", data=b"safe"),
            ]
            async with working(runner):
                first = await runner.submit("j", "ann", items, {"k": 7})
                assert (first.state, first.failed) == ("queued", 1)
                job = await ended(editor)
            assert (job.done, job.failed, job.outcomes) == (3, 2, {"unsafe": 1, "review": 1, "safe": 1})
            found = await results(editor)
            assert outcomes(found) == ["unsafe", "corrupt-image", "review", "fetch-disabled", "safe"]
            assert [item.id for item in found] == list("abcde")
            assert [item.request_id for item in found] == [f"j-{i}" for i in range(5)]
            assert isinstance(found[1], JobItemError)
            assert found[1].error.request_id == "j-1"
            assert isinstance(found[0], JobItem)
            assert found[0].reason == "k is 7"
            there = select(func.count()).where(job_items.c.data.is_not(None) | job_items.c.url.is_not(None))
            assert await editor.read(lambda connection: connection.execute(there).scalar_one()) == 0

    run(work())


def test_a_bug_is_the_answer_of_its_image_and_says_nothing_of_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def classify(image: JobImage) -> JobItem:
        if image.position == 0:
            raise RuntimeError("s3cr3t")
        return judged(image)

    async def work() -> str:
        async with opened(tmp_path) as editor, working(quick(editor, classify)):
            await submit(editor, ["safe", "safe"])
            await ended(editor)
            found = await results(editor)
            assert outcomes(found) == ["internal", "safe"]
            return found[0].model_dump_json()

    assert "s3cr3t" not in run(work())
    assert "s3cr3t" in caplog.text


def test_no_more_images_are_in_work_than_may_be(tmp_path: Path) -> None:
    async def work() -> tuple[int, int]:
        now = most = 0

        async def classify(image: JobImage) -> JobItem:
            nonlocal now, most
            now += 1
            most = max(most, now)
            await asyncio.sleep(0.001)
            now -= 1
            return judged(image)

        async with opened(tmp_path) as editor, working(quick(editor, classify, concurrency=3)):
            for id in ("j", "k"):
                await submit(editor, ["safe"] * 12, id)
            await ended(editor, "j")
            await ended(editor, "k")
        return now, most

    assert run(work()) == (0, 3)


def test_a_long_job_does_not_hold_up_a_short_one(tmp_path: Path) -> None:
    async def work() -> list[str]:
        order: list[str] = []

        async def classify(image: JobImage) -> JobItem:
            order.append(image.job.id)
            return judged(image)

        async with opened(tmp_path) as editor:
            await submit(editor, ["safe"] * 60, "long")
            await submit(editor, ["safe"] * 3, "short")
            async with working(quick(editor, classify)):
                await ended(editor, "long")
        return order

    order = run(work())
    assert len(order) == 63
    assert 0 < order.index("short") < 60 - 16


def test_nothing_is_begun_while_the_service_is_loaded(tmp_path: Path) -> None:
    async def work() -> None:
        loaded, asked = True, asyncio.Event()
        begun: list[int] = []

        def busy() -> bool:
            asked.set()
            return loaded

        async def classify(image: JobImage) -> JobItem:
            begun.append(image.position)
            return judged(image)

        async with opened(tmp_path) as editor, working(quick(editor, classify, busy=busy)):
            await submit(editor, ["safe"] * 3)
            for _ in range(5):
                asked.clear()
                await asked.wait()
            assert begun == []
            loaded = False
            assert (await ended(editor)).done == 3

    run(work())


@pytest.mark.parametrize("error", [Overloaded("encoder queue", 8), CatalogError("x", "locked")])
def test_what_finds_no_room_is_tried_again_and_never_fails(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.jobs._FIRST_WAIT_S", 0.001)

    async def work() -> list[int]:
        tried: list[int] = []

        async def classify(image: JobImage) -> JobItem:
            tried.append(image.position)
            if image.position == 0 and tried.count(0) < 9:
                raise error
            return judged(image)

        async with opened(tmp_path) as editor, working(quick(editor, classify)):
            await submit(editor, ["safe", "unsafe", "safe"])
            assert (await ended(editor)).failed == 0
            assert outcomes(await results(editor)) == ["safe", "unsafe", "safe"]
        return tried

    tried = run(work())
    assert sorted(tried) == [0] * 9 + [1, 2]
    assert {1, 2} <= set(tried[:5])  # the others did not wait for it


def test_an_image_that_always_takes_too_long_has_that_as_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.jobs._FIRST_WAIT_S", 0.001)

    async def classify(image: JobImage) -> JobItem:
        if image.position == 0:
            raise DeadlineExceeded(30.0)
        return judged(image)

    async def work() -> None:
        async with opened(tmp_path) as editor, working(quick(editor, classify)):
            await submit(editor, ["safe", "safe"])
            await ended(editor)
            assert outcomes(await results(editor)) == ["deadline-exceeded", "safe"]

    run(work())


def test_a_cancelled_job_is_left_alone(tmp_path: Path) -> None:
    async def work() -> None:
        begun, go_on = asyncio.Event(), asyncio.Event()
        seen: list[int] = []

        async def slow(image: JobImage) -> JobItem:
            seen.append(image.position)
            begun.set()
            await go_on.wait()
            return judged(image)

        async with opened(tmp_path) as editor, working(quick(editor, slow, concurrency=1)):
            await submit(editor, ["safe"] * 5)
            await begun.wait()
            await editor.write(partial(jobs.cancel, id="j"))
            go_on.set()
            await submit(editor, ["safe"], "k")
            await ended(editor, "k")
            job = await ended(editor)
            assert (job.state, job.done, job.waiting) == ("cancelled", 0, 5)
            assert await results(editor) == []
        assert seen == [0, 0]  # of j, then of k

    run(work())


@pytest.mark.parametrize("callback", [True, False])
def test_a_callback_tells_that_a_job_is_done(tmp_path: Path, callback: bool) -> None:
    async def work() -> list[str]:
        async with opened(tmp_path) as editor:
            webhooks = Webhooks(editor, [hook()])
            runner = quick(editor, webhooks=webhooks)
            async with working(runner):
                await submit(editor, ["safe", "unsafe"], callback=callback)
                await ended(editor)
                answered = NewItem("x", answer=failed_item("k", 0, "x", FetchDisabled()).model_dump_json())
                await runner.submit("k", "ann", [answered], {"callback": callback})
            claim = partial(deliveries.claim, hook="a", limit=9, hold_s=60.0)
            told = await editor.write(claim)
            total = select(func.count()).select_from(deliveries_table)
            assert await editor.read(lambda connection: connection.execute(total).scalar_one()) == len(told)
        return sorted(delivery.body for delivery in told)

    bodies = run(work())
    assert len(bodies) == 2 * callback
    if callback:
        said = "".join(bodies)
        assert '"job_id":"j"' in said
        assert '"verdicts":{"safe":1,"unsafe":1}' in said
        assert '"job_id":"k"' in said
        assert "ann" not in said


def test_jobs_and_their_bytes_are_bounded(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as editor:
            runner = JobRunner(editor, judge, max_jobs=2, max_bytes=10)
            await runner.submit("a", "ann", [NewItem("x", data=bytes(6))], {})
            with pytest.raises(Overloaded, match="bytes of jobs is full, its limit is 10"):
                await runner.submit("b", "ann", [NewItem("x", data=bytes(5))], {})
            await runner.submit("c", "ann", [NewItem("x", url="https://example.org/")], {})
            with pytest.raises(Overloaded, match="jobs is full, its limit is 2"):
                await runner.submit("d", "ann", [NewItem("x", url="https://example.org/")], {})
            listed = await editor.read(partial(jobs.list_jobs, owner=None, limit=9))
            assert {job.id for job in listed} == {"a", "c"}

    run(work())


def test_old_jobs_are_erased(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as editor:
            await submit(editor, ["safe"])
            async with working(quick(editor)):
                await ended(editor)
            async with working(quick(editor, results_s=-1.0)):
                with suppress(UnknownJob):
                    while True:
                        await ended(editor)
            assert await editor.read(partial(jobs.list_jobs, owner=None, limit=1)) == []

    run(work())


def test_trouble_with_the_database_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that cannot be stored are made again."""
    store, failures = jobs.finish_item, [CatalogError("x", "disk full")] * 3

    def sometimes(*arguments: Any) -> Job | None:
        if failures:
            raise failures.pop()
        return store(*arguments)

    monkeypatch.setattr(jobs, "finish_item", sometimes)

    async def work() -> None:
        async with opened(tmp_path) as editor, working(quick(editor)):
            await submit(editor, ["safe"] * 4)
            assert (await ended(editor)).done == 4

    run(work())
    assert failures == []
