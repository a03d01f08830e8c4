"""Commands of hardlook-index that look a collection through, and that write and read pool files.

Owns arguments and output. They are mounted by `indexer.cli`; encoders and the database are imported by the commands.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from indexer.catalog_cli import CatalogUrl, Collection, Json, Root, applied, print_json
from indexer.errors import IndexerError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from indexer.catalog.ledger import Catalog
    from indexer.live.view import View
    from indexer.pairs import Progress
    from indexer.pool_file import PoolFile

_SHOWN = 100
Limit = Annotated[int, Parameter(help="The most that are listed; 0 for all.")]
Prompts = Annotated[list[str], Parameter(consume_multiple=True, negative=())]
OnConflict = Literal["skip", "refuse", "replace"]


def mount(app: App) -> None:
    """Add the commands to those of hardlook-index."""
    app.command(_duplicates, name="duplicates")
    app.command(_contradictions, name="contradictions")
    app.command(_probe, name="probe")
    app.command(_export_pool, name="export-pool")
    app.command(_import_pool, name="import-pool")


def _duplicates(
    *,
    root: Root,
    collection: Collection,
    min_similarity: float = 0.95,
    label: str | None = None,
    limit: Limit = _SHOWN,
    catalog: CatalogUrl = "",
    json: Json = False,
) -> None:
    """List near-duplicates within each pool, and which of each group to keep.

    Args:
        min_similarity: Cosine from which two exemplars are near-duplicates, in (0, 1].
        label: Only within this pool or class.
    """
    from indexer.curation import near_duplicates
    from indexer.opened import opened_view

    if not 0.0 < min_similarity <= 1.0:
        raise IndexerError(f"--min-similarity: must be in (0, 1], got {min_similarity}")
    with opened_view(root, catalog, collection) as view, _progress("comparing") as show:
        groups = near_duplicates(view, min_similarity, label, show)
    if json:
        print_json(
            {"collection": collection, "version": view.version, "groups": [asdict(g) for g in _first(groups, limit)]}
        )
        return
    for group in _first(groups, limit):
        print(f"{len(group.members)} alike in {_named(group.keep.exemplar.label)}")
        for member in group.members:
            same = ", the same file" if member.same_file and member is not group.keep else ""
            print(f"  {member.suggestion:<6}  {member.similarity:.4f}{same}  {member.exemplar.id}")
    deletions = sum(m.suggestion == "delete" for group in groups for m in group.members)
    print(f"{len(groups)} groups{_of(groups, limit)}; {deletions} exemplars could be deleted")


def _contradictions(
    *, root: Root, collection: Collection = "pools", limit: Limit = _SHOWN, catalog: CatalogUrl = "", json: Json = False
) -> None:
    """List exemplars whose nearest neighbour lies in another pool, worst first, and what to do about them."""
    from indexer.curation import contradictions
    from indexer.opened import opened_view

    with opened_view(root, catalog, collection) as view, _progress("searching") as show:
        found = contradictions(view, show)
    if json:
        listed = [{**asdict(c), "margin": c.margin} for c in _first(found, limit)]
        print_json({"collection": collection, "version": view.version, "contradictions": listed})
        return
    for c in _first(found, limit):
        own = "none" if c.own is None else f"{c.own.similarity:.4f} {c.own.id}"
        where = f"move to {c.to}" if c.to is not None else "look"
        print(f"{c.exemplar.label}  {c.exemplar.id}: {where}")
        print(f"  nearest of {c.other.pool} {c.other.similarity:.4f} {c.other.id}, of its own {own}; {c.reason}")
    print(f"{len(found)} contradictions{_of(found, limit)}")


def _probe(
    *,
    text: Prompts,
    not_: Annotated[list[str] | None, Parameter(name="--not", consume_multiple=True, negative=())] = None,
    gallery: str,
    encoder: str,
    root: Root,
    k: int = 20,
    min_similarity: float = -1.0,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: str = "cpu",
    catalog: CatalogUrl = "",
    json: Json = False,
) -> None:
    """List exemplars of a gallery that texts describe: candidates for a pool. Those that a pool has are marked.

    Args:
        text: What to look for, such as "a photo of a rifle".
        not_: What to leave out: exemplars that one of these describes at least as well, such as "a toy".
        gallery: Collection to look in.
        encoder: Name in the catalogue of encoders; it must have a text tower and have made the collection.
        k: Candidates of each text.
        min_similarity: Leave out what is less similar than this.
        precision: Of the encoder.
        device: Where the encoder runs.
    """
    from indexer.curation import probe
    from indexer.opened import opened_view

    if k < 1:
        raise IndexerError(f"-k: must be at least 1, got {k}")
    with opened_view(root, catalog, gallery) as view:
        prompts = _encoded([*text, *(not_ or ())], view, encoder, precision, device)
    pools = _pools(root, catalog, view)
    found = probe(
        view,
        text,
        prompts[: len(text)],
        k=k,
        min_similarity=min_similarity,
        negatives=prompts[len(text) :],
        pools=pools,
    )
    if json:
        print_json({"collection": gallery, "version": view.version, "candidates": [asdict(c) for c in found]})
        return
    for c in found:
        contrast = "" if c.contrast is None else f"  {c.contrast:+.4f}"
        known = "" if c.known is None else f"  in {c.known.pool} as {c.known.id}"
        print(f"{c.similarity:.4f}{contrast}  {c.exemplar.id}  {c.prompt!r}{known}")
    print(f"{len(found)} candidates, {sum(c.known is not None for c in found)} of them in a pool already")


def _export_pool(
    file: Path, *, root: Root, collection: Collection, label: str | None = None, catalog: CatalogUrl = ""
) -> None:
    """Write a collection, or one pool of it, to one file without pixels.

    Args:
        file: The file to write.
        label: Only this pool or class.
    """
    from indexer.opened import opened_view
    from indexer.pool_file import export, write_pool_file

    with opened_view(root, catalog, collection) as view:
        made = export(view, label)
    write_pool_file(file, made)
    print(f"wrote {file}: {made.header.n} exemplars of {collection} {made.header.version}, sha256 {made.header.sha256}")


def _import_pool(
    file: Path,
    *,
    root: Root,
    collection: str | None = None,
    on_conflict: OnConflict = "refuse",
    reason: str = "",
    catalog: CatalogUrl = "",
) -> None:
    """Take the exemplars of a pool file into a collection of the same encoder.

    Args:
        file: As 'export-pool' or a service wrote it.
        collection: By default the one that it was exported from; made where there is none.
        on_conflict: What to do about an id that is there with another image, label, source, metadata or note.
        reason: Why; kept in the audit log.
    """
    from indexer.opened import actor, adopt, opened_catalog
    from indexer.pool_file import read_pool_file
    from indexer.pool_import import MOST_EDITS, import_edits, merge
    from indexer.store import SnapshotStore

    pool_file = read_pool_file(file)
    name = collection or pool_file.header.collection
    with opened_catalog(root, catalog, create=True) as opened:
        adopt(root, opened, name)
        before = _target(root, opened, name, pool_file)
        view = before
        if pool_file.header.n > MOST_EDITS:
            SnapshotStore(root, name).publish(merge(pool_file, view, on_conflict))
            adopt(root, opened, name)
            view = _target(root, opened, name, pool_file)
        edits = import_edits(pool_file, view, on_conflict)
        _make(opened, edits, actor(), reason)
        after = opened.state(name)
    done = "imported" if after.version != before.version else "nothing to do:"
    print(f"{done} {name} {after.version}")


def _make(catalog: "Catalog", edits: Sequence[Any], actor: str, reason: str) -> None:
    from indexer.catalog.ledger import EditRequest

    if edits:
        applied(catalog, [EditRequest(edit, actor, reason) for edit in edits])


def _target(root: Path, catalog: "Catalog", name: str, pool_file: "PoolFile") -> "View":
    """The present view of a collection; an empty one, of the file's encoder, where there is none."""
    from indexer.catalog.state import Stamp
    from indexer.opened import view_of

    state = catalog.state(name)
    if state.encoder is None:
        header = pool_file.header
        state = replace(state, encoder=Stamp(header.encoder_name, header.encoder_fingerprint, header.dim))
    return view_of(root, catalog, state)


