"""Preprocessing equals the reference transform, pixel for pixel."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from torchvision.transforms import Normalize

from perception.preprocess import PreprocessSpec, to_pixels
from perception.testing import synthetic_image


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 300), height=st.integers(1, 300), size_px=st.sampled_from([16, 33, 64]))
def test_equals_open_clips_evaluation_transform(width: int, height: int, size_px: int) -> None:
    if max(width, height) > 64 * min(width, height):
        return  # beyond this the long side is cut first, by design
    image = synthetic_image(width * 1000 + height, (width, height))
    reference = image_transform_v2(PreprocessCfg(size=size_px), is_train=False)
    reference.transforms = [t for t in reference.transforms if not isinstance(t, Normalize)]
    ours = to_pixels([PreprocessSpec(size_px=size_px, resize_px=size_px).apply(image)])
    assert torch.equal(ours[0], reference(image))


def test_resize_then_smaller_crop_equals_torchvision() -> None:
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize

    image = synthetic_image(3, (333, 251))
    reference = Compose([Resize(256, InterpolationMode.BICUBIC), CenterCrop(224), PILToTensor()])
    assert np.array_equal(PreprocessSpec(size_px=224, resize_px=256).apply(image), reference(image).numpy())


def test_squash_ignores_the_aspect_ratio() -> None:
    from torchvision.transforms import Compose, InterpolationMode, PILToTensor, Resize

    image = synthetic_image(4, (90, 31))
    reference = Compose([Resize((64, 64), InterpolationMode.BICUBIC), PILToTensor()])
    assert np.array_equal(PreprocessSpec(64, 64, resize_mode="squash").apply(image), reference(image).numpy())


@pytest.mark.parametrize("size", [(1, 40_000), (40_000, 1), (3, 30_000)])
def test_a_strip_costs_little(size: tuple[int, int]) -> None:
    from PIL import Image

    assert PreprocessSpec(224, 224).apply(Image.new("RGB", size, (10, 20, 30))).shape == (3, 224, 224)


def test_pixels_are_scaled_to_one() -> None:
    pixels = to_pixels([np.full((3, 2, 2), 255, np.uint8), np.zeros((3, 2, 2), np.uint8)])
    assert pixels.dtype == torch.float32
    assert (pixels[0] == 1).all()
    assert (pixels[1] == 0).all()


@pytest.mark.parametrize(
    "wrong",
    [{"size_px": 0}, {"size_px": 300}, {"resize_mode": "pad"}, {"interpolation": "nearest"}, {"std": (0.0, 1.0, 1.0)}],
)
def test_wrong_values_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PreprocessSpec(**({"size_px": 224, "resize_px": 224} | wrong))
