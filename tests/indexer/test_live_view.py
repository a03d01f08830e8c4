"""A view answers as a snapshot of the merged contents would, however little of them it was made from."""

import time
from datetime import datetime, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer.backends.flat import FlatIndex
from indexer.catalog.clock import text_of
from indexer.catalog.records import Disabled
from indexer.catalog.state import Stamp, State
from indexer.contents import POOL_LABELS, Exemplar
from indexer.errors import ContentsError, InvalidLabel, InvalidName, UnknownExemplar
from indexer.live.suppression import Evidence
from indexer.live.view import View
from indexer.snapshot import MakeIndex, Snapshot
from perception.errors import FingerprintMismatch
from tests.indexer.live_states import (
    DIM,
    FINGERPRINT,
    LABELS,
    LATER,
    NOW,
    Changes,
    Embedding,
    contents_of,
    make_base,
    merge,
    record,
    unit,
    view_of,
)


@st.composite
def situations(draw: st.DrawFn) -> tuple[str, Snapshot | None, Changes, Embedding]:
    """A collection, its base, its overlay and queries; of few directions, so that most similarities tie."""
    collection = draw(st.sampled_from(["pools", "shop"]))
    directions = unit(draw(st.integers(0, 1000)), draw(st.integers(1, 6)))
    label, direction = st.sampled_from(LABELS[collection]), st.sampled_from(list(directions))
    ids = [f"{prefix}{i}" for prefix in "bax" for i in range(8)]
    base = None
    if draw(st.booleans()):
        present = draw(st.lists(st.sampled_from(ids), unique=True, max_size=24))
        exemplars = [Exemplar(id, draw(label)) for id in present]
        embeddings = np.array([draw(direction) for _ in present], np.float32).reshape(-1, DIM)
        base = make_base(exemplars, embeddings, collection)
    changed: Changes = {}
    for id in draw(st.lists(st.sampled_from(ids), unique=True, max_size=24)):
        disabled = draw(st.sampled_from([None, None, Disabled("operator"), Disabled("quarantine", LATER)]))
        changed[id] = draw(st.sampled_from([None, record(id, draw(label), draw(direction), disabled)]))
    queries = np.concatenate([directions[:2], unit(draw(st.integers(0, 1000)), 2)])
    return collection, base, changed, queries


@settings(max_examples=120)
@given(situations(), st.sampled_from([1, 2, 5, 40]), st.sampled_from([NOW, LATER]))
def test_a_view_answers_as_a_snapshot_of_the_merged_contents(
    situation: tuple[str, Snapshot | None, Changes, Embedding], k: int, now: datetime
) -> None:
    collection, base, changed, queries = situation
    view, twin = (
        view_of(base, changed, collection, now),
        Snapshot.of(contents_of(merge(base, changed, now), collection)),
    )
    assert (len(view), view.counts, list(view.counts)) == (len(twin), twin.counts, list(twin.counts))
    assert (view.kind, view.dim, view.collection) == (twin.kind, twin.dim, twin.collection)
    assert (view.encoder_name, view.encoder_fingerprint) == (twin.encoder_name, twin.encoder_fingerprint)
    for label in (None, *LABELS[collection]):
        assert view.search(queries, k, label=label) == twin.search(queries, k, label=label)  # to the last bit
    assert view.search_each(queries, k) == twin.search_each(queries, k)
    assert view.evidence(queries, k) == [Evidence(tuple(found)) for found in twin.search_each(queries, k)]
    assert tuple(view.active()) == twin.exemplars
    assert Snapshot.of(view.contents()).version == twin.version
    assert view.to_gallery().sha256 == twin.to_gallery().sha256
    for exemplar in twin.exemplars:
        assert view.exemplar(exemplar.id) == exemplar
        assert view.is_active(exemplar.id)
        assert np.array_equal(view.embedding(exemplar.id), twin.embedding(exemplar.id))


