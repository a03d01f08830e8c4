"""Judging: one image of a request becomes an answer, and what happened is recorded.

The one way from any route, or a job, to a verdict: so every verdict is in the log, is seen by shadows, and is made
coarse for callers who probe.
"""

from dataclasses import dataclass

from indexer.catalog.clock import now
from indexer.catalog.traffic import Decision
from indexer.live.view import View
from perception.verdict import Neighbor, PoolLabel
from service.classifier import Classification, RemoteImage
from service.errors import Overloaded
from service.intake import Upload
from service.keys import Caller
from service.recording import LIMIT
from service.runtime import Runtime, actor_of
from service.schemas import classify_item, coarse_classify_item
from service.wire import ClassifyItem


@dataclass(frozen=True)
class Judge:
    """Judges the images of one request, which all see the same pools.

    Attributes:
        runtime: of the service.
        caller: who asks.
        route: that answers.
        request_id: of the request.
        snapshot: the moderation pools.
        shown: neighbours of each pool to answer with.
        until_s: when the answer must be there, in the event loop's time.
    """

    runtime: Runtime
    caller: Caller
    route: str
    request_id: str
    snapshot: View
    shown: int
    until_s: float

    async def __call__(self, upload: Upload, source: bytes | RemoteImage) -> ClassifyItem:
        """Judge one image; errors are those of `Classifier.classify`.

        Raises:
            Overloaded: too many verdicts wait to be recorded, and what cannot be recorded is not decided.
        """
        runtime, books = self.runtime, self.runtime.books
        if books is not None and books.recorder.full:
            raise Overloaded("decisions", LIMIT)
        found = await runtime.classifier.classify(source, self.snapshot, self.shown, self.until_s)
        coarse = runtime.answers_coarsely(self.caller, found.sha256, found.embedding)
        if books is not None:
            books.recorder.observe(self._decision(upload.id, found))
            if books.images is not None:
                books.images.judged(found)
            books.candidates.observe(found, source if isinstance(source, bytes) else None, self.request_id)
        if coarse:
            return coarse_classify_item(upload.id, found)
        return classify_item(upload.id, found, runtime.calibrated)

    def _decision(self, image_id: str, found: Classification) -> Decision:
        verdict, view = found.verdict, self.snapshot
        return Decision(
            time=now(),
            request_id=self.request_id,
            caller=actor_of(self.caller),
            image_id=image_id,
            sha256=found.sha256.hex(),
            route=self.route,
            frame_index=found.frame.index,
            background=found.frame.background,
            encoder_fingerprint=view.encoder_fingerprint,
            collection=view.collection,
            version=view.version,
            revision=view.revision,
            policy_version=verdict.policy_version,
            verdict=verdict.label,
            pool=verdict.pool,
            margin=verdict.margin,
            neighbors=_needed(verdict.neighbors, self.runtime.rule.neighbors_needed),
            suppressed=found.suppressed,
            embedding=found.embedding,
        )


def _needed(neighbors: tuple[Neighbor, ...], most: int) -> tuple[Neighbor, ...]:
    """The evidence that a verdict was made from: of each pool no more than the policy looks at."""
    left = dict.fromkeys(map(str, PoolLabel), most)
    kept = []
    for neighbor in neighbors:
        if left[str(neighbor.pool)] > 0:
            left[str(neighbor.pool)] -= 1
            kept.append(neighbor)
    return tuple(kept)
