"""Shadows that cannot keep up, fail or end: the service does not notice."""

import asyncio
import logging
import os
import threading
from typing import Any

import numpy as np
import pytest

from indexer.snapshot import Snapshot
from perception.preprocess import PreprocessSpec
from perception.testing import ToyEncoder, encoded, synthetic_image
from perception.verdict import PoolLabel
from service.errors import NotReady
from service.shadow import Shadow, ShadowEncoder
from service.testing import decode_processes, toy_pools
from tests.service.shadowing import (
    DECODING,
    HASH,
    NO_PIXELS,
    POLICY,
    REVIEW,
    SAFE,
    SERVING,
    UNSAFE,
    Counts,
    Fixed,
    contents,
    embedding_of,
    eventually,
    run,
)


def test_what_there_is_no_room_for_is_dropped_at_once_and_counted() -> None:
    async def work() -> None:
        candidate, counts = Fixed(), Counts()
        candidate.gate.clear()
        async with Shadow(candidate, DECODING, counts, max_waiting=3) as shadow:
            for _ in range(10):
                shadow.observe(HASH, np.zeros(3, np.float32), NO_PIXELS, None, SAFE)
            assert shadow.waiting == 3
            assert shadow.dropped == counts.of("dropped") == 7
            assert counts.total == 7
            candidate.gate.set()
            await eventually(lambda: shadow.waiting == 0)
            shadow.observe(HASH, np.zeros(3, np.float32), NO_PIXELS, None, SAFE)
            await eventually(lambda: counts.of("agree") == 4)
            assert shadow.disagreement() == (0.0, 4)  # what was not judged is in no rate

    run(work)


def test_what_waits_has_a_bound_in_bytes_too() -> None:
    async def work() -> None:
        candidate, counts = Fixed(preprocess=SERVING.preprocess), Counts()
        candidate.gate.clear()
        pixels = [np.zeros((3, 16, 16), np.uint8)] * 2
        size_bytes = 4 * 3 + 2 * pixels[0].nbytes
        async with Shadow(candidate, DECODING, counts, max_waiting=100, max_waiting_bytes=3 * size_bytes) as shadow:
            for _ in range(5):
                shadow.observe(HASH, np.zeros(3, np.float32), pixels, b"x" * 10_000, SAFE)
            assert (shadow.waiting, shadow.dropped) == (3, 2)
            candidate.gate.set()
            await eventually(lambda: shadow.waiting == 0)
            for _ in range(3):  # all of it has come back
                shadow.observe(HASH, np.zeros(3, np.float32), pixels, None, SAFE)
            await eventually(lambda: counts.of("agree") == 6)

    run(work)


def test_files_that_wait_for_their_decoder_count_with_their_bytes() -> None:
    async def work() -> None:
        counts = Counts()
        data = encoded(synthetic_image(1))
        candidate = Fixed(preprocess=PreprocessSpec(size_px=24, resize_px=24))
        async with Shadow(candidate, DECODING, counts, max_waiting_bytes=len(data) + 100) as shadow:
            shadow.observe(HASH, np.zeros(3, np.float32), NO_PIXELS, data, SAFE)
            shadow.observe(HASH, np.zeros(3, np.float32), NO_PIXELS, data, SAFE)
            assert (shadow.waiting, shadow.dropped) == (1, 1)
            await eventually(lambda: counts.of("agree") == 1 and shadow.waiting == 0)
        [(_, pixels)] = candidate.shown
        assert np.array_equal(np.stack(pixels), [candidate.preprocess.apply(synthetic_image(1))])  # type: ignore[union-attr]

    run(work)


def test_one_thread_of_low_priority_judges_and_not_the_event_loop() -> None:
    async def work() -> None:
        candidate, counts = Fixed(), Counts()
        async with Shadow(candidate, DECODING, counts, max_waiting=100) as shadow:
            for _ in range(20):
                shadow.observe(HASH, np.zeros(3, np.float32), NO_PIXELS, None, SAFE)
            await eventually(lambda: counts.total == 20)
        assert len(candidate.threads) == 1
        assert threading.get_ident() not in candidate.threads
        own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        assert all(found > own for found in candidate.niceness)

    run(work)


