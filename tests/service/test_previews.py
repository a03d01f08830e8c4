"""Previews: pixels alone, upright, on white, of the frame that is asked for, under the limits of every decoding."""

import asyncio
import io
import os
import signal
import struct
import tarfile
import zlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms, PngImagePlugin

from perception.errors import ImageError
from perception.image import ImageLimits, decode
from perception.preprocess import PreprocessSpec
from perception.testing import encoded, synthetic_image
from service.decode_worker import _preview
from service.decoding import DecoderPool, DecoderSettings, Preview
from service.errors import DecodeLimitExceeded, DecoderCrashed, DecodingError, InvalidParameter
from service.testing import decode_processes

MIB = 1024 * 1024
SPEC = PreprocessSpec(size_px=24, resize_px=32)
SETTINGS = DecoderSettings(ImageLimits(), SPEC, timeout_s=20.0, memory_bytes=512 * MIB)
GOOD = encoded(synthetic_image(1))
SECRET = b"GPS 52.5163 13.3777 of a home"
ARCHIVE = "hostile/hostile_images.tar.xz"
DATA = Path(os.environ.get("HARDLOOK_DATA", Path(__file__).parents[3] / "shared" / "data"))
# Segments of a JPEG file that hold nothing but what its pixels need: JFIF's, tables, the frame, the scan.
NEEDED = {0xE0, 0xDB, 0xC0, 0xC4, 0xDA}


def run(work: Callable[[DecoderPool], Awaitable[None]], settings: DecoderSettings = SETTINGS) -> None:
    async def coroutine() -> None:
        async with DecoderPool(settings, workers=1) as pool:
            await work(pool)

    asyncio.run(asyncio.wait_for(coroutine(), 300))


def previewed(data: bytes, frame: int = 0) -> Preview:
    found: list[Preview] = []

    async def work(pool: DecoderPool) -> None:
        found.append(await pool.preview(data, frame))

    run(work)
    return found[0]


def pixels_of(preview: Preview) -> NDArray[np.float64]:
    with Image.open(io.BytesIO(preview.jpeg), formats=["JPEG"]) as image:
        assert image.mode == "RGB"
        assert image.size == (preview.width_px, preview.height_px)
        return np.asarray(image, np.float64)


def segments(jpeg: bytes) -> Iterator[tuple[int, bytes]]:
    """Markers before the scan, with what they hold."""
    assert jpeg[:2] == b"\xff\xd8"
    at = 2
    while True:
        assert jpeg[at] == 0xFF
        marker, size = jpeg[at + 1], int.from_bytes(jpeg[at + 2 : at + 4], "big")
        yield marker, jpeg[at + 4 : at + 2 + size]
        if marker == 0xDA:
            return
        at += 2 + size


def quarters() -> Image.Image:
    """Red, green, blue and grey corners, 64 x 32 px."""
    image = Image.new("RGB", (64, 32), (200, 0, 0))
    for box, colour in (((32, 0), (0, 200, 0)), ((0, 16), (0, 0, 200)), ((32, 16), (128, 128, 128))):
        image.paste(colour, (*box, box[0] + 32, box[1] + 16))
    return image


@pytest.mark.parametrize(
    ("size_px", "expected"),
    [
        ((48, 40), (48, 40)),
        ((512, 512), (512, 512)),
        ((513, 100), (512, 100)),
        ((1024, 2048), (256, 512)),
        ((3000, 2000), (512, 341)),
        ((5000, 3), (512, 1)),
        ((1, 1), (1, 1)),
    ],
)
def test_the_longer_side_is_512_at_most_and_nothing_is_enlarged(
    size_px: tuple[int, int], expected: tuple[int, int]
) -> None:
    preview = previewed(encoded(Image.new("RGB", size_px, (10, 200, 30))))
    assert (preview.width_px, preview.height_px) == expected
    assert np.abs(pixels_of(preview) - (10, 200, 30)).max() < 6


