"""What an added exemplar would have caught, against searching everything again."""

import time
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer.catalog.records import Disabled
from indexer.catalog.traffic import Recent, Seen
from indexer.contents import POOL_LABELS, Exemplar
from indexer.live.view import View
from indexer.retroactive import catch
from perception.verdict import DecisionPolicy, PoolLabel, Verdict, VerdictLabel
from tests.indexer.live_states import LATER, NOW, Changes, Embedding, make_base, record, unit, view_of


def verdicts(view: View, policy: DecisionPolicy, embeddings: Embedding) -> list[Verdict]:
    return [policy.decide(e.neighbors) for e in view.evidence(embeddings, policy.neighbors_needed)]


def answered(view: View, policy: DecisionPolicy, embeddings: Embedding) -> Recent:
    """Traffic that a view has answered."""
    seen = []
    for row, verdict in enumerate(verdicts(view, policy, embeddings)):
        nearest = next((n.id for n in verdict.neighbors if n.pool == verdict.pool), "")
        seen.append(
            Seen(f"r{row}", f"{row:064x}", NOW, verdict.label, verdict.pool, verdict.margin, nearest, view.version)
        )
    return Recent(embeddings, tuple(seen))


@st.composite
def situations(draw: st.DrawFn) -> tuple[Recent, Embedding, DecisionPolicy, View, View]:
    """Pools that have answered, have changed since, and get one more exemplar, or lose none and move one."""
    directions = unit(draw(st.integers(0, 1000)), 12)
    label, direction = st.sampled_from(POOL_LABELS), st.sampled_from(list(directions))
    base_labels = draw(st.lists(label, min_size=1, max_size=8))
    exemplars = [Exemplar(f"b{i}", each) for i, each in enumerate(base_labels)]
    base = make_base(exemplars, np.array([draw(direction) for _ in exemplars], np.float32))
    margins = st.sampled_from([0.0, 0.1, 0.5])
    rule: Literal["nearest", "vote"] = draw(st.sampled_from(["nearest", "nearest", "vote"]))
    policy = DecisionPolicy(rule, 3, draw(st.sampled_from([-1.0, 0.6])), draw(margins), draw(margins))
    queries = np.concatenate([directions, unit(draw(st.integers(0, 1000)), 12)])
    recent = answered(view_of(base, {}), policy, queries)
    changed: Changes = {}
    for id in draw(st.lists(st.sampled_from([e.id for e in exemplars] + ["x0", "x1"]), unique=True, max_size=4)):
        disabled = draw(st.sampled_from([None, Disabled("operator"), Disabled("quarantine", LATER)]))
        changed[id] = draw(st.sampled_from([None, record(id, draw(label), draw(direction), disabled)]))
    if draw(st.booleans()):
        changed["s"] = record("s", "suppress", draw(direction), suppresses=("b0",), min_similarity=0.3)
    before = view_of(base, changed)
    id = draw(st.sampled_from(["new", "b0"]))
    embedding = base.embedding("b0") if id == "b0" else draw(direction)
    if id == "b0":
        before = view_of(base, {**changed, "b0": record("b0", exemplars[0].label, embedding)})
    after = view_of(base, {**changed, id: record(id, draw(label), embedding)})
    return recent, embedding, policy, before, after


@settings(max_examples=150)
@given(situations())
def test_what_is_caught_is_what_searching_everything_finds(
    situation: tuple[Recent, Embedding, DecisionPolicy, View, View],
) -> None:
    recent, embedding, policy, before, after = situation
    old, new = (verdicts(view, policy, recent.embeddings) for view in (before, after))
    expected = {
        seen.request_id: (was.label, is_.label)
        for seen, was, is_ in zip(recent.seen, old, new, strict=True)
        if is_.label not in (was.label, seen.verdict)
    }
    found = catch(recent, embedding, policy, before, after, limit=1000)
    assert {caught.seen.request_id: (caught.before, caught.after) for caught in found.caught} == expected
    assert found.complete
    assert (found.recent, len(expected) <= found.candidates <= found.recent) == (24, True)
    similarities = [caught.similarity for caught in found.caught]
    assert similarities == sorted(similarities, reverse=True)
    for caught in found.caught:
        row = int(caught.seen.request_id[1:])
        assert caught.similarity == pytest.approx(float(recent.embeddings[row] @ embedding), abs=1e-6)


