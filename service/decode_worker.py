"""The decoding process: image bytes come in over a pipe, preprocessed frames go out.

Started by `service.decoding` as `python -m service.decode_worker`. It handles bytes that nobody trusts, so it limits
its own memory, can write no file, imports neither torch nor the rest of the service, and speaks a plain framed
protocol: what it answers is never unpickled.

    frame    4 bytes big-endian length, then that many bytes
    start    <- frame: JSON configuration              -> frame: b"ready"
    image    <- frame: what is asked, frame: the file  -> frame: JSON header, frame: what was asked for

Asked for are either the preprocessed frames, pixels (f, 3, h, w) uint8, by an empty request; or a small JPEG of one
frame, to be looked at by people, by the number of that frame in 4 bytes big-endian.

Linux only: it reads its own size from /proc.
"""

import io
import json
import os
import resource
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from perception.errors import ImageError
from perception.image import DecodedImage, ImageLimits, decode
from perception.preprocess import PreprocessSpec

LENGTH_BYTES = 4
READY = b"ready"
PREVIEW_SIDE_PX = 512
NO_SUCH_FRAME = "NoSuchFrame"
_PREVIEW_QUALITY = 85
_FRAME_BYTES = 4
# A worker that has grown by more than this between two images ends itself, so that the memory comes back.
_GROWTH_BYTES = 96 * 1024 * 1024
# Beyond the parent's own time limit: ends a worker whose parent is no longer there to do so.
_ORPHAN_S = 5


def write_frame(stream: BinaryIO, data: bytes) -> None:
    """Write one frame."""
    stream.write(len(data).to_bytes(LENGTH_BYTES, "big"))
    stream.write(data)


def read_frame(stream: BinaryIO) -> bytes | None:
    """Read one frame; None at the end of the stream."""
    head = stream.read(LENGTH_BYTES)
    if len(head) < LENGTH_BYTES:
        return None
    length = int.from_bytes(head, "big")
    data = stream.read(length)
    return data if len(data) == length else None


def preview_request(frame: int) -> bytes:
    """What asks for a preview of one frame.

    Args:
        frame: 0-based number in the file, below 2^32.

    Raises:
        OverflowError: it is not.
    """
    return frame.to_bytes(_FRAME_BYTES, "big")


def configuration(limits: ImageLimits, spec: PreprocessSpec, timeout_s: float, memory_bytes: int) -> dict[str, Any]:
    """What the worker is told at its start."""
    return {
        "limits": asdict(limits),
        "preprocess": spec.as_dict(),
        "timeout_s": timeout_s,
        "memory_bytes": memory_bytes,
    }


def _spec(values: Mapping[str, Any]) -> PreprocessSpec:
    """Undo JSON's lists; mean and std are tuples."""
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return PreprocessSpec(**fields)


def _memory_bytes(field: int) -> int:
    """Of this process: field 0 is the address space, field 1 what is resident."""
    return int(Path("/proc/self/statm").read_text().split()[field]) * resource.getpagesize()


def _confine(memory_bytes: int) -> None:
    """Limit what decoding may add to this process; no core dumps, which would hold the image; no files."""
    limit = _memory_bytes(0) + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def _answer(request: bytes, data: bytes, limits: ImageLimits, spec: PreprocessSpec) -> tuple[dict[str, Any], bytes]:
    """Header and body of what is asked about one image."""
    try:
        if request:
            return _preview(data, int.from_bytes(request, "big"), limits)
        return _preprocess(data, limits, spec)
    except ImageError as error:
        return {"error": type(error).__name__, "fields": vars(error)}, b""
    except MemoryError:
        return {"error": "MemoryError", "fields": {}}, b""


def _preprocess(data: bytes, limits: ImageLimits, spec: PreprocessSpec) -> tuple[dict[str, Any], bytes]:
    """Header and pixels of one image."""
    image: DecodedImage = decode(data, limits)
    pixels = np.stack([spec.apply(frame.image) for frame in image.frames])
    header = {
        "format": image.format,
        "width_px": image.width_px,
        "height_px": image.height_px,
        "frames_in_file": image.frames_in_file,
        "frames": [[frame.index, frame.background] for frame in image.frames],
    }
    return header, pixels.tobytes()


def _preview(data: bytes, frame: int, limits: ImageLimits) -> tuple[dict[str, Any], bytes]:
    """Header and a small JPEG of one of the frames that are examined, transparency laid on white.

    It is made from pixels alone: nothing else of the file, neither its bytes nor what it says of itself, is in it.
    """
    image = decode(data, limits if frame else replace(limits, max_frames=1))  # others need not be decoded for the first
    views = {view.index: view.image for view in image.frames if view.background != "black"}
    if frame not in views:
        return {"error": NO_SUCH_FRAME, "fields": {"frame": frame, "frames": sorted(views)}}, b""
    view = views[frame]
    scale = min(1.0, PREVIEW_SIDE_PX / max(view.size))
    size_px = (max(1, round(view.width * scale)), max(1, round(view.height * scale)))
    small = view if size_px == view.size else view.resize(size_px, Image.Resampling.LANCZOS, reducing_gap=3.0)
    bare = Image.new("RGB", size_px)  # Pillow would write comments that it finds beside the pixels
    bare.paste(small)
    buffer = io.BytesIO()
    bare.save(buffer, "JPEG", quality=_PREVIEW_QUALITY)
    return {"width_px": bare.width, "height_px": bare.height}, buffer.getvalue()


def _protocol_streams() -> tuple[BinaryIO, BinaryIO]:
    """The two ends of the pipe, moved out of the way of C libraries that print to stdout."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    return source, sink


def main() -> None:
    """Serve until the pipe closes."""
    # Both may reach the whole process group; the parent ends its workers itself, when all is answered.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    source, sink = _protocol_streams()
    start = read_frame(source)
    if start is None:
        sys.exit(1)
    config = json.loads(start)
    limits, spec = ImageLimits(**config["limits"]), _spec(config["preprocess"])
    _confine(config["memory_bytes"])
    write_frame(sink, READY)
    sink.flush()
    os.dup2(1, 2)  # decoders print warnings that hostile files choose; start-up errors have been seen by now
    resident_bytes = _memory_bytes(1)
    while (request := read_frame(source)) is not None and (data := read_frame(source)) is not None:
        signal.setitimer(signal.ITIMER_REAL, config["timeout_s"] + _ORPHAN_S)
        header, body = _answer(request, data, limits, spec)
        signal.setitimer(signal.ITIMER_REAL, 0)
        del data
        grown = _memory_bytes(1) - resident_bytes > _GROWTH_BYTES
        header["retire"] = grown or header.get("error") == "MemoryError"
        write_frame(sink, json.dumps(header).encode())
        write_frame(sink, body)
        sink.flush()


if __name__ == "__main__":
    main()
