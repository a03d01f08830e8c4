"""Decoding: every accepted format and mode, the limits, and ImageError alone for everything else."""

import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pillow_heif
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from perception.errors import CorruptImage, ImageError, ImageTooLarge, UnsupportedFormat
from perception.image import ACCEPTED_FORMATS, ImageLimits, decode, sniff_format
from perception.testing import encoded, synthetic_image

LOSSY = {"JPEG", "WEBP", "AVIF", "HEIF"}


def heif(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, quality=90)
    return buffer.getvalue()


def file_of(image_format: str, image: Image.Image) -> bytes:
    return heif(image) if image_format == "HEIF" else encoded(image, image_format)


@pytest.mark.parametrize("image_format", ACCEPTED_FORMATS)
def test_every_accepted_format_comes_back_as_it_was(image_format: str) -> None:
    image = synthetic_image(1, (64, 48))
    if image_format == "GIF":  # exact for few colours
        image = image.quantize(64).convert("RGB")
    decoded = decode(file_of(image_format, image))
    assert decoded.format == image_format
    assert (decoded.width_px, decoded.height_px) == (64, 48)
    (frame,) = decoded.frames
    assert (frame.image.mode, frame.index, frame.background) == ("RGB", 0, None)
    difference = np.abs(np.asarray(frame.image, np.int16) - np.asarray(image, np.int16))
    assert difference.mean() <= (6 if image_format in LOSSY else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation: int) -> None:
    upright = synthetic_image(2, (40, 24))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that makes the stored picture
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode(encoded(stored, "PNG", exif=exif))
    assert np.array_equal(np.asarray(decoded.frames[0].image), np.asarray(upright))


def test_broken_exif_does_not_refuse_a_photo() -> None:
    data = encoded(synthetic_image(3), "JPEG", exif=b"Exif\0\0MM\0*garbage that is no directory")
    assert decode(data).format == "JPEG"


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_colour_modes_become_rgb(mode: str) -> None:
    image = synthetic_image(4).convert(mode)
    decoded = decode(encoded(image, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"))
    assert np.array_equal(np.asarray(decoded.frames[0].image), np.asarray(image.convert("RGB")))


def test_sixteen_bit_grey_keeps_its_scale() -> None:
    ramp = np.linspace(0, 65535, 256 * 4).reshape(4, 256).astype(np.uint16)
    for image_format in ("PNG", "TIFF"):
        grey = np.asarray(decode(encoded(Image.fromarray(ramp), image_format)).frames[0].image)[..., 0]
        assert np.abs(grey - ramp / 257.0).max() <= 0.5


@pytest.mark.parametrize(("top", "scale"), [(1.0, 255.0), (255.0, 1.0), (65535.0, 1 / 257)])
def test_float_grey_keeps_its_scale(top: float, scale: float) -> None:
    ramp = np.linspace(0, top, 100, dtype=np.float32).reshape(10, 10)
    grey = np.asarray(decode(encoded(Image.fromarray(ramp), "TIFF")).frames[0].image)[..., 0]
    assert np.abs(grey - ramp * scale).max() <= 0.51


def test_float_grey_with_nan_and_infinity_is_decoded() -> None:
    values = np.array([[np.nan, np.inf], [-np.inf, 0.5]], dtype=np.float32)
    grey = np.asarray(decode(encoded(Image.fromarray(values), "TIFF")).frames[0].image)[..., 0]
    assert grey.min() == 0
    assert grey.max() == 255


def test_real_transparency_is_seen_on_white_and_on_black() -> None:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    image.putpixel((0, 0), (0, 255, 0, 0))
    frames = decode(encoded(image)).frames
    assert [f.background for f in frames] == ["white", "black"]
    assert frames[0].image.getpixel((0, 0)) == (255, 255, 255)
    assert frames[1].image.getpixel((0, 0)) == (0, 0, 0)
    assert frames[0].image.getpixel((1, 1)) == frames[1].image.getpixel((1, 1)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_opaque_alpha_channel_is_one_frame(mode: str) -> None:
    assert [f.background for f in decode(encoded(synthetic_image(5).convert(mode))).frames] == [None]


def test_palette_transparency_counts() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30] + [0] * 762)
    image.putpixel((0, 0), 0)
    frames = decode(encoded(image, "PNG", transparency=0)).frames
    assert frames[0].image.getpixel((0, 0)) == (255, 255, 255)
    assert frames[0].image.getpixel((1, 1)) == (10, 20, 30)


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "AVIF"])
def test_animations_are_sampled_from_first_to_last(image_format: str) -> None:
    shades = [Image.new("RGB", (16, 16), (i * 12, 255 - i * 12, 40)) for i in range(20)]
    options: dict[str, Any] = {"save_all": True, "append_images": shades[1:]}
    decoded = decode(encoded(shades[0], image_format, **options), ImageLimits(max_frames=5))
    assert decoded.frames_in_file == 20
    assert [f.index for f in decoded.frames] == [0, 5, 10, 14, 19]
    last = decoded.frames[-1].image.getpixel((8, 8))
    assert isinstance(last, tuple)
    assert abs(last[0] - 228) < 16


