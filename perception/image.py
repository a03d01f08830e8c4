"""From bytes to RGB frames: the only place in the repository that opens an image.

Owns the format allow-list, the limits, orientation, colour modes, transparency and frame sampling; ICC profiles are
`perception.colour`'s. Needs Pillow and numpy alone, so that decoding workers stay small. Raises nothing but ImageError.
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pillow_heif
from PIL import Image, UnidentifiedImageError

from perception.colour import to_srgb
from perception.errors import CorruptImage, ImageError, ImageTooLarge, UnsupportedFormat

pillow_heif.register_heif_opener(thumbnails=False)

_AVIF_BRANDS = {b"avif", b"avis"}
_HEIF_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1"}
# Pillow's plug-in for each accepted signature. What is not listed is never handed to a parser.
_SIGNATURES: tuple[tuple[str, Callable[[bytes], bool]], ...] = (
    ("JPEG", lambda head: head.startswith(b"\xff\xd8\xff")),
    ("PNG", lambda head: head.startswith(b"\x89PNG\r\n\x1a\n")),
    ("WEBP", lambda head: head[:4] == b"RIFF" and head[8:12] == b"WEBP"),
    ("GIF", lambda head: head[:6] in (b"GIF87a", b"GIF89a")),
    ("BMP", lambda head: head.startswith(b"BM")),
    ("TIFF", lambda head: head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    ("AVIF", lambda head: head[4:8] == b"ftyp" and bool(_brands(head) & _AVIF_BRANDS)),
    ("HEIF", lambda head: head[4:8] == b"ftyp" and bool(_brands(head) & _HEIF_BRANDS)),
)
ACCEPTED_FORMATS = tuple(name for name, _ in _SIGNATURES)
# What their files are called; readers of folders and archives pass over other files.
IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "heic", "heif", "avif"})

# EXIF orientation 2..8 as the transpositions that undo it.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_ORIENTATION = 0x0112
Background = Literal["white", "black"]
_BACKGROUNDS: tuple[tuple[Background, tuple[int, int, int]], ...] = (("white", (255,) * 3), ("black", (0,) * 3))


@dataclass(frozen=True)
class ImageLimits:
    """What an image may cost.

    Attributes:
        max_bytes: of the encoded file.
        max_pixels: width x height of one frame, read from the header before any pixel is decoded. 50 million is a
            large phone camera; decoding it takes about 150 MB.
        max_frames: frames sampled, evenly and with the first and the last, from an animation.
        max_total_pixels: frames x width x height of an animation, since decoders walk every frame up to the last.
    """

    max_bytes: int = 20 * 1024 * 1024
    max_pixels: int = 50_000_000
    max_frames: int = 8
    max_total_pixels: int = 250_000_000


@dataclass(frozen=True)
class Frame:
    """One RGB view of an image.

    Attributes:
        image: mode RGB, upright.
        index: 0-based frame number within the file.
        background: what transparency was laid on; None for an opaque frame.
    """

    image: Image.Image
    index: int
    background: Background | None


@dataclass(frozen=True)
class DecodedImage:
    """All views of one file that a moderation decision has to look at.

    Attributes:
        format: one of ACCEPTED_FORMATS.
        width_px, height_px: of the first frame, upright.
        frames_in_file: how many frames the file has; `frames` may be a sample of them.
        frames: at least one. A frame with real transparency comes twice, on white and on black, since an image can
            be drawn to show different things on light and dark pages.
    """

    format: str
    width_px: int
    height_px: int
    frames_in_file: int
    frames: tuple[Frame, ...]


def _brands(head: bytes) -> set[bytes]:
    """Major and compatible brands of an ISO media file's `ftyp` box."""
    end = min(int.from_bytes(head[:4], "big"), len(head))
    return {head[8:12]} | {head[i : i + 4] for i in range(16, end - 3, 4)}


def sniff_format(data: bytes) -> str:
    """Name the format by its signature.

    Raises:
        UnsupportedFormat: no accepted signature.
    """
    head = data[:512]
    if head[4:8] == b"ftyp":  # a HEIC and an AVIF may list each other's brands: the major brand decides
        if head[8:12] in _AVIF_BRANDS:
            return "AVIF"
        if head[8:12] in _HEIF_BRANDS and not _brands(head) & _AVIF_BRANDS:
            return "HEIF"
    for name, matches in _SIGNATURES:
        if matches(head):
            return name
    found = "an empty file" if not data else f"a file that starts with {data[:8].hex(' ')}"
    raise UnsupportedFormat(found, ACCEPTED_FORMATS)


