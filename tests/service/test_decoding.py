"""Decoding processes: right pixels, typed errors, and a working decoder after whatever an image did to it."""

import asyncio
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perception.errors import CorruptImage, ImageTooLarge, UnsupportedFormat
from perception.image import ImageLimits, decode
from perception.preprocess import PreprocessSpec
from perception.testing import encoded, synthetic_image
from service.decoding import DecoderPool, DecoderSettings
from service.errors import DecodeLimitExceeded, DecoderCrashed, DecoderUnavailable
from service.testing import decode_processes

MIB = 1024 * 1024
SPEC = PreprocessSpec(size_px=24, resize_px=32)
SETTINGS = DecoderSettings(ImageLimits(), SPEC, timeout_s=20.0, memory_bytes=512 * MIB)
GOOD = encoded(synthetic_image(1))


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def coroutine() -> None:
        await work()

    asyncio.run(asyncio.wait_for(coroutine(), 60))


Workers = Callable[[], frozenset[int]]


@pytest.fixture
def workers() -> Workers:
    """Process ids of the workers that the test itself has started; other tests of this process may have theirs."""
    others = decode_processes(os.getpid())
    return lambda: decode_processes(os.getpid()) - others


def proc(pid: int, name: str) -> bytes:
    return Path(f"/proc/{pid}/{name}").read_bytes()


def rss_bytes(pid: int) -> int:
    return int(proc(pid, "statm").split()[1]) * resource.getpagesize()