def test_animation_budget_counts_all_frames() -> None:
    frames = [Image.new("L", (100, 100), i) for i in range(10)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with pytest.raises(ImageTooLarge) as caught:
        decode(data, ImageLimits(max_total_pixels=99_999))
    assert (caught.value.quantity, caught.value.limit, caught.value.actual) == (
        "pixels over all frames",
        99_999,
        100_000,
    )


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(body: bytes) -> bytes:
        return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))

    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(header) + chunk(b"IDAT" + zlib.compress(b"\0"))


@pytest.mark.parametrize(("width", "height"), [(7072, 7071), (30_000, 30_000), (65_000, 800)])
def test_pixels_are_capped_from_the_header(width: int, height: int) -> None:
    with pytest.raises(ImageTooLarge) as caught:
        decode(png_header(width, height))
    assert (caught.value.quantity, caught.value.limit, caught.value.actual) == ("pixels", 50_000_000, width * height)


def test_bytes_are_capped() -> None:
    with pytest.raises(ImageTooLarge, match=r"1001 bytes, the limit is 1000"):
        decode(b"\xff\xd8\xff" + b"\0" * 998, ImageLimits(max_bytes=1000))


@pytest.mark.parametrize(
    "data", [b"", b"B", b"hello", b"<svg/>", b"%PDF-1.7", b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", b"P6 1 1 255 abc"]
)
def test_other_formats_are_refused_by_signature(data: bytes) -> None:
    with pytest.raises(UnsupportedFormat):
        decode(data)


def test_avif_and_heic_are_told_apart_by_brand() -> None:
    assert sniff_format(b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf") == "AVIF"
    assert sniff_format(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic") == "HEIF"
    assert sniff_format(b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf") == "AVIF"


@pytest.mark.parametrize("image_format", ACCEPTED_FORMATS)
def test_a_truncated_file_is_corrupt_not_half_an_image(image_format: str) -> None:
    data = file_of(image_format, synthetic_image(6, (200, 160)))
    with pytest.raises(CorruptImage):
        decode(data[: len(data) // 2])


@pytest.mark.parametrize("image_format", ACCEPTED_FORMATS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), flips=st.integers(1, 40))
def test_mutated_files_raise_image_errors_only(image_format: str, seed: int, flips: int) -> None:
    data = bytearray(file_of(image_format, synthetic_image(7, (24, 24))))
    rng = np.random.default_rng(seed)
    for position in rng.integers(0, len(data), flips):
        data[position] = rng.integers(0, 256)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            frames = decode(bytes(data)).frames
        except ImageError:
            return
    assert all(f.image.mode == "RGB" for f in frames)
    assert frames


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_arbitrary_bytes_raise_image_errors_only(data: bytes) -> None:
    for head in (b"", b"\xff\xd8\xff", b"GIF89a", b"II*\0", b"BM", b"RIFF\0\0\0\0WEBP"):
        with pytest.raises(ImageError):
            decode(head + data)
