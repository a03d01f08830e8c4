"""What a process shows of a collection while its states come in."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from indexer.backends.flat import FlatIndex
from indexer.catalog.records import Disabled, Record, embedding_sha256
from indexer.catalog.state import State
from indexer.contents import POOL_LABELS, Contents, Exemplar
from indexer.errors import CatalogError, ContentsError, IndexerError, InvalidName, UnknownVersion
from indexer.live.collection import LiveCollection
from indexer.snapshot import Snapshot
from indexer.store import SnapshotStore
from perception.errors import FingerprintMismatch

Embedding = NDArray[np.float32]
Make = Callable[..., Contents]
Unit = Callable[..., Embedding]

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
DIM = 12  # of `make_contents`


class Embeddings:
    """Where a live collection gets embeddings from; remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self._known: dict[str, Embedding] = {}

    def __call__(self, hashes: Sequence[str]) -> Mapping[str, Embedding]:
        self.asked.append(list(hashes))
        return {sha256: self._known[sha256] for sha256 in hashes if sha256 in self._known}

    def record(self, id: str, label: str, embedding: Embedding, disabled: Disabled | None = None) -> Record:
        sha256 = embedding_sha256(embedding)
        self._known[sha256] = embedding
        return Record(Exemplar(id, label), sha256, disabled=disabled)


@pytest.fixture
def live(tmp_path: Path, fingerprint: str) -> LiveCollection:
    return LiveCollection(tmp_path, "pools", fingerprint, "toy/0", DIM)


def test_nothing_is_shown_before_a_state_is(live: LiveCollection) -> None:
    assert live.view is None


def test_a_collection_without_a_base(live: LiveCollection, unit: Unit, fingerprint: str) -> None:
    """One that has only run-time exemplars, or none: there is nothing on disk to read."""
    embeddings, rows = Embeddings(), unit(0, 2)
    empty = live.show(State("pools"), embeddings, NOW)
    assert (len(empty), empty.counts) == (0, {"buffer": 0, "safe": 0, "unsafe": 0})
    assert empty.search_each(rows, 2) == [[], []]
    assert live.view is empty
    view = live.show(State("pools").with_records({"a": embeddings.record("a", "safe", rows[0])}, 3), embeddings, NOW)
    assert (view.encoder_name, view.encoder_fingerprint, view.dim) == ("toy/0", fingerprint, DIM)
    assert [[n.id for n in found] for found in view.search(rows, 2)] == [["a"], ["a"]]
    assert empty.search_each(rows, 2) == [[], []]  # whoever has the old view still sees it whole


def test_a_base_is_loaded_where_it_changes(tmp_path: Path, make_contents: Make, unit: Unit, fingerprint: str) -> None:
    made: list[int] = []

    def index(embeddings: Embedding) -> FlatIndex:
        made.append(len(embeddings))
        return FlatIndex(embeddings)

    live = LiveCollection(tmp_path, "pools", fingerprint, "toy/0", DIM, index)
    store, embeddings = SnapshotStore(tmp_path, "pools"), Embeddings()
    versions = [store.publish(make_contents(n=n)) for n in (10, 20, 30)]
    change = {"new": embeddings.record("new", "safe", unit(5, 1)[0]), "x001": None}
    bases = []
    for revision, at in enumerate((0, 0, 1, 0, 1, 2, 1, 0)):
        view = live.show(State("pools", base=versions[at]).with_records(change, revision), embeddings, NOW)
        assert len(view) == 10 * (at + 1)  # one more, one less
        bases.append(view.base)
    assert made == [10, 20, 30, 10]  # the last two stay, so that a roll back reads nothing
    assert bases[0] is bases[1] is bases[3]


def test_embeddings_are_asked_for_once(live: LiveCollection, unit: Unit) -> None:
    embeddings, rows = Embeddings(), unit(0, 3)
    a, b, c = (embeddings.record(id, "safe", row) for id, row in zip("abc", rows, strict=True))
    one = State("pools").with_records({"a": a, "b": replace(b, disabled=Disabled("operator"))}, 1)
    two = one.with_records({"b": b, "c": c}, 2)
    three = two.with_records({"a": None, "copy": replace(c, exemplar=Exemplar("copy", "unsafe"))}, 3)
    for state in (one, two, three, one):
        live.show(state, embeddings, NOW)
    hashes = [record.embedding_sha256 for record in (a, b, c)]
    assert [set(asked) for asked in embeddings.asked] == [set(hashes[:2]), {hashes[2]}, {hashes[0]}]


