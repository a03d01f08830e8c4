"""Explaining: why an image got its verdict. The decision spelt out, and what the similarities are made of.

An explanation is no verdict on traffic: it is not recorded, no metric counts its verdict, and candidates do not see it.
Attributions take many times as long as a verdict, so they are made one at a time, in a thread of their own, and few may
wait. Knows no HTTP.
"""

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray

from indexer.contents import Exemplar
from indexer.live.view import View
from perception.counterattack import Counterattack
from perception.encoder import Encoder
from perception.verdict import DecisionPolicy, PoolLabel, Verdict
from service.admission import Admission
from service.classifier import Classification, Classifier, Match, RemoteImage
from service.curation import Desk
from service.engine import ServingEncoder
from service.errors import DeadlineExceeded, NotReady
from service.graph import GraphEncoder
from service.saliency import Abandoned, Attribution, attribute

PLACES = 4
"""Explanations that are in work or wait; more are refused."""
MAX_COMPARED = 2
"""Exemplars that one image is compared with."""
# Of the time for an answer that may go into making an attribution finer.
_REFINING = 0.5
ThresholdName = Literal["min_similarity", "min_margin", "min_margin_unsafe"]
_VALUES: dict[ThresholdName, str] = {
    "min_similarity": "similarity",
    "min_margin": "margin",
    "min_margin_unsafe": "margin",
}


@dataclass(frozen=True)
class Standing:
    """How one pool did.

    Attributes:
        pool: which.
        best: its most similar exemplar; None where it has none.
        votes: for it, by the rule 'vote'; None by another rule.
    """

    pool: PoolLabel
    best: Match | None
    votes: int | None


@dataclass(frozen=True)
class Threshold:
    """One threshold of the policy.

    Attributes:
        name: of the policy's parameter.
        limit: what the policy asks for.
        value: what the image has; None where there was nothing to compare with.
        applies: whether the winning pool is one that it is asked of.
    """

    name: ThresholdName
    limit: float
    value: float | None
    applies: bool

    @property
    def holds(self) -> bool:
        """Whether the value reaches it; true of one that does not apply."""
        return not self.applies or (self.value is not None and self.value >= self.limit)

    @property
    def fact(self) -> str:
        """In words; only of one that applies."""
        assert self.value is not None  # else nothing applies
        what, apart = _VALUES[self.name], abs(self.value - self.limit)
        if self.value == self.limit:
            return f"{what} {self.value:.4f} is exactly {self.name}: any less would be review"
        if self.value > self.limit:
            return f"{what} {self.value:.4f} is above {self.name} {self.limit:.4f} by {apart:.4f}"
        return f"{what} {self.value:.4f} is below {self.name} {self.limit:.4f} by {apart:.4f}: this makes it review"


@dataclass(frozen=True)
class Reasoning:
    """The arithmetic of one decision, of the frame that decided.

    Attributes:
        standings: of the three pools.
        winner: the pool that won; None where a pool was empty, so that nothing could be decided.
        runner_up: the one with the most similar exemplar among the others; without a winner, among all; None where
            none has one.
        thresholds: of the policy, each once.
        facts: what holds the verdict where it is, and by how much, in words.
    """

    standings: tuple[Standing, ...]
    winner: PoolLabel | None
    runner_up: PoolLabel | None
    thresholds: tuple[Threshold, ...]
    facts: tuple[str, ...]

    def best(self, pool: PoolLabel | None) -> Match | None:
        """The most similar exemplar of a pool."""
        return next((standing.best for standing in self.standings if standing.pool == pool), None)


@dataclass(frozen=True)
class Compared:
    """An exemplar, and what the image's similarity to it is made of.

    Attributes:
        exemplar: which.
        judged: the similarity by which it was evidence, through the defence where there is one; None where it was none.
        attribution: of the similarity that the encoder itself gives.
    """

    exemplar: Exemplar
    judged: float | None
    attribution: Attribution


@dataclass(frozen=True)
class Explanation:
    """Why one image got its verdict.

    Attributes:
        found: the verdict, as a classification finds it.
        pixels: (3, h, w) uint8 RGB, what the encoder saw of the frame that decided.
        reasoning: the decision.
        compared: the exemplars that were asked for.
    """

    found: Classification
    pixels: NDArray[np.uint8]
    reasoning: Reasoning
    compared: tuple[Compared, ...]


