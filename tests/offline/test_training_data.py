"""Views and order of the training data are functions of (seed, step)."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from offline.data.training import PROMPTS, TextBank, augment, epoch_indices, to_signed


@given(n=st.integers(1, 50), batch=st.integers(1, 60), seed=st.integers(0, 5))
def test_every_epoch_shows_every_image_once(n: int, batch: int, seed: int) -> None:
    steps = -(-3 * n // batch)
    shown = np.concatenate([epoch_indices(n, batch, step, seed, 0) for step in range(steps)])[: 3 * n]
    for epoch in shown.reshape(3, n):
        assert sorted(epoch) == list(range(n))


def test_a_whole_crop_is_the_image_or_its_mirror() -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)

    class Whole:
        """A generator that always draws the whole image; flips alternate."""

        def uniform(self, low: float, high: float, n: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
            return np.full(n, 1.0 if high == 1.0 and low > 0 else 0.0)

        def choice(self, options: list[float], n: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
            return np.resize(np.array(options), n)

    views = augment(images, 16, 0.5, Whole())  # type: ignore[arg-type]
    expected = to_signed(images)
    assert torch.allclose(views[1::2], expected[1::2], atol=1e-5)
    assert torch.allclose(views[::2], expected[::2].flip(-1), atol=1e-5)


def test_augmentation_repeats_under_one_seed() -> None:
    images = np.random.default_rng(1).integers(0, 256, (4, 20, 20, 3), dtype=np.uint8)
    a, b, c = (augment(images, 24, 0.4, np.random.default_rng(s)) for s in (3, 3, 4))
    assert a.shape == (4, 3, 24, 24)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_prompts_name_their_class() -> None:
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer(context_length=16)
    bank = TextBank([("tench", "Tinca tinca"), ("koala",)], [["a dog runs"]], 16)
    rng = np.random.default_rng(0)
    allowed = [{p.format(n) for p in PROMPTS for n in names} for names in (("tench", "Tinca tinca"), ("koala",))]
    known = [{tuple(tokenizer([text])[0].tolist()) for text in texts} for texts in allowed]
    for _ in range(20):
        for row, texts in zip(bank.class_prompts(rng), known, strict=True):
            assert tuple(row.tolist()) in texts
    used = set(bank.used_tokens().tolist())
    assert set(tokenizer(["a dog runs"])[0].tolist()) <= used
