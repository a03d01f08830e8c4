"""Batches are functions of (seed, step, slot): orders, ranks, resumption, substitutes, and reading ahead."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offline.data.batches import MAX_ATTEMPTS, PREFETCHED, Batch, BatchPlan, BatchReader, EpochOrder
from offline.data.examples import ClassNames
from offline.data.labelled import TrainingExample, joined, open_images
from offline.errors import PlanError, RunError
from perception.errors import CorruptImage
from perception.preprocess import PreprocessSpec, to_pixels
from perception.testing import synthetic_image
from tests.offline.data_layouts import folder, mosaic_zip

SPEC = PreprocessSpec(size_px=8, resize_px=10)


class Pictures:
    """n synthetic images, some of which cannot be read."""

    problems = ()

    def __init__(self, n: int, name: str = "pictures", broken: frozenset[int] = frozenset(), word: str = "") -> None:
        self.n, self.name, self.broken = n, name, broken
        self.class_names: ClassNames = ((word,),) if word else ()

    def __len__(self) -> int:
        return self.n

    def id_of(self, index: int) -> str:
        return f"no. {index}"

    def read(self, index: int) -> TrainingExample:
        if index in self.broken:
            raise CorruptImage("drawn so") if index % 2 else OSError("disk")
        return TrainingExample(self.id_of(index), synthetic_image(index, (12, 11)), 0 if self.class_names else -1)


def reader_of(*parts: Pictures, per_batch: tuple[int, ...] = (4,), seed: int = 0, **options: object) -> BatchReader:
    plan = BatchPlan([len(part) for part in parts], per_batch, seed)
    return BatchReader(joined(parts), plan, SPEC, **options)  # type: ignore[arg-type]


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.pixels, b.pixels) and torch.equal(a.labels, b.labels) and a.unreadable == b.unreadable


# --- plans -----------------------------------------------------------------------------------------------------------


def plan_of(sources: list[tuple[int, int]], seed: int) -> BatchPlan:
    """From (size, per_batch) of each source."""
    return BatchPlan([size for size, _ in sources], [per_batch for _, per_batch in sources], seed)


plans = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 40)), min_size=1, max_size=3)


@given(plans, st.integers(0, 3))
def test_every_epoch_of_every_source_shows_every_image_once(sources: list[tuple[int, int]], seed: int) -> None:
    plan = plan_of(sources, seed)
    for source, (size, per_batch) in enumerate(sources):
        steps = -(-2 * size // per_batch)
        # In the order of the source's own slots; a plan for each source alone walks the same way.
        order = EpochOrder(size, seed, source)
        shown = np.concatenate([order.indices(per_batch, step) for step in range(steps)])[: 2 * size]
        assert [sorted(epoch) for epoch in shown.reshape(2, size).tolist()] == [list(range(size))] * 2
        for step in range(steps):
            of_source = [index for s, index in plan.slots(step) if s == source]
            assert of_source == order.indices(per_batch, step).tolist()


@given(st.integers(1, 40), st.integers(1, 50), st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(0, 2))
def test_orders_are_those_of_the_naive_walk(n: int, batch: int, steps: list[int], seed: int) -> None:
    """Whatever is remembered between steps, in whatever order they come."""
    order = EpochOrder(n, seed, 5)
    for step in steps:
        expected = []
        for position in range(step * batch, (step + 1) * batch):
            epoch, offset = divmod(position, n)
            expected.append(np.random.default_rng([seed, 5, epoch]).permutation(n)[offset])
        assert order.indices(batch, step).tolist() == expected


@given(plans)
def test_sources_take_turns_in_proportion(sources: list[tuple[int, int]]) -> None:
    plan = plan_of(sources, 0)
    turns = [source for source, _ in plan.slots(0)]
    assert len(turns) == plan.batch_size == sum(n for _, n in sources)
    for end in range(len(turns) + 1):
        for source, (_, n) in enumerate(sources):
            assert abs(turns[:end].count(source) - end * n / len(turns)) <= len(sources)


def test_a_large_source_costs_its_order_once_an_epoch() -> None:
    plan = BatchPlan([1_281_167], [128], 0)
    plan.slots(0)
    began = time.perf_counter()
    for step in range(1, 101):
        plan.slots(step)
    assert time.perf_counter() - began < 1  # 100 permutations take more than two


@given(st.integers(0, 1000), st.integers(0, 6), st.integers(1, 99))
def test_a_substitute_comes_from_the_same_source(step: int, slot: int, attempt: int) -> None:
    plan = BatchPlan([5, 9], [3, 4], 7)
    source, index = plan.replacement(step, slot, attempt)
    assert source == plan.slots(step)[slot][0]
    assert 0 <= index < plan.sizes[source]
    assert plan.replacement(step, slot, attempt) == (source, index)


def test_substitutes_differ_by_seed_step_slot_and_attempt() -> None:
    plan = BatchPlan([10**9], [8], 7)
    drawn = {
        plan.replacement(step, slot, attempt)[1] for step in range(5) for slot in range(8) for attempt in (1, 2, 3)
    }
    assert len(drawn) == 5 * 8 * 3
    assert BatchPlan([10**9], [8], 8).replacement(0, 0, 1) != plan.replacement(0, 0, 1)


@pytest.mark.parametrize(
    ("sizes", "per_batch", "seed"),
    [([], [], 0), ([3], [1, 1], 0), ([3, 0], [1, 1], 0), ([3, 3], [1, 0], 0), ([3], [1], -1)],
)
def test_impossible_plans_are_refused(sizes: list[int], per_batch: list[int], seed: int) -> None:
    with pytest.raises(PlanError):
        BatchPlan(sizes, per_batch, seed)


def test_a_reader_refuses_another_plan() -> None:
    with pytest.raises(PlanError, match=r"sources of \(4,\) images, these have \(5,\)"):
        BatchReader(joined([Pictures(5)]), BatchPlan([4], [2], 0), SPEC)
    for slots in ((0, 5), (2, 2), (-1, 2)):
        with pytest.raises(PlanError, match="not within a batch of 4"):
            reader_of(Pictures(5), slots=slots)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_a_batch_is_its_slots_preprocessed() -> None:
    parts = Pictures(7, word="cat"), Pictures(20, word="dog"), Pictures(3)
    reader = reader_of(*parts, per_batch=(2, 3, 1), seed=4)
    plan = BatchPlan([7, 20, 3], [2, 3, 1], 4)
    for step in (0, 9):
        batch = reader.read(step)
        examples = [parts[source].read(index) for source, index in plan.slots(step)]
        views = [SPEC.apply(example.image) for example in examples]
        assert batch.pixels.dtype is torch.uint8
        assert torch.equal(batch.pixels.float().div_(255), to_pixels(views))
        assert batch.labels.tolist() == [(0, 1, -1)[source] for source, _ in plan.slots(step)]
        assert batch.labels.dtype is torch.int64
        assert batch.unreadable == ()


def test_ranks_together_read_what_one_process_reads() -> None:
    parts = Pictures(7, broken=frozenset({2, 3})), Pictures(5, "others")
    options = {"per_batch": (5, 3), "seed": 1, "random_flip": True}
    whole = reader_of(*parts, **options)  # type: ignore[arg-type]
    for ranks in (2, 4, 8):
        share = 8 // ranks
        readers = [reader_of(*parts, **options, slots=(r * share, (r + 1) * share)) for r in range(ranks)]  # type: ignore[arg-type]
        for step in range(3):
            shares = [reader.read(step) for reader in readers]
            union = Batch(
                torch.cat([batch.pixels for batch in shares]),
                torch.cat([batch.labels for batch in shares]),
                tuple(u for batch in shares for u in batch.unreadable),
            )
            assert same(union, whole.read(step))


def test_flips_mirror_about_half_and_repeat() -> None:
    plain, flipped, again = (reader_of(Pictures(50), per_batch=(40,), random_flip=flip) for flip in (False, True, True))
    mirrored = []
    for step in range(5):
        a, b = plain.read(step).pixels, flipped.read(step).pixels
        assert torch.equal(b, again.read(step).pixels)
        for before, after in zip(a, b, strict=True):
            mirrored.append(torch.equal(after, before.flip(-1)))
            assert mirrored[-1] or torch.equal(after, before)
    assert 70 <= sum(mirrored) <= 130


def test_unreadable_images_are_replaced_and_reported() -> None:
    broken = frozenset({1, 2, 5})
    reader = reader_of(Pictures(6, broken=broken), per_batch=(6,), seed=3)
    readable = {SPEC.apply(synthetic_image(i, (12, 11))).tobytes() for i in {0, 3, 4}}
    for step in range(4):
        batch = reader.read(step)
        assert {view.numpy().tobytes() for view in batch.pixels} <= readable
        assert {unreadable.id for unreadable in batch.unreadable} == {"no. 1", "no. 2", "no. 5"}
        reasons = {(source, id): reason for source, id, reason in batch.unreadable}
        assert reasons["pictures", "no. 1"] == "image cannot be decoded: drawn so"
        assert reasons["pictures", "no. 2"] == "disk"
        assert same(batch, reader.read(step))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_of_which_nothing_can_be_read_ends_the_run(workers: int) -> None:
    reader = reader_of(Pictures(4), Pictures(9, "bad", frozenset(range(9))), per_batch=(2, 2))
    batches = reader.stream(0, 3, workers)
    with pytest.raises(RunError, match=rf"^step 0: {MAX_ATTEMPTS} images of bad in a row cannot be read[^\n]*$"):
        next(batches)


def test_other_errors_are_not_taken_for_bad_images() -> None:
    class Faulty(Pictures):
        def read(self, index: int) -> TrainingExample:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        next(reader_of(Faulty(4)).stream(0, 2))


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_in_order_and_resumes(tmp_path: Path, workers: int) -> None:
    root = folder(tmp_path / "f", [f"{name}/{n}.png" for name in ("cat", "dog") for n in range(4)])
    (root / "dog" / "2.png").write_bytes(b"none")
    tiles = mosaic_zip(tmp_path / "m.zip", {"n1": ("tench, Tinca tinca", 5), "n2": ("Dog", 4)})
    sources = joined([open_images("folder", root), open_images("mosaic", tiles)])
    reader = BatchReader(sources, BatchPlan([8, 9], [3, 2], 0), SPEC, random_flip=True)
    expected = [reader.read(step) for step in range(8)]
    assert any(batch.unreadable for batch in expected)
    whole = list(reader.stream(0, 8, workers))
    assert [same(a, b) for a, b in zip(whole, expected, strict=True)] == [True] * 8
    tail = list(reader.stream(5, 8, workers))
    assert [same(a, b) for a, b in zip(tail, expected[5:], strict=True)] == [True] * 3
    assert list(reader.stream(8, 8, workers)) == []


def test_the_thread_reads_ahead_within_bounds_and_stops_when_closed() -> None:
    read: list[int] = []

    class Counting(Pictures):
        def read(self, index: int) -> TrainingExample:
            read.append(index)
            return super().read(index)

    before = set(threading.enumerate())  # of other tests, which may end meanwhile
    batches = reader_of(Counting(1000), per_batch=(1,)).stream(0, 1000)
    next(batches)
    deadline = time.monotonic() + 10
    while len(read) < 1 + PREFETCHED and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(read) == 1 + PREFETCHED
    batches.close()
    assert set(threading.enumerate()) <= before
    assert len(read) == 1 + PREFETCHED


def test_processes_stop_when_the_stream_is_closed() -> None:
    import multiprocessing

    batches = reader_of(Pictures(10)).stream(0, 1000, 1)
    next(batches)
    assert len(multiprocessing.active_children()) == 1
    batches.close()
    assert multiprocessing.active_children() == []
