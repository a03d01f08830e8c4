from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from indexer.contents import Contents, Exemplar, collection_kind
from indexer.errors import ContentsError, DuplicateId, IndexerError, InvalidLabel, InvalidName

Unit = Callable[..., NDArray[np.float32]]


@pytest.mark.parametrize(
    ("name", "kind"), [("pools", "pools"), ("shop", "gallery"), ("0-a_b", "gallery"), ("a" * 64, "gallery")]
)
def test_kind_follows_from_the_name(name: str, kind: str) -> None:
    assert collection_kind(name) == kind


@pytest.mark.parametrize(
    "name", ["", "Pools", "a/b", "..", ".", "a\n", "-a", "_a", "a" * 65, "ä", "a b", "safe", "buffer", "unsafe", "a\0"]
)
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidName) as caught:
        collection_kind(name)
    assert caught.value.name == name


def test_rows_are_ordered_whatever_order_they_came_in(unit: Unit) -> None:
    rng = np.random.default_rng(0)
    exemplars = [Exemplar(f"{i % 7}-{i}", ("safe", "unsafe", "buffer")[i % 3]) for i in range(40)]
    embeddings = unit(0, 40)
    arranged = Contents.arrange("pools", "toy", "f", exemplars, embeddings)
    shuffle = rng.permutation(40)
    again = Contents.arrange("pools", "toy", "f", [exemplars[i] for i in shuffle], embeddings[shuffle])
    assert arranged.exemplars == again.exemplars
    assert np.array_equal(arranged.embeddings, again.embeddings)
    for exemplar, embedding in zip(arranged.exemplars, arranged.embeddings, strict=True):
        assert np.array_equal(embedding, embeddings[exemplars.index(exemplar)])
    assert list(arranged.counts.items()) == [("buffer", 13), ("safe", 14), ("unsafe", 13)]


def test_empty_pools_are_counted(unit: Unit) -> None:
    only_safe = Contents.arrange("pools", "toy", "f", [Exemplar("a", "safe")], unit(0, 1))
    assert only_safe.counts == {"buffer": 0, "safe": 1, "unsafe": 0}
    assert Contents.arrange("shop", "toy", "f", [Exemplar("a", "cat")], unit(0, 1)).counts == {"cat": 1}


def test_gallery_has_the_same_rows(make_contents: Callable[..., Contents]) -> None:
    contents = make_contents()
    gallery = contents.to_gallery()
    assert gallery.ids == tuple(e.id for e in contents.exemplars)
    assert gallery.labels == tuple(e.label for e in contents.exemplars)
    assert np.array_equal(gallery.embeddings, contents.embeddings)
    assert gallery.encoder_fingerprint == contents.encoder_fingerprint


def test_contents_cannot_be_changed(make_contents: Callable[..., Contents]) -> None:
    with pytest.raises(ValueError, match="read-only"):
        make_contents().embeddings[0] = 0


NAN = np.full((1, 4), np.nan, np.float32)
ONE = np.eye(4, dtype=np.float32)[:1]


@pytest.mark.parametrize(
    ("collection", "labels", "embeddings", "error"),
    [
        ("pools", ("neutral",), ONE, InvalidLabel),
        ("pools", ("",), ONE, InvalidLabel),
        ("a/b", ("x",), ONE, InvalidName),
        ("shop", ("x",), NAN, ContentsError),
        ("shop", ("x",), ONE * 2, ContentsError),
        ("shop", ("x",), ONE.astype(np.float64), ContentsError),
        ("shop", ("x",), ONE[0], ContentsError),
        ("shop", ("x", "y"), ONE, ContentsError),
        ("shop", ("x", "y"), np.concatenate([ONE, ONE]), DuplicateId),
    ],
)
def test_what_does_not_fit_is_refused(
    collection: str, labels: tuple[str, ...], embeddings: Any, error: type[IndexerError]
) -> None:
    with pytest.raises(error):
        Contents.arrange(collection, "toy", "f", [Exemplar("a", label) for label in labels], embeddings)


def test_rows_out_of_order_are_refused(unit: Unit) -> None:
    with pytest.raises(ContentsError, match="ordered"):
        Contents("shop", "toy", "f", (Exemplar("b", ""), Exemplar("a", "")), unit(0, 2))


@pytest.mark.parametrize(
    "fields",
    [
        {"id": ""},
        {"sha256": "abc"},
        {"sha256": "G" * 64},
        {"id": "a\ud800"},
        {"label": "\udcff"},
        {"source": "\udcff"},
        {"metadata": {"\udcff": ""}},
        {"metadata": {"a": "\udcff"}},
    ],
)
def test_bad_exemplars_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ContentsError):
        Exemplar(**{"id": "a", "label": "b", **fields})
