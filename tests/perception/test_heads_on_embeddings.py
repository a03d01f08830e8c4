"""LAION's B/32 detector on real CLIP embeddings: `test_heads` has the heads' layouts and the logits of the L/14 one."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from perception.heads import DetectorHead, load_head

DATA = Path(os.environ.get("HARDLOOK_DATA", Path(__file__).parents[3] / "shared" / "data"))
HEAD, EMBEDDINGS = DATA / "weights/laion_nsfw_head_vitb32.npz", DATA / "embeddings/clip_vitb32_flickr8k_800.npz"
pytestmark = pytest.mark.skipif(
    not (HEAD.is_file() and EMBEDDINGS.is_file()), reason="HARDLOOK_DATA has no weights/ or no embeddings/"
)


@pytest.fixture(scope="module")
def photos() -> Tensor:
    """(800, 512) embeddings of ordinary photos, of unit norm to fp16."""
    rows = torch.from_numpy(np.load(EMBEDDINGS)["embeddings"].astype(np.float32))
    assert rows.shape == (800, 512)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(800), atol=1e-3, rtol=0)
    return rows


@pytest.fixture(scope="module")
def head() -> DetectorHead:
    loaded = load_head(HEAD)
    assert isinstance(loaded, DetectorHead)
    return loaded


def test_the_mean_probability_is_the_published_one(head: DetectorHead, photos: Tensor) -> None:
    """0.043 on the 1,000 photos of which these are the first 800."""
    unit = torch.nn.functional.normalize(photos, dim=1)
    assert head.probabilities(unit).mean().item() == pytest.approx(0.043, abs=0.005)
    assert int(head.flags(unit).sum()) <= 38  # as many as of all 1,000
    # Rounding to fp16 is no reason to normalise anew.
    torch.testing.assert_close(head.probabilities(photos), head.probabilities(unit), atol=0.01, rtol=0)


def test_logits_are_those_of_the_layers_spelled_out(head: DetectorHead, photos: Tensor) -> None:
    """In double precision, straight from the file: standardise, then ReLU between three linear layers."""
    arrays = {name: array.astype(np.float64) for name, array in np.load(HEAD).items()}
    x = (photos.double().numpy() - arrays["norm.mean"]) / np.sqrt(arrays["norm.variance"])
    for layer in (1, 2, 3):
        x = x @ arrays[f"linear_{layer}.weight"].T + arrays[f"linear_{layer}.bias"]
        x = np.maximum(x, 0) if layer < 3 else x
    assert np.abs(head.logits(photos).double().numpy() - x[:, 0]).max() < 1e-3
