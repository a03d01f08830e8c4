"""Bookkeeping: everything that writes to the catalogue, put together and started. Called by `service.startup` alone."""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace

from indexer.catalog.ledger import Catalog
from indexer.catalog.traffic import Decision
from indexer.compaction import stage_compacted
from indexer.errors import EditRefused
from indexer.store import SnapshotStore
from perception.verdict import DecisionPolicy
from service.books import Books
from service.candidates import Candidates
from service.decoding import DecoderPool, DecoderSettings
from service.editing import Editor
from service.engine import ServingEncoder
from service.flood import FloodGuard
from service.image_keeping import ImageKeeper
from service.intake import Upload
from service.jobs import JobImage, JobRunner
from service.judging import Judge
from service.kept_images import KeptImages
from service.keys import Caller
from service.oversight import Oversight
from service.provenance import ACTOR
from service.published import Published
from service.recording import Recorder, Recording
from service.runtime import Runtime
from service.schemas import snapshot_version
from service.settings import Settings
from service.shadow import ShadowEncoder
from service.telemetry import Metrics
from service.webhook_file import Hook
from service.webhooks import Webhooks
from service.wire_jobs import JobItem

_AFTER_FAILURE_S = 60.0
_PREVIEW_NICENESS = 10  # pictures may come late; answers may not
_PREVIEW_PATIENCE = 4  # times the limit of one image: whoever gives way on busy cores takes longer for the same
IMAGES_FOLDER = ".images"  # in that of the pools, where no collection can have this name
_log = logging.getLogger("hardlook.bookkeeping")


@dataclass(frozen=True)
class CandidateEncoder:
    """An encoder that might serve instead, and its collections."""

    encoder: ServingEncoder
    published: Published


async def open_books(
    settings: Settings,
    catalog: Catalog,
    published: Published,
    hooks: tuple[Hook, ...],
    rule: DecisionPolicy,
    decoding: DecoderSettings,
    candidate: CandidateEncoder | None,
    metrics: Metrics,
    stack: AsyncExitStack,
) -> Books:
    """Start the threads and tasks that write; the stack ends them, each before what it writes through.

    Raises:
        DecoderUnavailable: the decoding process of the candidate encoder, or of pictures, does not start.
    """
    editor = await stack.enter_async_context(Editor(catalog, published, settings.catalog_poll_s))
    webhooks = Webhooks(editor, hooks, observe=metrics.webhook) if hooks else None
    oversight = Oversight(editor, published, webhooks, settings.max_open_reviews, metrics.quarantined)
    guard = None
    if settings.flood_share:
        guard = FloodGuard(
            settings.flood_window, settings.flood_least, settings.flood_share, oversight.is_new, oversight.searched
        )
    recording = Recording(
        settings.log_decisions, settings.traffic_kept, settings.max_open_reviews if settings.review_verdicts else 0
    )
    images = _keeper(settings, editor, published, decoding, metrics)
    if images is not None:  # before the recorder, whose last decisions it still hears of
        await stack.enter_async_context(images)
    recorder = await stack.enter_async_context(
        Recorder(
            editor,
            recording,
            guard,
            also=oversight.tell,
            on_flood=oversight.on_flood,
            counted=metrics.recorded,
            on_decisions=_nobody if images is None else images.recorded,
        )
    )
    candidates = await stack.enter_async_context(
        Candidates(editor, published, rule, decoding, metrics.shadowed, settings.shadow_share)
    )
    if candidate is not None:
        shadow = ShadowEncoder(candidate.encoder, candidate.published.pools, rule)
        await candidates.run_encoder(shadow, candidate.published)
    waiting = {"changes": lambda: editor.depth, "decisions": lambda: recorder.depth}
    if webhooks is not None:
        waiting["webhooks"] = lambda: webhooks.depth
    if images is not None:
        waiting["images"] = lambda: images.depth
    metrics.watch_catalog(lambda: catalog.revision, waiting)
    return Books(editor, recorder, candidates, webhooks, guard, images)


async def _nobody(decisions: Sequence[Decision]) -> None:
    """Hear of decisions."""


def _keeper(
    settings: Settings, editor: Editor, published: Published, decoding: DecoderSettings, metrics: Metrics
) -> ImageKeeper | None:
    """What keeps small pictures; None where the operator has not asked for it."""
    if settings.keep_images == "none":
        return None
    folder = settings.images or settings.pools / IMAGES_FOLDER
    timeout_s = _PREVIEW_PATIENCE * decoding.timeout_s
    patient = replace(decoding, niceness=_PREVIEW_NICENESS, timeout_s=timeout_s)
    return ImageKeeper(
        KeptImages(folder, kept_s=settings.images_kept_s, max_bytes=settings.images_bytes),
        DecoderPool(patient, workers=1, replaced=metrics.decoder_replaced),
        editor,
        published,
        every=settings.keep_images == "all",
        queued=settings.review_verdicts,
        counted=metrics.kept_images,
    )


def job_runner(runtime: Runtime, books: Books) -> JobRunner:
    """What works on jobs, while callers who wait leave it room."""
    settings = runtime.settings

    async def classify(image: JobImage) -> JobItem:
        view = runtime.published.pools()
        shown = int(image.job.parameters.get("k", 1))
        until_s = asyncio.get_running_loop().time() + settings.deadline_s
        owner = Caller(image.job.owner, "owner of a job", frozenset())  # whose probing counts, whichever way it comes
        judge = Judge(runtime, owner, "/jobs", image.request_id, view, shown, until_s)
        with runtime.admission.work_on(1):
            item = await judge(Upload(image.id, image.source), image.source)
        return JobItem(
            **item.model_dump(),
            position=image.position,
            request_id=image.request_id,
            model=runtime.model.fingerprint,
            snapshot=snapshot_version(view),
            policy=runtime.policy.version,
        )

    return JobRunner(
        books.editor,
        classify,
        # Callers who wait come first; they leave room wherever a batch is not full.
        busy=lambda: runtime.admission.images >= settings.max_batch + settings.job_concurrency,
        webhooks=books.webhooks,
        concurrency=settings.job_concurrency,
        max_jobs=settings.max_jobs,
        max_bytes=settings.job_bytes,
        results_s=settings.job_results_s,
    )


async def keep_compact(settings: Settings, editor: Editor, published: Published) -> None:
    """Renew the snapshot of every collection of which much has changed; until cancelled, whatever goes wrong."""
    while True:
        await asyncio.sleep(settings.pools_reload_s)
        for name, view in published.snapshots.items():
            # Notes, disabled exemplars and suppress items stay on top of any snapshot, however many there are.
            movable = sum(record is None or record.is_plain for record in view.state.records.values())
            if movable < settings.compact_after:
                continue
            try:
                await _compact(editor, published, name)
            except Exception:
                _log.exception("the snapshot of %r is not renewed", name)
                await asyncio.sleep(_AFTER_FAILURE_S)


async def _compact(editor: Editor, published: Published, name: str) -> None:
    view = published.get(name)
    edit = await asyncio.to_thread(stage_compacted, SnapshotStore(published.root, name), view)
    if edit is None:
        return
    await asyncio.to_thread(published.base, name, edit.base)  # loaded before anybody waits for it
    reason = f"{len(view.state.records)} exemplars differed from the snapshot"
    with suppress(EditRefused):  # another process was quicker
        await editor.apply([edit], actor=ACTOR, reason=reason)
        _log.info("the snapshot of %r is renewed: %s", name, reason)
