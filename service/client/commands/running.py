"""A command over many images: which they are, and what is written of them."""

import asyncio
import io
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from service.client.bulk import BrokenOff, Bulk, Tally
from service.client.clients import MAX_IMAGE_BYTES, AsyncHardlookClient, HardlookClient
from service.client.commands.options import ALL_ANSWERED, SOME_ERRORS, VERDICT_FOUND, Service
from service.client.exchange import MAX_ATTEMPTS
from service.client.images import LoadedImage
from service.client.progress import Progress
from service.client.records import Answered, Record, appended, json_line, table_line
from service.client.sources import Found, Sources

_START_ATTEMPTS = 3
Ask = Callable[[AsyncHardlookClient, list[LoadedImage]], Awaitable[list[Record]]]
_LISTS = Parameter(
    name="--list",
    allow_leading_hyphen=True,
    negative=(),
    help="File with a path or URL on each line, or a .csv with a column path or url; '-' reads lines from stdin. Paths "
    "are relative to the working directory.",
)
Lists = Annotated[list[str] | None, _LISTS]


@Parameter(name="*")
@dataclass(frozen=True)
class Selection:
    """Which images to work on."""

    lists: Lists = None

    def sources(self, paths: Sequence[str]) -> Sources:
        """The images.

        Raises:
            ValueError: none are named.
        """
        if not paths and not self.lists:
            raise ValueError("name files, folders or URLs, or a --list")
        # A reader of its own, never closed: a thread may be waiting in it when the run is interrupted.
        stdin = io.BufferedReader(io.FileIO(0, closefd=False)) if "-" in (self.lists or ()) else None
        return Sources(paths, self.lists or (), stdin)


@Parameter(name="*")
@dataclass(frozen=True)
class Run(Selection):
    """Which images to ask about, how, and where the answers go."""

    concurrency: Annotated[int, Parameter(help="Requests at a time.")] = 8
    per_request: Annotated[int, Parameter(help="Images in one request.")] = 1
    output: Annotated[
        Path | None,
        Parameter(help="Append JSON lines to this file; images that have an answer in it are not asked about again."),
    ] = None
    format: Annotated[Literal["jsonl", "table"], Parameter(help="Of what goes to stdout without --output.")] = "jsonl"

    def check(self) -> None:
        """Raises ValueError for what cannot be run."""
        if self.output is not None and self.format != "jsonl":
            raise ValueError("--output holds JSON lines: leave --format out")
        for name, value, most in (("--concurrency", self.concurrency, 256), ("--per-request", self.per_request, 1000)):
            if not 1 <= value <= most:
                raise ValueError(f"{name} must be in 1..{most}, got {value}")


ONE_BY_ONE, NO_LISTS = Run(), Selection()


def run_images(paths: Sequence[str], service: Service, run: Run, ask: Ask, flagged: set[str]) -> int:
    """Ask about every image, write what comes, sum it up; returns the exit code."""
    sources = run.sources(paths)
    run.check()
    arguments = service.arguments()
    tally, answered = Tally(), Answered(flagged)
    with ExitStack() as stack:
        write = stack.enter_context(appended(run.output, answered.add)) if run.output else to_stdout(run.format)
        with HardlookClient(**arguments, max_attempts=_START_ATTEMPTS) as client:
            client.pools()  # a wrong address or key shows here, once, and not at every image
        progress = stack.enter_context(Progress(tally, shown=run.output is not None or not sys.stdout.isatty()))

        def emit(record: Record) -> None:
            try:
                write(record)
            except OSError as error:
                raise BrokenOff(f"the output cannot be written: {error.strerror}") from error
            tally.add(record, flagged)
            progress.update()

        try:
            asyncio.run(_ask_all(arguments, run, ask, emit, _unanswered(sources, answered, tally)))
        except (BrokenOff, KeyboardInterrupt):
            progress.end(f"broken off: {tally}")
            raise
        progress.end(str(tally))
        say_linked(sources)
    return exit_code(tally)


def exit_code(tally: Tally) -> int:
    """What a run comes to."""
    if tally.flagged:
        return VERDICT_FOUND
    return SOME_ERRORS if tally.errors else ALL_ANSWERED


def say_linked(sources: Sources) -> None:
    """Say which folders were left out."""
    if sources.linked_folders:
        print(f"{sources.linked_folders} linked folders were not followed", file=sys.stderr)


async def _ask_all(
    arguments: dict[str, Any], run: Run, ask: Ask, emit: Callable[[Record], None], sources: Iterator[Found]
) -> None:
    async with AsyncHardlookClient(**arguments, max_attempts=MAX_ATTEMPTS) as client:
        bulk = Bulk(
            ask=lambda images: ask(client, images),
            emit=emit,
            concurrency=run.concurrency,
            per_request=run.per_request,
            max_image_bytes=MAX_IMAGE_BYTES,
        )
        await bulk.run(sources)


def _unanswered(sources: Sources, answered: Answered, tally: Tally) -> Iterator[Found]:
    for found in sources:
        if found.path in answered:
            tally.skipped += 1
            tally.flagged += answered.flagged(found.path)
        else:
            yield found


def to_stdout(format: Literal["jsonl", "table"]) -> Callable[[Record], None]:
    """Writes one record at a time."""
    line = json_line if format == "jsonl" else table_line

    def write(record: Record) -> None:
        sys.stdout.write(line(record))
        sys.stdout.flush()

    return write
