"""DecoderPool: decoding and preprocessing in processes that may die, hang or eat their memory, one image at a time.

Owns the life of the decoding processes (`service.decode_worker`): start, time limit, kill, replacement, recycling.
Whatever an image does to its decoder, its caller gets a typed error and the next image a working decoder.
"""

import asyncio
import json
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from perception.errors import CorruptImage, ImageError, ImageTooLarge, UnsupportedFormat
from perception.image import ImageLimits
from perception.preprocess import PreprocessSpec
from service.decode_worker import (
    LENGTH_BYTES,
    NO_SUCH_FRAME,
    PREVIEW_SIDE_PX,
    READY,
    configuration,
    preview_request,
)
from service.errors import DecodeLimitExceeded, DecoderCrashed, DecoderUnavailable, InvalidParameter

T = TypeVar("T")
_log = logging.getLogger("hardlook.decoding")
_IMAGE_ERRORS: dict[str, type[ImageError]] = {e.__name__: e for e in (UnsupportedFormat, CorruptImage, ImageTooLarge)}
_START_TIMEOUT_S = 60.0
_RESTART_PAUSE_S = 1.0
_MAX_HEADER_BYTES = 64 * 1024
MAX_PREVIEW_BYTES = 1024 * 1024  # noise of 512 x 512 pixels takes 0.4 MiB
_READ_AHEAD_BYTES = 1024 * 1024
# glibc gives blocks above the first threshold, and what is free above the second at the top of its heap, back to the
# system as soon as they are freed; lower ones would make every small image pay for fresh pages. OpenBLAS would reserve
# address space for every core. Nothing else of the service's environment reaches a process that handles hostile bytes.
_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1024 * 1024),
    "MALLOC_TRIM_THRESHOLD_": str(8 * 1024 * 1024),
    "OPENBLAS_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class FrameOrigin:
    """Where a frame comes from: 0-based number in the file, and what its transparency was laid on."""

    index: int
    background: str | None


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """One image, ready for the encoder.

    Attributes:
        format, width_px, height_px, frames_in_file: as in `perception.image.DecodedImage`.
        frames: f origins, at least one.
        pixels: (f, 3, h, w) uint8 RGB.
    """

    format: str
    width_px: int
    height_px: int
    frames_in_file: int
    frames: tuple[FrameOrigin, ...]
    pixels: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Preview:
    """A small picture of one frame, for people.

    Attributes:
        jpeg: a whole JPEG file, RGB, without metadata.
        width_px, height_px: of the picture; the longer is 512 at most.
    """

    jpeg: bytes
    width_px: int
    height_px: int


@dataclass(frozen=True)
class DecoderSettings:
    """What every worker is started with; the limits hold for one image each.

    Attributes:
        limits, preprocess: of the images, and of the frames that `prepare` makes.
        timeout_s, memory_bytes: for one image.
        niceness: of the process, 0 to 19; for work that must take no time from other work.
    """

    limits: ImageLimits
    preprocess: PreprocessSpec
    timeout_s: float
    memory_bytes: int
    niceness: int = 0


class _ProtocolBroken(Exception):
    """A worker answered what it cannot answer; it is not to be trusted any more."""


