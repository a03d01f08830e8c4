"""The benchmark's arithmetic against naive twins."""

import numpy as np
import pytest
import torch

from offline.benchmarks.embedding import nearest_neighbor_accuracy, recall_at


def unit(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(rows, dim=-1)


def test_recall_counts_targets_among_the_first_k() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, gallery = unit(torch.randn(40, 8, generator=generator)), unit(torch.randn(25, 8, generator=generator))
    target = torch.randint(0, 25, (40,), generator=generator)
    for k in (1, 5, 10):
        order = np.argsort(-(queries @ gallery.T).numpy(), axis=1)[:, :k]
        naive = np.mean([int(t) in row for t, row in zip(target, order, strict=True)])
        assert recall_at(k, queries, gallery, target) == pytest.approx(naive)


def test_nearest_neighbour_may_not_be_the_query_itself() -> None:
    rows = unit(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]))
    labels = ["a", "b", "b", "b"]
    assert nearest_neighbor_accuracy(rows, labels, rows, labels) == 1.0
    assert nearest_neighbor_accuracy(rows, labels, rows, labels, exclude_self=True) == 0.5
