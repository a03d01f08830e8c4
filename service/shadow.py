"""Shadows: candidates that see live traffic. Their verdicts are compared with those that were answered, and not heard.

Owns that a shadow can neither slow nor fail the service: what it is shown waits in a bounded queue, is left out and
counted where that is full, and is judged in one thread of low priority. Which candidates run, the caller decides.
"""

import asyncio
import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from indexer.errors import IndexerError
from indexer.live.view import View
from indexer.snapshot import Snapshot
from perception.errors import PerceptionError
from perception.preprocess import PreprocessSpec
from perception.verdict import DecisionPolicy, Verdict, VerdictLabel, most_cautious
from service.decoding import DecoderPool, DecoderSettings, PreparedImage
from service.engine import Engine, Query, Search, ServingEncoder
from service.errors import ServiceError

WINDOW = 1000
MAX_WAITING = 16
MAX_WAITING_BYTES = 64 * 1024 * 1024
# Low, not lowest: a thread that holds Python's lock and gets no time from the system holds up all others.
_NICENESS = 5
_EXPECTED = (PerceptionError, IndexerError, ServiceError)
_END_S = 5.0
_HASH_CHARS, _HASH_RANGE = 16, 2.0**64
_log = logging.getLogger("hardlook.shadow")


@dataclass(frozen=True, eq=False)
class Opinion:
    """What a candidate says of an image.

    Attributes:
        verdict: the most cautious over the frames that it was shown.
        embedding: (d,) unit float32, of the frame that decided; without a defence.
    """

    verdict: Verdict
    embedding: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Comparison:
    """An image that was judged by the service and by a candidate.

    Attributes:
        sha256: of the file, in hex.
        request_id: of the request that it came with.
        served: what was answered.
        candidate: name of the candidate.
        fingerprint: of the encoder that the candidate's embedding is of.
        opinion: of the candidate.
    """

    sha256: str
    request_id: str
    served: VerdictLabel
    candidate: str
    fingerprint: str
    opinion: Opinion


class Candidate(Protocol):
    """What might serve instead. `judge` is called in the shadow's thread alone.

    Attributes:
        name: for people, and as a label of metrics.
        fingerprint: of the encoder that its embeddings are of.
        preprocess: of the pixels that it must be shown; None where the service's embeddings are enough.
    """

    name: str
    fingerprint: str
    preprocess: PreprocessSpec | None

    def judge(self, embeddings: NDArray[np.float32], pixels: Sequence[NDArray[np.uint8]]) -> Opinion:
        """Judge one image.

        Args:
            embeddings: (f, d), of the service's encoder.
            pixels: frames (3, h, w), as `preprocess` makes them.
        """


class ShadowVersion:
    """Another version of the pools, under the encoder that serves.

    Args:
        view: that version.
        policy: that serves.
    """

    def __init__(self, view: View, policy: DecisionPolicy) -> None:
        self.name, self.fingerprint = f"version {view.version}", view.encoder_fingerprint
        self.preprocess: PreprocessSpec | None = None
        self._view, self._policy = view, policy

    def judge(self, embeddings: NDArray[np.float32], pixels: Sequence[NDArray[np.uint8]]) -> Opinion:
        """See `Candidate.judge`."""
        found = self._view.evidence(embeddings, self._policy.neighbors_needed)
        verdicts = [self._policy.decide(evidence.neighbors) for evidence in found]
        deciding = most_cautious(verdicts)
        return Opinion(verdicts[deciding], embeddings[deciding])


class ShadowEncoder:
    """Another encoder, with pools that were built under it.

    Args:
        encoder: used by nobody else.
        pools: its moderation pools, asked for with each image; what it raises is a failure to judge that image.
        policy: that serves.
    """

    def __init__(self, encoder: ServingEncoder, pools: Callable[[], View | Snapshot], policy: DecisionPolicy) -> None:
        self.name, self.fingerprint = f"encoder {encoder.name}", encoder.fingerprint
        self.preprocess: PreprocessSpec | None = encoder.preprocess
        self._engine, self._pools, self._policy = Engine(encoder, None), pools, policy

    def judge(self, embeddings: NDArray[np.float32], pixels: Sequence[NDArray[np.uint8]]) -> Opinion:
        """See `Candidate.judge`."""
        search = Search(self._pools(), self._policy.neighbors_needed, each_pool=True)
        sightings = self._engine.answer([Query(frame, search) for frame in pixels])
        verdicts = [self._policy.decide(sighting.neighbors) for sighting in sightings]
        deciding = most_cautious(verdicts)
        return Opinion(verdicts[deciding], sightings[deciding].undefended)


