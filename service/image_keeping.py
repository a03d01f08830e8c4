"""ImageKeeper: keeps small pictures of images where the operator wishes so, after the answers and beside them.

Owns which images, and when pictures go. What it needs of an image waits in a bounded queue until the answer is out;
what finds no room is dropped and counted. Pictures are made by a decoding process of its own, and the disk is touched
by threads of its own: a slow or full disk costs pictures, never a verdict. Knows nothing of HTTP.
"""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Self, TypeVar

from indexer.catalog.review_images import Standing, standing_of
from indexer.catalog.traffic import Decision
from indexer.errors import IndexerError, UnknownExemplar
from indexer.live.view import View
from perception.errors import ImageError
from perception.verdict import VerdictLabel
from service.classifier import Classification
from service.decoding import DecoderPool, FrameOrigin
from service.editing import Editor
from service.errors import DecodingError, InvalidParameter, NotReady, ServiceError
from service.kept_images import KeptImages
from service.published import Published

T = TypeVar("T")
Outcome = Literal["kept", "present", "unwanted", "dropped", "failed", "expired", "forgotten"]
MAX_WAITING = 256  # images
MAX_WAITING_BYTES = 128 * 1024 * 1024
PRUNE_S = 60.0
_LOOK_THROUGH = 60  # prunings between two looks for pictures of what is no exemplar any more
_SETTLED_S = 3600.0  # others are changing; those are looked through later
_WAIT_S = 2.0  # the most that who asks for something of the disk waits for it
_THREADS = 2  # one changes the folder, the other reads it
_OF_DISK = "disk: "
_log = logging.getLogger("hardlook.images")


@dataclass(frozen=True, eq=False)
class _Sight:
    """An image of which there may have to be a picture.

    Attributes:
        sha256: of the file, in hex.
        data: the file.
        frame: 0-based number in the file of the one to show.
        still: whether there is no other.
        exemplar: collection and id of the exemplar that it became; None for one that was judged.
        reviewed: whether its verdict may have put it into the review queue.
    """

    sha256: str
    data: bytes = field(repr=False)
    frame: int
    still: bool
    exemplar: tuple[str, str] | None = None
    reviewed: bool = False


