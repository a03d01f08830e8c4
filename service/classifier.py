"""Classifier: the use cases of the service. Bytes or a prompt in; a verdict or neighbours, with the evidence, out.

Owns the path decode -> encode and search -> decide, and its deadline. Knows no HTTP: whatever goes wrong is one of the
exceptions of perception, indexer or `service.errors`.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from indexer.contents import Exemplar
from indexer.live.suppression import Suppressed
from indexer.live.view import View
from indexer.snapshot import Snapshot
from perception.certificates import FeatureBound
from perception.certified_decision import decision_radius, label_radius
from perception.verdict import DecisionPolicy, Neighbor, PoolLabel, Verdict, most_cautious
from service.batching import Batcher
from service.decoding import DecoderPool, FrameOrigin, PreparedImage, Preview
from service.engine import Query, Search, Sighting
from service.errors import (
    DeadlineExceeded,
    FetchDisabled,
    FetchError,
    FetchTimeout,
    InvalidParameter,
    Unavailable,
    UrlRefused,
)
from service.fetch import Fetcher
from service.published import Published
from service.telemetry import Metrics
from service.tracing import past_span, span

FetchOutcome = Literal["ok", "disabled", "refused", "failed", "timeout"]
_FETCH_OUTCOMES: Mapping[type[FetchError], FetchOutcome] = {
    FetchDisabled: "disabled",
    UrlRefused: "refused",
    FetchTimeout: "timeout",
}


CERTIFICATE_NEIGHBORS = 16
"""Exemplars of each pool that a certificate looks at one by one; all others are bounded by the last of them."""


@dataclass(frozen=True)
class RemoteImage:
    """An image that is to be fetched; the URL is as the caller gave it."""

    url: str


@dataclass(frozen=True)
class Match:
    """A neighbour together with what is known of the exemplar."""

    neighbor: Neighbor
    exemplar: Exemplar


@dataclass(frozen=True)
class Classification:
    """The answer for one image.

    Attributes:
        embedding: (d,) unit float32, of the frame that decided; without the defence where there is one.
        embeddings: (f, d) unit float32, of all frames that were examined, as they were judged.
        suppressed: what suppress items took away from the evidence of that frame.
        sha256: of the file.
        file: its bytes, as they were sent or fetched.
        image: as decoded.
        verdict: the most cautious over all frames.
        frame: the frame that decided.
        matches: the nearest exemplars of each pool to that frame, most similar first.
        certified_radius_l2: within which the verdict's label cannot change, in L2 over [0, 1] pixels at the encoder's
            input, of every frame at once; None where nothing is certified (`perception.certified_decision`).
    """

    image: PreparedImage
    verdict: Verdict
    frame: FrameOrigin
    matches: tuple[Match, ...]
    embedding: NDArray[np.float32]
    embeddings: NDArray[np.float32]
    suppressed: tuple[Suppressed, ...]
    sha256: bytes
    file: bytes
    certified_radius_l2: float | None = None


@dataclass(frozen=True)
class Embedded:
    """An image and what the encoder makes of one of its frames.

    Attributes:
        image: as decoded.
        embedding: (d,) unit float32.
        sha256: of the file.
        file: its bytes, as they were sent or fetched.
        frame: the one that was embedded.
    """

    image: PreparedImage
    embedding: NDArray[np.float32]
    sha256: bytes
    file: bytes
    frame: FrameOrigin


@dataclass(frozen=True)
class Lookup:
    """The answer to one search.

    Attributes:
        image: as decoded; None for a prompt.
        matches: most similar first.
        embedding: (d,) unit float32, of what was searched with; without the defence where there is one.
        sha256: of the file; None for a prompt.
    """

    image: PreparedImage | None
    matches: tuple[Match, ...]
    embedding: NDArray[np.float32]
    sha256: bytes | None


class Classifier:
    """Classifies images and looks up similar ones.

    Callers take a view once and pass it with every image of a request, so that one request has one snapshot even
    where a new version is published meanwhile.

    Args:
        published: the snapshots.
        decoder: turns bytes into frames.
        batcher: turns frames and prompts into embeddings and neighbours.
        fetcher: turns URLs into bytes.
        policy: turns neighbours into verdicts.
        deadline_s: of an answer; named in errors, kept by `until_s` of each call.
        metrics: told of every stage and verdict.
        answered: called for each image that got a verdict, neighbours or an error of its own.
        defend_similar: whether the images of `similar` go through the defence, as those of `classify` do.
        bound: what is proven of the encoder's features; None for no certificates.
    """

    def __init__(
        self,
        published: Published,
        decoder: DecoderPool,
        batcher: Batcher[Query, Sighting],
        fetcher: Fetcher,
        policy: DecisionPolicy,
        deadline_s: float,
        metrics: Metrics,
        answered: Callable[[], None],
        *,
        defend_similar: bool = False,
        bound: FeatureBound | None = None,
    ) -> None:
        self._published, self._decoder, self._batcher = published, decoder, batcher
        self._policy, self._deadline_s, self._defend_similar = policy, deadline_s, defend_similar
        self._fetcher, self._metrics, self._answered, self._bound = fetcher, metrics, answered, bound

    def searchable(self, gallery: str | None, pool: PoolLabel | None) -> View:
        """The snapshot that a search with these parameters goes to.

        Raises:
            InvalidParameter: a gallery and a pool.
            UnknownCollection: no such gallery.
            NotReady: no pools.
        """
        if gallery is None:
            return self._published.pools()
        if pool is not None:
            raise InvalidParameter("pool", "name a gallery or a pool, not both")
        return self._published.get(gallery)

    async def classify(
        self, source: bytes | RemoteImage, snapshot: View, shown: int, until_s: float, *, counted: bool = True
    ) -> Classification:
        """Classify one image file.

        Args:
            source: the file's bytes, or where to fetch them.
            snapshot: of the moderation pools.
            shown: neighbours of each pool to answer with; the verdict does not depend on it.
            until_s: when the answer must be there, in the event loop's time.
            counted: whether the metrics are told of the verdict.

        Raises:
            FetchError: the image cannot be fetched.
            ImageError, DecodingError, NonFiniteEmbedding: it cannot be judged.
            Unavailable: no answer in time, or no room for it.
        """
        needed = self._policy.neighbors_needed
        certify = max(CERTIFICATE_NEIGHBORS, needed) if self._bound is not None else 0
        search = Search(snapshot, max(shown, needed), each_pool=True, certify=certify)
        async with self._answer(until_s):
            image, sha256, file = await self._prepare(source)
            sightings = await self._look_up([Query(pixels, search) for pixels in image.pixels])
            radii = await asyncio.to_thread(self._radii, sightings) if certify else [None] * len(sightings)
        with self._metrics.stage("decide"), span("decide"):
            verdicts = [self._policy.decide(sighting.neighbors) for sighting in sightings]
            deciding = most_cautious(verdicts)
        verdict, frame = verdicts[deciding], image.frames[deciding]
        evidence = [
            neighbor for pool in PoolLabel for neighbor in [n for n in verdict.neighbors if n.pool == pool][:shown]
        ]
        evidence.sort(key=lambda n: -n.similarity)
        if counted:
            self._metrics.verdict(verdict.label, verdict.pool, verdict.margin)
            for kind in disagreements(image.frames, verdicts, deciding):
                self._metrics.disagreement(kind)
        sighting = sightings[deciding]
        matches = _matches(snapshot, evidence)
        embeddings = np.stack([each.embedding for each in sightings])
        certified = label_radius([each.label for each in verdicts], radii)
        return Classification(
            image=image,
            verdict=verdict,
            frame=frame,
            matches=matches,
            embedding=sighting.undefended,
            embeddings=embeddings,
            suppressed=sighting.suppressed,
            sha256=sha256,
            file=file,
            certified_radius_l2=certified,
        )

    async def embed(self, source: bytes | RemoteImage, frame: int, until_s: float) -> Embedded:
        """What the encoder makes of one frame of an image, without any defence.

        Args:
            source: the file's bytes, or where to fetch them.
            frame: position among the frames that are examined.
            until_s: when the answer must be there, in the event loop's time.

        Raises:
            InvalidParameter: the image has no such frame.
            Exception: those of `classify`.
        """
        async with self._answer(until_s):
            image, sha256, file = await self._prepare(source)
            if frame >= len(image.pixels):
                raise InvalidParameter("frame", f"it is {frame}, the image has {len(image.pixels)} examined frames")
            [sighting] = await self._look_up([Query(image.pixels[frame], None, defended=False)])
        return Embedded(image, sighting.embedding, sha256, file, image.frames[frame])

    async def preview(self, data: bytes, frame: int, until_s: float) -> Preview:
        """A small picture of one frame of an image, for people to look at.

        Args:
            data: the file's bytes.
            frame: number of the frame in the file.
            until_s: when the answer must be there, in the event loop's time.

        Raises:
            DeadlineExceeded: it is not.
            Exception: those of `DecoderPool.preview`.
        """
        timer = asyncio.timeout_at(until_s)
        try:
            async with timer:
                return await self._decoder.preview(data, frame)
        except TimeoutError as error:
            if timer.expired():
                raise DeadlineExceeded(self._deadline_s) from error
            raise

    async def embed_texts(self, prompts: Sequence[str], until_s: float) -> NDArray[np.float32]:
        """What the encoder makes of prompts: (len(prompts), d) unit float32.

        Raises:
            TextUnsupported: it has no text tower.
            Exception: those of `classify`.
        """
        async with self._answer(until_s):
            sightings = await self._look_up([Query(prompt, None) for prompt in prompts])
        return np.stack([sighting.embedding for sighting in sightings])

    async def similar(self, subject: bytes | RemoteImage | str, search: Search, until_s: float) -> Lookup:
        """Find the exemplars that an image (its first frame) or a prompt is most similar to.

        Args:
            subject: an image file's bytes, where to fetch them, or a prompt.
            search: where, and how many.
            until_s: when the answer must be there, in the event loop's time.

        Raises:
            TextUnsupported: a prompt, for an encoder without a text tower.
            Exception: those of `classify`.
        """
        async with self._answer(until_s):
            if isinstance(subject, str):
                image, sha256, query = None, None, Query(subject, search)
            else:
                image, sha256, _ = await self._prepare(subject)
                query = Query(image.pixels[0], search, defended=self._defend_similar)
            [sighting] = await self._look_up([query])
        return Lookup(image, _matches(search.snapshot, sighting.neighbors), sighting.undefended, sha256)

    async def _prepare(self, source: bytes | RemoteImage) -> tuple[PreparedImage, bytes, bytes]:
        """The frames of an image, and the hash and the bytes of its file."""
        if isinstance(source, RemoteImage):
            source = await self._fetch(source.url)
        with self._metrics.stage("decode"), span("decode"):
            return await self._decoder.prepare(source), hashlib.sha256(source).digest(), source

    def _radii(self, sightings: Sequence[Sighting]) -> list[float | None]:
        """Certified radii of the verdicts on all frames."""
        found: list[float | None] = []
        for sighting in sightings:
            assert self._bound is not None  # else nothing was asked for
            assert sighting.features is not None
            assert sighting.around is not None
            found.append(decision_radius(sighting.features, sighting.around, self._policy, self._bound))
        return found

    async def _look_up(self, queries: Sequence[Query]) -> list[Sighting]:
        sightings = await self._batcher.submit(queries)
        for timing in sightings[0].timings:
            past_span(*timing)
        return sightings

    async def _fetch(self, url: str) -> bytes:
        outcome: FetchOutcome = "failed"
        try:
            with self._metrics.stage("fetch"), span("fetch"):
                data = await self._fetcher.fetch(url)
            outcome = "ok"
        except FetchError as error:
            outcome = _FETCH_OUTCOMES.get(type(error), "failed")
            raise
        finally:
            self._metrics.fetched(outcome)
        return data

    @asynccontextmanager
    async def _answer(self, until_s: float) -> AsyncIterator[None]:
        """Keep the time, and count what got an answer: of its own, not one about the service's load."""
        timer = asyncio.timeout_at(until_s)
        try:
            async with timer:
                yield
        except TimeoutError as error:
            if timer.expired():
                raise DeadlineExceeded(self._deadline_s) from error
            self._answered()
            raise
        except Unavailable:
            raise
        except Exception:
            self._answered()
            raise
        self._answered()


