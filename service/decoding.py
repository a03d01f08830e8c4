"""DecoderPool: decoding and preprocessing in processes that may die, hang or eat their memory, one image at a time.

Owns the life of the decoding processes (`service.decode_worker`): start, time limit, kill, replacement, recycling.
Whatever an image does to its decoder, its caller gets a typed error and the next image a working decoder.
"""

import asyncio
import json
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from perception.errors import CorruptImage, ImageError, ImageTooLarge, UnsupportedFormat
from perception.image import ImageLimits
from perception.preprocess import PreprocessSpec
from service.decode_worker import LENGTH_BYTES, READY, configuration
from service.errors import DecodeLimitExceeded, DecoderCrashed, DecoderUnavailable

_log = logging.getLogger("hardlook.decoding")
_IMAGE_ERRORS: dict[str, type[ImageError]] = {e.__name__: e for e in (UnsupportedFormat, CorruptImage, ImageTooLarge)}
_START_TIMEOUT_S = 60.0
_RESTART_PAUSE_S = 1.0
_MAX_HEADER_BYTES = 64 * 1024
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


@dataclass(frozen=True)
class DecoderSettings:
    """What every worker is started with; the limits hold for one image each."""

    limits: ImageLimits
    preprocess: PreprocessSpec
    timeout_s: float
    memory_bytes: int


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
        """Decode one image; after any error but an ImageError the worker must be killed."""
        self.served += 1
        await self._send(data)
        header: dict[str, Any] = json.loads(await self._receive(_MAX_HEADER_BYTES))
        most_frames = 2 * self._settings.limits.max_frames
        frame_shape = (3, self._settings.preprocess.size_px, self._settings.preprocess.size_px)
        pixels = await self._receive(most_frames * prod(frame_shape))
        self.retire = bool(header["retire"])
        if "error" in header:
            if header["error"] == "MemoryError":
                raise DecodeLimitExceeded("bytes of memory", self._settings.memory_bytes)
            fields = {name: tuple(v) if isinstance(v, list) else v for name, v in header["fields"].items()}
            raise _IMAGE_ERRORS[header["error"]](**fields)
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

    async def _send(self, data: bytes) -> None:
        self._stdin.writelines((len(data).to_bytes(LENGTH_BYTES, "big"), data))
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
        self._waiting += 1
        try:
            worker = await self._idle.get()
            while worker.ended:  # of itself while it was idle: no fault of this image
                self._spawn(self._replace(worker, "died"))
                worker = await self._idle.get()
        finally:
            self._waiting -= 1
        return await asyncio.shield(self._spawn(self._serve(worker, data)))

    def _spawn(self, work: Any) -> "asyncio.Task[Any]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # a caller who hung up does not read it

    async def _serve(self, worker: _Worker, data: bytes) -> PreparedImage:
        limit_s = self._settings.timeout_s
        reason = "died"  # until it has answered
        try:
            async with asyncio.timeout(limit_s):
                prepared = await worker.prepare(data)
            reason = ""
        except (ImageError, DecodeLimitExceeded):
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
        return prepared

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