def test_the_same_state_is_shown_again_when_a_time_is_over(live: LiveCollection, unit: Unit) -> None:
    embeddings, until = Embeddings(), NOW + timedelta(seconds=90)
    record = embeddings.record("a", "safe", unit(0, 1)[0], Disabled("quarantine", until))
    state = State("pools").with_records({"a": record}, 1)
    early = live.show(state, embeddings, NOW)
    assert (len(early), early.until) == (0, until)
    late = live.show(state, embeddings, until)
    assert (len(late), late.until) == (1, None)
    assert (late.version, late.created_at) == (early.version, early.created_at)
    assert live.show(state, embeddings, until, created_at="2001-01-01T00:00:00+00:00").created_at.startswith("2001")


def test_a_view_of_another_state_changes_nothing(
    tmp_path: Path, make_contents: Make, unit: Unit, live: LiveCollection
) -> None:
    store, embeddings, rows = SnapshotStore(tmp_path, "pools"), Embeddings(), unit(0, 2)
    old, new = (store.publish(make_contents(n=n)) for n in (10, 20))
    a, b = (embeddings.record(id, "safe", row) for id, row in zip("ab", rows, strict=True))
    state = State("pools", base=new).with_records({"a": a}, 1)
    shown = live.show(state, embeddings, NOW)
    other = live.view_of(replace(state, base=old).with_records({"b": b}, 2), embeddings, NOW)
    assert (len(shown), len(other)) == (21, 12)
    assert live.view is shown
    assert (live.base(new), live.base(old)) == (shown.base, other.base)
    assert embeddings.asked == [[a.embedding_sha256], [b.embedding_sha256]]


def test_the_base_that_was_used_last_stays(tmp_path: Path, make_contents: Make, fingerprint: str) -> None:
    store = SnapshotStore(tmp_path, "pools")
    versions = [store.publish(make_contents(n=n)) for n in (3, 6, 9, 12)]
    live = LiveCollection(tmp_path, "pools", fingerprint, "toy/0", DIM, bases_kept=3)
    first, second, _, again, _ = (live.base(versions[at]) for at in (0, 1, 2, 0, 3))
    assert again is first
    assert live.base(versions[0]) is first
    assert live.base(versions[1]) is not second


