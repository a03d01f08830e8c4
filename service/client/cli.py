"""hardlook: ask a running service from the command line.

Exit codes: 0 all is done and all images have an answer; 1 some have none, or what was checked is not so; 2 it could not
be done, or was broken off; 3 there is a verdict of --fail-on. The highest that applies.
"""

import sys
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

from service.client.bulk import BrokenOff
from service.client.clients import AsyncHardlookClient, Pool
from service.client.commands import audit, collections, exemplars, explain, jobs, reviews, versions
from service.client.commands.options import (
    ALL_ANSWERED,
    HERE,
    NOT_DONE,
    SOME_ERRORS,
    FailOn,
    Paths,
    Service,
    flagged_verdicts,
)
from service.client.commands.running import ONE_BY_ONE, Run, run_images
from service.client.errors import HardlookError, one_line
from service.client.images import LoadedImage
from service.client.records import (
    OutputUnusable,
    Record,
    json_line,
    printable,
    problem_record,
    similar_record,
    table_line,
    verdict_record,
)
from service.wire import ItemError

_POLL_S = 0.5


def main(tokens: Sequence[str] | None = None) -> None:
    """Run the command line and exit; an error is one line."""
    try:
        code = _app()(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except (CycloptsError, HardlookError, OutputUnusable, BrokenOff, OSError, ValueError) as error:
        print(f"hardlook: {printable(one_line(error))}", file=sys.stderr)
        code = NOT_DONE
    except KeyboardInterrupt:
        print("hardlook: interrupted", file=sys.stderr)
        code = NOT_DONE
    sys.exit(code or ALL_ANSWERED)


def _app() -> App:
    app = App(
        name="hardlook",
        help="Ask a hardlook service. Exit codes: 0 all is done and all images have an answer; 1 some have none, or "
        "what was checked is not so; 2 it could not be done, or was broken off; 3 there is a verdict of --fail-on.",
        suppress_keyboard_interrupt=False,
    )
    app.command(_classify, name="classify")
    app.command(_similar, name="similar")
    app.command(_pools, name="pools")
    app.command(_ready, name="ready")
    for area in (explain, exemplars, collections, versions, reviews, jobs, audit):
        area.mount(app)
    return app


def _classify(*paths: Paths, service: Service = HERE, run: Run = ONE_BY_ONE, fail_on: FailOn = "") -> int:
    """Ask whether images are safe. Answers are written as they come, not in the order of the images."""

    async def ask(client: AsyncHardlookClient, images: list[LoadedImage]) -> list[Record]:
        answer = await client.classify([(image.id, image.content) for image in images])
        return [
            problem_record(item.id, item.error)
            if isinstance(item, ItemError)
            else verdict_record(item.id, answer, item)
            for item in answer.results
        ]

    return run_images(paths, service, run, ask, flagged_verdicts(fail_on))


def _similar(
    *paths: Paths,
    text: Annotated[str | None, Parameter(help="Look for what this describes, in place of images.")] = None,
    pool: Annotated[Pool | None, Parameter(help="Search this one of the moderation pools alone.")] = None,
    gallery: Annotated[str | None, Parameter(help="Collection to search, in place of the moderation pools.")] = None,
    k: Annotated[int | None, Parameter(help="The most neighbours.")] = None,
    min_similarity: Annotated[float | None, Parameter(help="Leave out what is less similar, -1 to 1.")] = None,
    service: Service = HERE,
    run: Run = ONE_BY_ONE,
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

        return run_images(paths, service, run, ask, set())
    if paths or run.lists or run.output:
        raise ValueError("--text stands alone: no images, no --list, no --output")
    with service.client() as client:
        answer = client.similar(text=text, **search)
    for item in answer.results:
        if isinstance(item, ItemError):
            raise ValueError(item.error.detail)
        record = similar_record(None, answer, item)
        sys.stdout.write(json_line(record) if run.format == "jsonl" else table_line(record))
    return ALL_ANSWERED


def _pools(*, service: Service = HERE, format: Literal["jsonl", "table"] = "table") -> int:
    """Show what is published, and the model that serves it.

    Args:
        format: 'jsonl' is one line with the whole answer.
    """
    with service.client() as client:
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
    service: Service = HERE,
    wait: Annotated[float, Parameter(help="Seconds to wait for it; by default it is asked once.")] = 0.0,
) -> int:
    """Find out whether the service can classify: exit code 0 if so, 1 if not."""
    until_s = time.monotonic() + wait
    with service.client() as client:
        while not client.is_ready():
            remaining_s = until_s - time.monotonic()
            if remaining_s <= 0:
                print("not ready")
                return SOME_ERRORS
            time.sleep(min(_POLL_S, remaining_s))
    print("ready")
    return ALL_ANSWERED