def disagreements(
    frames: Sequence[FrameOrigin], verdicts: Sequence[Verdict], deciding: int
) -> Iterator[Literal["frames", "backgrounds", "neighbors"]]:
    """In what the evidence on one image contradicts itself.

    Between frames; between the two backgrounds of one frame, which says that the image shows different things on light
    and dark pages; between the nearest exemplar and the majority of the nearest three, in the deciding frame.
    """
    labels = [verdict.label for verdict in verdicts]
    by_frame: dict[int, set[str]] = {}
    for frame, label in zip(frames, labels, strict=True):
        by_frame.setdefault(frame.index, set()).add(label)
    if any(len(found) > 1 for found in by_frame.values()):
        yield "backgrounds"
    if len(by_frame) > 1 and len(set(labels)) > 1:
        yield "frames"
    nearest = [n.pool for n in sorted(verdicts[deciding].neighbors, key=lambda n: -n.similarity)[:3]]
    if len(nearest) == 3 and nearest[1] == nearest[2] != nearest[0]:
        yield "neighbors"


def _matches(snapshot: View | Snapshot, neighbors: Iterable[Neighbor]) -> tuple[Match, ...]:
    return tuple(Match(neighbor, snapshot.exemplar(neighbor.id)) for neighbor in neighbors)