@hypothesis_settings(max_examples=60)
@given(st.integers(1, 1500), st.integers(1, 1500))
def test_proportions_stay(width_px: int, height_px: int) -> None:
    header, _ = _preview(encoded(Image.new("RGB", (width_px, height_px))), 0, ImageLimits())
    longest = min(512, max(width_px, height_px))
    assert max(header["width_px"], header["height_px"]) == longest
    scale = longest / max(width_px, height_px)
    assert abs(header["width_px"] - width_px * scale) <= 1
    assert abs(header["height_px"] - height_px * scale) <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_it_is_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(quarters(), "PNG", exif=exif)
    upright = decode(data).frames[0].image
    assert upright.size == ((64, 32) if orientation < 5 else (32, 64))
    preview = previewed(data)
    assert np.abs(pixels_of(preview) - np.asarray(upright, np.float64)).mean() < 6
    turned = np.asarray(quarters().resize((preview.width_px, preview.height_px)), np.float64)
    assert (np.abs(pixels_of(preview) - turned).mean() < 6) == (orientation == 1)


def loaded_with_secrets() -> dict[str, bytes]:
    """Files with something to hide in every place that their format has for it."""
    exif = Image.Exif()
    exif[0x010E] = SECRET.decode()  # ImageDescription
    exif[0x013B] = "Ann"
    exif.get_ifd(0x8825)[1] = "N"
    exif.get_ifd(0x8825)[29] = SECRET.decode()[:10]
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", SECRET.decode())
    text.add_itxt("XML:com.adobe.xmp", SECRET.decode())
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = synthetic_image(7)
    return {
        "jpeg": encoded(image, "JPEG", exif=exif, comment=SECRET, icc_profile=profile, dpi=(301, 301), xmp=SECRET)
        + SECRET,
        "png": encoded(image, "PNG", exif=exif, pnginfo=text, icc_profile=profile) + SECRET,
        "webp": encoded(image, "WEBP", exif=exif, xmp=SECRET, icc_profile=profile),
        "gif": encoded(image, "GIF", comment=SECRET),
        "tiff": encoded(image, "TIFF", description=SECRET.decode(), exif=exif),
    }


@pytest.mark.parametrize("name", ["jpeg", "png", "webp", "gif", "tiff"])
def test_nothing_but_pixels_is_in_it(name: str) -> None:
    data = loaded_with_secrets()[name]
    assert SECRET in data
    jpeg = previewed(data).jpeg
    assert {marker for marker, _ in segments(jpeg)} <= NEEDED
    [jfif] = [body for marker, body in segments(jpeg) if marker == 0xE0]
    assert (jfif[:5], len(jfif)) == (b"JFIF\0", 14)  # no thumbnail
    for secret in (SECRET, SECRET[:10], b"Exif", b"ICC_PROFILE", b"Ann", b"http"):
        assert secret not in jpeg
    with Image.open(io.BytesIO(jpeg)) as image:
        assert not image.getexif()
        assert image.info.keys() <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
        assert image.info["jfif_density"] == (1, 1)
    assert jpeg.endswith(b"\xff\xd9")


def test_transparency_is_laid_on_white() -> None:
    image = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 16, 32))
    pixels = pixels_of(previewed(encoded(image)))
    assert np.abs(pixels[:, :12] - (0, 0, 255)).max() < 40
    assert np.abs(pixels[:, 20:] - (255, 255, 255)).max() < 40


def animation(frames: int) -> bytes:
    images = [Image.new("RGB", (40, 30), (20 * i, 0, 255 - 20 * i)) for i in range(frames)]
    return encoded(images[0], "WEBP", save_all=True, append_images=images[1:], lossless=True)


def test_the_frame_is_the_one_that_is_asked_for() -> None:
    data = animation(12)

    async def work(pool: DecoderPool) -> None:
        prepared = await pool.prepare(data)
        examined = [frame.index for frame in prepared.frames]
        assert len(examined) == ImageLimits().max_frames < prepared.frames_in_file == 12
        for index in examined:
            pixels = pixels_of(await pool.preview(data, index))
            assert np.abs(pixels - (20 * index, 0, 255 - 20 * index)).max() < 8
        [other, *_] = set(range(12)) - set(examined)
        for absent in (other, 12, 2**32 - 1, 2**32, -1):
            with pytest.raises(InvalidParameter, match="frame"):
                await pool.preview(data, absent)

    run(work)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "I;16", "LA", "1"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = synthetic_image(3).convert("L")
    image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    preview = previewed(encoded(image, "TIFF"))
    grey = np.asarray(decode(encoded(image, "TIFF")).frames[0].image, np.float64)
    assert np.abs(pixels_of(preview) - grey).mean() < 20


