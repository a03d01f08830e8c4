"""hardlook: ask a running service from the command line.

Exit codes: 0 all images have an answer; 1 some have none, or the service is not ready; 2 the run could not start or was
broken off; 3 there is a verdict of --fail-on. The highest that applies.
"""

import asyncio
import io
import os
import ssl
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

from service.client.bulk import BrokenOff, Bulk, Tally
from service.client.clients import MAX_IMAGE_BYTES, AsyncHardlookClient, HardlookClient, Pool
from service.client.errors import HardlookError
from service.client.exchange import MAX_ATTEMPTS
from service.client.images import LoadedImage
from service.client.progress import Progress
from service.client.records import (
    Answered,
    OutputUnusable,
    Record,
    appended,
    json_line,
    printable,
    problem_record,
    similar_record,
    table_line,
    verdict_record,
)
from service.client.sources import Found, Sources
from service.wire import ItemError

ALL_ANSWERED, SOME_ERRORS, NOT_DONE, VERDICT_FOUND = 0, 1, 2, 3
_START_ATTEMPTS = 3
_POLL_S = 0.5
_MAX_KEY_FILE_BYTES = 4096
Verdicts = Literal["safe", "unsafe", "review"]


@Parameter(name="*")
@dataclass(frozen=True)
class Service:
    """Which service to ask."""

    url: Annotated[str, Parameter(env_var="HARDLOOK_URL", help="Base URL of the service.")] = "http://127.0.0.1:8000"
    api_key_file: Annotated[
        Path | None, Parameter(help="File with the API key; without it the variable HARDLOOK_API_KEY, if there is one.")
    ] = None
    timeout: Annotated[float, Parameter(help="Seconds for one request, with all its retries.")] = 60.0
    ca_file: Annotated[Path | None, Parameter(help="Certificates to trust, in PEM, in place of the usual ones.")] = None
    trust_env: Annotated[
        bool, Parameter(negative=(), help="Use the proxies and certificates that HTTPS_PROXY and the like name.")
    ] = False

    def arguments(self) -> dict[str, Any]:
        """For both clients.

        Raises:
            OSError: a file cannot be read.
            ValueError: there is no key in the key file.
        """
        return {
            "base_url": self.url,
            "api_key": self._key(),
            "timeout_s": self.timeout,
            "trust_env": self.trust_env,
            "ssl_context": ssl.create_default_context(cafile=self.ca_file) if self.ca_file else None,
        }

    def _key(self) -> str | None:
        if self.api_key_file is None:
            return os.environ.get("HARDLOOK_API_KEY", "").strip() or None
        with self.api_key_file.open("rb") as file:
            key = file.read(_MAX_KEY_FILE_BYTES).decode("ascii", "replace").strip()
        if not key:
            raise ValueError(f"{self.api_key_file} holds no API key")
        return key


@Parameter(name="*")
@dataclass(frozen=True)
class Run:
    """Which images to ask about, how, and where the answers go."""

    lists: Annotated[
        list[str] | None,
        Parameter(
            name="--list",
            allow_leading_hyphen=True,
            negative=(),
            help="File with a path or URL on each line, or a .csv with a column path or url; '-' reads lines from "
            "stdin. Paths are relative to the working directory.",
        ),
    ] = None
    concurrency: Annotated[int, Parameter(help="Requests at a time.")] = 8
    per_request: Annotated[int, Parameter(help="Images in one request.")] = 1
    output: Annotated[
        Path | None,
        Parameter(help="Append JSON lines to this file; images that have an answer in it are not asked about again."),
    ] = None
    format: Annotated[Literal["jsonl", "table"], Parameter(help="Of what goes to stdout without --output.")] = "jsonl"

    def check(self, paths: Sequence[str]) -> None:
        """Raises ValueError for what cannot be run."""
        if not paths and not self.lists:
            raise ValueError("name files, folders or URLs, or a --list")
        if self.output is not None and self.format != "jsonl":
            raise ValueError("--output holds JSON lines: leave --format out")
        for name, value, most in (("--concurrency", self.concurrency, 256), ("--per-request", self.per_request, 1000)):
            if not 1 <= value <= most:
                raise ValueError(f"{name} must be in 1..{most}, got {value}")


Paths = Annotated[str, Parameter(help="Files, folders and URLs.")]
Ask = Callable[[AsyncHardlookClient, list[LoadedImage]], Awaitable[list[Record]]]


