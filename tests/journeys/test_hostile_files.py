"""Files made to break decoders, sent to the running service: typed answers, in time, and nothing left behind."""

import base64
import os
import struct
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from perception.testing import ToyEncoder, encoded, synthetic_image
from service.testing import publish, toy_pools
from tests.journeys.servers import Server, running

MIB = 1024 * 1024
SLOWEST_S = 5.0
GROWTH_BYTES = 200 * MIB
ARCHIVE = "hostile/hostile_images.tar.xz"
DATA = Path(os.environ.get("HARDLOOK_DATA", Path(__file__).parents[3] / "shared" / "data"))


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png_chunk(b"IEND", b"")


def bombs() -> Iterator[bytes]:
    """Small files that are large images, or claim to be."""
    yield encoded(Image.new("1", (20_000, 20_000)))
    yield encoded(Image.new("L", (7000, 7000)))  # within the limits
    yield encoded(Image.new("RGBA", (3000, 3000), (1, 2, 3, 4)))  # within the limits, on two backgrounds
    yield png(2**31 - 1, 2**31 - 1, png_chunk(b"IDAT", zlib.compress(b"")))
    yield png(0, 0)
    yield png(100, 100, png_chunk(b"IDAT", zlib.compress(bytes(50 * MIB), 9)))
    yield png(10, 10, png_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(50 * MIB), 9)))
    yield png(10, 10, *(png_chunk(b"tEXt", b"k\0" + bytes(1000)) for _ in range(2000)))
    yield b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**31 - 1, -(2**31), 1, 24, 0, 0, 0, 0, 0, 0)
    yield b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b";"
    yield b"II*\0\x08\0\0\0" + struct.pack("<H", 65535) + bytes(100)
    yield b"RIFF\xff\xff\xff\xffWEBPVP8 " + bytes(100)
    yield b"\xff\xd8" + b"\xff\xe1\xff\xff" * 1000
    yield struct.pack(">I", 24) + b"ftypavif" + bytes(12) + b"\0\0\0\x01mdat" + b"\xff" * 8
    yield struct.pack(">I", 2**31) + b"ftypheic" + bytes(100)
    frames = [Image.new("P", (5000, 5000), i) for i in range(11)]
    yield encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    yield encoded(Image.new("RGB", (1, 60_000)))
    yield encoded(Image.new("RGB", (60_000, 1)))


def mutations(count: int) -> Iterator[bytes]:
    """Valid files of every format, cut and overwritten by a seeded hand."""
    rng = np.random.default_rng(0)
    image = synthetic_image(0)
    originals = [encoded(image, image_format) for image_format in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")]
    for i in range(count):
        data = bytearray(originals[i % len(originals)])
        for position in rng.integers(0, len(data), rng.integers(1, 8)):
            data[position] = rng.integers(0, 256)
        yield bytes(data[: rng.integers(1, len(data) + 1)] if rng.random() < 0.4 else data)


def assert_survives(server: Server, files: Iterator[tuple[str, bytes]]) -> None:
    good = encoded(synthetic_image(3))
    for _ in range(20):
        assert server.classify(good).status_code == 200
    before_bytes = server.resident_bytes()
    wrong: list[str] = []
    for name, data in files:
        started = time.monotonic()
        response = server.classify(data)
        took_s = time.monotonic() - started
        typed = response.status_code == 200 or (
            400 <= response.status_code < 500 and response.json()["type"].startswith("urn:hardlook:problem:")
        )
        if not typed or took_s > SLOWEST_S:
            wrong.append(f"{name}: {response.status_code} after {took_s:.1f} s: {response.text[:200]}")
    assert wrong == []
    assert server.process is not None
    assert server.process.poll() is None
    assert server.classify(good).status_code == 200
    time.sleep(1.0)  # a worker that is being replaced
    assert server.resident_bytes() - before_bytes < GROWTH_BYTES


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("published")
    publish(root, ToyEncoder(), toy_pools())
    with running(root, tmp_path_factory.mktemp("log")) as server:
        yield server


@pytest.mark.slow
def test_generated_files(server: Server) -> None:
    files = [(f"bomb {i}", data) for i, data in enumerate(bombs())]
    files += [(f"mutation {i}", data) for i, data in enumerate(mutations(200))]
    assert_survives(server, iter(files))


@pytest.mark.slow
def test_memory_of_large_bodies_comes_back(server: Server) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2200, 2200, 3), dtype=np.uint8)
    large = encoded(Image.fromarray(pixels), compress_level=1)
    assert len(large) > 10 * MIB
    body = {"images": [{"data": base64.b64encode(large).decode()}]}
    forms: list[Callable[[], httpx.Response]] = [
        lambda: server.classify(large),
        lambda: server.client.post("/classify", files={"image": ("large.png", large)}),
        lambda: server.client.post("/classify", json=body),
    ]
    assert [form().status_code for form in forms] == [200] * 3
    time.sleep(2.5)
    before_bytes = server.resident_bytes()
    with ThreadPoolExecutor(12) as threads:
        answers = [threads.submit(forms[i % 3]) for i in range(12)]
        assert [answer.result().status_code for answer in answers] == [200] * 12
    time.sleep(2.5)
    assert server.resident_bytes() - before_bytes < 50 * MIB


def corpus() -> Iterator[tuple[str, bytes]]:
    with tarfile.open(DATA / ARCHIVE) as archive:
        for member in archive:
            if member.isfile() and not member.name.endswith(".csv"):
                content = archive.extractfile(member)
                assert content is not None
                yield member.name, content.read()


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / ARCHIVE).is_file(), reason=f"HARDLOOK_DATA has no {ARCHIVE}")
def test_collected_files(server: Server) -> None:
    files = list(corpus())
    assert len(files) > 1000
    assert_survives(server, iter(files))