def test_a_worker_imports_neither_torch_nor_the_service() -> None:
    code = "import sys, service.decode_worker; print(sorted(m for m in sys.modules if m.split('.')[0] in %r))"
    heavy = ("torch", "torchvision", "fastapi", "pydantic", "faiss", "service")
    result = subprocess.run([sys.executable, "-c", code % (heavy,)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['service', 'service.decode_worker']"


@pytest.mark.parametrize(
    "data",
    [
        GOOD,
        encoded(synthetic_image(2), "JPEG"),
        encoded(synthetic_image(3).convert("RGBA").rotate(30)),
        encoded(synthetic_image(4), "WEBP", save_all=True, append_images=[synthetic_image(5)], lossless=True),
    ],
    ids=["png", "jpeg", "transparent", "animated"],
)
def test_frames_are_those_of_the_library(data: bytes) -> None:
    async def work() -> None:
        async with DecoderPool(SETTINGS, workers=1) as pool:
            prepared = await pool.prepare(data)
        expected = decode(data)
        assert prepared.pixels.dtype == np.uint8
        assert np.array_equal(prepared.pixels, np.stack([SPEC.apply(frame.image) for frame in expected.frames]))
        assert [(f.index, f.background) for f in prepared.frames] == [(f.index, f.background) for f in expected.frames]
        assert (prepared.format, prepared.width_px, prepared.height_px, prepared.frames_in_file) == (
            expected.format,
            expected.width_px,
            expected.height_px,
            expected.frames_in_file,
        )

    run(work)


def test_image_errors_come_through_with_their_data(workers: Workers) -> None:
    settings = replace(SETTINGS, limits=ImageLimits(max_bytes=5000, max_pixels=10_000))

    async def work() -> None:
        async with DecoderPool(settings, workers=1) as pool:
            before = workers()
            with pytest.raises(UnsupportedFormat) as unsupported:
                await pool.prepare(b"hello")
            assert isinstance(unsupported.value.accepted, tuple)
            assert "PNG" in unsupported.value.accepted
            with pytest.raises(CorruptImage, match="PNG"):
                await pool.prepare(GOOD[:80])
            with pytest.raises(ImageTooLarge) as too_large:
                await pool.prepare(encoded(Image.new("1", (200, 51))))
            assert (too_large.value.quantity, too_large.value.limit, too_large.value.actual) == (
                "pixels",
                10_000,
                10_200,
            )
            with pytest.raises(ImageTooLarge, match="bytes"):
                await pool.prepare(bytes(6000))
            assert (await pool.prepare(GOOD)).format == "PNG"
            assert workers() == before

    run(work)


def test_a_decoder_that_hangs_is_ended_in_time_and_replaced(workers: Workers) -> None:
    async def work() -> None:
        async with DecoderPool(replace(SETTINGS, timeout_s=0.5), workers=1) as pool:
            [pid] = workers()
            os.kill(pid, signal.SIGSTOP)
            started = time.perf_counter()
            with pytest.raises(DecodeLimitExceeded) as caught:
                await pool.prepare(GOOD)
            assert time.perf_counter() - started < 2.0
            assert (caught.value.quantity, caught.value.limit) == ("seconds", 0.5)
            assert (await pool.prepare(GOOD)).format == "PNG"
            assert workers()
            assert pid not in workers()

    run(work)


@pytest.mark.parametrize("sent", [signal.SIGSEGV, signal.SIGKILL])
def test_a_decoder_that_dies_is_an_error_of_its_image_and_is_replaced(sent: signal.Signals, workers: Workers) -> None:
    async def work() -> None:
        async with DecoderPool(SETTINGS, workers=1) as pool:
            [pid] = workers()
            os.kill(pid, signal.SIGSTOP)
            task = asyncio.create_task(pool.prepare(GOOD))
            await asyncio.sleep(0.05)
            os.kill(pid, sent)
            with suppress(ProcessLookupError):  # SIGKILL does not wait for it
                os.kill(pid, signal.SIGCONT)
            with pytest.raises(DecoderCrashed) as caught:
                await task
            assert caught.value.exit_code == -sent
            assert (await pool.prepare(GOOD)).format == "PNG"

    run(work)


def test_memory_is_limited_and_comes_back(workers: Workers) -> None:
    async def work() -> None:
        async with DecoderPool(replace(SETTINGS, memory_bytes=96 * MIB), workers=1) as pool:
            await pool.prepare(GOOD)
            with pytest.raises(DecodeLimitExceeded) as caught:
                await pool.prepare(encoded(Image.new("RGB", (7000, 7000))))
            assert (caught.value.quantity, caught.value.limit) == ("bytes of memory", 96 * MIB)
            assert (await pool.prepare(GOOD)).format == "PNG"
            [pid] = workers()
            assert rss_bytes(pid) < 100 * MIB

    run(work)


def test_a_worker_is_replaced_after_its_share_of_images(workers: Workers) -> None:
    async def work() -> None:
        async with DecoderPool(SETTINGS, workers=1, images_per_worker=3) as pool:
            [first] = workers()
            for _ in range(3):
                await pool.prepare(GOOD)
            await pool.prepare(GOOD)
            [second] = workers()
            assert first != second

    run(work)


def test_a_worker_that_ended_while_idle_is_no_fault_of_the_next_image(workers: Workers) -> None:
    async def work() -> None:
        async with DecoderPool(SETTINGS, workers=2) as pool:
            before = workers()
            for pid in before:
                os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.5)
            assert (await pool.prepare(GOOD)).format == "PNG"
            assert not before & workers()

    run(work)


def test_a_caller_who_hangs_up_costs_no_worker(workers: Workers) -> None:
    async def work() -> None:
        async with DecoderPool(SETTINGS, workers=1) as pool:
            before = workers()
            for _ in range(5):
                task = asyncio.create_task(pool.prepare(encoded(synthetic_image(1, size_px=(2000, 2000)))))
                await asyncio.sleep(0.01)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert (await pool.prepare(GOOD)).format == "PNG"
            assert workers() == before

    run(work)


def test_many_at_a_time_share_the_workers(workers: Workers) -> None:
    async def work() -> None:
        async with DecoderPool(SETTINGS, workers=2) as pool:
            images = [encoded(synthetic_image(seed)) for seed in range(30)]
            prepared = await asyncio.gather(*(pool.prepare(data) for data in images))
            for data, found in zip(images, prepared, strict=True):
                assert np.array_equal(found.pixels[0], SPEC.apply(decode(data).frames[0].image))
            assert len(workers()) == 2

    run(work)


def test_workers_are_confined(monkeypatch: pytest.MonkeyPatch, workers: Workers) -> None:
    monkeypatch.setenv("A_SECRET", "hunter2")

    async def work() -> None:
        async with DecoderPool(SETTINGS, workers=1) as pool:
            [pid] = workers()
            limits = proc(pid, "limits").decode().splitlines()
            soft = {line[:25].strip(): line[25:].split()[0] for line in limits}
            assert soft["Max core file size"] == "0"
            assert soft["Max file size"] == "0"
            assert soft["Max address space"] != "unlimited"
            assert b"hunter2" not in proc(pid, "environ")
            await pool.prepare(GOOD)

    run(work)


def test_no_worker_stays_behind(workers: Workers) -> None:
    async def work() -> None:
        async with DecoderPool(SETTINGS, workers=2) as pool:
            await pool.prepare(GOOD)
            assert len(workers()) == 2
        assert workers() == set()

    run(work)


def test_a_worker_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")

    async def work() -> None:
        with pytest.raises(DecoderUnavailable, match="exit code 1"):
            async with DecoderPool(SETTINGS, workers=1):
                pass

    run(work)


def test_a_pool_needs_a_worker() -> None:
    with pytest.raises(ValueError, match="workers"):
        DecoderPool(SETTINGS, workers=0)