def main(tokens: Sequence[str] | None = None) -> None:
    """Run the command line and exit; an error is one line."""
    try:
        code = _app()(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except (CycloptsError, HardlookError, OutputUnusable, BrokenOff, OSError, ValueError) as error:
        print(f"hardlook: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        code = NOT_DONE
    except KeyboardInterrupt:
        print("hardlook: interrupted", file=sys.stderr)
        code = NOT_DONE
    sys.exit(code or ALL_ANSWERED)


def _app() -> App:
    app = App(
        name="hardlook",
        help="Ask a hardlook service. Exit codes: 0 all images have an answer; 1 some have none; 2 the run could not "
        "start or was broken off; 3 there is a verdict of --fail-on.",
        suppress_keyboard_interrupt=False,
    )
    app.command(_classify, name="classify")
    app.command(_similar, name="similar")
    app.command(_pools, name="pools")
    app.command(_ready, name="ready")
    return app


def _classify(
    *paths: Paths,
    service: Service = Service(),  # frozen
    run: Run = Run(),
    fail_on: Annotated[str, Parameter(help="Verdicts for which to exit with 3, such as 'unsafe,review'.")] = "",
) -> int:
    """Ask whether images are safe. Answers are written as they come, not in the order of the images."""
    flagged = {verdict.strip() for verdict in fail_on.split(",") if verdict.strip()}
    if unknown := flagged - {"safe", "unsafe", "review"}:
        raise ValueError(f"--fail-on takes safe, unsafe and review, got {', '.join(sorted(unknown))}")

    async def ask(client: AsyncHardlookClient, images: list[LoadedImage]) -> list[Record]:
        answer = await client.classify([(image.id, image.content) for image in images])
        return [
            problem_record(item.id, item.error)
            if isinstance(item, ItemError)
            else verdict_record(item.id, answer, item)
            for item in answer.results
        ]

    return _run(paths, service, run, ask, flagged)


def _similar(
    *paths: Paths,
    text: Annotated[str | None, Parameter(help="Look for what this describes, in place of images.")] = None,
    pool: Annotated[Pool | None, Parameter(help="Search this one of the moderation pools alone.")] = None,
    gallery: Annotated[str | None, Parameter(help="Collection to search, in place of the moderation pools.")] = None,
    k: Annotated[int | None, Parameter(help="The most neighbours.")] = None,
    min_similarity: Annotated[float | None, Parameter(help="Leave out what is less similar, -1 to 1.")] = None,
    service: Service = Service(),
    run: Run = Run(),
) -> int:
    """Ask for the exemplars that are most similar to images or to a text."""
    search: dict[str, Any] = {"pool": pool, "gallery": gallery, "k": k, "min_similarity": min_similarity}
    if text is None:

        async def ask(client: AsyncHardlookClient, images: list[LoadedImage]) -> list[Record]:
            answer = await client.similar([(image.id, image.content) for image in images], **search)
            return [
                problem_record(item.id, item.error)
                if isinstance(item, ItemError)
                else similar_record(item.id, answer, item)
                for item in answer.results
            ]

        return _run(paths, service, run, ask, set())
    if paths or run.lists or run.output:
        raise ValueError("--text stands alone: no images, no --list, no --output")
    with HardlookClient(**service.arguments()) as client:
        answer = client.similar(text=text, **search)
    for item in answer.results:
        if isinstance(item, ItemError):
            raise ValueError(item.error.detail)
        record = similar_record(None, answer, item)
        sys.stdout.write(json_line(record) if run.format == "jsonl" else table_line(record))
    return ALL_ANSWERED


def _pools(*, service: Service = Service(), format: Literal["jsonl", "table"] = "table") -> int:
    """Show what is published, and the model that serves it.

    Args:
        format: 'jsonl' is one line with the whole answer.
    """
    with HardlookClient(**service.arguments()) as client:
        answer = client.pools()
    if format == "jsonl":
        print(answer.model_dump_json())
        return ALL_ANSWERED
    print(f"model {printable(answer.model.name)} ({answer.model.precision}), policy {printable(answer.policy.version)}")
    for collection in answer.collections:
        counts = ", ".join(f"{count} {printable(label)}" for label, count in sorted(collection.counts.items()))
        print(
            f"{printable(collection.name)}  {collection.kind}  {collection.version}  {collection.created_at}  {counts}"
        )
    return ALL_ANSWERED


def _ready(
    *,
    service: Service = Service(),
    wait: Annotated[float, Parameter(help="Seconds to wait for it; by default it is asked once.")] = 0.0,
) -> int:
    """Find out whether the service can classify: exit code 0 if so, 1 if not."""
    until_s = time.monotonic() + wait
    with HardlookClient(**service.arguments()) as client:
        while not client.is_ready():
            remaining_s = until_s - time.monotonic()
            if remaining_s <= 0:
                print("not ready")
                return SOME_ERRORS
            time.sleep(min(_POLL_S, remaining_s))
    print("ready")
    return ALL_ANSWERED


def _run(paths: Sequence[str], service: Service, run: Run, ask: Ask, flagged: set[str]) -> int:
    """Ask about every image, write what comes, sum it up; returns the exit code."""
    run.check(paths)
    arguments = service.arguments()
    tally, answered = Tally(), Answered(flagged)
    with ExitStack() as stack:
        write = stack.enter_context(appended(run.output, answered.add)) if run.output else _to_stdout(run.format)
        with HardlookClient(**arguments, max_attempts=_START_ATTEMPTS) as client:
            client.pools()  # a wrong address or key shows here, once, and not at every image
        # A reader of its own, never closed: a thread may be waiting in it when the run is interrupted.
        stdin = io.BufferedReader(io.FileIO(0, closefd=False)) if "-" in (run.lists or ()) else None
        sources = Sources(paths, run.lists or (), stdin)
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
        if sources.linked_folders:
            print(f"{sources.linked_folders} linked folders were not followed", file=sys.stderr)
    if tally.flagged:
        return VERDICT_FOUND
    return SOME_ERRORS if tally.errors else ALL_ANSWERED


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


def _to_stdout(format: Literal["jsonl", "table"]) -> Callable[[Record], None]:
    line = json_line if format == "jsonl" else table_line

    def write(record: Record) -> None:
        sys.stdout.write(line(record))
        sys.stdout.flush()

    return write