def _pools(root: Path, url: str, view: "View") -> "View | None":
    """The moderation collection, where there is one of the same encoder."""
    from indexer.errors import UnknownCollection
    from indexer.opened import opened_view

    try:
        with opened_view(root, url, "pools") as pools:
            return pools if pools.encoder_fingerprint == view.encoder_fingerprint else None
    except UnknownCollection:
        return None


def _encoded(
    prompts: Sequence[str], view: "View", name: str, precision: Literal["fp32", "bf16"], device: str
) -> "NDArray[np.float32]":
    """The embeddings (p, d) of prompts, by the encoder of a collection."""
    import torch

    import perception
    from perception.errors import FingerprintMismatch

    if not all(prompt.strip() for prompt in prompts):
        raise IndexerError("--text and --not: a text is empty")
    model = perception.load_encoder(name, precision=precision, device=device)
    if model.fingerprint != view.encoder_fingerprint:
        raise FingerprintMismatch(view.artefact, model.fingerprint, view.encoder_fingerprint)
    text = getattr(model, "text", None)
    if text is None:
        raise IndexerError(f"encoder {name!r} has no text tower")
    with torch.inference_mode():
        embeddings: NDArray[np.float32] = text.encode_text(list(prompts)).cpu().numpy()
    return embeddings


@contextmanager
def _progress(what: str) -> "Iterator[Progress]":
    """A bar on standard error; nothing where nobody watches."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _first(found: Sequence[Any], limit: int) -> Sequence[Any]:
    return found[:limit] if limit > 0 else found


def _of(found: Sequence[Any], limit: int) -> str:
    return f", the first {limit} shown" if 0 < limit < len(found) else ""


def _named(label: str) -> str:
    return label or "(no label)"