def test_who_reads_a_base_keeps_nobody_waiting(tmp_path: Path, make_contents: Make, fingerprint: str) -> None:
    """Two threads ask for a base that is read for long: it is read once, and states are shown meanwhile."""
    store = SnapshotStore(tmp_path, "pools")
    slow, quick = (store.publish(make_contents(n=n)) for n in (20, 10))
    reading, go_on, reads = threading.Event(), threading.Event(), []

    def index(embeddings: Embedding) -> FlatIndex:
        reads.append(len(embeddings))
        if len(embeddings) == 20:
            reading.set()
            assert go_on.wait(20)
        return FlatIndex(embeddings)

    live = LiveCollection(tmp_path, "pools", fingerprint, "toy/0", DIM, index)
    live.show(State("pools", base=quick), Embeddings(), NOW)
    found: list[Snapshot] = []
    threads = [threading.Thread(target=lambda: found.append(live.base(slow))) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert reading.wait(20)
    view = live.show(State("pools", base=quick).with_records({"x001": None}, 1), Embeddings(), NOW)
    assert len(view) == 9
    go_on.set()
    for thread in threads:
        thread.join()
    assert found[0] is found[1] is live.show(State("pools", base=slow), Embeddings(), NOW).base
    assert reads == [10, 20]


@pytest.mark.parametrize("bases_kept", [1, 2])
def test_an_error_leaves_the_old_view(
    tmp_path: Path, make_contents: Make, unit: Unit, fingerprint: str, bases_kept: int
) -> None:
    store, embeddings = SnapshotStore(tmp_path, "pools"), Embeddings()
    foreign = store.publish(make_contents(n=9, fingerprint="cd" * 32))
    damaged = store.publish(make_contents(n=12))
    (tmp_path / "pools" / "versions" / damaged / "vectors.safetensors").unlink()
    good = store.publish(make_contents(n=30))
    live = LiveCollection(tmp_path, "pools", fingerprint, "toy/0", DIM, bases_kept=bases_kept)
    record = embeddings.record("a", "safe", unit(0, 1)[0])
    state = State("pools", base=good).with_records({"a": record}, 1)
    view = live.show(state, embeddings, NOW)

    def unreachable(hashes: Sequence[str]) -> Mapping[str, Embedding]:
        raise CatalogError("somewhere", "is down")

    other_dim = state.with_records({"long": embeddings.record("long", "safe", unit(0, 1, 13)[0])}, 2)
    lost = replace(record, exemplar=Exemplar("lost", "safe"), embedding_sha256="0" * 64)
    not_there = state.with_records({"lost": lost}, 2)
    refused: list[tuple[State, Callable[[Sequence[str]], Mapping[str, Embedding]], type[Exception], str]] = [
        (replace(state, base=foreign), embeddings, FingerprintMismatch, "cdcd"),
        (replace(state, base=damaged), embeddings, IndexerError, "vectors"),
        (replace(state, base="0" * 16), embeddings, UnknownVersion, "0000"),
        (State("shop"), embeddings, InvalidName, "'pools'"),
        (other_dim, embeddings, ContentsError, r"'long' is \(13,\)"),
        (not_there, embeddings, ContentsError, "'lost' is missing"),
        (other_dim, unreachable, CatalogError, "is down"),
    ]
    for bad, source, error, complaint in refused:
        with pytest.raises(error, match=complaint):
            live.show(bad, source, NOW)
        assert live.view is view
    again = live.show(replace(state, revision=9), unreachable, NOW)  # and nothing needs to be read again
    assert again.base is view.base


def test_refuses_to_keep_no_base(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bases_kept"):
        LiveCollection(tmp_path, "pools", "f", "toy/0", DIM, bases_kept=0)
    with pytest.raises(InvalidName):
        LiveCollection(tmp_path, "safe", "f", "toy/0", DIM)


def test_every_answer_is_of_one_state(tmp_path: Path, make_contents: Make, unit: Unit, live: LiveCollection) -> None:
    """Four threads search while 500 states are shown; a version's answers are those of a snapshot of its contents."""
    store, embeddings, rng = SnapshotStore(tmp_path, "pools"), Embeddings(), np.random.default_rng(0)
    contents = {store.publish(made): made for made in (make_contents(n=40, seed=1), make_contents(n=30, seed=2))}
    queries, rows = unit(3, 2), unit(4, 60)
    states, expected = [], {}
    state = State("pools", base=next(iter(contents)))
    for revision in range(1, 501):
        id, row = f"x{rng.integers(60):03d}", rows[rng.integers(60)]
        label = str(rng.choice(POOL_LABELS))
        disabled = Disabled("operator") if rng.random() < 0.2 else None
        change = None if rng.random() < 0.3 else embeddings.record(id, label, row, disabled)
        base = str(rng.choice(list(contents))) if rng.random() < 0.05 else state.base
        state = replace(state, base=base).with_records({id: change}, revision)
        states.append(state)
        expected[state.version] = answer_of(contents[state.base or ""], state, embeddings, queries)
    live.show(states[0], embeddings, NOW)
    seen: list[set[str]] = [set() for _ in range(4)]
    wrong: list[str] = []
    done, answered = threading.Event(), threading.Event()

    def search(versions: set[str]) -> None:
        while not done.is_set():
            view = live.view
            if view is None or view.search_each(queries, 3) != expected[view.version]:
                wrong.append(view.version if view else "none")
            else:
                versions.add(view.version)
            answered.set()

    threads = [threading.Thread(target=search, args=(versions,)) for versions in seen]
    for thread in threads:
        thread.start()
    for state in states:
        live.show(state, embeddings, NOW)
        if state.revision % 10 == 0:  # now and then somebody has to have got through
            answered.clear()
            assert answered.wait(20)
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(set.union(*seen)) > 20  # they did run side by side
    assert live.view is not None
    assert live.view.version == states[-1].version


def answer_of(contents: Contents, state: State, embeddings: Embeddings, queries: Embedding) -> object:
    """Naive twin: a snapshot of all that is active."""
    merged = {e.id: (e, row) for e, row in zip(contents.exemplars, contents.embeddings, strict=True)}
    for id, record in state.records.items():
        merged.pop(id, None)
        if record is not None and record.disabled is None:
            merged[id] = (record.exemplar, embeddings([record.embedding_sha256])[record.embedding_sha256])
    exemplars, rows = [e for e, _ in merged.values()], np.stack([e for _, e in merged.values()])
    return Snapshot.of(Contents.arrange("pools", "toy/0", contents.encoder_fingerprint, exemplars, rows)).search_each(
        queries, 3
    )
