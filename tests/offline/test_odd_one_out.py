"""The odd-one-out rule: by hand, against a naive twin, with ties, and on real embeddings of people's choices."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from offline.benchmarks.odd_one_out import accuracy, choices, choose, similarity_table
from offline.errors import DataError

DATA = Path(os.environ.get("HARDLOOK_DATA", "../shared/data"))
VICE = DATA / "perceptual" / "things_vice.zip"


def test_the_odd_one_is_outside_the_most_similar_pair() -> None:
    # Columns: the pair without the first, the second, the third image.
    similarities = torch.tensor([[0.9, 0.1, 0.2], [0.1, 0.9, 0.2], [0.1, 0.2, 0.9], [-0.9, -0.8, -0.7]])
    assert choose(similarities).tolist() == [0, 1, 2, 2]


def test_without_one_most_similar_pair_it_is_the_first() -> None:
    ties = [[0.5, 0.5, 0.1], [0.5, 0.1, 0.5], [0.1, 0.5, 0.5], [0.5, 0.5, 0.5]]
    assert choose(torch.tensor(ties)).tolist() == [0, 0, 0, 0]
    same = torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.6, 0.8], [1.0, 0.0]]).repeat(1, 500)
    for metric in ("cosine", "l2"):
        chosen = choices(similarity_table(same, metric), np.array([[0, 1, 2], [2, 1, 3], [3, 0, 1], [0, 3, 2]]))
        assert chosen.tolist() == [0, 2, 0, 1]


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_the_table_agrees_with_a_naive_twin(metric: str) -> None:
    made = torch.Generator().manual_seed(0)
    embeddings = torch.randn(20, 7, generator=made) * (torch.rand(20, 1, generator=made) + 0.5)
    rng = np.random.default_rng(0)
    triplets = np.stack([rng.permutation(20)[:3] for _ in range(400)])

    def similarity(a: torch.Tensor, b: torch.Tensor) -> float:
        if metric == "l2":
            return -float((a - b).double().square().sum())
        return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))

    naive = []
    for i, j, k in triplets.tolist():
        pairs = {2: (i, j), 1: (i, k), 0: (j, k)}
        naive.append(max(pairs, key=lambda odd: similarity(embeddings[pairs[odd][0]], embeddings[pairs[odd][1]])))
    table = similarity_table(embeddings, metric)
    assert torch.equal(table, table.T)
    assert choices(table, triplets).tolist() == naive
    assert len(set(naive)) == 3


def test_scale_does_not_matter_to_the_cosine_and_matters_to_distance() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [100.0, 5.0], [0.5, 0.5]])
    triplet = np.array([[0, 1, 2]])
    assert choices(similarity_table(embeddings), triplet).tolist() == [2]
    assert choices(similarity_table(embeddings, "l2"), triplet).tolist() == [1]


def test_the_share_of_right_answers_has_wilsons_interval() -> None:
    found = accuracy(torch.tensor([0, 1, 2, 2]), np.array([0, 1, 1, 2]))
    assert (found.right, found.total, found.value) == (3, 4, 0.75)
    assert found.interval == pytest.approx((0.3006, 0.9544), abs=1e-4)
    with pytest.raises(DataError, match="1 choices for 2"):
        accuracy(torch.tensor([0]), np.array([0, 1]))
    with pytest.raises(DataError):
        accuracy(torch.tensor([], dtype=torch.int64), np.array([], dtype=np.int64))


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(DataError, match=r"\(n, 3\)"):
        choose(torch.zeros(3, 2))
    with pytest.raises(DataError, match=r"rows \[1\]"):
        choose(torch.tensor([[1.0, 2.0, 3.0], [1.0, float("nan"), 3.0]]))
    for bad in (torch.zeros(2, 3), torch.tensor([[float("inf"), 1.0]])):
        with pytest.raises(DataError, match="not finite, or is zero"):
            similarity_table(bad)
    with pytest.raises(DataError, match="'dot'"):
        similarity_table(torch.eye(2), "dot")


@pytest.mark.skipif(not VICE.is_file(), reason=f"needs {VICE}")
def test_on_embeddings_of_peoples_choices_the_rule_finds_what_they_were_fitted_to() -> None:
    """VICE chooses by inner products: where the most similar pair leads by far, the cosine says the same.

    The archive's 20,000 triplets come without their images' numbers, so that triplets are drawn here.
    """
    with zipfile.ZipFile(VICE) as archive:
        embedding = np.load(io.BytesIO(archive.read("final_embedding.npy"))).astype(np.float64)
    rng = np.random.default_rng(0)
    triplets = np.stack([rng.choice(1854, 3, replace=False) for _ in range(5000)])
    first, second, third = (embedding[triplets[:, i]] for i in range(3))
    pairs = np.stack([(second * third).sum(1), (first * third).sum(1), (first * second).sum(1)], axis=1)
    assert embedding.shape == (1854, 42)
    softmax = np.exp(pairs - pairs.max(1, keepdims=True))
    confidence = (softmax / softmax.sum(1, keepdims=True)).max(1)
    chosen = choices(similarity_table(torch.from_numpy(embedding)), triplets).numpy()
    agrees = chosen == pairs.argmax(1)
    assert agrees.mean() > 0.7  # a third by chance
    assert agrees[confidence > 0.9].mean() > 0.9
    assert (confidence > 0.9).sum() > 500
