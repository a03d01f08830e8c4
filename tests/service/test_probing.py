"""The probing detector: what counts, what does not, what junk cannot do, and what it costs."""

import hashlib
import itertools
import logging
import time
from collections import deque
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from service.probing import MAX_BYTES, SLOTS, ProbingDetector

DIM, LIMIT, WINDOW_S = 64, 5, 600.0
Embedding = NDArray[np.float32]


class Bench:
    """A detector with a clock, and files that all differ unless they are said to be the same."""

    def __init__(self, limit: int = LIMIT, **options: int) -> None:
        self.now_s = 1.0
        self.detector = ProbingDetector(limit, 0.95, WINDOW_S, lambda: self.now_s, **options)
        self._numbers = itertools.count()

    def ask(self, embedding: Embedding, caller: str = "a", file: str | None = None) -> bool:
        name = f"new {next(self._numbers)}" if file is None else file
        return self.detector.observe(caller, hashlib.sha256(name.encode()).digest(), embedding)

    def answers(self, embeddings: Iterable[Embedding], caller: str = "a") -> list[bool]:
        return [self.ask(embedding, caller) for embedding in embeddings]


def unit(vector: NDArray[np.float64]) -> Embedding:
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def axis(number: int, dim: int = DIM) -> Embedding:
    return unit(np.eye(dim)[number])


def near(centre: Embedding, cosine: float, seed: int = 0) -> Embedding:
    """An embedding of exactly that cosine to the centre."""
    other = np.random.default_rng(seed).standard_normal(len(centre))
    other -= (other @ centre) * centre
    return unit(cosine * centre + np.sqrt(1 - cosine**2) * other / np.linalg.norm(other))


def different(count: int, dim: int = DIM, seed: int = 0) -> list[Embedding]:
    """Random directions: of 64 dimensions no two of these are near each other."""
    return [unit(row) for row in np.random.default_rng(seed).standard_normal((count, dim))]


def test_more_than_the_limit_of_near_duplicates_gets_coarse_answers() -> None:
    bench = Bench()
    versions = [near(axis(0), 0.99, seed) for seed in range(20)]
    assert bench.answers(versions) == [False] * LIMIT + [True] * (20 - LIMIT)


@pytest.mark.parametrize(("cosine", "coarse"), [(0.951, True), (0.949, False)])
def test_the_threshold_is_where_it_is_said(cosine: float, coarse: bool) -> None:
    bench = Bench()
    bench.ask(axis(0))
    other = near(axis(0), cosine)
    assert bench.answers([other] * LIMIT)[-1] is coarse


def test_the_same_bytes_never_count() -> None:
    bench = Bench()
    assert not any(bench.ask(axis(0), file="meme") for _ in range(100))
    others = bench.answers(axis(0) for _ in range(LIMIT))
    assert others == [False] * (LIMIT - 1) + [True]
    assert bench.ask(axis(0), file="meme")


def test_other_images_of_the_caller_and_other_callers_keep_full_answers() -> None:
    bench = Bench()
    assert bench.answers([axis(0)] * 50)[-1]
    assert not any(bench.answers(axis(number) for number in range(1, DIM)))
    assert not bench.ask(axis(0), caller="b")
    assert bench.ask(axis(0))


def test_the_window_passes() -> None:
    bench = Bench()
    for _ in range(LIMIT):
        bench.now_s += 1
        assert not bench.ask(axis(0))
    bench.now_s += WINDOW_S - 5  # a second before the first one ceases to count
    assert bench.ask(axis(0))
    bench.now_s += WINDOW_S
    assert bench.answers([axis(0)] * (LIMIT + 1)) == [False] * LIMIT + [True]


def test_a_slow_caller_is_never_coarse() -> None:
    bench = Bench()
    for _ in range(100):
        assert not bench.ask(axis(0))
        bench.now_s += WINDOW_S / LIMIT


def test_clusters_in_sight_of_an_image_count_together() -> None:
    """An attack that wanders leaves several clusters behind, none of which need be over the limit alone."""
    bench = Bench()
    one, other = axis(0), near(axis(0), 0.9)
    assert bench.answers([one, other] * 3) == [False] * 6
    assert bench.ask(unit((one + other).astype(np.float64)))
    assert not bench.ask(other)