class _Worker:
    """One decoding process; used by one caller at a time."""

    def __init__(self, process: asyncio.subprocess.Process, settings: DecoderSettings) -> None:
        self._process, self._settings = process, settings
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin, self._stdout = process.stdin, process.stdout
        self.served = 0
        self.retire = False

    @classmethod
    async def start(cls, settings: DecoderSettings) -> Self:
        """Start a process and wait until it is ready.

        Raises:
            DecoderUnavailable: it ended, or did not get ready in time.
        """
        environment = {**_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(entry or "." for entry in sys.path)}
        # -P: the working directory is not searched for modules.
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "service.decode_worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=environment,
            limit=_READ_AHEAD_BYTES,
        )
        worker = cls(process, settings)
        if settings.niceness:
            with suppress(OSError):  # it has ended, which is noticed below
                os.setpriority(os.PRIO_PROCESS, process.pid, settings.niceness)
        config = configuration(settings.limits, settings.preprocess, settings.timeout_s, settings.memory_bytes)
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                await worker._send(json.dumps(config).encode())
                if await worker._receive(len(READY)) != READY:
                    raise _ProtocolBroken
        except (OSError, EOFError, TimeoutError, _ProtocolBroken) as error:
            code = await worker.exit_code()
            await worker.kill()
            raise DecoderUnavailable(f"a decoding process did not start (exit code {code})") from error
        except asyncio.CancelledError:
            await worker.kill()
            raise
        return worker

    async def prepare(self, data: bytes) -> PreparedImage:
        """Decode one image; after any error but those of the image or the request the worker must be killed."""
        most_frames = 2 * self._settings.limits.max_frames
        frame_shape = (3, self._settings.preprocess.size_px, self._settings.preprocess.size_px)
        header, pixels = await self._ask(b"", data, most_frames * prod(frame_shape))
        frames = tuple(FrameOrigin(int(index), background) for index, background in header["frames"])
        if not frames or len(pixels) != len(frames) * prod(frame_shape):
            raise _ProtocolBroken
        return PreparedImage(
            str(header["format"]),
            int(header["width_px"]),
            int(header["height_px"]),
            int(header["frames_in_file"]),
            frames,
            np.frombuffer(pixels, np.uint8).reshape(len(frames), *frame_shape),
        )

    async def preview(self, data: bytes, frame: int) -> Preview:
        """A small picture of one frame; errors as of `prepare`."""
        header, jpeg = await self._ask(preview_request(frame), data, MAX_PREVIEW_BYTES)
        width_px, height_px = int(header["width_px"]), int(header["height_px"])
        whole = jpeg.startswith(b"\xff\xd8\xff") and jpeg.endswith(b"\xff\xd9")
        if not whole or not 1 <= min(width_px, height_px) <= max(width_px, height_px) <= PREVIEW_SIDE_PX:
            raise _ProtocolBroken
        return Preview(jpeg, width_px, height_px)

    async def _ask(self, request: bytes, data: bytes, most_bytes: int) -> tuple[dict[str, Any], bytes]:
        """Header and body of the answer."""
        self.served += 1
        await self._send(request, data)
        header: dict[str, Any] = json.loads(await self._receive(_MAX_HEADER_BYTES))
        body = await self._receive(most_bytes)
        self.retire = bool(header["retire"])
        if "error" not in header:
            return header, body
        kind, fields = header["error"], header["fields"]
        if kind == "MemoryError":
            raise DecodeLimitExceeded("bytes of memory", self._settings.memory_bytes)
        if kind == NO_SUCH_FRAME:
            reason = f"it is {int(fields['frame'])}, the examined frames are {[int(at) for at in fields['frames']]}"
            raise InvalidParameter("frame", reason)
        raise _IMAGE_ERRORS[kind](**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()})

    async def kill(self) -> None:
        """End the process, however it is."""
        if not self.ended:
            with suppress(ProcessLookupError):  # it ended by itself in this moment
                self._process.kill()
        self._stdin.close()
        await self._process.wait()

    @property
    def ended(self) -> bool:
        """Whether the process is known to have ended."""
        return self._process.returncode is not None

    async def exit_code(self) -> int | None:
        """The code of a process whose pipe has closed, negative for a signal; None where it still runs.

        To be asked before `kill`, which may take the code away from asyncio.
        """
        try:
            return await asyncio.wait_for(self._process.wait(), 1.0)
        except TimeoutError:
            return None

    async def _send(self, *frames: bytes) -> None:
        self._stdin.writelines(part for frame in frames for part in (len(frame).to_bytes(LENGTH_BYTES, "big"), frame))
        await self._stdin.drain()

    async def _receive(self, most_bytes: int) -> bytes:
        length = int.from_bytes(await self._stdout.readexactly(LENGTH_BYTES), "big")
        if length > most_bytes:
            raise _ProtocolBroken
        return await self._stdout.readexactly(length)


