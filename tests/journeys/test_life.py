"""The life of a service: starting, ready, broken, draining, ended."""

import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from PIL import Image

from perception.testing import ToyEncoder, encoded, synthetic_image
from service.testing import publish, toy_pools
from tests.journeys.servers import Server, running
from tests.journeys.toy_server import LOST

DATA = encoded(synthetic_image(1))
BREAKING = encoded(Image.new("RGB", (20, 20), LOST))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    publish(root, ToyEncoder(), toy_pools())
    return root


def states(server: Server) -> tuple[int, ...]:
    return tuple(server.client.get(path).status_code for path in ("/livez", "/startupz", "/readyz"))


def eventually(condition: Callable[[], bool], within_s: float = 30.0) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.02)


def test_it_is_alive_while_it_loads_and_then_starts(published: Path, tmp_path: Path) -> None:
    with running(published, tmp_path, load_s=2.0, wait=False) as server:
        assert states(server) == (200, 503, 503)
        refused = server.classify(DATA)
        assert refused.status_code == 503
        assert "is being loaded" in refused.json()["detail"]
        assert refused.headers["retry-after"]
        eventually(lambda: states(server) == (200, 200, 200))
        assert server.classify(DATA).status_code == 200


def test_it_can_be_stopped_while_it_loads(published: Path, tmp_path: Path) -> None:
    with running(published, tmp_path, load_s=60.0, wait=False) as server:
        assert states(server) == (200, 503, 503)
        assert server.process is not None
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) in (0, -signal.SIGTERM)


def test_what_cannot_be_loaded_ends_it_with_one_line(published: Path, tmp_path: Path) -> None:
    with running(published, tmp_path, wait=False, policy_file="absent.json") as server:
        assert server.process is not None
        assert server.process.wait(20) == 2
    lines = (tmp_path / "server.log").read_text().splitlines()
    [line] = [line for line in lines if not line.startswith("{")]
    assert line.startswith("hardlook-serve: ")
    assert "absent.json" in line


def test_an_encoder_that_is_lost_is_found_out_and_said(published: Path, tmp_path: Path) -> None:
    with running(published, tmp_path) as server:
        assert states(server) == (200, 200, 200)
        assert server.classify(BREAKING).status_code == 500
        eventually(lambda: states(server) == (503, 200, 503))
        assert server.classify(DATA).status_code == 503


def test_load_balancers_get_time_to_notice_the_end(published: Path, tmp_path: Path) -> None:
    with running(published, tmp_path, shutdown_delay_s=2.0) as server:
        assert server.process is not None
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: states(server) == (200, 200, 503))
        assert server.classify(DATA).status_code == 200
        assert server.process.wait(20) in (0, -signal.SIGTERM)


def test_a_second_signal_does_not_wait(published: Path, tmp_path: Path) -> None:
    with running(published, tmp_path, shutdown_delay_s=600) as server:
        assert server.process is not None
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: states(server) == (200, 200, 503))
        server.process.send_signal(signal.SIGTERM)
        try:
            assert server.process.wait(20) in (0, -signal.SIGTERM)
        except subprocess.TimeoutExpired:
            pytest.fail("it waits all the same")


def test_replicas_work_side_by_side(published: Path, tmp_path: Path) -> None:
    """Four batches of a second each, on four replicas."""
    with (
        running(published, tmp_path, batch_s=1.0, replicas=4, max_batch=1, decode_workers=4) as server,
        ThreadPoolExecutor(4) as threads,
    ):
        started_s = time.monotonic()
        answers = [threads.submit(server.classify, DATA) for _ in range(4)]
        assert [answer.result().status_code for answer in answers] == [200] * 4
        assert time.monotonic() - started_s < 3


@pytest.mark.slow
def test_twice_the_load_is_answered_at_the_pace_of_once_and_in_time(published: Path, tmp_path: Path) -> None:
    """Eight callers for what two could keep busy: half a second a batch of one, deadline two seconds."""
    answers: list[tuple[int, float]] = []

    def caller(server: Server) -> None:
        end = time.monotonic() + 10
        with httpx.Client(base_url=server.client.base_url, timeout=30, trust_env=False) as client:
            while time.monotonic() < end:
                began_s = time.monotonic()
                status = client.post("/classify", content=DATA).status_code
                answers.append((status, time.monotonic() - began_s))
                if status == 503:
                    time.sleep(0.1)

    with (
        running(published, tmp_path, batch_s=0.5, max_batch=1, deadline_s=2.0) as server,
        ThreadPoolExecutor(8) as threads,
    ):
        for done in [threads.submit(caller, server) for _ in range(8)]:
            done.result()
    good = [seconds for status, seconds in answers if status == 200]
    refused = [seconds for status, seconds in answers if status == 503]
    assert {status for status, _ in answers} == {200, 503}
    assert 16 <= len(good) <= 24
    assert max(good) < 2.0
    assert len(refused) > 20
    assert sorted(refused)[len(refused) // 2] < 0.2
