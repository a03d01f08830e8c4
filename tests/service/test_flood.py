"""The flood guard: what it reports, what it must not report, and what nobody can bring about."""

import threading
import time
import tracemalloc
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from service.flood import Flood, FloodGuard

DIM = 64
MANY = 10_000  # exemplars, so that the share alone counts
Embedding = NDArray[np.float32]


def axis(number: int, dim: int = DIM) -> Embedding:
    """Images of different kinds: no two of these are near each other."""
    made = np.zeros(dim, np.float32)
    made[number % dim] = 1.0 if number // dim % 2 == 0 else -1.0
    return made


def different(count: int, seed: int = 0, dim: int = DIM) -> list[Embedding]:
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return [(row / np.linalg.norm(row)).astype(np.float32) for row in rows]


def near(centre: Embedding, cosine: float, seed: int) -> Embedding:
    other = np.random.default_rng(seed).standard_normal(len(centre))
    other -= (other @ centre) * centre
    made: NDArray[np.float64] = cosine * centre + np.sqrt(1 - cosine**2) * other / np.linalg.norm(other)
    return made.astype(np.float32)


def guard(
    window: int = 100,
    least: int = 10,
    share: float = 0.2,
    new: Callable[[str], bool] = lambda id: False,
    searched: int = MANY,
) -> FloodGuard:
    return FloodGuard(window, least, share, new, lambda: searched)


def floods(guard: FloodGuard, decisions: Iterable[tuple[str, Embedding]]) -> list[Flood]:
    return [flood for decision in decisions if (flood := guard.observe(*decision))]


def others(count: int, of: int = 1000, seed: int = 1) -> list[tuple[str, Embedding]]:
    """Usual traffic: each exemplar decides little."""
    ids = np.random.default_rng(seed).integers(0, of, count)
    return [(f"other-{id}", image) for id, image in zip(ids, different(count, seed), strict=True)]


def mixed(*parts: list[tuple[str, Embedding]]) -> list[tuple[str, Embedding]]:
    together = [decision for part in parts for decision in part]
    return [together[at] for at in np.random.default_rng(0).permutation(len(together))]


def test_a_new_exemplar_that_decides_too_much_is_reported_once() -> None:
    watching = guard(new=lambda id: id == "blank")
    usual = others(60)
    flood = [("blank", image) for image in different(60, seed=2)]
    found = floods(watching, mixed(usual, flood))
    assert [(f.exemplar_id, f.new) for f in found] == [("blank", True)]
    assert found[0].matches == 21  # the first number that is more than a fifth of the window
    assert floods(watching, [("blank", image) for image in different(300, seed=3)]) == []


def test_an_old_exemplar_that_decides_four_times_as_much_as_before_is_reported() -> None:
    watching = guard()
    before = [(id, image) for id, image in others(190)] + [("old", image) for image in different(10, seed=2)]
    assert floods(watching, mixed(before)) == []
    found = floods(watching, [("old", image) for image in different(60, seed=4)])
    assert [(f.exemplar_id, f.new) for f in found] == [("old", False)]


def test_an_old_exemplar_is_not_sudden_before_there_is_a_before() -> None:
    watching = guard()
    assert floods(watching, [("old", image) for image in different(199, seed=2)]) == []


@pytest.mark.parametrize("exemplars", [1, 2, 3, 5, 8])
def test_small_pools_whose_exemplars_have_always_matched_much_raise_no_alarm(exemplars: int) -> None:
    """Neither at a start, nor later, nor where one is a little more frequent than it was, nor where all are new."""
    rng = np.random.default_rng(exemplars)
    drift = np.linspace(1.0, 2.0, exemplars)
    for new in (False, True):
        watching = guard(new=lambda id, new=new: new, searched=exemplars)  # type: ignore[misc]
        for part in range(6):
            weights = drift if part % 2 else drift[::-1]
            ids = rng.choice(exemplars, 100, p=weights / weights.sum())
            images = different(100, seed=10 * part)
            assert floods(watching, [(f"x{id}", image) for id, image in zip(ids, images, strict=True)]) == []


def test_a_new_exemplar_of_a_small_pool_that_decides_nearly_all_is_reported() -> None:
    watching = guard(new=lambda id: id == "blank", searched=6)
    usual = [(f"x{i % 5}", image) for i, image in enumerate(different(20))]
    found = floods(watching, mixed(usual, [("blank", image) for image in different(80, seed=2)]))
    assert [f.exemplar_id for f in found] == ["blank"]
    assert found[0].matches == 67  # more than 4 / 6 of the window