class DecoderPool:
    """A fixed number of decoding processes, started beforehand and replaced when they end.

    Args:
        settings: what every worker is started with.
        workers: how many; as many images are decoded at a time.
        images_per_worker: after that many a worker is replaced, so that what it leaks comes back.
        replaced: told why each worker was replaced: 'died', 'limit', 'grown' or 'served enough'.
    """

    def __init__(
        self,
        settings: DecoderSettings,
        *,
        workers: int,
        images_per_worker: int = 10_000,
        replaced: Callable[[str], object] = lambda reason: None,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.workers = workers
        self._settings, self._images_per_worker = settings, images_per_worker
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._replaced = replaced
        self._waiting = 0
        self._closing = False

    @property
    def waiting(self) -> int:
        """How many images wait for a worker."""
        return self._waiting

    async def __aenter__(self) -> Self:
        """Start all workers.

        Raises:
            DecoderUnavailable: one of them did not start.
        """
        starts = await asyncio.gather(
            *(_Worker.start(self._settings) for _ in range(self.workers)), return_exceptions=True
        )
        for outcome in starts:
            if isinstance(outcome, _Worker):
                self._idle.put_nowait(outcome)
        failure = next((outcome for outcome in starts if isinstance(outcome, BaseException)), None)
        if failure is not None:
            await self.__aexit__()
            raise failure
        return self

    async def __aexit__(self, *_: object) -> None:
        """End all workers, busy ones when their image is done."""
        self._closing = True
        while self._tasks:
            await asyncio.wait(self._tasks)
        while not self._idle.empty():
            await self._idle.get_nowait().kill()

    async def prepare(self, data: bytes) -> PreparedImage:
        """Decode and preprocess one image file, as soon as a worker is free.

        The work goes on when the caller is cancelled: at its end the worker is as good as new, where ending it would
        let callers who hang up cost a process each.

        Raises:
            ImageError: see `perception.image.decode`.
            DecodeLimitExceeded: it took more time or memory than one image may.
            DecoderCrashed: the decoder died.
        """
        return await self._work(lambda worker: worker.prepare(data))

    async def preview(self, data: bytes, frame: int = 0) -> Preview:
        """A small picture of one frame of an image file, made as `prepare` is: RGB, upright, transparency on white.

        Args:
            data: the file's bytes, none of which are in the picture.
            frame: 0-based number in the file, of a frame that is examined; see `FrameOrigin.index`.

        Raises:
            InvalidParameter: the image has no such frame, or it is not examined.
            Exception: those of `prepare`.
        """
        if not 0 <= frame < 2**32:
            raise InvalidParameter("frame", f"it is {frame}, frames are counted from 0")
        return await self._work(lambda worker: worker.preview(data, frame))

    async def _work(self, ask: Callable[[_Worker], Awaitable[T]]) -> T:
        """Ask a worker, as soon as one is free."""
        self._waiting += 1
        try:
            worker = await self._idle.get()
            while worker.ended:  # of itself while it was idle: no fault of this image
                self._spawn(self._replace(worker, "died"))
                worker = await self._idle.get()
        finally:
            self._waiting -= 1
        served: T = await asyncio.shield(self._spawn(self._serve(worker, ask)))
        return served

    def _spawn(self, work: Any) -> "asyncio.Task[Any]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # a caller who hung up does not read it

    async def _serve(self, worker: _Worker, ask: Callable[[_Worker], Awaitable[T]]) -> T:
        limit_s = self._settings.timeout_s
        reason = "died"  # until it has answered
        try:
            async with asyncio.timeout(limit_s):
                answer = await ask(worker)
            reason = ""
        except (ImageError, DecodeLimitExceeded, InvalidParameter):
            reason = ""
            raise
        except TimeoutError as error:
            reason = "limit"
            raise DecodeLimitExceeded("seconds", limit_s) from error
        except (OSError, EOFError, ValueError, KeyError, TypeError, _ProtocolBroken) as error:
            raise DecoderCrashed(await worker.exit_code()) from error
        finally:
            if not reason and worker.retire:
                reason = "grown"
            elif not reason and worker.served >= self._images_per_worker:
                reason = "served enough"
            if reason:
                self._spawn(self._replace(worker, reason))
            else:
                self._idle.put_nowait(worker)
        return answer

    async def _replace(self, worker: _Worker, reason: str) -> None:
        """End a worker and put a new one in its place, however often that has to be tried."""
        self._replaced(reason)
        await worker.kill()
        while not self._closing:
            try:
                self._idle.put_nowait(await _Worker.start(self._settings))
            except (DecoderUnavailable, OSError) as error:
                _log.error("decoding process not replaced, trying again: %s", error)
                await asyncio.sleep(_RESTART_PAUSE_S)
            else:
                return
