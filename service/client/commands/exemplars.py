"""hardlook exemplars: what is in a collection, and what is done to it. And suppress items."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Literal

from cyclopts import App, Parameter

from service.client.clients import MAX_IMAGE_BYTES, AsyncHardlookClient
from service.client.commands.options import (
    HERE,
    POOLS,
    Collection,
    Json,
    Label,
    Paths,
    Reason,
    Service,
)
from service.client.commands.output import print_json, print_line
from service.client.commands.running import Lists, Run, run_images
from service.client.errors import Conflict
from service.client.images import LoadedImage, load_image
from service.client.records import Record, addition_record, printable
from service.client.sources import Sources
from service.wire_collections import MAX_TEXT_CHARS, ChangedAnswer, ExemplarItem

Id = Annotated[str, Parameter(help="Of the exemplar or suppress item.", allow_leading_hyphen=True)]
Until = Annotated[
    datetime | None,
    Parameter(help="When it takes part in searches by itself, such as 2027-01-31; in UTC where it names no zone."),
]


def mount(app: App) -> None:
    """Add the commands."""
    exemplars = App(name="exemplars", help="List, add, change and delete what a collection compares with.")
    exemplars.command(_list, name="list")
    exemplars.command(_show, name="show")
    exemplars.command(_add, name="add")
    exemplars.command(_move, name="move")
    exemplars.command(_disable, name="disable")
    exemplars.command(_enable, name="enable")
    exemplars.command(_note, name="note")
    exemplars.command(_delete, name="delete")
    app.command(exemplars)
    app.command(_suppress, name="suppress")


def _list(*, collection: Collection = POOLS, label: Label = None, json: Json = False, service: Service = HERE) -> None:
    """List exemplars and suppress items in the order of their ids, disabled ones too."""
    with service.client() as client:
        for item in client.collections.exemplars(collection, label=label, page_size=1000):
            if json:
                print_json(item)
            else:
                _print_item(item)


def _show(id: Id, *, collection: Collection = POOLS, json: Json = False, service: Service = HERE) -> None:
    """Show one exemplar or suppress item."""
    with service.client() as client:
        answer = client.collections.exemplar(collection, id)
    if json:
        print_json(answer)
        return
    item = answer.item
    _print_item(item)
    for name, value in (
        ("sha256", item.sha256),
        ("note", item.note),
        ("disabled until", item.disabled_until),
        ("suppresses", ", ".join(item.suppresses)),
        ("from similarity", item.min_similarity),
        *item.metadata.items(),
    ):
        if value not in (None, ""):
            print_line(f"  {name}:", value)


def _add(
    *paths: Paths,
    label: Annotated[str, Parameter(help="Pool to add to: safe, buffer or unsafe; in a gallery a class.")],
    collection: Collection = POOLS,
    id: Annotated[str | None, Parameter(help="Of an only image; made of the hash of its file by default.")] = None,
    source: Annotated[str | None, Parameter(help="Where the images are from; by default their paths.")] = None,
    metadata: Annotated[list[str] | None, Parameter(name="--metadata", help="NAME=VALUE.", negative=())] = None,
    note: Annotated[str, Parameter(help="Of every image.")] = "",
    frame: Annotated[int, Parameter(help="Which of the examined frames of animations is meant.")] = 0,
    disabled_until: Until = None,
    reason: Reason = "",
    lists: Lists = None,
    concurrency: Annotated[int, Parameter(help="Requests at a time.")] = 4,
    format: Annotated[Literal["jsonl", "table"], Parameter(help="Of what goes to stdout.")] = "jsonl",
    service: Service = HERE,
) -> int:
    """Add images to a pool or gallery while it serves. Adding again what is there already changes nothing.

    Each image is a request of its own: what cannot be added is an error of its own and stops nothing.
    """
    if id is not None:
        _require_one(paths, lists)
    pairs = _pairs(metadata or [])

    async def add(client: AsyncHardlookClient, images: list[LoadedImage]) -> list[Record]:
        [image] = images
        try:
            answer = await client.collections.add(
                collection,
                image.content if id is None else (id, image.content),
                label,
                source=printable(image.id)[:MAX_TEXT_CHARS] if source is None else source,
                metadata=pairs,
                note=note,
                frame=frame,
                disabled_until=_aware(disabled_until),
                reason=reason,
            )
        except Conflict as error:
            if id is not None or error.slug != "exemplar-exists":
                raise
            # Its id is made of the hash of the file: the same image is there, from another path or with a note.
            there = await client.collections.exemplar(collection, str(error.members["id"]))
            if there.item.label != label:
                raise
            state = there.model_dump(exclude={"item"})
            answer = ChangedAnswer(changed=False, items=[there.item], **state)
        return [addition_record(image.id, answer)]

    run = Run(lists, concurrency=concurrency, format=format)
    return run_images(paths, service, run, add, set())


def _move(
    id: Id,
    label: str,
    *,
    collection: Collection = POOLS,
    reason: Reason = "",
    json: Json = False,
    service: Service = HERE,
) -> None:
    """Put an exemplar into another pool or class.

    Args:
        label: The pool: safe, buffer or unsafe; in a gallery a class.
    """
    with service.client() as client:
        _print_change(client.collections.move(collection, id, label, reason=reason), json)


def _disable(
    id: Id,
    *,
    until: Until = None,
    collection: Collection = POOLS,
    reason: Reason = "",
    json: Json = False,
    service: Service = HERE,
) -> None:
    """Take an exemplar out of searches, for a time or until it is enabled."""
    with service.client() as client:
        _print_change(client.collections.disable(collection, id, until=_aware(until), reason=reason), json)


def _enable(
    id: Id, *, collection: Collection = POOLS, reason: Reason = "", json: Json = False, service: Service = HERE
) -> None:
    """Take an exemplar that is disabled or in quarantine into searches again."""
    with service.client() as client:
        _print_change(client.collections.enable(collection, id, reason=reason), json)


def _note(
    id: Id,
    note: Annotated[str | None, Parameter(help="In place of the note that it has.", allow_leading_hyphen=True)] = None,
    *,
    source: Annotated[str | None, Parameter(help="Where it is from.")] = None,
    metadata: Annotated[
        list[str] | None, Parameter(name="--metadata", help="NAME=VALUE, in place of all that it has.", negative=())
    ] = None,
    collection: Collection = POOLS,
    reason: Reason = "",
    json: Json = False,
    service: Service = HERE,
) -> None:
    """Change the note, the source or the metadata of an exemplar."""
    pairs = None if metadata is None else _pairs(metadata)
    if note is None and source is None and pairs is None:
        raise ValueError("give a note, --source or --metadata")
    with service.client() as client:
        answer = client.collections.change(collection, id, note=note, source=source, metadata=pairs, reason=reason)
    _print_change(answer, json)


def _delete(
    id: Id, *, collection: Collection = POOLS, reason: Reason = "", json: Json = False, service: Service = HERE
) -> None:
    """Remove an exemplar or suppress item; versions from before still have it."""
    with service.client() as client:
        _print_change(client.collections.delete(collection, id, reason=reason), json)


def _suppress(
    image: Annotated[str, Parameter(help="File or URL of an image that is matched by mistake.")],
    *exemplars: Annotated[str, Parameter(help="Ids of the exemplars that are no evidence near it.")],
    min_similarity: Annotated[float, Parameter(help="From which on an image is near it, above 0, at most 1.")] = 0.95,
    id: Annotated[str | None, Parameter(help="Of the suppress item; made of the hash of the image by default.")] = None,
    note: str = "",
    collection: Collection = POOLS,
    reason: Reason = "",
    json: Json = False,
    service: Service = HERE,
) -> None:
    """Say that near an image some exemplars are no evidence: they match it by mistake.

    Args:
        note: Of the suppress item.
    """
    [found] = Sources([image], ())
    if found.source is None:
        raise found.error or ValueError(f"{image} is no image")
    with service.client() as client:
        answer = client.collections.suppress(
            collection,
            load_image(found.source, MAX_IMAGE_BYTES),
            exemplars,
            min_similarity=min_similarity,
            id=id,
            source=printable(image)[:MAX_TEXT_CHARS],
            note=note,
            reason=reason,
        )
    _print_change(answer, json)


def _require_one(paths: Sequence[str], lists: Sequence[str] | None) -> None:
    found = [] if lists else [each for each, _ in zip(Sources(paths, ()), range(2), strict=False)]
    if len(found) != 1:
        raise ValueError("--id is for one image")


def _aware(time: datetime | None) -> datetime | None:
    """In UTC where it names no zone."""
    return time.replace(tzinfo=UTC) if time is not None and time.tzinfo is None else time


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise ValueError(f"--metadata takes NAME=VALUE, got {text!r}")
        pairs[name] = value
    return pairs


def _print_change(answer: ChangedAnswer, json: bool) -> None:
    if json:
        print_json(answer)
        return
    for item in answer.items:
        _print_item(item)
    done = "changed" if answer.changed else "nothing to change"
    print_line(f"{done}: {answer.collection}", answer.version, f"revision {answer.revision}")


def _print_item(item: ExemplarItem) -> None:
    print_line(f"{item.label:<8}", f"{item.state:<11}", item.id, item.source)