class Explainer:
    """Explains verdicts.

    To be entered before its first use; at its end nothing of it runs any more.

    Args:
        classifier: that judges.
        encoder: that it judges with; `differentiable` says what is explained of it.
        policy: that it decides by.
        admission: of images in progress: judging counts there, attributing does not, which has bounds of its own.
        deadline_s: of an answer; named in errors, kept by `until_s` of each call.
        threads: of one operation on a CPU; None where the device is no CPU.
    """

    def __init__(
        self,
        classifier: Classifier,
        encoder: ServingEncoder,
        policy: DecisionPolicy,
        admission: Admission,
        deadline_s: float,
        threads: int | None,
    ) -> None:
        self._classifier, self._encoder, self._policy = classifier, differentiable(encoder), policy
        self._admission, self._deadline_s, self._threads = admission, deadline_s, threads
        self._desk, self._closing = Desk("explanations", PLACES), threading.Event()
        self._thread: ThreadPoolExecutor | None = None

    async def __aenter__(self) -> Self:
        self._thread = ThreadPoolExecutor(1, "explanations", self._prepare)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.shutdown)

    def place(self) -> AbstractContextManager[None]:
        """Hold a place for one explanation.

        Raises:
            Overloaded: there is none; on entering.
        """
        return self._desk.place()

    async def explain(
        self,
        source: bytes | RemoteImage,
        snapshot: View,
        shown: int,
        until_s: float,
        *,
        against: Sequence[str] = (),
        attributed: bool = True,
    ) -> Explanation:
        """Explain the verdict on one image file. The caller holds a `place`.

        Args:
            source: the file's bytes, or where to fetch them.
            snapshot: of the moderation pools.
            shown: neighbours of each pool that the classification has.
            until_s: when the answer must be there, in the event loop's time.
            against: ids of exemplars to compare the image with; by default the most similar one of the pool that won,
                and of the runner-up.
            attributed: whether to attribute similarities at all.

        Raises:
            UnknownExemplar: there is none of an id.
            AttributionFailed: there is no finite attribution.
            WaitTooLong, DeadlineExceeded, NotReady: no answer in time, or shutting down.
            Exception: those of `Classifier.classify`.
        """
        exemplars = [snapshot.exemplar(id) for id in dict.fromkeys(against)]
        with self._admission.work_on(1):
            found = await self._classifier.classify(source, snapshot, shown, until_s, counted=False)
        pixels = found.image.pixels[found.image.frames.index(found.frame)]
        reasoning = reasoned(found, self._policy, snapshot)
        if not attributed:
            return Explanation(found, pixels, reasoning, ())
        if not exemplars:
            bests = [reasoning.best(reasoning.winner), reasoning.best(reasoning.runner_up)]
            exemplars = [best.exemplar for best in bests if best is not None]
        attributions: tuple[Attribution, ...] = ()
        if exemplars:
            embeddings = np.stack([snapshot.embedding(exemplar.id) for exemplar in exemplars])
            attributions = await self._attribute(pixels, embeddings, until_s)
        judged = {neighbor.id: neighbor.similarity for neighbor in found.verdict.neighbors}
        compared = tuple(
            Compared(exemplar, judged.get(exemplar.id), attribution)
            for exemplar, attribution in zip(exemplars, attributions, strict=True)
        )
        return Explanation(found, pixels, reasoning, compared)

    async def _attribute(
        self, pixels: NDArray[np.uint8], exemplars: NDArray[np.float32], until_s: float
    ) -> tuple[Attribution, ...]:
        """In the thread, which goes on to the next as soon as nobody waits for this any more."""
        assert self._thread is not None  # else it was not entered
        loop, gone, encoder = asyncio.get_running_loop(), threading.Event(), self._encoder
        refine_until_s = loop.time() + _REFINING * (until_s - loop.time())

        def work() -> tuple[Attribution, ...]:
            return attribute(
                encoder,
                pixels,
                exemplars,
                wanted=lambda: not (gone.is_set() or self._closing.is_set()),
                refine=lambda: loop.time() < refine_until_s,
            )

        timer = asyncio.timeout_at(until_s)
        try:
            async with timer:
                return await loop.run_in_executor(self._thread, work)
        except TimeoutError as error:
            if timer.expired():
                raise DeadlineExceeded(self._deadline_s) from error
            raise
        except Abandoned as error:
            raise NotReady("shutting down") from error
        finally:
            gone.set()

    def _prepare(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)  # of the thread that calls it


