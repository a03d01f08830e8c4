"""hardlook-index: build, publish and look after collections from the command line.

Owns arguments and output. Encoders and torch are imported by the one command that needs them.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from indexer import catalog_cli, curation_cli
from indexer.contents import Exemplar, Kind, collection_kind
from indexer.errors import BuildError, IndexerError
from indexer.sources import FolderSource, ManifestSource, Source, TarSource
from indexer.staging import read_details, stage_gallery
from indexer.store import SnapshotStore, collections
from perception.errors import PerceptionError
from perception.gallery import Gallery

_FAILURE, _INTERRUPTED = 2, 130
Root = Annotated[Path, Parameter(help="Folder of all collections.")]
Collection = Annotated[str, Parameter(help="Name of the collection; 'pools' is the moderation collection.")]


def main(tokens: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 0, 2 after an error of one line, or 130 after an interrupt."""
    try:
        _app()(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except (CycloptsError, IndexerError, PerceptionError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(_FAILURE)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
        sys.exit(_INTERRUPTED)


def _app() -> App:
    app = App(
        name="hardlook-index",
        help="Build, publish and look after collections of images.",
        suppress_keyboard_interrupt=False,
    )
    app.command(_build, name="build")
    app.command(_import, name="import")
    app.command(_publish, name="publish")
    app.command(_rollback, name="rollback")
    app.command(_verify, name="verify")
    app.command(_export, name="export")
    app.command(_stats, name="stats")
    app.command(_list, name="list")
    catalog_cli.mount(app)
    curation_cli.mount(app)
    return app


def _build(
    *,
    encoder: str,
    root: Root,
    collection: Collection,
    from_folder: Path | None = None,
    from_manifest: Path | None = None,
    from_tar: Annotated[list[Path] | None, Parameter(consume_multiple=True, negative=())] = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: str = "cpu",
    batch_size: Annotated[int, Parameter(help="Images encoded at once; at least 1.")] = 32,
    work_dir: Path | None = None,
    stage: Annotated[bool, Parameter(help="Write the version without publishing it.", negative=())] = False,
) -> None:
    """Encode images and publish them as the collection's new version.

    Give exactly one of the three sources. Files that cannot be used are skipped and listed in report.csv.

    Args:
        encoder: Name in the catalogue, 'hf-hub:OWNER/MODEL' or 'local-dir:FOLDER'.
        from_folder: Folder with a sub-folder for each pool or class.
        from_manifest: CSV with the columns path and label, optionally id; others become metadata.
        from_tar: Tar shards in webdataset layout.
        precision: Of the encoder; the service has to use the same.
        device: Where the encoder runs, such as 'cpu' or 'cuda'.
        work_dir: Where an interrupted build is resumed, with equal arguments; ROOT/.builds/COLLECTION by default.
    """
    source = _source(collection_kind(collection), from_folder, from_manifest, from_tar)
    import perception
    from indexer.build import build
    from indexer.workdir import WorkDir

    work_dir = work_dir or root / ".builds" / collection
    model = perception.load_encoder(encoder, precision=precision, device=device)
    with _progress_bar(source.count()) as bar:
        task = bar.task_ids[0]

        def show(done: int, skipped: int) -> None:
            bar.update(task, completed=done, skipped=skipped)

        report = build(model, source, collection=collection, work_dir=work_dir, batch_size=batch_size, progress=show)
    store = SnapshotStore(root, collection)
    version = store.stage(report.contents) if stage else store.publish(report.contents)
    WorkDir(work_dir).discard_parts()
    print(f"{'staged' if stage else 'published'} {collection} {version}: {_counts(report.contents.counts)}")
    if report.skipped:
        print(f"skipped {sum(report.skipped.values())} of {report.n_entries}: {_counts(report.skipped)}")
        print(f"report: {report.report_path}")


def _import(
    gallery: Path, *, root: Root, collection: Collection, encoder_name: str, details: Path | None = None
) -> None:
    """Publish a ready-made gallery file as the collection's new version.

    Args:
        gallery: Gallery file, as `export` writes it.
        encoder_name: Name of the encoder that made it, for a person; the fingerprint is in the file.
        details: JSON lines with sha256, source and metadata by id, like a snapshot's exemplars.jsonl.
    """
    known: dict[str, Exemplar] = read_details(details) if details is not None else {}
    contents = stage_gallery(Gallery.load(gallery), collection=collection, encoder_name=encoder_name, details=known)
    version = SnapshotStore(root, collection).publish(contents)
    print(f"published {collection} {version}: {_counts(contents.counts)}")


def _publish(snapshot: Path, *, root: Root, collection: Collection) -> None:
    """Publish a snapshot folder that was made elsewhere.

    Args:
        snapshot: Folder with manifest.json, called like its version.
    """
    print(f"published {collection} {SnapshotStore(root, collection).publish(snapshot)}")


def _rollback(*, root: Root, collection: Collection, to: str | None = None) -> None:
    """Serve an earlier version again.

    Args:
        to: The version; by default the one that was current before the current one was published.
    """
    print(f"rolled back {collection} to {SnapshotStore(root, collection).rollback(to)}")


def _verify(*, root: Root, collection: str | None = None) -> None:
    """Check every byte of every version, of one collection or of all."""
    problems: list[str] = []
    for name in [collection] if collection is not None else collections(root):
        found = SnapshotStore(root, name).verify()
        print(f"{name}: {'sound' if not found else f'{len(found)} problems'}")
        problems += found
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        sys.exit(_FAILURE)


def _export(gallery: Path, *, root: Root, collection: Collection, version: str | None = None) -> None:
    """Write a version to one gallery file, for audits and other offline work.

    Args:
        gallery: The file to write.
        version: By default the current one.
    """
    SnapshotStore(root, collection).load(None, version).to_gallery().save(gallery)
    print(f"wrote {gallery}")


def _stats(*, root: Root, collection: Collection, version: str | None = None) -> None:
    """Describe one version of a collection.

    Args:
        version: By default the current one.
    """
    store = SnapshotStore(root, collection)
    snapshot = store.load(None, version)
    labels_of: dict[str, set[str]] = {}
    for exemplar in snapshot.exemplars:
        if exemplar.sha256:
            labels_of.setdefault(exemplar.sha256, set()).add(exemplar.label)
    print(f"collection   {collection} ({snapshot.kind})")
    print(f"version      {snapshot.version} of {snapshot.created_at}, one of {len(store.versions())}")
    print(f"encoder      {snapshot.encoder_name}")
    print(f"fingerprint  {snapshot.encoder_fingerprint}")
    print(f"exemplars    {len(snapshot)} of {snapshot.dim} dimensions: {_counts(snapshot.counts)}")
    print(f"conflicts    {sum(len(labels) > 1 for labels in labels_of.values())} images under more than one label")


def _list(*, root: Root) -> None:
    """List the published collections and their current versions."""
    for name, kind in collections(root).items():
        try:
            manifest = SnapshotStore(root, name).manifest()
        except IndexerError as error:  # one damaged collection must not hide the others
            print(f"{name}  {kind}  damaged: {error}")
            continue
        total = sum(manifest.counts.values())
        print(f"{name}  {kind}  {manifest.version}  {manifest.created_at}  {total} exemplars  {manifest.encoder_name}")


def _source(
    kind: Kind, from_folder: Path | None, from_manifest: Path | None, from_tar: Sequence[Path] | None
) -> Source:
    given: list[Source] = [
        *([FolderSource(from_folder, kind)] if from_folder else []),
        *([ManifestSource(from_manifest, kind)] if from_manifest else []),
        *([TarSource(from_tar, kind)] if from_tar else []),
    ]
    if len(given) != 1:
        raise BuildError(f"give exactly one of --from-folder, --from-manifest, --from-tar; got {len(given)}")
    return given[0]


@contextmanager
def _progress_bar(total: int | None) -> Iterator[Progress]:
    columns = (TextColumn("encoding"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[skipped]} skipped"))
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times, console=Console(stderr=True)) as bar:
        bar.add_task("encoding", total=total, skipped=0)
        yield bar


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name or '(no label)'} {count}" for name, count in counts.items())
