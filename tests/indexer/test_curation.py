from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from indexer.contents import POOL_LABELS, Contents, Exemplar
from indexer.curation import NEAR_IDENTICAL, VOTERS, contradictions, near_duplicates, probe
from indexer.errors import InvalidLabel, InvalidName
from indexer.pairs import Groups, join_near, similarities
from indexer.snapshot import Snapshot

Make = Callable[..., Contents]
Vectors = NDArray[np.float32]


def unit(rows: NDArray[np.float64]) -> Vectors:
    normal: Vectors = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return normal


def clustered(seed: int, n: int, dim: int, spread: float) -> Vectors:
    """Rows around a few centres, some of them twice to the bit."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(1, n // 4), dim))
    rows = unit(centres[rng.integers(0, len(centres), n)] + spread * rng.normal(size=(n, dim)))
    rows[n // 2 :: 5] = rows[:1]
    return rows


def collection(
    rows: Vectors, labels: Sequence[str], name: str = "pools", hashes: Sequence[str] | None = None
) -> Snapshot:
    exemplars = [Exemplar(f"x{i:03d}", label, "" if hashes is None else hashes[i]) for i, label in enumerate(labels)]
    return Snapshot.of(Contents.arrange(name, "toy/0", "ab" * 32, exemplars, rows))


def cosine(a: Vectors, b: Vectors) -> float:
    return float(np.clip((a * b.astype(np.float64)).sum(), -1.0, 1.0))


def brute_partition(contents: Contents, threshold: float, *, across_labels: bool) -> set[frozenset[str]]:
    """Connected components by comparing everything with everything."""
    n, rows, exemplars = len(contents.exemplars), contents.embeddings, contents.exemplars
    component = list(range(n))
    for a, b in combinations(range(n), 2):
        if not across_labels and exemplars[a].label != exemplars[b].label:
            continue
        equal = np.array_equal(rows[a], rows[b])
        same_file = exemplars[a].sha256 and exemplars[a].sha256 == exemplars[b].sha256
        if equal or same_file or cosine(rows[a], rows[b]) >= threshold:
            old, new = component[b], component[a]
            component = [new if c == old else c for c in component]
    groups: dict[int, set[str]] = {}
    for row, c in enumerate(component):
        groups.setdefault(c, set()).add(exemplars[row].id)
    return {frozenset(group) for group in groups.values() if len(group) > 1}


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(0, 40),
    dim=st.sampled_from([2, 12, 129, 200]),
    spread=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    threshold=st.sampled_from([0.3, 0.8, 0.95, 1.0]),
    name=st.sampled_from(["pools", "shop"]),
    files=st.integers(2, 60),
)
@settings(max_examples=60, deadline=None)
def test_groups_are_those_of_comparing_everything(
    seed: int, n: int, dim: int, spread: float, threshold: float, name: str, files: int
) -> None:
    rng = np.random.default_rng(seed)
    hashes = ["" if f == 0 else f"{f:064x}" for f in rng.integers(0, files, n)]
    snapshot = collection(
        clustered(seed, n, dim, spread), [POOL_LABELS[i] for i in rng.integers(0, 3, n)], name, hashes
    )
    found = near_duplicates(snapshot, threshold)
    expected = brute_partition(snapshot.contents(), threshold, across_labels=name == "shop")
    assert {frozenset(m.exemplar.id for m in group.members) for group in found} == expected
    assert [len(group.members) for group in found] == sorted((len(g) for g in expected), reverse=True)
    for group in found:
        check_group(snapshot, [m.exemplar for m in group.members], group.keep.exemplar)
        for member in group.members[1:]:
            real = cosine(snapshot.embedding(member.exemplar.id), snapshot.embedding(group.keep.exemplar.id))
            assert member.similarity == pytest.approx(real, abs=1e-12)
            assert member.same_file == (
                bool(member.exemplar.sha256) and member.exemplar.sha256 == group.keep.exemplar.sha256
            )
            assert member.suggestion in ("delete", "look")
            if member.suggestion == "look":
                assert member.similarity < threshold
                assert not member.same_file
    assert near_duplicates(snapshot, threshold) == found


def check_group(snapshot: Snapshot, exemplars: Sequence[Exemplar], keep: Exemplar) -> None:
    """The one to keep is nearest the mean; of those that are as near, the first by id."""
    rows = np.stack([snapshot.embedding(e.id) for e in exemplars]).astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    near = rows @ rows.mean(axis=0)
    at = [e.id for e in exemplars].index(keep.id)
    assert near[at] >= near.max() - 1e-8
    assert not any(
        n > near[at] + 1e-8 or (n == near[at] and e.id < keep.id) for n, e in zip(near, exemplars, strict=True)
    )


def test_many_blocks_give_the_same_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = clustered(3, 500, 160, 0.05)
    snapshot = collection(rows, ["safe"] * len(rows))
    whole = near_duplicates(snapshot, 0.9)
    for name, size in {"_BLOCK_COLUMNS": 96, "_BLOCK_ROWS": 40, "_CHUNK_PAIRS": 7, "_SAMPLE_ROWS": 50}.items():
        monkeypatch.setattr(f"indexer.pairs.{name}", size)
    told: list[tuple[int, int]] = []
    assert near_duplicates(snapshot, 0.9, progress=lambda done, total: told.append((done, total))) == whole
    assert len(whole) > 50
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] <= told[-1][1]


def test_progress_ends_with_everything() -> None:
    rows = unit(np.random.default_rng(0).normal(size=(60, 8)))
    told: list[tuple[int, int]] = []
    near_duplicates(collection(rows, [POOL_LABELS[i % 3] for i in range(60)]), 0.99, progress=lambda *p: told.append(p))
    assert told[-1] == (3 * 20 * 21 // 2, 3 * 20 * 21 // 2)
    told.clear()
    contradictions(collection(rows, [POOL_LABELS[i % 3] for i in range(60)]), progress=lambda *p: told.append(p))
    assert told[-1] == (60, 60)


def test_a_chain_keeps_what_is_not_near_the_kept_one() -> None:
    angles = np.deg2rad([0, 10, 20, 30, 40])
    rows = unit(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    [group] = near_duplicates(collection(rows, ["safe"] * 5), float(np.cos(np.deg2rad(11))))
    assert group.keep.exemplar.id == "x002"
    assert {m.exemplar.id for m in group.members if m.suggestion == "delete"} == {"x001", "x003"}
    assert {m.exemplar.id for m in group.members if m.suggestion == "look"} == {"x000", "x004"}


def test_equal_files_are_duplicates_whatever_their_embeddings() -> None:
    rows = unit(np.eye(3))
    hashes = ["a" * 64, "b" * 64, "a" * 64]
    [group] = near_duplicates(collection(rows, ["unsafe"] * 3, hashes=hashes), 0.99)
    assert [(m.exemplar.id, m.suggestion, m.same_file) for m in group.members] == [
        ("x000", "keep", True), ("x002", "delete", True)
    ]  # fmt: skip


def test_duplicates_of_one_label_alone() -> None:
    rows = unit(np.repeat(np.eye(2), 4, axis=0))
    labels = ["safe", "safe", "unsafe", "unsafe"] * 2
    snapshot = collection(rows, labels)
    assert len(near_duplicates(snapshot, 0.9)) == 4
    assert {g.keep.exemplar.label for g in near_duplicates(snapshot, 0.9, "unsafe")} == {"unsafe"}
    assert near_duplicates(snapshot, 0.9, "buffer") == []
    assert near_duplicates(collection(rows, labels, "shop"), 0.9, "nothing") == []
    with pytest.raises(InvalidLabel):
        near_duplicates(snapshot, 0.9, "shop")


@pytest.mark.parametrize("bad", [0.0, -0.5, 1.0001, float("nan")])
def test_thresholds_are_checked(bad: float) -> None:
    with pytest.raises(ValueError, match="min_similarity"):
        near_duplicates(collection(unit(np.eye(2)), ["safe", "safe"]), bad)


@given(pairs=st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=60))
def test_groups_are_connected_components(pairs: list[tuple[int, int]]) -> None:
    groups = Groups(30)
    component = list(range(30))
    for a, b in pairs:
        groups.join(np.array([a]), np.array([b]))
        old, new = component[b], component[a]
        component = [new if c == old else c for c in component]
    expected = [[i for i in range(30) if component[i] == c] for c in dict.fromkeys(component)]
    assert [g.tolist() for g in groups.larger_than_one()] == [g for g in expected if len(g) > 1]
    assert groups.roots(np.arange(30)).tolist() == [component.index(component[i]) for i in range(30)]


def test_a_thousand_equal_rows_cost_no_thousand_squared_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.repeat(unit(np.random.default_rng(0).normal(size=(2, 200))), 500, axis=0)
    compared = 0

    def counting(embeddings: Vectors, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.float64]:
        nonlocal compared
        compared += len(left)
        return similarities(embeddings, left, right)

    monkeypatch.setattr("indexer.pairs.similarities", counting)
    groups = Groups(1000)
    join_near(groups, rows, 0.9)
    assert [len(g) for g in groups.larger_than_one()] == [500, 500]
    assert compared <= 1


# --- contradictions ------------------------------------------------------------------------------------------------


def brute_contradictions(contents: Contents) -> dict[str, tuple[str | None, str, str, str | None]]:
    """id -> nearest of its own pool, nearest of the others, suggestion, pool."""
    found = {}
    rows, exemplars = contents.embeddings, contents.exemplars
    for a, exemplar in enumerate(exemplars):
        others = sorted((-cosine(rows[a], rows[b]), e.label, e.id) for b, e in enumerate(exemplars) if b != a)
        own = next((o for o in others if o[1] == exemplar.label), None)
        other = next((o for o in others if o[1] != exemplar.label), None)
        if other is None or (own is not None and own[0] < other[0]):
            continue
        agree = len(others) >= VOTERS and {o[1] for o in others[:VOTERS]} == {other[1]}
        if -other[0] >= NEAR_IDENTICAL:
            suggestion, to = "look", None
        elif agree:
            suggestion, to = "move", other[1]
        elif exemplar.label == "buffer":
            suggestion, to = "look", None
        else:
            suggestion, to = "move", "buffer"
        found[exemplar.id] = (own and own[2], other[2], suggestion, to)
    return found


@given(seed=st.integers(0, 2**31), n=st.integers(0, 40), spread=st.sampled_from([0.0, 0.05, 0.3, 1.0]))
@settings(max_examples=60, deadline=None)
def test_contradictions_are_those_of_comparing_everything(seed: int, n: int, spread: float) -> None:
    labels = [POOL_LABELS[i] for i in np.random.default_rng(seed).choice(3, n, p=[0.1, 0.3, 0.6])]
    snapshot = collection(clustered(seed, n, 6, spread), labels)
    found = contradictions(snapshot)
    assert {c.exemplar.id: (c.own and c.own.id, c.other.id, c.suggestion, c.to) for c in found} == (
        brute_contradictions(snapshot.contents())
    )
    assert len({c.exemplar.id for c in found}) == len(found)
    keys = [
        (c.other.similarity < NEAR_IDENTICAL, "buffer" in (c.exemplar.label, c.other.pool), -c.margin) for c in found
    ]
    assert keys == sorted(keys)
    assert all(c.margin >= 0 and c.reason for c in found)


def test_what_a_contradiction_suggests() -> None:
    def around(angle: float, n: int) -> list[float]:
        return [angle + 12 + i for i in range(n)]

    angles = [0.0, *around(0, 6), 120.0, 121.0, 240.0, 252.0]
    labels = ["unsafe", *["safe"] * 6, "unsafe", "safe", "safe", "buffer"]
    rows = unit(np.stack([np.cos(np.deg2rad(angles)), np.sin(np.deg2rad(angles))], axis=1))
    found = {c.exemplar.id: (c.suggestion, c.to, c.other.id) for c in contradictions(collection(rows, labels))}
    assert found["x000"] == ("move", "safe", "x001")  # all around it are safe
    assert found["x007"] == ("look", None, "x008")  # near-identical, both sides are listed
    assert found["x008"] == ("look", None, "x007")
    assert found["x009"] == ("move", "buffer", "x010")
    assert found["x010"] == ("look", None, "x009")  # it is in the buffer already


def test_galleries_have_no_contradictions() -> None:
    with pytest.raises(InvalidName, match="a gallery has none"):
        contradictions(collection(unit(np.eye(2)), ["a", "b"], "shop"))


# --- probes --------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**31), k=st.integers(1, 4), negatives=st.integers(0, 2))
@settings(max_examples=50, deadline=None)
def test_candidates_are_those_of_comparing_everything(seed: int, k: int, negatives: int) -> None:
    rng = np.random.default_rng(seed)
    gallery = collection(unit(rng.normal(size=(30, 5))), ["cat", ""] * 15, "shop")
    prompts, against = unit(rng.normal(size=(2, 5))), unit(rng.normal(size=(2, 5)))[:negatives]
    found = probe(gallery, ["p", "q"], prompts, k=k, min_similarity=0.1, negatives=against)
    expected: dict[str, tuple[str, float, float | None]] = {}
    for name, prompt in zip("pq", prompts, strict=True):
        scored = []
        nearest = sorted((-cosine(gallery.embedding(e.id), prompt), e.label, e.id) for e in gallery.exemplars)
        for negated, label, id in nearest[: 8 * k if negatives else k]:
            row, similarity = gallery.embedding(id), -negated
            contrast = similarity - max(cosine(row, a) for a in against) if negatives else None
            if similarity >= 0.1 and (contrast is None or contrast > 0):
                scored.append((similarity if contrast is None else contrast, (label, id), similarity, contrast))
        for _, (_, id), similarity, contrast in sorted(scored, key=lambda s: (-s[0], s[1]))[:k]:
            if id not in expected or similarity > expected[id][1]:
                expected[id] = (name, similarity, contrast)
    got = {c.exemplar.id: (c.prompt, c.similarity, c.contrast) for c in found}
    assert got.keys() == expected.keys()
    for id, (name, similarity, contrast) in expected.items():
        assert got[id][0] == name
        assert got[id][1:] == pytest.approx((similarity, contrast), abs=1e-9)
    values = [c.similarity if c.contrast is None else c.contrast for c in found]
    assert values == sorted(values, reverse=True)
    assert {c.known for c in found} <= {None}


def test_candidates_that_a_pool_has_already_are_marked() -> None:
    gallery = collection(unit(np.eye(3)), ["", "", ""], "shop")
    pools = collection(unit(np.eye(3)[:1] + 1e-3), ["unsafe"])
    found = probe(gallery, ["p"], unit(np.array([[3.0, 2.0, 1.0]])), k=3, pools=pools)
    assert [(c.exemplar.id, c.known and (c.known.pool, c.known.id)) for c in found] == [
        ("x000", ("unsafe", "x000")), ("x001", None), ("x002", None)
    ]  # fmt: skip
    [own] = probe(pools, ["p"], unit(np.ones((1, 3))), k=3, pools=pools)
    assert own.known is not None
    assert own.known.pool == "unsafe"


def test_probes_of_nothing(make_contents: Make) -> None:
    snapshot = Snapshot.of(make_contents("shop", 0))
    with pytest.raises(ValueError, match="do not fit"):
        probe(snapshot, ["p"], np.zeros((0, 12), np.float32), k=1)
    assert probe(snapshot, ["p"], unit(np.ones((1, 12))), k=3) == []