@dataclass(frozen=True, eq=False)
class _Job:
    """One image that waits; `data` where it has to be decoded for the candidate."""

    sha256: str
    request_id: str
    served: VerdictLabel
    embeddings: NDArray[np.float32]
    pixels: Sequence[NDArray[np.uint8]]
    data: bytes | None

    @property
    def size_bytes(self) -> int:
        return self.embeddings.nbytes + sum(frame.nbytes for frame in self.pixels) + len(self.data or b"")


class Shadow:
    """Shows a candidate a share of the traffic, and counts where it would have answered otherwise.

    To be used as an asynchronous context manager: it has a thread, and a decoding process where the candidate's images
    are prepared otherwise than those of the service.

    Args:
        candidate: what might serve instead.
        decoding: how the service decodes, and how it prepares images.
        count: told of every image of the share, with the candidate's name and an outcome: 'agree', 'safe->unsafe' and
            the like, 'dropped' for one that it had no room for, 'failed' for one that it could not judge. From any
            thread.
        share: of all images, in [0, 1]; equal files are always treated alike.
        record: told of every image that was judged, in the shadow's thread.
        max_waiting: images that wait; further ones are dropped.
        max_waiting_bytes: of these together.
    """

    def __init__(
        self,
        candidate: Candidate,
        decoding: DecoderSettings,
        count: Callable[[str, str], object],
        *,
        share: float = 1.0,
        record: Callable[[Comparison], object] | None = None,
        max_waiting: int = MAX_WAITING,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
    ) -> None:
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"share must be in [0, 1], got {share}")
        self.name = candidate.name
        self._candidate, self._count, self._share, self._record = candidate, count, share, record
        self._max_waiting, self._max_bytes = max_waiting, max_waiting_bytes
        self._decoder: DecoderPool | None = None
        if candidate.preprocess is not None and candidate.preprocess != decoding.preprocess:
            self._decoder = DecoderPool(replace(decoding, preprocess=candidate.preprocess), workers=1)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._decodings: set[asyncio.Task[PreparedImage]] = set()
        self._thread = threading.Thread(target=self._run, name=f"shadow {self.name}", daemon=True)
        self._lock = threading.Lock()  # guards what follows
        self._open = False
        self._waiting, self._waiting_bytes, self._dropped = 0, 0, 0
        self._differing: deque[bool] = deque(maxlen=WINDOW)
        self._failures: set[str] = set()

    async def __aenter__(self) -> Self:
        """Begin.

        Raises:
            DecoderUnavailable: the decoding process does not start.
        """
        if self._decoder is not None:
            await self._decoder.__aenter__()
        self._thread.start()
        self._open = True
        return self

    async def __aexit__(self, *_: object) -> None:
        """End, as soon as the image in work is judged, which is waited for a moment; what waits is forgotten."""
        with self._lock:
            self._open = False
        decodings = tuple(self._decodings)
        for decoding in decodings:
            decoding.cancel()
        await asyncio.gather(*decodings, return_exceptions=True)
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join, _END_S)
        if self._decoder is not None:
            await self._decoder.__aexit__()

    @property
    def waiting(self) -> int:
        """How many images wait or are in work."""
        return self._waiting

    @property
    def dropped(self) -> int:
        """How many images of the share there was no room for."""
        return self._dropped

    def disagreement(self) -> tuple[float, int]:
        """The share of other verdicts among the last ones, 1,000 at most, and how many these are; 0 of 0 at first."""
        with self._lock:
            n = len(self._differing)
            return (sum(self._differing) / n if n else 0.0), n

    def observe(
        self,
        sha256: str,
        embedding: NDArray[np.float32],
        pixels: Sequence[NDArray[np.uint8]],
        data: bytes | None,
        verdict: VerdictLabel,
        request_id: str = "",
    ) -> None:
        """Show an image that has been answered. Returns at once, and raises nothing; from the event loop alone.

        Args:
            sha256: of the file, in hex.
            embedding: (d,) of the frame that decided, or (f, d) of all of them.
            pixels: of the same frames, (3, h, w) each, as the service prepared them.
            data: the file, which is forgotten once it is decoded for the candidate; None where it is not at hand.
            verdict: that was answered.
            request_id: for the record.
        """
        if not self._open or not in_share(sha256, self._share):
            return
        job = _Job(
            sha256,
            request_id,
            verdict,
            np.atleast_2d(embedding),
            pixels if self._candidate.preprocess is not None and self._decoder is None else (),
            data if self._decoder is not None else None,
        )
        if self._decoder is not None and data is None:
            self._fail("the image's file is not at hand, and the candidate prepares images otherwise")
        elif not self._has_room(job):
            self._count(self.name, "dropped")
        elif self._decoder is None or data is None:
            self._jobs.put(job)
        else:
            decoding = asyncio.create_task(self._decoder.prepare(data))
            self._decodings.add(decoding)
            decoding.add_done_callback(partial(self._decoded, job))

    def _has_room(self, job: _Job) -> bool:
        with self._lock:
            full = self._waiting >= self._max_waiting or self._waiting_bytes + job.size_bytes > self._max_bytes
            if full:
                self._dropped += 1
            else:
                self._waiting += 1
                self._waiting_bytes += job.size_bytes
        return not full

    def _leave(self, job: _Job) -> None:
        with self._lock:
            self._waiting -= 1
            self._waiting_bytes -= job.size_bytes

    def _decoded(self, job: _Job, decoding: "asyncio.Task[PreparedImage]") -> None:
        self._decodings.discard(decoding)
        error = None if decoding.cancelled() else decoding.exception()
        if decoding.cancelled() or error is not None:
            self._leave(job)
            if isinstance(error, Exception):
                self._fail(error)
            return
        decoded = replace(job, pixels=tuple(decoding.result().pixels), data=None)
        with self._lock:
            self._waiting_bytes += decoded.size_bytes - job.size_bytes
        self._jobs.put(decoded)

    def _run(self) -> None:
        with suppress(AttributeError, OSError):  # where a thread has no priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        torch.set_num_threads(1)  # of this thread
        while (job := self._jobs.get()) is not None:
            if self._open:
                self._judge(job)
            self._leave(job)

    def _judge(self, job: _Job) -> None:
        try:
            opinion = self._candidate.judge(job.embeddings, job.pixels)
        except Exception as error:
            self._fail(error)
            return
        differs = opinion.verdict.label != job.served
        with self._lock:
            self._differing.append(differs)
        self._count(self.name, f"{job.served}->{opinion.verdict.label}" if differs else "agree")
        if self._record is None:
            return
        fingerprint = self._candidate.fingerprint
        try:
            self._record(Comparison(job.sha256, job.request_id, job.served, self.name, fingerprint, opinion))
        except Exception:
            _log.exception("a bug")

    def _fail(self, error: Exception | str) -> None:
        """Count, and log once for each kind of failure, not once for each image."""
        self._count(self.name, "failed")
        kind = error if isinstance(error, str) else type(error).__name__
        with self._lock:
            known = kind in self._failures
            self._failures.add(kind)
        if known:
            return
        if isinstance(error, (str, *_EXPECTED)):
            _log.warning("shadow %s cannot judge an image: %s", self.name, error)
        else:
            _log.error("a bug in shadow %s", self.name, exc_info=error)


def in_share(sha256: str, share: float) -> bool:
    """Whether a file belongs to a share of all files; it then belongs to every larger one too.

    Args:
        sha256: of the file, in hex.
        share: in [0, 1].
    """
    return int(sha256[:_HASH_CHARS], 16) < share * _HASH_RANGE