def decode(data: bytes, limits: ImageLimits | None = None) -> DecodedImage:
    """Decode one image file.

    Args:
        data: the file's bytes.
        limits: default `ImageLimits()`.

    Raises:
        ImageTooLarge: more bytes, pixels or pixels over all frames than the limit.
        UnsupportedFormat: not one of ACCEPTED_FORMATS, whatever its file name says.
        CorruptImage: anything else that a decoder can find wrong with it.
    """
    limits = limits or ImageLimits()
    if len(data) > limits.max_bytes:
        raise ImageTooLarge("bytes", limits.max_bytes, len(data))
    image_format = sniff_format(data)
    try:
        return _decode(data, image_format, limits)
    except (ImageError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow's own guard, which comes first where our limit is set above it; its message names the size.
        numbers = [int(n) for n in re.findall(r"\d+", str(error))] or [0]
        raise ImageTooLarge("pixels", limits.max_pixels, numbers[0]) from error
    except UnidentifiedImageError as error:  # its own message names a memory address
        raise CorruptImage(f"{image_format}: the signature is there, a readable header is not") from error
    except (
        Exception
    ) as error:  # decoders raise OSError, ValueError, SyntaxError, RuntimeError, EOFError, struct.error...
        raise CorruptImage(f"{image_format}: {type(error).__name__}: {str(error)[:200]}") from error


def _decode(data: bytes, image_format: str, limits: ImageLimits) -> DecodedImage:
    with warnings.catch_warnings():
        # Pillow warns about odd but harmless metadata; the bomb guard is ours and comes before any pixel is decoded.
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=[image_format]) as image:
            frames_in_file = _check_size(image, limits)
            upright = _orientation(image)
            frames = []
            for index in _sampled(frames_in_file, limits.max_frames):
                if index:
                    image.seek(index)
                    _check_pixels(image, limits)
                image.load()
                for background, view in _rgb_views(image):
                    turned = view.transpose(upright) if upright is not None else view
                    frames.append(Frame(turned, index, background))
    width_px, height_px = frames[0].image.size
    return DecodedImage(image_format, width_px, height_px, frames_in_file, tuple(frames))


def _check_pixels(image: Image.Image, limits: ImageLimits) -> int:
    """Width x height, or ImageTooLarge."""
    width, height = image.size
    if width < 1 or height < 1:
        raise CorruptImage(f"size is {width} x {height}")
    if width * height > limits.max_pixels:
        raise ImageTooLarge("pixels", limits.max_pixels, width * height)
    return width * height


def _check_size(image: Image.Image, limits: ImageLimits) -> int:
    """Check the header's sizes and return the number of frames that count as content."""
    pixels = _check_pixels(image, limits)
    # The other pages of a phone's multi-picture JPEG are previews and depth maps, not frames that anybody is shown.
    frames = 1 if image.format in ("JPEG", "MPO") else int(getattr(image, "n_frames", 1))
    if frames * pixels > limits.max_total_pixels and frames > 1:
        raise ImageTooLarge("pixels over all frames", limits.max_total_pixels, frames * pixels)
    return frames


def _sampled(frames: int, most: int) -> list[int]:
    """At most `most` frame numbers, evenly spaced, with the first and the last."""
    if frames <= most:
        return list(range(frames))
    if most == 1:
        return [0]
    return sorted({round(i * (frames - 1) / (most - 1)) for i in range(most)})


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """What turns the image upright; unreadable EXIF means upright, as viewers take it."""
    try:
        return _UPRIGHT.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:
        return None


def _rgb_views(image: Image.Image) -> Iterator[tuple[Background | None, Image.Image]]:
    """The frame as RGB: once when opaque, on white and on black when it has real transparency."""
    image = _eight_bit(image)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        lowest = rgba.getchannel("A").getextrema()[0]
        if isinstance(lowest, (int, float)) and lowest < 255:
            opaque, alpha = to_srgb(rgba.convert("RGB")), rgba.getchannel("A")
            del image, rgba  # large ones cost hundreds of megabytes each
            for name, colour in _BACKGROUNDS:
                canvas = Image.new("RGB", opaque.size, colour)
                canvas.paste(opaque, mask=alpha)
                yield name, canvas
            return
        image = rgba
    if image.mode not in ("L", "CMYK", "RGB"):
        image = image.convert("RGB")
    shown = to_srgb(image)
    yield None, image.copy() if shown is image and image.mode == "RGB" else shown.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Bring 16-bit, 32-bit and float grey to 8 bits by their full scale; Pillow's own conversion clips."""
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.float64) / 257.0
    elif image.mode == "I":
        values = np.asarray(image).astype(np.float64)
        values = values / 257.0 if values.max(initial=0.0) > 255 else values
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0, posinf=255.0, neginf=0.0)
        top = float(values.max(initial=0.0))
        # Floats come in [0, 1], [0, 255] or [0, 65535]: the smallest scale that holds them.
        values = values * (255.0 if top <= 1 else 1.0 if top <= 255 else 1 / 257 if top <= 65535 else 255.0 / top)
    else:
        return image
    if not math.isfinite(float(values.sum())):
        raise CorruptImage("pixel values are not finite")
    grey = Image.fromarray(np.clip(np.round(values), 0, 255).astype(np.uint8))
    if "icc_profile" in image.info:
        grey.info["icc_profile"] = image.info["icc_profile"]
    return grey
