"""hardlook collections: make galleries, look collections through, and take them elsewhere as files."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from service.client.commands.options import HERE, POOLS, Collection, Json, Label, Reason, Service
from service.client.commands.output import print_json, print_line
from service.client.curation import OnConflict

Limit = Annotated[int | None, Parameter(help="The most that are listed, at most 1000; 100 by default.")]


def mount(app: App) -> None:
    """Add the commands."""
    collections = App(name="collections", help="Make galleries, look collections through, export and import them.")
    collections.command(_create, name="create")
    collections.command(_duplicates, name="duplicates")
    collections.command(_contradictions, name="contradictions")
    collections.command(_probe, name="probe")
    collections.command(_export, name="export")
    collections.command(_import, name="import")
    app.command(collections)


def _create(name: str, *, reason: Reason = "", json: Json = False, service: Service = HERE) -> None:
    """Make an empty gallery.

    Args:
        name: Of the gallery.
    """
    with service.client() as client:
        answer = client.collections.create(name, reason=reason)
    if json:
        print_json(answer)
    else:
        done = "created" if answer.changed else "there already"
        print_line(f"{done}: {answer.collection}", answer.version, f"revision {answer.revision}")


def _duplicates(
    collection: Collection = POOLS,
    *,
    min_similarity: Annotated[float, Parameter(help="Cosine from which two are near-duplicates, 0.8 to 1.")] = 0.95,
    label: Label = None,
    limit: Limit = None,
    json: Json = False,
    service: Service = HERE,
) -> None:
    """List near-duplicates within each pool, and which of each group to keep."""
    with service.client() as client:
        answer = client.curation.duplicates(collection, min_similarity=min_similarity, label=label, limit=limit)
    if json:
        print_json(answer)
        return
    for group in answer.groups:
        print_line(f"{group.size} alike in {group.members[0].label}")
        for member in group.members:
            same = "the same file" if member.same_file and member.suggestion != "keep" else None
            print_line(f"  {member.suggestion:<6}", f"{member.similarity:.4f}", member.id, member.source, same)
    print_line(f"{len(answer.groups)} of {answer.total} groups", answer.collection, answer.version)


def _contradictions(
    collection: Collection = POOLS, *, limit: Limit = None, json: Json = False, service: Service = HERE
) -> None:
    """List exemplars whose nearest neighbour lies in another pool, worst first, and what to do about them."""
    with service.client() as client:
        answer = client.curation.contradictions(collection, limit=limit)
    if json:
        print_json(answer)
        return
    for item in answer.items:
        print_line(f"{item.label:<8}", item.id, item.suggestion + (f" to {item.to}" if item.to else ""))
        own = "nothing of its own" if item.own is None else f"its own {item.own.similarity:.4f} {item.own.id}"
        print_line(f"  nearest {item.other.pool} {item.other.similarity:.4f} {item.other.id}, {own}: {item.reason}")
    print_line(f"{len(answer.items)} of {answer.total} contradictions", answer.collection, answer.version)


def _probe(
    *prompts: Annotated[str, Parameter(help="What to look for, such as 'a photo of a rifle'.")],
    collection: Annotated[str, Parameter(help="Collection to look in.")],
    without: Annotated[
        list[str] | None, Parameter(name="--not", help="Leave out what this describes as well.", negative=())
    ] = None,
    k: Annotated[int, Parameter(help="The most candidates of each prompt.")] = 20,
    min_similarity: Annotated[float, Parameter(help="Leave out what is less similar, -1 to 1.")] = -1.0,
    json: Json = False,
    service: Service = HERE,
) -> None:
    """List exemplars that texts describe: candidates for a pool. Those that a pool has already are marked."""
    with service.client() as client:
        answer = client.curation.probe(collection, prompts, negatives=without or (), k=k, min_similarity=min_similarity)
    if json:
        print_json(answer)
        return
    for item in answer.items:
        known = None if item.known is None else f"in {item.known.pool} as {item.known.id}"
        print_line(f"{item.similarity:7.4f}", f"{item.label:<8}", item.id, item.source, known)


def _export(
    collection: Collection,
    file: Annotated[Path, Parameter(help="New file to write.")],
    *,
    label: Label = None,
    service: Service = HERE,
) -> None:
    """Write a collection, or one pool of it, to a pool file: embeddings and ids, no pixels, a checksum."""
    with service.client() as client:
        saved = client.curation.export_file(collection, file, label=label)
    print_line(f"wrote {saved.path}", f"{saved.size_bytes} bytes")


def _import(
    collection: Collection,
    file: Annotated[Path, Parameter(help="Pool file of the same encoder.")],
    *,
    on_conflict: Annotated[
        OnConflict, Parameter(help="About ids that are there with something else: keep that, refuse all, replace.")
    ] = "refuse",
    reason: Reason = "",
    json: Json = False,
    service: Service = HERE,
) -> None:
    """Take in a pool file; the collection is made where there is none."""
    with service.client() as client:
        answer = client.curation.import_file(collection, file, on_conflict=on_conflict, reason=reason)
    if json:
        print_json(answer)
        return
    done = "changed" if answer.changed else "nothing to change"
    print_line(f"{done}: {answer.collection}", answer.version, f"{answer.exemplars} exemplars in the file")
