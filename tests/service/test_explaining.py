"""Explanations: the arithmetic of decisions is the policy's own, and whatever serves can be explained."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from indexer.catalog.state import Stamp, State
from indexer.contents import Contents, Exemplar
from indexer.live.suppression import Suppressed
from indexer.live.view import View
from indexer.snapshot import Snapshot
from perception import load_encoder
from perception.counterattack import Counterattack, FeatureEncoder
from perception.encoder import Precision
from perception.encoders.tower import TowerEncoder
from perception.preprocess import to_pixels
from perception.testing import ToyEncoder, synthetic_image
from perception.verdict import DecisionPolicy, Neighbor, PoolLabel, VerdictLabel
from service import explaining
from service.admission import Admission
from service.classifier import Classification, Classifier
from service.decoding import FrameOrigin, PreparedImage
from service.errors import DeadlineExceeded, NotReady, Overloaded
from service.explaining import PLACES, Explainer, Reasoning, differentiable, reasoned
from service.graph import GraphEncoder, as_graph
from service.saliency import Abandoned, Attribution, attribute
from tests.perception.adapter_checkpoints import TOWERS, write_tower

pytestmark = pytest.mark.anyio
POOLS = tuple(PoolLabel)
IDS = [(pool, f"{pool}-{i}") for pool in POOLS for i in range(4)]
PIXELS = np.zeros((1, 3, 16, 16), np.uint8)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@cache
def pools() -> View:
    exemplars = [Exemplar(id, str(pool), source="") for pool, id in IDS]
    encoder = ToyEncoder()
    embeddings = np.eye(len(IDS), encoder.dim, dtype=np.float32)
    contents = Contents.arrange("pools", encoder.name, encoder.fingerprint, exemplars, embeddings)
    base = Snapshot.of(contents)
    stamp = Stamp(encoder.name, encoder.fingerprint, encoder.dim)
    return View(State("pools", stamp, base.version), base, {}, datetime.now(UTC), stamp)


def classified(
    policy: DecisionPolicy, similarities: dict[str, float], suppressed: tuple[Suppressed, ...] = (), frames: int = 1
) -> Classification:
    neighbors = [Neighbor(id, pool, similarities[id]) for pool, id in IDS if id in similarities]
    origins = tuple(FrameOrigin(i, "black" if i else None) for i in range(frames))
    image = PreparedImage("PNG", 16, 16, frames, origins, np.repeat(PIXELS, frames, axis=0))
    nothing = np.zeros(16, np.float32)
    return Classification(
        image=image, verdict=policy.decide(neighbors), frame=origins[-1], matches=(), embedding=nothing,
        embeddings=nothing[None], suppressed=suppressed, sha256=b"", file=b"",
    )  # fmt: skip


def explained(policy: DecisionPolicy, similarities: dict[str, float], **more: Any) -> Reasoning:
    return reasoned(classified(policy, similarities, **more), policy, pools())


def test_margins_and_thresholds_are_spelt_out() -> None:
    policy = DecisionPolicy(min_similarity=0.5, min_margin=0.02)
    found = explained(policy, {"safe-0": 0.8, "buffer-0": 0.4, "unsafe-1": 0.769})
    assert (found.winner, found.runner_up) == ("safe", "unsafe")
    assert [threshold.applies for threshold in found.thresholds] == [True, True, False]
    assert all(threshold.holds for threshold in found.thresholds)
    assert found.facts == (
        "the best of the unsafe pool is less similar than that of the safe pool by 0.0310: the unsafe pool would win "
        "where that is made up for",
        "similarity 0.8000 is above min_similarity 0.5000 by 0.3000",
        "margin 0.0310 is above min_margin 0.0200 by 0.0110",
    )


def test_what_makes_it_review_is_said() -> None:
    policy = DecisionPolicy(min_similarity=0.5, min_margin_unsafe=0.1)
    found = explained(policy, {"safe-0": 0.4, "unsafe-0": 0.45})
    assert found.facts[1:] == (
        "similarity 0.4500 is below min_similarity 0.5000 by 0.0500: this makes it review",
        "margin 0.0500 is below min_margin_unsafe 0.1000 by 0.0500: this makes it review",
    )
    assert [threshold.holds for threshold in found.thresholds] == [False, True, False]


def test_a_threshold_that_is_met_exactly_holds() -> None:
    found = explained(DecisionPolicy(min_similarity=0.5), {"safe-0": 0.5, "unsafe-0": 0.25})
    assert "similarity 0.5000 is exactly min_similarity: any less would be review" in found.facts
    assert found.thresholds[0].holds


def test_votes_are_counted() -> None:
    policy = DecisionPolicy(rule="vote", k=3)
    similarities = {"safe-0": 0.9, "safe-1": 0.2, "unsafe-0": 0.8, "unsafe-1": 0.7, "buffer-0": 0.1}
    found = explained(policy, similarities)
    assert (found.winner, found.runner_up) == ("unsafe", "safe")
    assert [standing.votes for standing in found.standings] == [1, 0, 2]
    assert found.facts[0].startswith("of the 3 nearest exemplars, 1 for safe, 0 for buffer, 2 for unsafe")


def test_nothing_to_compare_with_is_review_and_has_a_best_all_the_same() -> None:
    found = explained(DecisionPolicy(), {"safe-0": 0.9, "buffer-0": 0.1})
    assert (found.winner, found.runner_up) == (None, "safe")
    assert found.best(PoolLabel.UNSAFE) is None
    assert found.facts == (
        "nothing to compare with: no exemplar in the unsafe pool: it is review whatever else is near",
    )
    assert not any(threshold.applies for threshold in found.thresholds)
    assert explained(DecisionPolicy(), {}).runner_up is None


def test_what_was_taken_away_and_which_frame_decided_is_said() -> None:
    left_out = (Suppressed("unsafe-3", "suppress-1", 0.97),)
    found = explained(DecisionPolicy(), {"safe-0": 0.9, "unsafe-0": 0.1}, suppressed=left_out, frames=3)
    assert found.facts[-2:] == (
        "exemplar 'unsafe-3' was left out: the image is near the suppress item 'suppress-1' (similarity 0.9700)",
        "3 frames and backgrounds were examined, and the most cautious verdict counts: that of frame 2 on black",
    )


similarity = st.floats(-1, 1, width=32)
policies = st.builds(
    DecisionPolicy,
    rule=st.sampled_from(["nearest", "vote"]),
    k=st.integers(1, 6),
    min_similarity=st.floats(-1, 1),
    min_margin=st.floats(0, 0.5),
    min_margin_unsafe=st.floats(0, 0.5),
)


@given(policies, st.dictionaries(st.sampled_from([id for _, id in IDS]), similarity))
def test_the_arithmetic_is_that_of_the_verdict(policy: DecisionPolicy, similarities: dict[str, float]) -> None:
    found = classified(policy, similarities)
    verdict, reasoning = found.verdict, reasoned(found, policy, pools())
    best = {standing.pool: standing.best for standing in reasoning.standings}
    assert reasoning.winner == verdict.pool
    for pool, match in best.items():
        of_pool = [s for id, s in similarities.items() if id.startswith(pool)]
        assert (match.neighbor.similarity if match else None) == max(of_pool, default=None)
    if verdict.pool is not None:
        winner, other = best[verdict.pool], reasoning.best(reasoning.runner_up)
        assert winner is not None
        assert other is not None
        assert verdict.margin == winner.neighbor.similarity - other.neighbor.similarity
        failed = not all(threshold.holds for threshold in reasoning.thresholds)
        assert (verdict.label is VerdictLabel.REVIEW) == (failed or verdict.pool is PoolLabel.BUFFER)
    votes = [standing.votes for standing in reasoning.standings]
    if policy.rule == "vote":
        assert sum(vote or 0 for vote in votes) == min(policy.k, len(similarities))
    else:
        assert votes == [None] * 3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", TOWERS)
def test_whatever_serves_can_be_explained(tmp_path: Path, kind: str, precision: Precision) -> None:
    """As a graph that was run in inference mode, and behind a defence: it is the encoder itself that is explained."""
    encoder = load_encoder(write_tower(tmp_path / "hub", kind), precision=precision)
    assert isinstance(encoder, TowerEncoder)
    pixels = encoder.preprocess.apply(synthetic_image(3, (64, 64)))
    graph = as_graph(encoder, (1,))
    with torch.inference_mode():
        exemplars = graph.encode(to_pixels([encoder.preprocess.apply(synthetic_image(4))])).numpy().copy()
        graph.encode(to_pixels([pixels]))
    assert isinstance(encoder, FeatureEncoder)
    behind = Counterattack(encoder, seed=b"a seed that nobody can guess")
    behind.encode(to_pixels([pixels]))
    grids = []
    for serving in (encoder, graph, behind):
        explained = differentiable(serving)
        assert explained is encoder
        [found] = attribute(explained, pixels, exemplars)
        assert np.isfinite(found.grid).all()
        assert found.completeness_error < 0.1
        grids.append(found.grid)
    np.testing.assert_array_equal(grids[0], grids[1])
    assert np.ptp(grids[0]) > 0


def test_a_graph_is_not_what_is_differentiated() -> None:
    encoder = load_encoder("bundled/lipsim")
    graph = as_graph(encoder, (1,))
    if not isinstance(graph, GraphEncoder):
        pytest.skip("this encoder has no graph here")
    assert differentiable(graph) is encoder


class Blocking:
    """In place of `attribute`: works until it is told to go on, or that nobody waits."""

    def __init__(self) -> None:
        self.began, self.release = threading.Event(), threading.Event()
        self.abandoned = 0

    def __call__(self, *_: Any, wanted: Any, refine: Any) -> tuple[Attribution, ...]:
        self.began.set()
        while not self.release.wait(0.01):
            if not wanted():
                self.abandoned += 1
                raise Abandoned
        return (Attribution(np.zeros((1, 1)), 0.0, 0.0, 8),)


class Judged:
    """In place of a Classifier: the same for every image."""

    def __init__(self) -> None:
        self.found = classified(DecisionPolicy(), {"safe-0": 0.9})

    async def classify(self, *_: Any, counted: bool, **__: Any) -> Classification:
        assert not counted
        return self.found


@contextmanager
def blocking(monkeypatch: pytest.MonkeyPatch) -> Iterator[Blocking]:
    work = Blocking()
    monkeypatch.setattr(explaining, "attribute", work)
    try:
        yield work
    finally:
        work.release.set()


def explainer() -> Explainer:
    judged: Any = Judged()
    assert hasattr(Classifier, "classify")
    return Explainer(judged, ToyEncoder(), DecisionPolicy(), Admission(8, 30.0), 30.0, threads=1)


def explanation(explainer: Explainer, within_s: float = 30.0) -> Any:
    return explainer.explain(b"", pools(), 3, asyncio.get_running_loop().time() + within_s)


async def began(work: Blocking) -> None:
    assert await asyncio.to_thread(work.began.wait, 30)
    work.began.clear()


async def test_who_hangs_up_stops_the_work_and_the_next_gets_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    with blocking(monkeypatch) as work:
        async with explainer() as explains:
            first = asyncio.create_task(explanation(explains))
            await began(work)
            second = asyncio.create_task(explanation(explains))
            await asyncio.sleep(0)
            assert not work.began.is_set()  # one at a time
            first.cancel()
            await began(work)
            assert work.abandoned == 1
            work.release.set()
            [compared] = (await second).compared
            assert compared.exemplar.id == "safe-0"
            assert compared.judged == pytest.approx(0.9)
            assert first.cancelled()


async def test_the_deadline_stops_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with blocking(monkeypatch) as work:
        async with explainer() as explains:
            with pytest.raises(DeadlineExceeded, match="no answer within 30"):
                await explanation(explains, within_s=0.2)
        assert work.abandoned == 1


async def test_shutting_down_does_not_wait_for_explanations(monkeypatch: pytest.MonkeyPatch) -> None:
    with blocking(monkeypatch) as work:
        async with explainer() as explains:
            waiting = asyncio.create_task(explanation(explains))
            await began(work)
        with pytest.raises(NotReady, match="shutting down"):
            await waiting


async def test_few_wait() -> None:
    explains = explainer()
    taken = [explains.place() for _ in range(PLACES)]
    for place in taken:
        place.__enter__()
    with pytest.raises(Overloaded, match=f"explanations is full, its limit is {PLACES}"), explains.place():
        pass
    taken[0].__exit__(None, None, None)
    with explains.place():
        pass
