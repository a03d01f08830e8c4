"""Replicas: devices, threads, and encoders that are tried out."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import service.replicas
from perception.errors import NonFiniteEmbedding
from perception.testing import ToyEncoder
from service.errors import SettingsError
from service.replicas import devices, serve_on, text_tower, try_out, warm_up_queries
from service.settings import Settings
from tests.lipschitz_toy import IsometricEncoder


def no_cuda(monkeypatch: pytest.MonkeyPatch, count: int = 0) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("count", "device", "replicas", "expected"),
    [
        (0, "auto", 1, ["cpu"]),
        (2, "auto", 1, ["cuda"]),
        (2, "cuda:1", 2, ["cuda:1", "cuda:1"]),
        (2, "cuda:0,cuda:1", 1, ["cuda:0", "cuda:1"]),
        (0, "cpu", 3, ["cpu"] * 3),
    ],
)
def test_devices(monkeypatch: pytest.MonkeyPatch, count: int, device: str, replicas: int, expected: list[str]) -> None:
    no_cuda(monkeypatch, count)
    assert list(devices(Settings(device=device, replicas=replicas))) == expected


@pytest.mark.parametrize(("count", "device"), [(0, "cuda"), (0, "cpu,cuda:0"), (1, "cuda:1")])
def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, count: int, device: str) -> None:
    no_cuda(monkeypatch, count)
    with pytest.raises(SettingsError, match="HARDLOOK_DEVICE"):
        devices(Settings(device=device))


def test_an_encoder_is_loaded_once_for_each_device() -> None:
    loaded: list[str] = []

    def load(device: str) -> ToyEncoder:
        loaded.append(device)
        return ToyEncoder()

    served = serve_on(("cpu", "cpu", "cpu:0"), load, Settings())
    assert loaded == ["cpu", "cpu:0"]
    assert served[0] is served[1]
    assert served[0].encoder is not served[2].encoder


@pytest.mark.parametrize(("one", "many", "expected"), [(0.1, 0.09, 1), (0.1, 0.05, 2), (0.1, 0.2, 1)])
def test_more_threads_are_used_where_they_pay(
    monkeypatch: pytest.MonkeyPatch, one: float, many: float, expected: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: times.update(now=one if threads == 1 else many))
    times: dict[str, float] = {}
    monkeypatch.setattr(service.replicas, "_seconds", lambda engine, encoder, batch: batch * times["now"])
    served = try_out(ToyEncoder(), None, Settings(), replicas=1)
    assert served.threads == expected
    assert served.seconds_per_image == pytest.approx(min(one, many) if expected == 2 else one)


def test_threads_that_are_named_are_used_in_the_replicas_own_thread() -> None:
    before = torch.get_num_threads()
    served = try_out(ToyEncoder(), None, Settings(threads=1), replicas=1)
    assert torch.get_num_threads() == before
    replica = served.replica()
    seen: list[int] = []

    def run() -> None:
        assert replica.prepare is not None
        replica.prepare()
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [1]


def test_replicas_answer_and_check_themselves() -> None:
    encoder = ToyEncoder()
    replica = try_out(encoder, None, Settings(threads=1), replicas=1).replica()
    [sighting] = replica.run(warm_up_queries(encoder, None))
    assert sighting.embedding.shape == (encoder.dim,)
    assert [stage for stage, *_ in sighting.timings] == ["encode", "search"]
    assert all(began <= ended for _, began, ended in sighting.timings)
    assert replica.check is not None
    replica.check()


class Blind(ToyEncoder):
    def encode(self, pixels: Tensor) -> Tensor:
        return torch.full((len(pixels), self.dim), float("nan"))


def test_an_encoder_that_does_not_work_is_found_out() -> None:
    with pytest.raises(NonFiniteEmbedding):
        try_out(Blind(), None, Settings(), replicas=1)


def test_text_towers() -> None:
    class WithText(ToyEncoder):
        @property
        def text(self) -> Any:
            return "a tower"

    assert text_tower(ToyEncoder()) is None
    assert text_tower(WithText()) == "a tower"  # type: ignore[comparison-overlap]
    assert [type(query.subject).__name__ for query in warm_up_queries(ToyEncoder(), None)] == ["ndarray"]


@pytest.mark.parametrize(
    ("place", "proven", "kept"), [("cuda:0", True, False), ("cuda:0", False, True), ("cpu", True, True)]
)
def test_an_encoder_with_a_proven_constant_has_no_tf32(
    monkeypatch: pytest.MonkeyPatch, place: str, proven: bool, kept: bool
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    serve_on((place,), lambda device: IsometricEncoder() if proven else ToyEncoder(), Settings())
    assert torch.backends.cudnn.allow_tf32 is kept