def test_what_it_cannot_judge_is_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        candidate, counts = Fixed(), Counts()
        async with Shadow(candidate, DECODING, counts, max_waiting=100) as shadow:
            for failure in (NotReady("no pools"), NotReady("still none"), RuntimeError("a bug"), None):
                for _ in range(3):
                    candidate.failure = failure
                    shadow.observe(HASH, np.zeros(3, np.float32), NO_PIXELS, None, SAFE)
                    await eventually(lambda: shadow.waiting == 0)
            assert shadow.disagreement() == (0.0, 3)
        assert counts.by == {("fixed", "failed"): 9, ("fixed", "agree"): 3}

    with caplog.at_level(logging.INFO):
        run(work)
    assert [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "hardlook.shadow"] == [
        ("WARNING", "shadow fixed cannot judge an image: not ready: no pools"),
        ("ERROR", "a bug in shadow fixed"),
    ]


def test_a_file_that_the_candidate_cannot_have_is_a_failure_to_judge_it() -> None:
    async def work() -> None:
        counts = Counts()
        candidate = Fixed(preprocess=PreprocessSpec(size_px=24, resize_px=24))
        async with Shadow(candidate, DECODING, counts) as shadow:
            for data in (None, b"hello", encoded(synthetic_image(1))[:60], encoded(synthetic_image(1))):
                shadow.observe(HASH, np.zeros(3, np.float32), NO_PIXELS, data, SAFE)
            await eventually(lambda: counts.total == 4 and shadow.waiting == 0)
        assert counts.by == {("fixed", "failed"): 3, ("fixed", "agree"): 1}

    run(work)


def test_a_record_that_fails_changes_no_count(caplog: pytest.LogCaptureFixture) -> None:
    def record(_: Any) -> None:
        raise RuntimeError("full")

    async def work() -> None:
        counts = Counts()
        async with Shadow(Fixed(), DECODING, counts, record=record) as shadow:
            for _ in range(2):
                shadow.observe(HASH, np.zeros(3, np.float32), NO_PIXELS, None, SAFE)
            await eventually(lambda: shadow.waiting == 0)
        assert counts.by == {("fixed", "agree"): 2}

    run(work)
    assert "full" in caplog.text


def test_pools_that_are_not_there_are_a_failure_to_judge() -> None:
    def no_pools() -> Snapshot:
        raise NotReady("no pools")

    async def work() -> None:
        counts = Counts()
        async with Shadow(ShadowEncoder(ToyEncoder(), no_pools, POLICY), DECODING, counts) as shadow:
            image = synthetic_image(1)
            shadow.observe(HASH, embedding_of(image), [SERVING.preprocess.apply(image)], None, SAFE)
            await eventually(lambda: shadow.waiting == 0)
        assert counts.by == {("encoder toy/0", "failed"): 1}

    run(work)


def test_it_ends_with_the_image_in_work_and_forgets_what_waits() -> None:
    async def work() -> None:
        candidate, counts = Fixed(), Counts()
        candidate.gate.clear()
        shadow = Shadow(candidate, DECODING, counts)
        shadow.observe(HASH, np.zeros(3, np.float32), NO_PIXELS, None, SAFE)  # it has not begun
        async with shadow:
            for _ in range(5):
                shadow.observe(HASH, np.zeros(3, np.float32), NO_PIXELS, None, SAFE)
            await eventually(candidate.entered.is_set)
            asyncio.get_running_loop().call_later(0.05, candidate.gate.set)
        assert counts.by == {("fixed", "agree"): 1}
        assert shadow.waiting == 0
        assert not [thread for thread in threading.enumerate() if thread.name == "shadow fixed"]
        shadow.observe(HASH, np.zeros(3, np.float32), NO_PIXELS, None, SAFE)
        assert counts.total == 1

    run(work)


def test_it_ends_while_files_are_decoded() -> None:
    async def work() -> None:
        candidate, counts = Fixed(preprocess=PreprocessSpec(size_px=24, resize_px=24)), Counts()
        before = decode_processes(os.getpid())
        async with Shadow(candidate, DECODING, counts) as shadow:
            for _ in range(5):
                shadow.observe(HASH, np.zeros(3, np.float32), NO_PIXELS, encoded(synthetic_image(1)), SAFE)
            assert shadow.waiting == 5
        assert shadow.waiting == 0
        assert counts.of("failed") == 0
        assert decode_processes(os.getpid()) <= before

    run(work)


def test_plain_snapshots_serve_as_well_as_views() -> None:
    candidate, pools = ToyEncoder(seed=3), toy_pools()
    snapshot = Snapshot.of(contents(candidate, pools))
    judge = ShadowEncoder(candidate, lambda: snapshot, POLICY)
    for pool, label in (("safe", SAFE), ("buffer", REVIEW), ("unsafe", UNSAFE)):
        image = pools[pool][0]
        opinion = judge.judge(np.zeros((1, 16), np.float32), [candidate.preprocess.apply(image)])
        assert (opinion.verdict.label, opinion.verdict.pool) == (label, PoolLabel(pool))