def crowd(n: int, pool: int, dim: int) -> tuple[View, Recent]:
    """Many recent decisions, on pools of random exemplars."""
    exemplars = [Exemplar(f"b{i}", POOL_LABELS[i % 3]) for i in range(pool)]
    view = view_of(make_base(exemplars, unit(0, pool, dim)), {}, dim=dim)
    embeddings = unit(1, n, dim)
    return view, answered(view, DecisionPolicy(), embeddings)


def test_the_most_similar_come_first_and_no_more_than_asked_for() -> None:
    view, recent = crowd(400, 60, 8)
    wrong = next(row for row, seen in enumerate(recent.seen) if seen.verdict == "safe")
    embedding = recent.embeddings[wrong]
    assert view.base is not None
    after = view_of(view.base, {"new": record("new", "unsafe", embedding)}, dim=8)
    everything = catch(recent, embedding, DecisionPolicy(), view, after, limit=1000)
    assert len(everything.caught) > 3
    assert everything.caught[0].seen == recent.seen[wrong]
    few = catch(recent, embedding, DecisionPolicy(), view, after, limit=3)
    assert few.caught == everything.caught[:3]
    assert not few.complete
    one = catch(recent, embedding, DecisionPolicy(), view, after, limit=1000, examined=1)
    assert (one.caught, one.complete) == (everything.caught[:1], False)
    assert all(caught.after is VerdictLabel.UNSAFE for caught in everything.caught)


def test_what_was_answered_so_already_is_not_caught() -> None:
    """The pools were corrected, became wrong again, and are corrected again: nobody got a wrong answer from them."""
    view, recent = crowd(40, 30, 8)
    wrong = next(row for row, seen in enumerate(recent.seen) if seen.verdict == "safe")
    assert view.base is not None
    after = view_of(view.base, {"new": record("new", "unsafe", recent.embeddings[wrong])}, dim=8)
    unsafe = replace(recent.seen[wrong], verdict=VerdictLabel.UNSAFE, pool=PoolLabel.UNSAFE)
    corrected = Recent(recent.embeddings, tuple(unsafe if s is recent.seen[wrong] else s for s in recent.seen))
    found = catch(corrected, recent.embeddings[wrong], DecisionPolicy(), view, after, limit=1000)
    assert unsafe not in [caught.seen for caught in found.caught]


def test_nothing_recent() -> None:
    view, _ = crowd(1, 30, 8)
    found = catch(Recent(np.empty((0, 0), np.float32), ()), unit(3, 1, 8)[0], DecisionPolicy(), view, view, limit=5)
    assert (found.caught, found.recent, found.candidates, found.complete) == ((), 0, 0, True)


def test_the_caller_is_asked_in_between_and_may_end_it() -> None:
    view, recent = crowd(200, 30, 8)
    calls: list[None] = []
    policy = DecisionPolicy("vote", 3)  # all are candidates

    def never() -> bool:
        calls.append(None)
        return False

    assert catch(recent, unit(5, 1, 8)[0], policy, view, view, limit=10, enough=never).complete
    assert len(calls) == 7  # 200 in batches of 32
    assert not catch(recent, unit(5, 1, 8)[0], policy, view, view, limit=10, enough=lambda: True).complete


def test_ten_thousand_decisions_are_looked_through_quickly() -> None:
    """Its own work; the few candidates that are left have to be searched. Best of three, since others use the cores."""
    view, recent = crowd(10_000, 600, 640)
    embedding = unit(7, 1, 640)[0]
    after = view_of(view.base, {"new": record("new", "unsafe", embedding)}, dim=640)
    seconds = []
    for _ in range(3):
        started_s = time.perf_counter()
        found = catch(recent, embedding, DecisionPolicy(), view, after, limit=100, examined=1)
        seconds.append(time.perf_counter() - started_s)
    assert found.candidates < 1000
    assert min(seconds) < 0.3
