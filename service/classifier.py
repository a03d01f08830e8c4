"""Classifier: the use cases of the service. Bytes or a prompt in; a verdict or neighbours, with the evidence, out.

Owns the path decode -> encode and search -> decide, and its deadline. Knows no HTTP: whatever goes wrong is one of the
exceptions of perception, indexer or `service.errors`.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from indexer.contents import Exemplar
from indexer.snapshot import Snapshot
from perception.verdict import DecisionPolicy, Neighbor, PoolLabel, Verdict, most_cautious
from service.batching import Batcher
from service.decoding import DecoderPool, FrameOrigin, PreparedImage
from service.engine import Query, Search, Sighting
from service.errors import DeadlineExceeded, InvalidParameter
from service.published import Published


@dataclass(frozen=True)
class Match:
    """A neighbour together with what is known of the exemplar."""

    neighbor: Neighbor
    exemplar: Exemplar


@dataclass(frozen=True)
class Classification:
    """The answer for one image.

    Attributes:
        image: as decoded.
        verdict: the most cautious over all frames.
        frame: the frame that decided.
        matches: the nearest exemplars of each pool to that frame, most similar first.
    """

    image: PreparedImage
    verdict: Verdict
    frame: FrameOrigin
    matches: tuple[Match, ...]


@dataclass(frozen=True)
class Lookup:
    """The answer to one search; `image` is None for a prompt."""

    image: PreparedImage | None
    matches: tuple[Match, ...]


class Classifier:
    """Classifies images and looks up similar ones.

    Callers take a snapshot once and pass it with every image of a request, so that one request has one snapshot even
    where a new version is published meanwhile.

    Args:
        published: the snapshots.
        decoder: turns bytes into frames.
        batcher: turns frames and prompts into embeddings and neighbours.
        policy: turns neighbours into verdicts.
        deadline_s: for one image or prompt, from submission to answer.
    """

    def __init__(
        self,
        published: Published,
        decoder: DecoderPool,
        batcher: Batcher[Query, Sighting],
        policy: DecisionPolicy,
        deadline_s: float,
    ) -> None:
        self._published, self._decoder, self._batcher = published, decoder, batcher
        self._policy, self._deadline_s = policy, deadline_s

    def searchable(self, gallery: str | None, pool: PoolLabel | None) -> Snapshot:
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

    async def classify(self, data: bytes, snapshot: Snapshot, shown: int) -> Classification:
        """Classify one image file.

        Args:
            data: the file's bytes.
            snapshot: of the moderation pools.
            shown: neighbours of each pool to answer with; the verdict does not depend on it.

        Raises:
            ImageError, DecodingError, NonFiniteEmbedding: the image cannot be judged.
            Unavailable: no answer in time, or no room for it.
        """
        search = Search(snapshot, max(shown, self._policy.neighbors_needed), each_pool=True)
        async with self._deadline():
            image = await self._decoder.prepare(data)
            queries = [Query(pixels, search) for pixels in image.pixels]
            sightings = await self._batcher.submit(queries, timeout_s=self._deadline_s)
        verdicts = [self._policy.decide(sighting.neighbors) for sighting in sightings]
        deciding = most_cautious(verdicts)
        verdict = verdicts[deciding]
        evidence = [
            neighbor for pool in PoolLabel for neighbor in [n for n in verdict.neighbors if n.pool == pool][:shown]
        ]
        evidence.sort(key=lambda n: -n.similarity)
        return Classification(image, verdict, image.frames[deciding], _matches(snapshot, evidence))

    async def similar(self, subject: bytes | str, search: Search, min_similarity: float) -> Lookup:
        """Find the exemplars that an image (its first frame) or a prompt is most similar to.

        Args:
            subject: an image file's bytes, or a prompt.
            search: where, and how many.
            min_similarity: leave out what is less similar.

        Raises:
            TextUnsupported: a prompt, for an encoder without a text tower.
            Exception: those of `classify`.
        """
        async with self._deadline():
            image = await self._decoder.prepare(subject) if isinstance(subject, bytes) else None
            query = Query(image.pixels[0] if image else str(subject), search)
            [sighting] = await self._batcher.submit([query], timeout_s=self._deadline_s)
        near = [n for n in sighting.neighbors if n.similarity >= min_similarity]
        return Lookup(image, _matches(search.snapshot, near))

    @asynccontextmanager
    async def _deadline(self) -> AsyncIterator[None]:
        timer = asyncio.timeout(self._deadline_s)
        try:
            async with timer:
                yield
        except TimeoutError as error:
            if timer.expired():
                raise DeadlineExceeded(self._deadline_s) from error
            raise


def _matches(snapshot: Snapshot, neighbors: list[Neighbor]) -> tuple[Match, ...]:
    return tuple(Match(neighbor, snapshot.exemplar(neighbor.id)) for neighbor in neighbors)