def test_zero_turns_it_off() -> None:
    bench = Bench(limit=0)
    assert not any(bench.answers([axis(0)] * 100))
    assert bench.detector.memory_bytes == 0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8), st.integers(0, 200)), max_size=80))
def test_with_room_it_counts_as_one_would_by_hand(events: list[tuple[int, int, int]]) -> None:
    """Images far from each other, each in versions: a naive count of distinct files in the window says the same."""
    bench = Bench()
    seen: dict[int, dict[int, float]] = {}
    for image, file, pause_s in events:
        bench.now_s += pause_s
        files = {f: at for f, at in seen.get(image, {}).items() if at + WINDOW_S > bench.now_s}
        files.setdefault(file, bench.now_s)
        seen[image] = files
        assert bench.ask(axis(image), file=f"{image} {file}") is (len(files) > LIMIT)


@given(st.data())
def test_junk_hides_no_more_than_the_bound_says(data: st.DataObject) -> None:
    """Misra and Gries: of n images all but n / (slots + 1) near-duplicates count, whatever the order."""
    slots, bench = 4, Bench(slots=4)
    order = data.draw(st.lists(st.sampled_from(range(12)), max_size=150))
    for n, image in enumerate(order, 1):
        coarse = bench.ask(axis(image))
        times = order[:n].count(image)
        if times > LIMIT + n / (slots + 1):
            assert coarse
        if times <= LIMIT:  # and nothing ever counts too often
            assert not coarse


def test_filled_slots_do_not_hide_a_probe() -> None:
    """A cache that evicts would forget the probe with each junk image, once its slots are held by better-known ones."""
    bench = Bench(slots=8)
    bench.answers(axis(number) for number in range(1, 8) for _ in range(LIMIT))
    junk = iter(different(400, seed=1))
    answers = []
    for _ in range(40):
        answers.append(bench.ask(axis(0)))
        bench.ask(next(junk))
    assert sum(answers) >= 40 - LIMIT - (40 + 40 + 7 * LIMIT) / 9


def test_a_busy_honest_caller_is_never_coarse() -> None:
    bench = Bench(limit=30)
    assert not any(bench.answers(different(3000, dim=256)))


def test_memory_is_bounded_and_the_least_recent_caller_goes_first() -> None:
    bench = Bench(max_bytes=200_000)
    per_caller = 0
    for number in range(200):
        bench.ask(axis(0), caller=str(number))
        per_caller = per_caller or bench.detector.memory_bytes
        assert bench.detector.memory_bytes <= 200_000
    kept = 200_000 // per_caller
    assert 10 < kept < 200
    for number in (199, 200 - kept):  # still there: the count goes on
        assert bench.answers([axis(0)] * LIMIT, caller=str(number))[-1]
    assert not bench.answers([axis(0)] * LIMIT, caller="0")[-1]


def test_a_full_caller_takes_what_is_promised() -> None:
    dim, limit = 640, 30
    bench = Bench(limit)
    bench.answers(different(3 * SLOTS, dim))
    assert bench.detector.memory_bytes == SLOTS * (2 * dim + 16 * (limit + 1)) == 444 * 1024
    assert MAX_BYTES // bench.detector.memory_bytes == 295
    small = Bench(limit)
    small.answers(different(8, dim))
    assert MAX_BYTES // small.detector.memory_bytes > 9000


def test_the_log_names_the_caller_once_a_window(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    bench.answers([axis(0)] * 50)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert vars(record)["fields"] == {"caller": "a"}
    bench.now_s += WINDOW_S
    bench.answers([axis(0)] * 50)
    assert len(caplog.records) == 2


def test_an_observation_costs_little() -> None:
    """40 us on one core of 2025; the bound leaves room for a busy machine."""
    bench, images = Bench(limit=30), different(900, dim=640)
    bench.answers(images[:300])
    times: deque[float] = deque()
    for image in images[300:]:
        began = time.perf_counter()
        bench.ask(image)
        times.append(time.perf_counter() - began)
    assert float(np.percentile(times, 20)) < 0.0002
