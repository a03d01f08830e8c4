"""The engine: whatever travels together, each query gets the library's embedding and its own search."""

from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from indexer.catalog.records import Record, embedding_sha256
from indexer.catalog.state import Stamp, State
from indexer.contents import Contents, Exemplar
from indexer.live.suppression import Suppressed
from indexer.live.view import View
from indexer.snapshot import Snapshot
from perception.encoder import encode_images, unit_embeddings
from perception.errors import NonFiniteEmbedding
from perception.testing import ToyEncoder, synthetic_image
from service.engine import Engine, Query, Search
from service.errors import TextUnsupported


class ToyText:
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        return unit_embeddings(torch.tensor([[float(ord(c) - 96) for c in f"{p:z<16}"[:16]] for p in prompts]))


def snapshot(encoder: ToyEncoder, collection: str, seeds: Sequence[int]) -> Snapshot:
    labels = [("safe", "buffer", "unsafe")[i % 3] for i in range(len(seeds))]
    exemplars = [Exemplar(f"{label}-{seed}", label) for label, seed in zip(labels, seeds, strict=True)]
    embeddings = encode_images(encoder, [synthetic_image(seed) for seed in seeds]).numpy()
    return Snapshot.of(Contents.arrange(collection, encoder.name, encoder.fingerprint, exemplars, embeddings))


ENCODER = ToyEncoder()
POOLS, GALLERY = snapshot(ENCODER, "pools", range(9)), snapshot(ENCODER, "gallery", range(100, 105))
SEARCHES = [
    Search(POOLS, 2, each_pool=True),
    Search(POOLS, 4),
    Search(POOLS, 4, label="unsafe"),
    Search(GALLERY, 3),
]


@settings(max_examples=40)
@given(
    asked=st.lists(
        st.tuples(st.one_of(st.integers(0, 20), st.sampled_from(["red", "dog"])), st.sampled_from(range(4))),
        min_size=1,
        max_size=12,
    )
)
def test_a_query_s_answer_does_not_depend_on_its_batch(asked: list[tuple[int | str, int]]) -> None:
    engine = Engine(ENCODER, ToyText())
    queries = [
        Query(s if isinstance(s, str) else ENCODER.preprocess.apply(synthetic_image(s)), SEARCHES[search])
        for s, search in asked
    ]
    together = engine.answer(queries)
    for query, (subject, _), sighting in zip(queries, asked, together, strict=True):
        [alone] = engine.answer([query])
        library = (
            ToyText().encode_text([subject])
            if isinstance(subject, str)
            else encode_images(ENCODER, [synthetic_image(subject)])
        ).numpy()[0]
        assert float(sighting.embedding @ library) >= 0.99999
        assert [n.id for n in sighting.neighbors] == [n.id for n in alone.neighbors]
        assert [n.similarity for n in sighting.neighbors] == pytest.approx(
            [n.similarity for n in alone.neighbors], abs=1e-6
        )


def test_searches_go_where_they_are_told() -> None:
    pixels = ENCODER.preprocess.apply(synthetic_image(4))
    each, four, unsafe, gallery = Engine(ENCODER, None).answer([Query(pixels, search) for search in SEARCHES])
    assert [n.pool for n in each.neighbors] == ["safe", "safe", "buffer", "buffer", "unsafe", "unsafe"]
    assert len(four.neighbors) == 4
    assert four.neighbors[0].id == "buffer-4"
    assert [n.pool for n in unsafe.neighbors] == ["unsafe"] * 3  # there are three
    assert [n.pool for n in gallery.neighbors] == ["gallery"] * 3


def test_a_view_is_searched_as_a_snapshot_is_but_for_what_is_suppressed() -> None:
    """A false positive is put right: what looks like it is no longer compared with the exemplar that was wrong."""
    pixels = ENCODER.preprocess.apply(synthetic_image(4))
    embedding = encode_images(ENCODER, [synthetic_image(4)]).numpy()[0]
    item = Record(
        Exemplar("not-this", "suppress"), embedding_sha256(embedding), suppresses=("buffer-4",), min_similarity=0.99
    )
    stamp, now = Stamp(ENCODER.name, ENCODER.fingerprint, ENCODER.dim), datetime.now(UTC)
    state = State("pools", base=POOLS.version)
    plain = View(state, POOLS, {}, now, stamp)
    state = state.with_records({item.id: item}, 1)
    suppressing = View(state, POOLS, {item.embedding_sha256: embedding}, now, stamp)
    searches = [
        Search(snapshot, k, each_pool=each_pool)
        for snapshot in (POOLS, plain, suppressing)
        for k, each_pool in ((2, True), (4, False))
    ]
    of_pools, all_of_pools, of_plain, all_of_plain, evidence, everything = Engine(ENCODER, None).answer(
        [Query(pixels, search) for search in searches]
    )
    assert of_plain.neighbors == of_pools.neighbors
    assert all_of_plain.neighbors == everything.neighbors == all_of_pools.neighbors  # a search shows all that is there
    assert all(not sighting.suppressed for sighting in (of_pools, all_of_pools, of_plain, all_of_plain, everything))
    assert [n.id for n in of_pools.neighbors[2:4]] == ["buffer-4", evidence.neighbors[2].id]
    assert "buffer-4" not in {n.id for n in evidence.neighbors}
    assert [n.pool for n in evidence.neighbors] == ["safe", "safe", "buffer", "buffer", "unsafe", "unsafe"]
    [suppressed] = evidence.suppressed
    assert suppressed == Suppressed("buffer-4", "not-this", suppressed.similarity_to_item)
    assert suppressed.similarity_to_item == pytest.approx(1.0, abs=1e-6)


def test_a_prompt_needs_a_text_tower() -> None:
    with pytest.raises(TextUnsupported, match="toy/0"):
        Engine(ENCODER, None).answer([Query("a dog", SEARCHES[1])])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_embedding_that_is_not_finite_is_refused(value: float) -> None:
    """Also where an encoder breaks its contract and does not raise itself."""

    class Broken(ToyEncoder):
        def encode(self, pixels: Tensor) -> Tensor:
            embeddings = super().encode(pixels).clone()
            embeddings[1, 3] = value
            return embeddings

    pixels = np.zeros((3, 16, 16), np.uint8)
    with pytest.raises(NonFiniteEmbedding) as caught:
        Engine(Broken(), None).answer([Query(pixels, SEARCHES[1])] * 3)
    assert caught.value.rows == (1,)
