"""Shadows: they say what the candidate would have answered, and nothing of the service depends on them."""

import os
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perception.testing import ToyEncoder, encoded, synthetic_image
from service.shadow import WINDOW, Comparison, Shadow, ShadowEncoder, ShadowVersion, in_share
from service.testing import decode_processes, toy_pools
from tests.service.shadowing import (
    DECODING,
    HASH,
    NO_PIXELS,
    POLICY,
    SAFE,
    SERVING,
    UNSAFE,
    Counts,
    Fixed,
    embedding_of,
    eventually,
    run,
    sha256_of,
    verdict_of,
    view,
)


def test_another_version_is_compared_by_the_embedding_alone() -> None:
    pools = toy_pools()
    moved = {**pools, "safe": pools["safe"][1:], "unsafe": [*pools["unsafe"], pools["safe"][0]]}
    images = [synthetic_image(seed) for seed in (*range(12), *range(100, 103), *range(200, 203))]
    expected = Counter[str]()
    for image in images:
        served, other = verdict_of(pools, SERVING, image), verdict_of(moved, SERVING, image)
        expected["agree" if served == other else f"{served}->{other}"] += 1
    assert expected["safe->unsafe"]
    assert expected["agree"]

    async def work() -> None:
        counts, candidate = Counts(), ShadowVersion(view(moved), POLICY)
        async with Shadow(candidate, DECODING, counts, max_waiting=100) as shadow:
            assert shadow.disagreement() == (0.0, 0)
            for image in images:
                shadow.observe(HASH, embedding_of(image), NO_PIXELS, None, verdict_of(pools, SERVING, image))
            await eventually(lambda: shadow.waiting == 0)
            differing = len(images) - expected["agree"]
            assert shadow.disagreement() == (differing / len(images), len(images))
        assert shadow.name == f"version {view(moved).version}"
        assert counts.by == {(shadow.name, outcome): n for outcome, n in expected.items()}

    run(work)


def test_all_frames_count_where_all_are_shown() -> None:
    pools = toy_pools()
    frames = np.stack([embedding_of(pools[pool][0]) for pool in ("safe", "unsafe", "safe")])
    opinion = ShadowVersion(view(pools), POLICY).judge(frames, NO_PIXELS)
    assert opinion.verdict.label == UNSAFE
    assert np.array_equal(opinion.embedding, frames[1])


@pytest.mark.parametrize("size_px", [16, 24])
def test_another_encoder_judges_by_its_own_pixels_and_pools(size_px: int) -> None:
    """One that prepares images as the service does is shown the service's pixels; another decodes the file anew."""
    candidate, pools = ToyEncoder(dim=8, seed=5, size_px=size_px), toy_pools()
    same = candidate.preprocess == SERVING.preprocess
    assert same == (size_px == 16)
    images = [synthetic_image(seed) for seed in (*range(8), 100, 200)]
    records: list[Comparison] = []

    async def work() -> None:
        counts, before = Counts(), decode_processes(os.getpid())
        judge = ShadowEncoder(candidate, lambda: view(pools, candidate), POLICY)
        async with Shadow(judge, DECODING, counts, record=records.append, max_waiting=100) as shadow:
            assert len(decode_processes(os.getpid()) - before) == (0 if same else 1)
            for number, image in enumerate(images):
                pixels, data = [SERVING.preprocess.apply(image)], encoded(image)
                served = verdict_of(pools, SERVING, image)
                shadow.observe(sha256_of(data), embedding_of(image), pixels, data, served, f"request-{number}")
            await eventually(lambda: shadow.waiting == 0)
        assert decode_processes(os.getpid()) <= before
        assert counts.total == len(images)
        assert counts.of("failed") == counts.of("dropped") == 0

    run(work)
    found = {record.request_id: record for record in records}
    for number, image in enumerate(images):
        record = found[f"request-{number}"]
        assert record.opinion.verdict.label == verdict_of(pools, candidate, image)
        assert record.served == verdict_of(pools, SERVING, image)
        assert record.sha256 == sha256_of(encoded(image))
        assert (record.candidate, record.fingerprint) == ("encoder toy/5", candidate.fingerprint)
        assert record.opinion.embedding == pytest.approx(embedding_of(image, candidate), abs=1e-6)


def test_the_rate_is_of_the_last_thousand() -> None:
    async def work() -> None:
        candidate, counts = Fixed(UNSAFE), Counts()
        async with Shadow(candidate, DECODING, counts, max_waiting=5000) as shadow:
            for served in [SAFE] * 500 + [UNSAFE] * 900:
                shadow.observe(HASH, np.zeros(3, np.float32), NO_PIXELS, None, served)
            await eventually(lambda: shadow.waiting == 0)
            assert shadow.disagreement() == (0.1, WINDOW)
        assert counts.by == {("fixed", "safe->unsafe"): 500, ("fixed", "agree"): 900}

    run(work)


# --- which share -----------------------------------------------------------------------------------------------------


@given(st.binary(max_size=20), st.floats(0, 1), st.floats(0, 1))
def test_a_file_is_in_a_share_for_good(data: bytes, one: float, other: float) -> None:
    small, large = sorted((one, other))
    name = sha256_of(data)
    assert in_share(name, small) == in_share(name, small)
    assert in_share(name, large) or not in_share(name, small)
    assert in_share(name, 1.0)
    assert in_share("f" * 64, 1.0)
    assert not in_share(name, 0.0)


def test_a_share_is_that_large() -> None:
    names = [sha256_of(str(n).encode()) for n in range(4000)]
    for share in (0.1, 0.5, 0.9):
        assert sum(in_share(name, share) for name in names) / len(names) == pytest.approx(share, abs=0.03)


def test_the_rest_is_not_looked_at() -> None:
    names = [sha256_of(str(n).encode()) for n in range(50)]

    async def work() -> None:
        candidate, counts = Fixed(), Counts()
        async with Shadow(candidate, DECODING, counts, share=0.3, max_waiting=100) as shadow:
            for name in names:
                shadow.observe(name, np.zeros(3, np.float32), NO_PIXELS, None, SAFE)
            await eventually(lambda: shadow.waiting == 0)
        assert counts.total == sum(in_share(name, 0.3) for name in names)
        assert 0 < counts.total < 50

    run(work)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_between_nothing_and_everything(share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        Shadow(Fixed(), DECODING, Counts(), share=share)


# --- the service does not depend on it -------------------------------------------------------------------------------