@settings(max_examples=60)
@given(situations(), st.integers(1, 9), st.booleans())
def test_pages_list_all_that_is_there(
    situation: tuple[str, Snapshot | None, Changes, Embedding],
    limit: int,
    inactive: bool,
) -> None:
    collection, base, changed, _ = situation
    view = view_of(base, changed, collection)
    there = merge(base, changed, NOW) | {id: (r[0].exemplar, r[1]) for id, r in changed.items() if r and inactive}
    for label in (None, *LABELS[collection]):
        expected = [there[id][0] for id in sorted(there) if label in (None, there[id][0].label)]
        listed: list[Exemplar] = []
        while page := view.page(listed[-1].id if listed else "", limit, label=label, inactive=inactive):
            assert len(page) == min(limit, len(expected) - len(listed))
            listed += page
        assert listed == expected
    assert view.page("az", 1) == [there[id][0] for id in sorted(merge(base, changed, NOW)) if id > "az"][:1]


def crowded(index: MakeIndex = FlatIndex, n: int = 1200, hidden: int = 500) -> tuple[View, Snapshot, Embedding]:
    """A view in which the nearest to the query are hidden, and a snapshot without them."""
    embeddings, query = unit(1, n), unit(2, 1)
    exemplars = [Exemplar(f"x{i:04d}", POOL_LABELS[i % 3]) for i in range(n)]
    nearest = np.argsort(-(embeddings @ query[0]))[:hidden]
    changed: Changes = {}
    for at in nearest[::2]:
        changed[exemplars[at].id] = None
    for at in nearest[1::2]:
        changed[exemplars[at].id] = record(exemplars[at].id, exemplars[at].label, embeddings[at], Disabled("operator"))
    base = make_base(exemplars, embeddings, index=index)
    twin = Snapshot.of(contents_of(merge(base, changed, NOW), "pools"))
    return view_of(base, changed), twin, np.concatenate([query, -query, unit(3, 2)])


@pytest.mark.parametrize("k", [1, 10, 100, 2000])
def test_hidden_rows_cost_no_result(k: int) -> None:
    view, twin, queries = crowded()
    assert view.search(queries, k) == twin.search(queries, k)
    assert view.search_each(queries, k) == twin.search_each(queries, k)
    assert view.search(queries, k, label="unsafe") == twin.search(queries, k, label="unsafe")


