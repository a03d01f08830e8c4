"""Probing: whether a caller is asking about many slightly changed versions of one image.

Whoever wants to flip a verdict without knowing the encoder has to ask: Square and boundary attacks send thousands of
versions of one image and follow the margin. An honest caller sends different images. So for each caller the detector
counts distinct near-duplicates, and says when answers about one image must become coarse. Knows no HTTP and no verdict.
"""

import hashlib
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

_log = logging.getLogger("hardlook.probing")
SLOTS = 256
MAX_BYTES = 128 * 1024 * 1024
_FIRST_SLOTS = 8
# Centres are fixed-point numbers: int16 takes as little room as float16, is finer for values in [-1, 1], and numpy
# turns it into float32 twelve times as fast.
_SCALE = 32767


class ProbingDetector:
    """Counts the near-duplicates that each caller asks about.

    A caller's images are gathered in clusters, each around the first image of its kind. An image joins the nearest
    cluster whose centre has at least the cosine `similarity` to it, unless its bytes are there already: the same file
    again tells the caller nothing new. Answers about an image are coarse when the clusters near it hold more than
    `limit` images of the last `window_s` seconds. Answers about other images are not affected.

    A caller has `slots` clusters, and junk does not wash them out: the clusters are the counters of Misra and Gries
    (1982). An image that is near none takes a free slot; where there is none, every cluster loses its oldest image
    and the newcomer is not kept. Each loss so costs the caller `slots` + 1 images, in whatever order they come and
    whatever was sent before: hiding one more query costs 257 images of the rate limit. The other way round, of a
    caller with n images in the window who probes one, `limit` + n / 257 near-duplicates may pass before answers become
    coarse. No image is ever counted too often.

    What it does not see: probing with several keys or from several addresses, below `limit` in each window, with
    versions whose embeddings are less similar than `similarity`, or by a caller who was forgotten meanwhile.

    Memory: 2 d + 16 (`limit` + 1) bytes a slot, with d = 640 and a limit of 30 that is 1.8 kB, and 444 KiB for a caller
    who fills all slots; fewer are kept as long as fewer are needed. All together take at most `max_bytes`, the least
    recently seen callers are forgotten first: 295 full ones, or over nine thousand with up to eight images each.

    Not thread-safe: call it from the event loop.

    Args:
        limit: distinct near-duplicates of one image within the window that still get full answers; 0 turns it off.
        similarity: cosine, in (0, 1).
        window_s: how long an image counts.
        clock: seconds that never go back, above 0.
        slots: clusters of a caller, at least 1.
        max_bytes: of all callers together; the caller at hand is kept even where it alone takes more.
    """

    def __init__(
        self,
        limit: int,
        similarity: float,
        window_s: float,
        clock: Callable[[], float] = time.monotonic,
        *,
        slots: int = SLOTS,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._limit, self._similarity, self._window_s, self._clock = limit, similarity, window_s, clock
        self._slots, self._max_bytes = slots, max_bytes
        self._callers: OrderedDict[str, _Clusters] = OrderedDict()
        self._bytes = 0
        self._secret = secrets.token_bytes(16)

    @property
    def memory_bytes(self) -> int:
        """What the clusters of all callers take now."""
        return self._bytes

    def observe(self, caller_id: str, content_sha256: bytes, embedding: NDArray[np.float32]) -> bool:
        """Take note of an image.

        Args:
            caller_id: who asks.
            content_sha256: of the file's bytes.
            embedding: (d,) of unit norm; of an animation that of the frame which the answer speaks of.

        Returns:
            Whether answers to this caller about this image must be coarse now.
        """
        if not self._limit:
            return False
        clusters = self._callers.pop(caller_id, None)
        if clusters is None:
            clusters = _Clusters(len(embedding), self._limit, min(_FIRST_SLOTS, self._slots))
        else:
            self._bytes -= clusters.nbytes
        now_s = self._clock()
        # Keyed, so that nobody can make files whose shortened hashes are equal.
        digest = hashlib.blake2b(content_sha256, key=self._secret, digest_size=8).digest()
        similar = self._near(clusters, embedding)
        count = clusters.add(int.from_bytes(digest), embedding, similar, now_s, now_s + self._window_s, self._slots)
        self._callers[caller_id] = clusters
        self._bytes += clusters.nbytes
        while self._bytes > self._max_bytes and len(self._callers) > 1:
            self._bytes -= self._callers.popitem(last=False)[1].nbytes
        coarse = count > self._limit
        if coarse and now_s >= clusters.quiet_until_s:
            clusters.quiet_until_s = now_s + self._window_s
            _log.warning(
                "probing: more than %d near-duplicates of one image in %g s, answers about it are coarse",
                self._limit,
                self._window_s,
                extra={"fields": {"caller": caller_id}},
            )
        return coarse

    def _near(self, clusters: "_Clusters", embedding: NDArray[np.float32]) -> NDArray[np.float32]:
        """(m,) cosines to the centres, -inf where they are below the threshold."""
        cosines = (clusters.centres.astype(np.float32) @ embedding) / _SCALE
        near: NDArray[np.float32] = np.where(cosines >= self._similarity, cosines, np.float32(-np.inf))
        return near


class _Clusters:
    """The clusters of one caller: m slots, each with a centre and the images that joined it.

    Attributes:
        centres: (m, d) int16, unit vectors times `_SCALE`.
        digests: (m, limit + 1) uint64, of the images' bytes.
        expires_s: (m, limit + 1) when each image ceases to count; 0 where there is none.
        quiet_until_s: before that nothing more is logged about this caller.
    """

    def __init__(self, dim: int, limit: int, slots: int) -> None:
        self.centres = np.zeros((slots, dim), np.int16)
        self.digests = np.zeros((slots, limit + 1), np.uint64)
        self.expires_s = np.zeros((slots, limit + 1))
        self.quiet_until_s = 0.0

    @property
    def nbytes(self) -> int:
        """Of the arrays."""
        return self.centres.nbytes + self.digests.nbytes + self.expires_s.nbytes

    def add(
        self,
        digest: int,
        embedding: NDArray[np.float32],
        similar: NDArray[np.float32],
        now_s: float,
        expires_s: float,
        max_slots: int,
    ) -> int:
        """Let an image join a cluster, or found one.

        Args:
            digest: of its bytes, below 2^64.
            embedding: (d,) of unit norm.
            similar: (m,) cosines to the centres that are near, -inf for the others.
            now_s, expires_s: now, and when the image ceases to count.
            max_slots: clusters that there may be.

        Returns:
            How many images the clusters near it hold, itself included, up to limit + 1 of each cluster.
        """
        alive = self.expires_s > now_s
        counts = np.count_nonzero(alive, axis=1)
        near = np.isfinite(similar) & (counts > 0)
        if not near.any():
            self._found(digest, embedding, alive, counts, expires_s, max_slots)
            return 1
        count = int(counts[near].sum())
        if bool((alive[near] & (self.digests[near] == np.uint64(digest))).any()):
            return count
        slot = int(np.argmax(np.where(near, similar, -np.inf)))
        column = int(np.argmin(self.expires_s[slot]))  # an empty place, else that of the oldest image
        count += not alive[slot, column]
        self.digests[slot, column], self.expires_s[slot, column] = digest, expires_s
        return count

    def _found(
        self,
        digest: int,
        embedding: NDArray[np.float32],
        alive: NDArray[np.bool_],
        counts: NDArray[np.int_],
        expires_s: float,
        max_slots: int,
    ) -> None:
        """Make an image the centre of a cluster where there is room; else every cluster loses its oldest image."""
        slot = int(np.argmin(counts))
        if counts[slot]:
            slot = len(counts)
            if slot == max_slots:
                oldest = np.where(alive, self.expires_s, np.inf).argmin(axis=1)
                self.expires_s[np.arange(slot), oldest] = 0.0
                return
            self._grow(min(2 * slot, max_slots) - slot)
        self.centres[slot] = np.rint(embedding * _SCALE)
        self.expires_s[slot] = 0.0
        self.digests[slot, 0], self.expires_s[slot, 0] = digest, expires_s

    def _grow(self, slots: int) -> None:
        more = ((0, slots), (0, 0))
        self.centres, self.digests = np.pad(self.centres, more), np.pad(self.digests, more)
        self.expires_s = np.pad(self.expires_s, more)