def test_copies_of_one_image_have_no_exemplar_removed() -> None:
    """Somebody sends altered copies of a picture that an exemplar catches, to be rid of the exemplar."""
    watching = guard(new=lambda id: True, least=10)
    assert floods(watching, others(200)) == []
    for seed, picture in enumerate(different(9, seed=5)):
        copies = [near(picture, 0.98, 1000 * seed + i) for i in range(300)]
        assert floods(watching, [("right", copy) for copy in copies]) == []


def test_exactly_the_same_image_again_and_again_counts_once() -> None:
    watching = guard(new=lambda id: True, least=2, share=0.01)
    assert floods(watching, [("right", axis(0))] * 250) == []
    assert [f.matches for f in floods(watching, [("right", axis(1))])] == [2]


def test_too_few_kinds_are_no_flood_whatever_their_share() -> None:
    watching = guard(window=20, least=10, share=0.1, new=lambda id: True)
    assert floods(watching, [("x", axis(i % 9)) for i in range(100)]) == []
    assert len(floods(watching, [("x", axis(i)) for i in range(10)])) == 1


def test_after_it_was_forgotten_it_may_be_reported_again() -> None:
    watching = guard(new=lambda id: id == "blank")
    flood = [("blank", image) for image in different(40, seed=2)]
    assert len(floods(watching, flood)) == 1
    assert floods(watching, others(199)) == []
    assert floods(watching, flood) == []  # one of its decisions was still in the earlier window
    assert floods(watching, others(240)) == []
    assert len(floods(watching, flood)) == 1


def test_what_was_excused_is_never_reported() -> None:
    watching = guard(new=lambda id: True)
    watching.excuse("right")
    assert floods(watching, [("right", image) for image in different(300, seed=2)]) == []
    assert len(floods(watching, [("other", image) for image in different(60, seed=3)])) == 1


def test_decisions_that_no_exemplar_made_count_as_decisions_only() -> None:
    watching = guard(new=lambda id: True, least=1)
    assert floods(watching, [("", image) for image in different(250)]) == []
    assert [f.decisions for f in floods(watching, [("x", axis(i)) for i in range(30)])] == [100]


def test_turned_off() -> None:
    assert floods(guard(share=0.0, least=1, new=lambda id: True), [("x", image) for image in different(300)]) == []


@pytest.mark.parametrize(("window", "least", "share"), [(0, 1, 0.1), (1, 0, 0.1), (1, 1, -0.1), (1, 1, 1.1)])
def test_what_makes_no_sense_is_refused(window: int, least: int, share: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        guard(window, least, share)


@given(
    decisions=st.lists(st.tuples(st.sampled_from(["", "a", "b", "c"]), st.integers(0, 11)), max_size=120),
    window=st.integers(1, 30),
    least=st.integers(1, 5),
    share=st.floats(0.01, 0.9),
    new=st.sets(st.sampled_from(["a", "b", "c"])),
    searched=st.integers(0, 40),
)
def test_as_the_rule_says(
    decisions: list[tuple[str, int]], window: int, least: int, share: float, new: set[str], searched: int
) -> None:
    """The twin looks through everything again after each decision."""
    watching = FloodGuard(window, least, share, lambda id: id in new, lambda: searched)
    reported: set[str] = set()
    for n in range(1, len(decisions) + 1):
        present, earlier = decisions[max(0, n - window) : n], decisions[max(0, n - 2 * window) : max(0, n - window)]
        reported &= {id for id, _ in present + earlier}
        id, kind = decisions[n - 1]
        kinds = len({k for i, k in present if i == id})
        before = len({k for i, k in earlier if i == id})
        much = id and kinds >= least and kinds > max(share, 4 / max(1, searched)) * window
        sudden = id in new or (len(earlier) == window and kinds >= 4 * before)
        expected = bool(much and sudden and id not in reported)
        if expected:
            reported.add(id)
        assert (watching.observe(id, axis(kind)) is not None) is expected


def test_threads_report_a_flood_once() -> None:
    watching = guard(window=400, least=50, share=0.1, new=lambda id: True)
    images, found = different(400, seed=2), []
    begin = threading.Barrier(4)

    def work(mine: list[Embedding]) -> None:
        begin.wait(10)
        found.extend(floods(watching, [("x", image) for image in mine]))

    threads = [threading.Thread(target=work, args=(images[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [f.exemplar_id for f in found] == ["x"]


def test_cost_and_memory_are_bounded_whatever_comes() -> None:
    """Ids that never come again, and one exemplar that decides everything with ever new images."""
    dim, window = 640, 200
    watching = guard(window=window, share=0.5)
    images = different(1000, dim=dim)
    tracemalloc.start()
    started_s = time.perf_counter()
    for n in range(6000):
        watching.observe(f"id-{n}" if n < 3000 else "one", images[n % 1000])
    seconds = time.perf_counter() - started_s
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * window * 4 * dim
    assert seconds / 6000 < 0.002
