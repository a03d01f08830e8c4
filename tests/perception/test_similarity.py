"""Similarity, pseudo-distance and 2AFC on the vectors of the methods sheet."""

import math

import pytest
import torch

from perception.encoder import encode_images, image_similarity, unit_embeddings
from perception.errors import NonFiniteEmbedding
from perception.similarity import cosine_similarity, pseudo_distance, two_afc_choice
from perception.testing import ToyEncoder, encoded, synthetic_image

U, V = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])


def test_closed_forms() -> None:
    assert cosine_similarity(U, V) == 0
    assert pseudo_distance(U, V) == 1
    assert pseudo_distance(U, -U) == pytest.approx(math.sqrt(2))
    assert pseudo_distance(U, U) == 0


def test_the_root_obeys_the_triangle_inequality_and_its_square_does_not() -> None:
    a, b, c = (torch.tensor([math.cos(x), math.sin(x)]) for x in (0.0, math.pi / 3, 2 * math.pi / 3))
    assert 1 - cosine_similarity(a, c) > (1 - cosine_similarity(a, b)) + (1 - cosine_similarity(b, c))
    assert pseudo_distance(a, c) <= pseudo_distance(a, b) + pseudo_distance(b, c)


def test_two_afc_prefers_the_closer_and_the_left_in_a_tie() -> None:
    reference = U.repeat(3, 1)
    left, right = torch.stack([U, V, V]), torch.stack([V, U, V])
    assert two_afc_choice(reference, left, right).tolist() == [0, 1, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_rows_without_a_direction_are_named(bad: float) -> None:
    features = torch.ones(3, 2)
    features[1] = bad
    with pytest.raises(NonFiniteEmbedding, match=r"\[1\]") as caught:
        unit_embeddings(features)
    assert caught.value.rows == (1,)


def test_images_are_encoded_alike_from_bytes_and_pillow_in_any_batch() -> None:
    encoder = ToyEncoder()
    images = [synthetic_image(i) for i in range(5)]
    rows = encode_images(encoder, list(images), batch_size=2)
    assert torch.allclose(rows, encode_images(encoder, [encoded(i) for i in images], batch_size=5), atol=1e-6)
    assert image_similarity(encoder, images[0], images[0]) == pytest.approx(1.0)
    assert image_similarity(encoder, images[0], images[1]) < 0.999
    assert encode_images(encoder, []).shape == (0, encoder.dim)
