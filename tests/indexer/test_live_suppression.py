"""What a suppress item names is no evidence for what is similar to it."""

from collections.abc import Mapping

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer.catalog.records import Disabled
from indexer.contents import POOL_LABELS, Exemplar
from indexer.live.suppression import Evidence, Suppressed
from indexer.snapshot import Snapshot
from perception.verdict import Neighbor
from tests.indexer.live_states import Change, Changes, Embedding, make_base, record, unit, view_of


@st.composite
def suppressions(draw: st.DrawFn) -> tuple[Snapshot, Changes, Embedding]:
    n = draw(st.integers(0, 30))
    ids = [f"x{i:02d}" for i in range(n)]
    exemplars = [Exemplar(id, draw(st.sampled_from(POOL_LABELS))) for id in ids]
    embeddings = unit(draw(st.integers(0, 1000)), n)
    changed: Changes = {}
    queries = unit(draw(st.integers(0, 1000)), 3)
    for number in range(draw(st.integers(0, 3))):
        names = tuple(draw(st.lists(st.sampled_from([*ids, "gone"]), min_size=1, unique=True)))
        at = draw(st.sampled_from([*queries, *unit(number, 3)]))
        disabled = draw(st.sampled_from([None, None, Disabled("operator")]))
        threshold = draw(st.sampled_from([1.0, 0.999, 0.5, 1e-9]))
        changed[f"s{number}"] = record(f"s{number}", "suppress", at, disabled, names, threshold)
    return make_base(exemplars, embeddings), changed, queries


def naive_evidence(twin: Snapshot, changed: Mapping[str, Change], query: Embedding, k: int) -> Evidence:
    """Walk every pool from the nearest exemplar on, and leave out what a similar active item names."""
    named: dict[str, Suppressed] = {}
    similar = []
    wide = query.astype(float)
    for item, embedding in filter(None, changed.values()):
        other = embedding.astype(float)
        cosine = float(np.clip((wide * other).sum() / np.sqrt((wide * wide).sum() * (other * other).sum()), -1, 1))
        if item.min_similarity is not None and cosine >= item.min_similarity and item.disabled is None:
            similar.append((-cosine, item.id, item))
    for negative, _, item in sorted(similar, key=lambda found: found[:2]):
        for id in item.suppresses:
            named.setdefault(id, Suppressed(id, item.id, -negative))
    neighbors: list[Neighbor] = []
    suppressed: list[Suppressed] = []
    for pool in POOL_LABELS:
        left = k
        for neighbor in twin.search(query[np.newaxis], max(len(twin), 1), label=pool)[0]:
            if left and neighbor.id in named:
                suppressed.append(named[neighbor.id])
            elif left:
                neighbors.append(neighbor)
                left -= 1
    return Evidence(tuple(neighbors), tuple(suppressed))


@settings(max_examples=100)
@given(suppressions(), st.sampled_from([1, 2, 7, 40]))
def test_suppress_items_take_evidence_away_and_the_next_takes_its_place(
    situation: tuple[Snapshot, Changes, Embedding], k: int
) -> None:
    base, changed, queries = situation
    view = view_of(base, changed)
    together = view.evidence(queries, k)
    assert together == [naive_evidence(base, changed, query, k) for query in queries]
    assert together == [view.evidence(query[np.newaxis], k)[0] for query in queries]
    assert view.search_each(queries, k) == base.search_each(queries, k)  # a search shows all that is there
    assert (view.counts, len(view)) == (base.counts, len(base))


def test_an_item_that_names_a_whole_pool_empties_it() -> None:
    exemplars = [Exemplar(f"x{i:03d}", "unsafe" if i < 150 else "safe") for i in range(300)]
    base, query = make_base(exemplars, unit(4, 300)), unit(5, 1)
    names = tuple(f"x{i:03d}" for i in range(150))
    item = record("s", "suppress", query[0], suppresses=names, min_similarity=1.0)  # the query itself is similar by 1
    [evidence] = view_of(base, {"s": item}).evidence(query, 3)
    assert [neighbor.pool for neighbor in evidence.neighbors] == ["safe"] * 3
    assert {entry.exemplar_id for entry in evidence.suppressed} == set(names)
    assert {(entry.by, entry.similarity_to_item) for entry in evidence.suppressed} == {("s", 1.0)}


def test_in_a_gallery_suppression_works_on_all_labels_together() -> None:
    exemplars = [Exemplar(f"x{i}", "ab"[i % 2]) for i in range(6)]
    base, query = make_base(exemplars, unit(6, 6), "shop"), unit(7, 1)
    first, second, third = (neighbor.id for neighbor in base.search(query, 3)[0])
    item = record("s", "suppress", query[0], suppresses=(first, third), min_similarity=0.9)
    [evidence] = view_of(base, {"s": item}, "shop").evidence(query, 1)
    assert [neighbor.id for neighbor in evidence.neighbors] == [second]
    assert [entry.exemplar_id for entry in evidence.suppressed] == [first]  # the third would not have been found
