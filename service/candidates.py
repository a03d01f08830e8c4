"""Candidates: versions that do not serve, to be compared with the one that does, and shadows that see live traffic."""

import asyncio
import re
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial

from sqlalchemy import Connection

from indexer.catalog.edits import Note
from indexer.catalog.state import State
from indexer.catalog.traffic import Shadow as ShadowRecord
from indexer.catalog.traffic import attach_shadow, recent
from indexer.contents import POOLS
from indexer.dry_run import DryRun, Side, dry_run
from indexer.live.view import View
from indexer.store import SnapshotStore
from perception.verdict import DecisionPolicy
from service.classifier import Classification
from service.decoding import DecoderSettings
from service.editing import Editor
from service.errors import UnknownItem
from service.published import Published
from service.shadow import Comparison, Shadow, ShadowEncoder, ShadowVersion

_VERSION = re.compile(r"[0-9a-f]{16}")
_FLIPS = 100


class Candidates:
    """Versions by name, and the shadows that run.

    Use it as an asynchronous context manager, inside that of the editor: at the end all shadows stop.

    Args:
        editor: of the catalogue.
        published: the collections.
        policy: that serves.
        decoding: how the service decodes.
        count: told of every comparison, see `Shadow`.
        share: of the images that shadows see.
    """

    def __init__(
        self,
        editor: Editor,
        published: Published,
        policy: DecisionPolicy,
        decoding: DecoderSettings,
        count: Callable[[str, str], object],
        share: float,
    ) -> None:
        self._editor, self._published, self._policy = editor, published, policy
        self._decoding, self._count, self._share = decoding, count, share
        self._changing = asyncio.Lock()
        self._version: Shadow | None = None
        self._encoder: Shadow | None = None
        self._encoder_pools: Published | None = None
        self._encoder_fingerprint = ""
        self._stack = AsyncExitStack()
        self._loop = asyncio.get_running_loop()
        self._records: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "Candidates":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()
        await self.stop_version(None)
        await asyncio.gather(*self._records, return_exceptions=True)

    @property
    def running(self) -> list[Shadow]:
        """The shadows that run: an encoder's, a version's."""
        return [shadow for shadow in (self._encoder, self._version) if shadow is not None]

    def observe(self, found: Classification, data: bytes | None, request_id: str) -> None:
        """Show an answered image to all shadows; costs the answer nothing."""
        for shadow in self.running:
            shadow.observe(
                found.sha256.hex(),
                found.embeddings,
                list(found.image.pixels),
                data,
                found.verdict.label,
                request_id=request_id,
            )

    async def run_encoder(self, encoder: ShadowEncoder, pools: Published) -> None:
        """Let a candidate encoder see the traffic, until the end."""
        shadow = Shadow(encoder, self._decoding, self._count, share=self._share, record=self._keep)
        self._encoder = await self._stack.enter_async_context(shadow)
        self._encoder_pools, self._encoder_fingerprint = pools, encoder.fingerprint

    async def run_version(self, version: str, actor: str, reason: str, request_id: str) -> None:
        """Let a version of the moderation pools see the traffic, in place of the one that may do so now.

        Raises:
            UnknownItem: there is no such version.
            Exception: those of `Editor.apply`.
        """
        view = await self.view(POOLS, version)
        async with self._changing:
            note = Note(POOLS, "shadow.start", version)
            await self._editor.apply([note], actor=actor, reason=reason, request_id=request_id)
            await self._end_version()
            shadow = Shadow(ShadowVersion(view, self._policy), self._decoding, self._count, share=self._share)
            self._version = await shadow.__aenter__()

    async def stop_version(self, actor: str | None, reason: str = "", request_id: str = "") -> bool:
        """Let no version see the traffic any more; whether one did.

        Args:
            actor: who wishes so; None at the end of the service, which is not logged.
            reason: why.
            request_id: of the request.
        """
        async with self._changing:
            if self._version is None:
                return False
            if actor is not None:
                note = Note(POOLS, "shadow.stop", self._version.name.removeprefix("version "))
                await self._editor.apply([note], actor=actor, reason=reason, request_id=request_id)
            await self._end_version()
            return True

    async def view(self, collection: str, version: str) -> View:
        """A version of a collection: the present one, an earlier one, or one that is on disk and was never published.

        The latter as it would be if it were published now: with what was changed since the service runs on top.

        Raises:
            UnknownItem: there is none.
            CatalogError, SnapshotError: it cannot be read.
        """
        present = self._published.get(collection)
        if present.version == version:
            return present
        return await asyncio.to_thread(self._find, present.state, version)

    async def dry_run(self, candidate: View | None, limit: int) -> DryRun:
        """Judge recent traffic again.

        Args:
            candidate: pools under the encoder that serves; None for the candidate encoder, with its own.
            limit: verdicts to look at, the newest.

        Raises:
            UnknownItem: no candidate encoder runs.
            NotReady: no pools.
        """
        present = self._published.pools()
        other, fingerprint = candidate, None
        if other is None:
            if self._encoder_pools is None:
                raise UnknownItem("candidate encoder", "shadow")
            other, fingerprint = self._encoder_pools.pools(), self._encoder_fingerprint

        encoder = present.encoder_fingerprint
        seen = await self._editor.read(
            lambda connection: recent(
                connection, encoder_fingerprint=encoder, limit=limit, shadow_fingerprint=fingerprint
            )
        )
        theirs = seen.embeddings if seen.shadow_embeddings is None else seen.shadow_embeddings
        sides = Side(present, self._policy, seen.embeddings), Side(other, self._policy, theirs)
        return await asyncio.to_thread(lambda: dry_run(seen.seen, *sides, limit=_FLIPS))

    def _find(self, present: State, version: str) -> View:
        catalog = self._editor.catalog
        revision = catalog.revision_of(present.collection, version) if _VERSION.fullmatch(version) else None
        if revision is not None:
            return self._published.view_of(catalog.state_at(present.collection, revision))
        if version in SnapshotStore(self._published.root, present.collection).versions():
            return self._published.view_of(replace(present, base=version))
        raise UnknownItem("version", version)

    async def _end_version(self) -> None:
        shadow, self._version = self._version, None
        if shadow is not None:
            await shadow.__aexit__(None, None, None)

    def _keep(self, comparison: Comparison) -> None:
        """Put what a candidate encoder saw beside the verdict, for dry runs; called in the shadow's thread."""
        opinion = comparison.opinion
        record = ShadowRecord(comparison.fingerprint, opinion.embedding, opinion.verdict.label)
        write = partial(attach_shadow, request_id=comparison.request_id, sha256=comparison.sha256, shadow=record)

        def begin() -> None:
            task = asyncio.create_task(self._written(write))
            self._records.add(task)
            task.add_done_callback(self._records.discard)

        self._loop.call_soon_threadsafe(begin)

    async def _written(self, write: Callable[[Connection], int]) -> None:
        # The verdict itself is written a moment after its answer.
        for _ in range(20):
            if await self._editor.write(write):
                return
            await asyncio.sleep(0.1)