class ImageKeeper:
    """Keeps pictures; an asynchronous context manager, inside that of the editor and around that of the recorder.

    Args:
        images: where they are kept.
        decoder: makes them; entered and left with this.
        editor: of the catalogue.
        published: the collections.
        every: whether every image that got a verdict is kept, or only those in the review queue; exemplars always are.
        queued: whether verdicts put images into the review queue.
        counted: told of each outcome, and how many pictures had it: 'kept'; 'present', there already; 'unwanted', not
            in the queue or no exemplar any more; 'dropped' for want of room; 'failed'; 'expired'; 'forgotten'.
        max_waiting, max_waiting_bytes: images that wait, and the bytes of their files.
        prune_s: how often to look for what is too old or too much.
        last_s: at the end, how long to go on with what waits.
    """

    def __init__(
        self,
        images: KeptImages,
        decoder: DecoderPool,
        editor: Editor,
        published: Published,
        *,
        every: bool,
        queued: bool = True,
        counted: Callable[[Outcome, int], object] = lambda outcome, n: None,
        max_waiting: int = MAX_WAITING,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
        prune_s: float = PRUNE_S,
        last_s: float = 5.0,
    ) -> None:
        self._images, self._decoder, self._editor, self._published = images, decoder, editor, published
        self._every, self._queued, self._counted = every, queued, counted
        self._max_waiting, self._max_bytes, self._prune_s, self._last_s = (
            max_waiting,
            max_waiting_bytes,
            prune_s,
            last_s,
        )
        self._unrecorded: dict[str, _Sight] = {}  # by hash; their verdicts are not in the catalogue yet
        self._sights: asyncio.Queue[_Sight] = asyncio.Queue()
        self._waiting = self._waiting_bytes = 0
        self._changing = asyncio.Lock()  # what is wanted is found out and done without anything in between
        self._disk = ThreadPoolExecutor(_THREADS, "images")
        self._tasks: set[asyncio.Task[object]] = set()
        self._failures: set[str] = set()
        self._open = False

    async def __aenter__(self) -> Self:
        """Begin. A folder that cannot be made is logged, as any failure of it is.

        Raises:
            DecoderUnavailable: the decoding process does not start.
        """
        await self._decoder.__aenter__()
        await self._within(self._on_disk(self._images.prepare))
        self._open = True
        self._spawn(self._keep_all())
        self._spawn(self._keep_house())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._open = False
        with suppress(TimeoutError):
            await asyncio.wait_for(self._sights.join(), self._last_s)
        if self._waiting:
            _log.warning("%d images have no picture: there was no time for them until the end", self._waiting)
            self._counted("dropped", self._waiting)
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._decoder.__aexit__()
        self._disk.shutdown(wait=False, cancel_futures=True)

    @property
    def depth(self) -> int:
        """How many images wait for their picture."""
        return self._waiting

    def judged(self, found: Classification) -> None:
        """Take an image that got a verdict; returns at once and raises nothing.

        One whose verdict may put it into the review queue waits until `recorded` says that it is in the catalogue: call
        this right after `Recorder.observe`, without giving up the event loop in between.
        """
        reviewed = self._queued and found.verdict.label is VerdictLabel.REVIEW
        if not reviewed and not self._every:
            return
        still = found.image.frames_in_file == 1
        sight = _Sight(found.sha256.hex(), found.file, found.frame.index, still, reviewed=reviewed)
        if reviewed and sight.sha256 in self._unrecorded:
            return
        if self._has_room(sight):
            if reviewed:
                self._unrecorded[sight.sha256] = sight
            else:
                self._sights.put_nowait(sight)

    async def recorded(self, decisions: Sequence[Decision]) -> None:
        """Go on with images whose verdicts are in the catalogue now."""
        for decision in decisions:
            sight = self._unrecorded.pop(decision.sha256, None)
            if sight is not None:
                self._sights.put_nowait(sight)

    def added(self, collection: str, id: str, sha256: str, data: bytes, origin: FrameOrigin, *, still: bool) -> None:
        """Take an image that has become an exemplar, or a suppress item; returns at once and raises nothing."""
        sight = _Sight(sha256, data, origin.index, still, exemplar=(collection, id))
        if self._has_room(sight):
            self._sights.put_nowait(sight)

    async def decided(self, collection: str, exemplar_id: str | None, sha256: str) -> None:
        """Follow a decision of the review queue: what became an exemplar stays, what was dismissed goes.

        Args:
            collection: of the item.
            exemplar_id: that came of it; None where it was dismissed.
            sha256: of the image file; of what is none nothing is kept.
        """

        async def follow() -> None:
            async with self._changing:
                if exemplar_id is None and not self._every:
                    await self._forget(sha256, exemplar=False)
                elif exemplar_id is not None and self._is(collection, exemplar_id, sha256):
                    await self._on_disk(partial(self._images.promote, sha256))

        await self._within(follow())

    async def removed(self, sha256: str) -> None:
        """Forget the picture of an exemplar that was deleted, unless another one is of the same file."""

        async def follow() -> None:
            async with self._changing:
                if not await self._on_disk(partial(self._images.kept, [sha256])):
                    return  # looking through large collections takes a while
                if not await asyncio.to_thread(live_of, self._views(), {sha256}):
                    await self._forget(sha256, exemplar=True)

        if sha256:
            await self._within(follow())

    async def read(self, sha256: str) -> bytes | None:
        """The picture of an image file, a JPEG; None where none is kept.

        Raises:
            ValueError: not 64 lower-case hex digits.
            NotReady: the folder cannot be read, or not in time.
        """
        try:
            async with asyncio.timeout(_WAIT_S):
                return await self._on_disk(partial(self._images.read, sha256))
        except (OSError, TimeoutError) as error:  # the latter is one of the former
            self._fail(error)
            raise NotReady("the folder of kept images cannot be read") from error

    async def kept(self, sha256s: Iterable[str]) -> frozenset[str]:
        """Of which files there are pictures; of none where the folder cannot be read."""
        names = frozenset(sha256s)
        found = await self._tried(asyncio.wait_for(self._on_disk(partial(self._images.kept, names)), _WAIT_S))
        return found or frozenset()

    def _has_room(self, sight: _Sight) -> bool:
        size_bytes = len(sight.data)
        if not self._open or self._waiting >= self._max_waiting or self._waiting_bytes + size_bytes > self._max_bytes:
            self._counted("dropped", 1)
            return False
        self._waiting += 1
        self._waiting_bytes += size_bytes
        return True

    async def _keep_all(self) -> None:
        while True:
            sight = await self._sights.get()
            try:
                outcome = await self._tried(self._keep(sight))
                self._counted(outcome or "failed", 1)
            finally:
                self._waiting -= 1
                self._waiting_bytes -= len(sight.data)
                self._sights.task_done()

    async def _keep(self, sight: _Sight) -> Outcome:
        if await self._place(sight) is None:
            return "unwanted"
        jpeg = None
        # What is there already is the same, unless it may be of another frame.
        if not sight.still or not await self.kept([sight.sha256]):
            jpeg = (await self._decoder.preview(sight.data, sight.frame)).jpeg
        async with self._changing:
            place = await self._place(sight)
            if place is None:
                return "unwanted"
            stay = self._images.promote if place == "exemplars" else self._images.touch
            if jpeg is None and await self._on_disk(partial(stay, sight.sha256)):
                return "present"
            if jpeg is None:  # its time was over in this moment
                jpeg = (await self._decoder.preview(sight.data, sight.frame)).jpeg
            keep = partial(self._images.keep, sight.sha256, jpeg, exemplar=place == "exemplars")
            kept = await self._on_disk(keep)
        self._failures -= {kind for kind in self._failures if kind.startswith(_OF_DISK)}  # it works again
        return "kept" if kept else "dropped"

    async def _place(self, sight: _Sight) -> Literal["recent", "exemplars"] | None:
        """Where a picture belongs at this moment; None where there is to be none."""
        if sight.exemplar is not None:
            return "exemplars" if self._is(*sight.exemplar, sight.sha256) else None
        standing: Standing | None = None
        if sight.reviewed:
            standing = await self._editor.read(partial(standing_of, image_sha256=sight.sha256))
        if standing is None:
            return "recent" if self._every else None
        if standing.exemplar_id is not None and self._is(standing.collection, standing.exemplar_id, sight.sha256):
            return "exemplars"  # somebody was quick
        return "recent" if self._every or standing.undecided else None

    def _is(self, collection: str, id: str, sha256: str) -> bool:
        """Whether an exemplar is there and is of that file."""
        view = self._published.snapshots.get(collection)
        with suppress(UnknownExemplar):
            return view is not None and view.exemplar(id).sha256 == sha256
        return False

    def _views(self) -> list[View]:
        return list(self._published.snapshots.values())

    async def _forget(self, sha256: str, *, exemplar: bool) -> None:
        with suppress(ValueError):  # what the flood guard reports need not be of a file
            if await self._on_disk(partial(self._images.forget, sha256, exemplar=exemplar)):
                self._counted("forgotten", 1)

    async def _keep_house(self) -> None:
        """Remove what is too old or too much; now and then take back what is kept for an exemplar that is gone.

        A collection that was rolled back, or changed by another process, leaves such pictures.
        """
        images = self._images
        for turn in itertools.count():
            removed = await self._tried(self._on_disk(lambda: images.prune(images.clock())))
            if removed:
                self._counted("expired", removed)
            if turn % _LOOK_THROUGH == 0:
                await self._tried(self._look_through(images.clock() - _SETTLED_S))
            await asyncio.sleep(self._prune_s)

    async def _look_through(self, before_s: float) -> None:
        found = await self._on_disk(partial(self._images.exemplars, before_s))
        if not found:
            return
        async with self._changing:
            live = await asyncio.to_thread(live_of, self._views(), set(found))
            for sha256 in set(found) - live:
                await self._on_disk(partial(self._images.take_back, sha256))

    async def _on_disk(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, work)

    def _spawn(self, work: Coroutine[Any, Any, object]) -> "asyncio.Task[object]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _within(self, work: Awaitable[object]) -> None:
        """Do something, and wait for it as long as a caller can be made to wait; it goes on after that."""
        await asyncio.wait({self._spawn(self._tried(work))}, timeout=_WAIT_S)

    async def _tried(self, work: Awaitable[T]) -> T | None:
        """Do something; None where it fails, which is logged."""
        try:
            return await work
        except Exception as error:
            self._fail(error)
            return None

    def _fail(self, error: Exception) -> None:
        """Log once for each kind of failure, not once for each image."""
        kind = _OF_DISK + (error.strerror or "too slow") if isinstance(error, OSError) else type(error).__name__
        if kind in self._failures:
            return
        self._failures.add(kind)
        expected = isinstance(
            error, OSError | ImageError | DecodingError | InvalidParameter | IndexerError | ServiceError
        )
        _log.error("a picture is not kept or not found: %s", kind, exc_info=None if expected else error)


def live_of(views: Sequence[View], sha256s: set[str]) -> set[str]:
    """Of which files there are exemplars or suppress items, disabled ones too, in some collections."""
    found: set[str] = set()
    for view in views:
        changed = view.state.records
        found |= {record.exemplar.sha256 for record in changed.values() if record is not None} & sha256s
        if view.base is not None:
            found |= {each.sha256 for each in view.base.exemplars if each.sha256 in sha256s and each.id not in changed}
    return found