def differentiable(encoder: ServingEncoder) -> Encoder:
    """What is explained of the encoder that serves: its own weights, without a defence, and not as a graph."""
    if isinstance(encoder, Counterattack):
        return encoder.encoder
    return encoder.tower if isinstance(encoder, GraphEncoder) else encoder


def reasoned(found: Classification, policy: DecisionPolicy, snapshot: View) -> Reasoning:
    """Spell a decision out; every number is of the verdict itself.

    Args:
        found: the decision.
        policy: that made it.
        snapshot: that it was made from.
    """
    verdict, by_vote = found.verdict, policy.rule == "vote"
    standings = []
    for pool in PoolLabel:
        best = next((neighbor for neighbor in verdict.neighbors if neighbor.pool == pool), None)
        match = None if best is None else Match(best, snapshot.exemplar(best.id))
        votes = sum(neighbor.pool == pool for neighbor in verdict.neighbors[: policy.k]) if by_vote else None
        standings.append(Standing(pool, match, votes))
    # The evidence is sorted, so the first of another pool is the best of all others.
    others = (PoolLabel(neighbor.pool) for neighbor in verdict.neighbors if neighbor.pool != verdict.pool)
    runner_up = next(others, None)
    thresholds = _thresholds(verdict, policy)
    facts = tuple(_facts(found, policy, standings, runner_up, thresholds))
    return Reasoning(tuple(standings), verdict.pool, runner_up, thresholds, facts)


def _thresholds(verdict: Verdict, policy: DecisionPolicy) -> tuple[Threshold, ...]:
    decided, margin = verdict.pool is not None, verdict.margin
    nearest = verdict.neighbors[0].similarity if verdict.neighbors else None
    unsafe = verdict.pool is PoolLabel.UNSAFE and policy.min_margin_unsafe > 0  # 0 asks for nothing
    return (
        Threshold("min_similarity", policy.min_similarity, nearest, decided),
        Threshold("min_margin", policy.min_margin, margin, verdict.pool is PoolLabel.SAFE),
        Threshold("min_margin_unsafe", policy.min_margin_unsafe, margin, unsafe),
    )


def _facts(
    found: Classification,
    policy: DecisionPolicy,
    standings: Sequence[Standing],
    runner_up: PoolLabel | None,
    thresholds: Sequence[Threshold],
) -> list[str]:
    verdict, facts = found.verdict, []
    if verdict.pool is None:
        facts.append(f"{verdict.reason}: it is review whatever else is near")
    elif policy.rule == "vote":
        voters = min(policy.k, len(verdict.neighbors))
        votes = ", ".join(f"{standing.votes} for {standing.pool}" for standing in standings)
        facts.append(
            f"of the {voters} nearest exemplars, {votes}; the most votes win, the more cautious pool of equals"
        )
    elif verdict.margin is not None:
        facts.append(
            f"the best of the {runner_up} pool is less similar than that of the {verdict.pool} pool by "
            f"{verdict.margin:.4f}: the {runner_up} pool would win where that is made up for"
        )
    facts += [threshold.fact for threshold in thresholds if threshold.applies]
    facts += [
        f"exemplar {item.exemplar_id!r} was left out: the image is near the suppress item {item.by!r} "
        f"(similarity {item.similarity_to_item:.4f})"
        for item in found.suppressed
    ]
    if len(found.image.frames) > 1:
        on = f" on {found.frame.background}" if found.frame.background else ""
        facts.append(
            f"{len(found.image.frames)} frames and backgrounds were examined, and the most cautious verdict counts: "
            f"that of frame {found.frame.index}{on}"
        )
    return facts
