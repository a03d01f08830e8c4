"""ICC profiles: what is judged is what a browser shows."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from perception.image import decode
from perception.testing import encoded, synthetic_image

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
IMAGE = synthetic_image(3, (40, 30))


def swapped_primaries() -> bytes:
    """An sRGB profile in which red is called blue: every viewer that heeds it shows the colours exchanged."""
    red, blue = SRGB.index(b"rXYZ"), SRGB.index(b"bXYZ")
    profile = bytearray(SRGB)
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(profile)


def pixels(data: bytes) -> np.ndarray:
    [frame] = decode(data).frames
    return np.asarray(frame.image).astype(int)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_a_profile_that_exchanges_colours_is_heeded(image_format: str) -> None:
    plain = pixels(encoded(IMAGE, image_format))
    shown = pixels(encoded(IMAGE, image_format, icc_profile=swapped_primaries()))
    assert np.abs(plain - plain[..., ::-1]).mean() > 10
    assert np.abs(shown - plain[..., ::-1]).max() <= 4


def test_an_srgb_profile_changes_no_bit() -> None:
    assert (pixels(encoded(IMAGE, icc_profile=SRGB)) == pixels(encoded(IMAGE))).all()


def test_transparent_images_are_converted_under_their_alpha() -> None:
    image = IMAGE.convert("RGBA")
    image.putalpha(Image.new("L", image.size, 128))
    plain = decode(encoded(image)).frames
    shown = decode(encoded(image, icc_profile=swapped_primaries())).frames
    assert [frame.background for frame in shown] == ["white", "black"]
    for one, other in zip(plain, shown, strict=True):
        assert np.abs(np.asarray(one.image).astype(int)[..., ::-1] - np.asarray(other.image)).max() <= 4


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "I;16"])
def test_a_profile_of_other_colours_than_the_image_is_ignored(mode: str) -> None:
    """Viewers do the same; a palette image is of the colours of its palette."""
    image = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40)) if mode == "I;16" else IMAGE.convert(mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert (pixels(encoded(image, kind, icc_profile=lab)) == pixels(encoded(image, kind))).all()


def test_grey_images_follow_a_grey_profile() -> None:
    """A grey profile of gamma 1: mid grey is shown lighter."""
    data = SRGB_GREY_LINEAR
    shown = pixels(encoded(Image.new("L", (4, 4), 64), icc_profile=data))
    assert shown.min() > 120


def _grey_profile() -> bytes:
    """The least that a monochrome display profile needs: white point and a linear tone curve."""
    curve = b"curv" + bytes(4) + (0).to_bytes(4, "big")
    white = b"XYZ " + bytes(4) + b"".join(v.to_bytes(4, "big") for v in (0xF6D6, 0x10000, 0xD32D))
    description = b"desc" + bytes(4) + (5).to_bytes(4, "big") + b"grey\0" + bytes(78)
    description += bytes(-len(description) % 4)
    tags, start, table, body = ((b"kTRC", curve), (b"wtpt", white), (b"desc", description)), 128 + 4 + 36, b"", b""
    for name, data in tags:
        table += name + (start + len(body)).to_bytes(4, "big") + len(data).to_bytes(4, "big")
        body += data
    header = bytearray(128)
    header[:4] = (start + len(body)).to_bytes(4, "big")
    header[8:12], header[12:16], header[16:20], header[20:24] = b"\x02\x40\0\0", b"mntr", b"GRAY", b"XYZ "
    header[36:40] = b"acsp"
    header[68:80] = b"".join(v.to_bytes(4, "big") for v in (0xF6D6, 0x10000, 0xD32D))
    return bytes(header) + (3).to_bytes(4, "big") + table + body


SRGB_GREY_LINEAR = _grey_profile()


@settings(max_examples=150)
@given(st.data())
def test_no_profile_stops_an_image(data: st.DataObject) -> None:
    profile = bytearray(data.draw(st.sampled_from([SRGB, swapped_primaries(), SRGB_GREY_LINEAR])))
    for _ in range(data.draw(st.integers(1, 12))):
        profile[data.draw(st.integers(0, len(profile) - 1))] = data.draw(st.integers(0, 255))
    buffer = io.BytesIO()
    IMAGE.save(buffer, "PNG", icc_profile=bytes(profile[: data.draw(st.integers(1, len(profile)))]))
    assert pixels(buffer.getvalue()).shape == (30, 40, 3)
