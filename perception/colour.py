"""Colour management: pixels with an embedded ICC profile become sRGB, as every browser shows them.

Without it an image could carry a profile that turns what a viewer sees into something else than what is judged. Needs
Pillow alone. Never raises for a bad profile: viewers ignore those, and so does this.
"""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

# A profile that changes no colour by more than this, of 255, is taken for sRGB: pixels stay as they are, to the bit.
_SAME = 3
_MAX_PROFILE_BYTES = 4 * 1024 * 1024
_COLOURS = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK"}


def to_srgb(image: Image.Image) -> Image.Image:
    """Convert by the embedded profile, where there is a usable one.

    Args:
        image: mode RGB, L or CMYK; others are returned as they are.

    Returns:
        Mode RGB where it was converted, else the image itself.
    """
    profile = image.info.get("icc_profile")
    if image.mode not in _COLOURS or not isinstance(profile, bytes) or not 0 < len(profile) <= _MAX_PROFILE_BYTES:
        return image
    transform = _transform(profile, image.mode)
    if transform is None:
        return image
    try:
        converted = ImageCms.applyTransform(image, transform)
    except (ImageCms.PyCMSError, ValueError, OSError):
        return image
    return image if converted is None else converted


@lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None where it is unusable, of other colours than the image, or sRGB itself."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space != _COLOURS[mode]:
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        return None if mode == "RGB" and _changes_nothing(transform) else transform
    except (ImageCms.PyCMSError, ValueError, OSError, TypeError):
        return None


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    """Tried on a grid of all colours, whatever the profile calls itself."""
    axis = np.linspace(0, 255, 18).round()
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(1, -1, 3).astype(np.uint8)
    shown = ImageCms.applyTransform(Image.fromarray(grid), transform)
    return shown is not None and int(np.abs(np.asarray(shown).astype(int) - grid).max()) <= _SAME