class Careless:
    """An index that breaks its word: it misses every third row, and finds fewer than it was asked for."""

    def __init__(self, embeddings: Embedding) -> None:
        self._flat = FlatIndex(embeddings)

    @property
    def dim(self) -> int:
        return self._flat.dim

    def __len__(self) -> int:
        return len(self._flat)

    def search(self, queries: Embedding, k: int, rows: range | None = None) -> list[list[tuple[int, float]]]:
        found = self._flat.search(queries, k, rows)
        return [[hit for hit in hits if hit[0] % 3 != 1][: max(1, k // 2)] for hits in found]


def test_an_approximate_base_loses_nothing_by_what_is_hidden() -> None:
    view, twin, queries = crowded(Careless)
    exact = [{neighbor.id: neighbor for neighbor in hits} for hits in twin.search(queries, 2000)]
    for k in (1, 10, 100):
        for hits, known in zip(view.search(queries, k), exact, strict=True):
            assert len(hits) == k
            assert all(known[hit.id] == hit for hit in hits)
            assert hits == sorted(hits, key=lambda hit: (-hit.similarity, hit.pool, hit.id))


def test_many_hidden_rows_and_few_searches() -> None:
    """What is asked of the base grows with what is hidden near the query, not with all that is hidden."""
    asked: list[int] = []

    class Counting(Careless):
        def search(self, queries: Embedding, k: int, rows: range | None = None) -> list[list[tuple[int, float]]]:
            asked.append(len(queries) * k)
            return self._flat.search(queries, k, rows)

    view, _, queries = crowded(Counting)
    view.search(-unit(2, 1), 5)  # far from all that is hidden
    assert asked == [5 + 16]
    asked.clear()
    view.search(queries, 5)
    assert 500 < sum(asked) < 4 * 700


def test_disabled_exemplars_come_back_when_their_time_is_over() -> None:
    embeddings = unit(8, 4)
    changed: Changes = {
        "a": record("a", "safe", embeddings[0], Disabled("operator", NOW + timedelta(hours=2))),
        "b": record("b", "safe", embeddings[1], Disabled("quarantine", LATER)),
        "c": record("c", "safe", embeddings[2], Disabled("operator")),
        "s": record("s", "suppress", embeddings[3], Disabled("operator", NOW + timedelta(minutes=5)), ("a",), 0.5),
    }
    untils, active = [], []
    now: datetime | None = NOW
    while now is not None:
        view = view_of(None, changed, now=now)
        active.append([exemplar.id for exemplar in view.active()])
        untils.append(view.until and view.until - NOW)
        now = view.until
    assert active == [[], [], ["b"], ["a", "b"]]
    assert untils == [timedelta(minutes=5), timedelta(hours=1), timedelta(hours=2), None]


def test_what_is_there_can_be_looked_up_active_or_not() -> None:
    embeddings = unit(9, 6)
    base = make_base([Exemplar(id, "safe") for id in "abc"], embeddings[:3])
    changed: Changes = {
        "a": record("a", "unsafe", embeddings[3], Disabled("operator")),
        "b": None,
        "n": record("n", "buffer", embeddings[4]),
        "s": record("s", "suppress", embeddings[5], None, ("a",), 0.5),
    }
    view = view_of(base, changed)
    assert [view.is_active(id) for id in "acns"] == [False, True, True, False]
    assert [view.exemplar(id).label for id in "acns"] == ["unsafe", "safe", "buffer", "suppress"]
    assert [view.record(id) for id in "acns"] == [change and change[0] for change in map(changed.get, "acns")]
    for id, row in zip("acns", (3, 2, 4, 5), strict=True):
        assert np.array_equal(view.embedding(id), embeddings[row])
        view.embedding(id)[:] = 0
        assert np.array_equal(view.embedding(id), embeddings[row])
    for find in (view.exemplar, view.record, view.embedding, view.is_active):
        for id in ("b", "nobody"):
            with pytest.raises(UnknownExemplar, match=f"no exemplar '{id}' in snapshot pools/{view.version}"):
                find(id)
    assert [e.id for e in view.page("", 9, label="suppress", inactive=True)] == ["s"]
    assert view.page("", 9, label="suppress") == []
    assert (view.version, view.revision, view.state.base) == (view.state.version, 7, base.version)


@pytest.mark.parametrize("has_base", [True, False])
@pytest.mark.parametrize("changes", [0, 3])
def test_refuses_what_a_snapshot_refuses(has_base: bool, changes: int) -> None:
    embeddings = unit(10, 8)
    base = make_base([Exemplar(f"b{i}", "safe") for i in range(5)], embeddings[:5]) if has_base else None
    changed = {f"n{i}": record(f"n{i}", "safe", embeddings[i]) for i in range(changes)}
    view, twin = view_of(base, changed), Snapshot.of(contents_of(merge(base, changed, NOW), "pools"))
    good = unit(0, 2)
    for queries, k, label in [
        (good, 0, None),
        (good[:, :3], 1, "safe"),
        (good.astype(float), 1, None),
        (good * np.nan, 1, None),
        (good * 2, 1, "buffer"),
        (good, 1, "neutral"),
        (good * 2, 1, "suppress"),
    ]:
        with pytest.raises((ValueError, InvalidLabel)) as expected:
            twin.search(queries, k, label=label)
        text = str(expected.value).replace(twin.version, view.version)
        for search in (view.search, view.search_each, view.evidence):
            options = {"label": label} if search == view.search else {}
            if options or label is None:
                with pytest.raises(expected.type) as caught:
                    search(queries, k, **options)
                assert str(caught.value) == text
    for limit, label in ((0, None), (1, "neutral")):
        with pytest.raises((ValueError, InvalidLabel)):
            view.page("", limit, label=label)


def test_refuses_what_does_not_belong_together() -> None:
    base = make_base([Exemplar("a", "safe")], unit(0, 1))
    stamp = Stamp("toy/0", FINGERPRINT, DIM)
    state = State("pools", base=base.version)
    with pytest.raises(FingerprintMismatch, match="cdcd"):
        View(state, base, {}, NOW, Stamp("toy/1", "cd" * 32, DIM))
    with pytest.raises(FingerprintMismatch, match="cdcd"):
        View(State("pools", Stamp("toy/1", "cd" * 32, DIM)), None, {}, NOW, stamp)
    with pytest.raises(ContentsError, match=f"{base.version}, which is not given"):
        View(state, None, {}, NOW, stamp)
    with pytest.raises(ContentsError, match=f"stands on version None, not on snapshot pools/{base.version}"):
        View(State("pools"), base, {}, NOW, stamp)
    with pytest.raises(ContentsError, match="have length 5, the encoder's 6"):
        View(state, base, {}, NOW, Stamp("toy/0", FINGERPRINT, 6))
    with pytest.raises(InvalidName):
        View(State("../x"), None, {}, NOW, stamp)
    with pytest.raises(ValueError, match="no time zone"):
        View(State("pools"), None, {}, datetime(2026, 1, 1), stamp)  # noqa: DTZ001


@pytest.mark.parametrize("disabled", [None, Disabled("operator")])
def test_refuses_bad_records_and_names_them(disabled: Disabled | None) -> None:
    good = record("good", "safe", unit(0, 1)[0])
    bad, _ = record("bad", "safe", unit(1, 1)[0], disabled)
    state = State("pools").with_records({"good": good[0], "bad": bad}, 1)
    for embedding, complaint in [
        (None, "the embedding of 'bad' is missing"),
        (unit(1, 1, 6)[0], r"the embedding of 'bad' is \(6,\) float32, expected \(5,\)"),
        (unit(1, 1)[0].astype(float), r"the embedding of 'bad' is \(5,\) float64"),
        (unit(1, 1)[0] * np.float32(2), "the embedding of 'bad' is not finite and of unit L2 norm"),
        (unit(1, 1)[0] * np.float32("nan"), "the embedding of 'bad' is not finite"),
    ]:
        found = {good[0].embedding_sha256: good[1]} | ({} if embedding is None else {bad.embedding_sha256: embedding})
        with pytest.raises(ContentsError, match=complaint):
            View(state, None, found, NOW, Stamp("toy/0", FINGERPRINT, DIM))
    with pytest.raises(InvalidLabel, match="exemplar 'x': label 'cat'"):
        view_of(None, {"x": record("x", "cat", unit(0, 1)[0], disabled)})


def test_when_a_version_is_from() -> None:
    base = make_base([Exemplar("a", "safe")], unit(0, 1))
    assert view_of(base, {}).created_at == base.created_at
    assert view_of(base, {}).version == base.version
    assert view_of(base, {"a": None}).created_at == text_of(NOW)
    given = View(State("pools"), None, {}, NOW, Stamp("toy/0", FINGERPRINT, DIM), "2001-01-01T00:00:00+00:00")
    assert given.created_at == "2001-01-01T00:00:00+00:00"


def test_a_new_view_costs_what_has_changed_not_what_is_there() -> None:
    """The same overlay over bases of very different sizes."""
    changed = {f"n{i:04d}": record(f"n{i:04d}", "safe", row) for i, row in enumerate(unit(1, 200))}

    def best_s(base: Snapshot) -> float:
        def one() -> float:
            begin = time.perf_counter()
            view = view_of(base, changed)
            assert view.counts["safe"] == len(base) + 200
            return time.perf_counter() - begin

        return min(one() for _ in range(7))

    small, large = (make_base([Exemplar(f"x{i:06d}", "safe") for i in range(n)], unit(0, n)) for n in (300, 30_000))
    assert best_s(large) < 3 * best_s(small) + 2e-3
