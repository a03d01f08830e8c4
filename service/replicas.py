"""Replicas: copies of the encoder on their devices, tried out, each with the threads that serve it best.

Owns the reading of HARDLOOK_DEVICE and the choice of intra-operation threads. Knows no batching and no HTTP.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from indexer.contents import Contents
from indexer.snapshot import Snapshot
from perception.errors import CheckpointError
from service.batching import Replica
from service.engine import Engine, Query, Search, ServingEncoder, Sighting, TextTower
from service.errors import SettingsError
from service.graph import as_graph
from service.settings import Settings
from service.telemetry import Metrics

_log = logging.getLogger("hardlook.replicas")
# More threads of one operation must pay: they also take the cores from decoding and from answering.
_WORTH_IT = 1.5
_PROBE_BATCH = 4
_GRAPH_BATCH = 8
_PROBE_REPEATS = 3
_PROBE_LONG_S = 0.5


@dataclass(frozen=True)
class Served:
    """An encoder on one device.

    Attributes:
        encoder: of images.
        text: its text tower, None where it has none.
        threads: of one operation on a CPU; None where the device is no CPU.
        seconds_per_image: in a batch, as tried out.
    """

    encoder: ServingEncoder
    text: TextTower | None
    threads: int | None
    seconds_per_image: float

    def replica(self, metrics: Metrics | None = None) -> Replica[Query, Sighting]:
        """As the batcher runs it."""
        engine = Engine(self.encoder, self.text, metrics)
        queries = warm_up_queries(self.encoder, self.text)

        def prepare() -> None:
            if self.threads is not None:
                torch.set_num_threads(self.threads)  # of the thread that calls it
            for query in queries:
                engine.answer([query])

        return Replica(engine.answer, check=lambda: engine.answer(queries[:1]), prepare=prepare)


def devices(settings: Settings) -> tuple[str, ...]:
    """The torch devices that the settings name, each as often as it has replicas.

    Raises:
        SettingsError: CUDA is asked for and there is none, or not that device.
    """
    if settings.device == "auto":
        names = ["cuda" if torch.cuda.is_available() else "cpu"]
    else:
        names = [name.strip() for name in settings.device.split(",")]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for name in names:
        if name != "cpu" and int(name.partition(":")[2] or 0) >= count:
            raise SettingsError(f"HARDLOOK_DEVICE: no device {name!r} here; CUDA devices: {count}")
    return tuple(name for name in names for _ in range(settings.replicas))


def text_tower(encoder: ServingEncoder) -> TextTower | None:
    """The text tower of an encoder; None where it has none."""
    try:
        found: TextTower | None = getattr(encoder, "text", None)
    except CheckpointError as error:
        _log.warning("no search by text: %s", error)
        return None
    return found


def try_out(encoder: ServingEncoder, text: TextTower | None, settings: Settings, replicas: int) -> Served:
    """Answer a query of each kind, find the best number of threads, and measure the pace.

    Raises:
        NonFiniteEmbedding: it does not work.
    """
    engine = Engine(encoder, text)
    for query in warm_up_queries(encoder, text):
        engine.answer([query])
    device = getattr(encoder, "device", torch.device("cpu"))
    if torch.device(device).type != "cpu":
        return Served(encoder, text, None, _seconds(engine, encoder, settings.max_batch) / settings.max_batch)
    before = torch.get_num_threads()
    try:
        return _on_cpu(engine, encoder, text, settings, max(1, before // replicas))
    finally:
        torch.set_num_threads(before)


def _on_cpu(engine: Engine, encoder: ServingEncoder, text: TextTower | None, settings: Settings, most: int) -> Served:
    batch = min(_PROBE_BATCH, settings.max_batch)

    def tried(threads: int) -> tuple[float, float]:
        torch.set_num_threads(threads)
        return _seconds(engine, encoder, 1), _seconds(engine, encoder, batch)

    if settings.threads:
        return Served(encoder, text, settings.threads, tried(settings.threads)[1] / batch)
    one = tried(1)
    many = tried(most) if most > 1 else one
    gain = min(one[0] / many[0], one[1] / many[1])
    threads, chosen = (most, many) if gain >= _WORTH_IT else (1, one)
    _log.info("%d of %d threads for one operation: %d threads are %.2f times as fast as one", threads, most, most, gain)
    return Served(encoder, text, threads, chosen[1] / batch)


def _seconds(engine: Engine, encoder: ServingEncoder, batch: int) -> float:
    """The least of a few runs; of one where it takes long."""
    queries = warm_up_queries(encoder, None) * batch
    least = float("inf")
    for _ in range(_PROBE_REPEATS):
        started_s = time.perf_counter()
        engine.answer(queries)
        least = min(least, time.perf_counter() - started_s)
        if least > _PROBE_LONG_S:
            break
    return least


def warm_up_queries(encoder: ServingEncoder, text: TextTower | None) -> list[Query]:
    """One query of each kind, known to be good."""
    size_px = encoder.preprocess.size_px
    empty = Contents("warmup", encoder.name, encoder.fingerprint, (), np.zeros((0, encoder.dim), np.float32))
    search = Search(Snapshot.of(empty), k=1)
    # Noise: a plain image may have no embedding in a tiny encoder.
    pixels = np.random.default_rng(0).integers(0, 256, (3, size_px, size_px), dtype=np.uint8)
    return [Query(pixels, search)] + ([Query("a photo", search)] if text is not None else [])


def serve_on(places: Sequence[str], load: Callable[[str], ServingEncoder], settings: Settings) -> tuple[Served, ...]:
    """One Served for each place: those on one device share their weights, which nothing writes to.

    Args:
        places: devices, as `devices` names them.
        load: the encoder, on a device.
        settings: of the service.

    Raises:
        Exception: those of `load` and `try_out`.
    """
    by_device: dict[str, Served] = {}
    for place in places:
        if place not in by_device:
            loaded = load(place)
            _keep_float32(loaded, place)
            encoder = as_graph(loaded, (1, 3, min(_GRAPH_BATCH, settings.max_batch)))
            by_device[place] = try_out(encoder, text_tower(encoder), settings, places.count(place))
    return tuple(by_device[place] for place in places)


def _keep_float32(encoder: ServingEncoder, place: str) -> None:
    """Turn off TF32 where a Lipschitz constant is proven: its three decimals are too few for a certificate.

    That is a setting of the whole process, of which this encoder is what runs on its GPUs.
    """
    if not place.startswith("cpu") and getattr(encoder, "lipschitz", None) is not None:
        torch.backends.cudnn.allow_tf32 = False
