"""Candidates and images for tests of shadows."""

import asyncio
import hashlib
import os
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from indexer.catalog.state import Stamp, State
from indexer.contents import POOLS, Contents, Exemplar
from indexer.live.view import View
from indexer.snapshot import Snapshot
from perception.encoder import encode_images
from perception.image import ImageLimits
from perception.preprocess import PreprocessSpec
from perception.testing import ToyEncoder
from perception.verdict import DecisionPolicy, Neighbor, Verdict, VerdictLabel
from service.decoding import DecoderSettings
from service.shadow import Opinion
from tests.indexer.live_states import NOW

LONG_S = 30.0
SERVING = ToyEncoder()
DECODING = DecoderSettings(ImageLimits(), SERVING.preprocess, timeout_s=20.0, memory_bytes=512 * 1024 * 1024)
POLICY = DecisionPolicy()
SAFE, UNSAFE, REVIEW = VerdictLabel.SAFE, VerdictLabel.UNSAFE, VerdictLabel.REVIEW
NO_PIXELS: list[NDArray[np.uint8]] = []


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def coroutine() -> None:
        await work()

    asyncio.run(asyncio.wait_for(coroutine(), LONG_S))


async def eventually(condition: Callable[[], bool]) -> None:
    for _ in range(4000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("the condition did not come true")


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


HASH = sha256_of(b"")


class Counts:
    """What the metrics were told."""

    def __init__(self) -> None:
        self.by: Counter[tuple[str, str]] = Counter()

    def __call__(self, candidate: str, outcome: str) -> None:
        self.by[candidate, outcome] += 1

    def of(self, outcome: str) -> int:
        return sum(n for (_, found), n in self.by.items() if found == outcome)

    @property
    def total(self) -> int:
        return sum(self.by.values())


class Fixed:
    """Says what it is told to, once the gate is open; notes where it was asked."""

    name, fingerprint = "fixed", "f" * 64

    def __init__(self, label: VerdictLabel = SAFE, preprocess: PreprocessSpec | None = None) -> None:
        self.label, self.preprocess = label, preprocess
        self.entered, self.gate = threading.Event(), threading.Event()
        self.gate.set()
        self.failure: Exception | None = None
        self.shown: list[tuple[NDArray[np.float32], Sequence[NDArray[np.uint8]]]] = []
        self.threads: set[int] = set()
        self.niceness: set[int] = set()

    def judge(self, embeddings: NDArray[np.float32], pixels: Sequence[NDArray[np.uint8]]) -> Opinion:
        self.entered.set()
        assert self.gate.wait(LONG_S)
        self.threads.add(threading.get_ident())
        self.niceness.add(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        self.shown.append((embeddings, pixels))
        if self.failure is not None:
            raise self.failure
        return Opinion(Verdict(self.label, None, None, (), "", ""), embeddings[0])


def embedding_of(image: Image.Image, encoder: ToyEncoder = SERVING) -> NDArray[np.float32]:
    return np.asarray(encode_images(encoder, [image]).numpy()[0], np.float32)


def contents(encoder: ToyEncoder, images: dict[str, list[Image.Image]]) -> Contents:
    exemplars = [Exemplar(f"{pool}-{i}", pool) for pool, group in images.items() for i in range(len(group))]
    embeddings = encode_images(encoder, [image for group in images.values() for image in group]).numpy()
    return Contents.arrange(POOLS, encoder.name, encoder.fingerprint, exemplars, embeddings)


def view(images: dict[str, list[Image.Image]], encoder: ToyEncoder = SERVING) -> View:
    base = Snapshot.of(contents(encoder, images))
    return View(State(POOLS, base=base.version), base, {}, NOW, Stamp(encoder.name, encoder.fingerprint, encoder.dim))


def verdict_of(images: dict[str, list[Image.Image]], encoder: ToyEncoder, image: Image.Image) -> VerdictLabel:
    """The naive twin: similarities to all exemplars, without index, engine or threads."""
    held = contents(encoder, images)
    similarities = held.embeddings @ embedding_of(image, encoder)
    return POLICY.decide(
        Neighbor(e.id, e.label, float(s)) for e, s in zip(held.exemplars, similarities, strict=True)
    ).label


# --- what it says ----------------------------------------------------------------------------------------------------
