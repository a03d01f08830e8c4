"""A process that works on jobs until it is killed: it says what it begins, and never finishes the image 'hang'."""

import asyncio
import sys
from pathlib import Path

from service.jobs import JobImage, JobRunner
from service.wire_jobs import JobItem
from tests.service.editors import opened
from tests.service.job_doubles import judged


async def _classify(image: JobImage) -> JobItem:
    print(image.id, flush=True)
    if image.id == "hang":
        await asyncio.Event().wait()
    return judged(image)


async def _work(folder: Path) -> None:
    async with opened(folder) as editor:
        await JobRunner(editor, _classify, concurrency=1, poll_s=0.05, lease_s=1.0).run()


if __name__ == "__main__":
    asyncio.run(_work(Path(sys.argv[1])))