def broken() -> dict[str, bytes]:
    header = struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return {
        "empty": b"",
        "text": b"hello",
        "cut": GOOD[:80],
        "bomb": b"\x89PNG\r\n\x1a\n" + chunk,
        "pixels": encoded(Image.new("1", (200, 51))),
        "bytes": bytes(6000),
    }


@pytest.mark.parametrize("name", broken())
def test_errors_are_those_of_prepare(name: str) -> None:
    async def work(pool: DecoderPool) -> None:
        errors: list[Any] = []
        for ask in (pool.prepare, pool.preview):
            with pytest.raises(ImageError) as caught:
                await ask(broken()[name])
            errors.append(caught.value)
        assert type(errors[0]) is type(errors[1])
        assert vars(errors[0]) == vars(errors[1])
        assert pixels_of(await pool.preview(GOOD)).shape == (40, 48, 3)

    run(work, replace(SETTINGS, limits=ImageLimits(max_bytes=5000, max_pixels=10_000)))


def test_time_memory_and_crashes_are_bounded_as_those_of_prepare() -> None:
    before = decode_processes(os.getpid())

    async def work(pool: DecoderPool) -> None:
        [pid] = decode_processes(os.getpid()) - before
        with pytest.raises(DecodeLimitExceeded, match="memory"):
            await pool.preview(encoded(Image.new("RGB", (7000, 7000))))
        await pool.preview(GOOD)
        [pid] = decode_processes(os.getpid()) - before
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(DecodeLimitExceeded, match="seconds"):
            await pool.preview(GOOD)
        await pool.preview(GOOD)
        [pid] = decode_processes(os.getpid()) - before
        os.kill(pid, signal.SIGSTOP)
        task = asyncio.create_task(pool.preview(GOOD))
        await asyncio.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(DecoderCrashed):
            await task
        assert np.array_equal((await pool.prepare(GOOD)).pixels[0], SPEC.apply(decode(GOOD).frames[0].image))

    run(work, replace(SETTINGS, timeout_s=1.0, memory_bytes=96 * MIB))


def test_frames_and_previews_may_be_asked_for_in_any_order() -> None:
    async def work(pool: DecoderPool) -> None:
        for seed in range(6):
            data = encoded(synthetic_image(seed))
            prepared, preview = await asyncio.gather(pool.prepare(data), pool.preview(data))
            assert np.array_equal(prepared.pixels[0], SPEC.apply(decode(data).frames[0].image))
            assert np.abs(pixels_of(preview) - np.asarray(synthetic_image(seed), np.float64)).mean() < 12

    run(work)


def test_a_worker_may_be_less_important_than_others() -> None:
    before = decode_processes(os.getpid())
    priorities: list[int] = []

    async def work(pool: DecoderPool) -> None:
        [pid] = decode_processes(os.getpid()) - before
        priorities.append(os.getpriority(os.PRIO_PROCESS, pid))
        await pool.preview(GOOD)

    run(work, replace(SETTINGS, niceness=10))
    run(work)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert priorities == [max(own, 10), own]


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / ARCHIVE).is_file(), reason=f"HARDLOOK_DATA has no {ARCHIVE}")
def test_collected_hostile_files() -> None:
    """Each is a typed error or a sound picture; none ends the process that makes the others."""
    outcomes = {"picture": 0, "error": 0}

    async def work(pool: DecoderPool) -> None:
        with tarfile.open(DATA / ARCHIVE) as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isfile() else None
                data = b"" if content is None else content.read()
                try:
                    preview = await pool.preview(data)
                except (ImageError, DecodeLimitExceeded):
                    outcomes["error"] += 1
                    continue
                except DecodingError as error:  # pragma: no cover - says which file it was
                    pytest.fail(f"{member.name}: {error}")
                outcomes["picture"] += 1
                assert max(pixels_of(preview).shape) <= 512
                assert {marker for marker, _ in segments(preview.jpeg)} <= NEEDED, member.name

    run(work)
    assert outcomes["picture"] > 300
    assert outcomes["error"] > 300
