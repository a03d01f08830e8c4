"""Jobs that outlive a process: a shutdown, a kill, replicas, and who may take over when."""

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from indexer.catalog import jobs
from indexer.catalog.jobs import NewItem
from service.jobs import JobImage, JobRunner
from service.wire_jobs import JobItem
from tests.service.editors import opened
from tests.service.job_doubles import judged
from tests.service.running_jobs import LONG_S, ended, judge, quick, results, run, submit, working

ROOT = Path(__file__).parents[2]


def test_a_shutdown_leaves_what_is_in_work_to_the_next(tmp_path: Path) -> None:
    async def work() -> None:
        begun = asyncio.Event()

        async def hang(image: JobImage) -> JobItem:
            begun.set()
            await asyncio.Event().wait()
            return judged(image)

        async with opened(tmp_path) as editor:
            await submit(editor, ["safe"] * 3)
            async with working(quick(editor, hang, lease_s=LONG_S)):
                await begun.wait()
        async with opened(tmp_path) as editor, working(quick(editor)):  # long before the lease would have ended
            assert (await ended(editor)).done == 3

    run(work())


def test_a_killed_process_loses_nothing(tmp_path: Path) -> None:
    """Every image has one answer, and only the one in work is done again."""
    words = ["safe"] * 30 + ["hang"] + ["unsafe"] * 10

    async def prepare() -> None:
        async with opened(tmp_path) as editor:
            items = [NewItem(word, data=b"safe" if word == "hang" else word.encode()) for word in words]
            await JobRunner(editor, judge).submit("j", "ann", items, {"k": 3})

    run(prepare())
    command = [sys.executable, "-m", "tests.service.killed_job_runner", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        begun = [next(process.stdout).strip() for _ in range(31)]
        process.kill()
    assert begun == words[:31]

    async def resume() -> list[str]:
        again: list[str] = []

        async def classify(image: JobImage) -> JobItem:
            again.append(image.id)
            return judged(image)

        async with opened(tmp_path) as editor, working(quick(editor, classify, concurrency=1)):
            job = await ended(editor)
            assert (job.done, job.failed, job.outcomes) == (41, 0, {"safe": 31, "unsafe": 10})
            assert [item.id for item in await results(editor)] == words
        return again

    assert run(resume()) == words[30:]


def test_replicas_share_the_work_and_answer_once(tmp_path: Path) -> None:
    async def work() -> None:
        judged_by: list[tuple[str, int, int]] = []

        def by(replica: int) -> Callable[[JobImage], Awaitable[JobItem]]:
            async def classify(image: JobImage) -> JobItem:
                judged_by.append((image.job.id, image.position, replica))
                await asyncio.sleep(0.001)
                return judged(image)

            return classify

        async with opened(tmp_path) as one, opened(tmp_path) as other:
            for id in ("j", "k", "l"):
                await submit(one, ["safe"] * 40, id)
            async with working(quick(one, by(1), lease_s=LONG_S)), working(quick(other, by(2), lease_s=LONG_S)):
                for id in ("j", "k", "l"):
                    assert (await ended(one, id)).outcomes == {"safe": 40}
        assert len({(id, position) for id, position, _ in judged_by}) == len(judged_by) == 120
        assert {replica for _, _, replica in judged_by} == {1, 2}

    run(work())


def test_a_lease_is_renewed_while_an_image_takes_long(tmp_path: Path) -> None:
    async def work() -> None:
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def slow(image: JobImage) -> JobItem:
            begun.set()
            await go_on.wait()
            return judged(image)

        async with opened(tmp_path) as editor:
            await submit(editor, ["safe"])
            async with working(quick(editor, slow, lease_s=0.15)):
                await begun.wait()
                await asyncio.sleep(0.4)
                claimed = await editor.write(partial(jobs.claim, by="another", lease_s=1.0))
                assert claimed is None
                go_on.set()
                assert (await ended(editor)).done == 1

    run(work())
