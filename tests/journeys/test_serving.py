"""From a folder of images to answers over a real socket, through new versions, bad callers and the end."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from indexer.build import build
from indexer.sources import FolderSource
from indexer.store import SnapshotStore
from perception.testing import ToyEncoder, encoded, synthetic_image
from service.testing import publish, toy_pools
from tests.journeys.servers import Server, running, running_here

ENCODER = ToyEncoder()
DATA = encoded(synthetic_image(1))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    publish(root, ENCODER, toy_pools())
    return root


@pytest.fixture(scope="module")
def server(published: Path) -> Iterator[Server]:
    """With small limits, so that they are quickly reached."""
    with running_here(published, max_body_bytes=100_000, max_image_bytes=100_000, deadline_s=1.0) as server:
        yield server


def eventually(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.02)


def write_images(folder: Path) -> None:
    for pool, images in toy_pools().items():
        (folder / pool).mkdir(parents=True)
        for i, image in enumerate(images):
            (folder / pool / f"{i}.png").write_bytes(encoded(image))


def build_and_publish(folder: Path, root: Path, work: Path) -> str:
    report = build(ENCODER, FolderSource(folder, "pools"), collection="pools", work_dir=work)
    return SnapshotStore(root, "pools").publish(report.contents)


def verdict(server: Server, data: bytes) -> tuple[str, str]:
    answer = server.classify(data).json()
    return answer["results"][0]["verdict"], answer["snapshot"]["version"]


def test_build_serve_correct_roll_back_and_stop(tmp_path: Path) -> None:
    images, root = tmp_path / "images", tmp_path / "published"
    with running(root, tmp_path, batch_s=0.2) as server:
        assert server.process is not None
        assert server.client.get("/healthz").status_code == 200
        assert server.client.get("/readyz").status_code == 503
        assert server.classify(b"").status_code == 503

        write_images(images)
        first = build_and_publish(images, root, tmp_path / "work-1")
        eventually(lambda: server.client.get("/readyz").status_code == 200)
        for pool, expected in (("safe", "safe"), ("buffer", "review"), ("unsafe", "unsafe")):
            path = images / pool / "2.png"
            answer = server.classify(path.read_bytes()).json()
            [result] = answer["results"]
            assert (result["verdict"], answer["snapshot"]["version"]) == (expected, first)
            assert result["neighbors"][0]["id"] == f"{pool}/2.png"
            files = {"image": (path.name, path.read_bytes())}
            [found] = server.client.post("/similar", files=files, params={"k": 1}).json()["results"]
            assert found["neighbors"][0]["id"] == f"{pool}/2.png"
            assert found["neighbors"][0]["similarity"] == pytest.approx(1.0, abs=1e-5)
        [collection] = server.client.get("/pools").json()["collections"]
        assert collection["counts"] == {"safe": 3, "buffer": 3, "unsafe": 3}

        # A false positive is corrected: its exemplar moves to the safe pool, and the running service follows.
        mistaken = (images / "unsafe" / "1.png").rename(images / "safe" / "moved.png").read_bytes()
        second = build_and_publish(images, root, tmp_path / "work-2")
        eventually(lambda: verdict(server, mistaken) == ("safe", second))
        SnapshotStore(root, "pools").rollback()
        eventually(lambda: verdict(server, mistaken) == ("unsafe", first))

        # What was accepted is answered after the order to stop.
        with ThreadPoolExecutor(8) as threads:
            answers = [threads.submit(server.classify, mistaken) for _ in range(8)]
            time.sleep(0.1)
            server.process.send_signal(signal.SIGTERM)
            assert [answer.result().status_code for answer in answers] == [200] * 8
        assert server.process.wait(30) in (0, -signal.SIGTERM)
        assert server.processes() == [server.pid]


def test_many_callers_at_a_time_get_the_answers_of_one(published: Path) -> None:
    images = [encoded(synthetic_image(seed)) for seed in range(40)]
    with running_here(published, decode_workers=2) as server:
        alone = [server.classify(data).json()["results"] for data in images]
        with ThreadPoolExecutor(16) as threads:
            together = [response.json()["results"] for response in threads.map(server.classify, images * 3)]
    for [expected], [found] in zip(alone * 3, together, strict=True):
        assert found["verdict"] == expected["verdict"]
        assert [n["id"] for n in found["neighbors"]] == [n["id"] for n in expected["neighbors"]]
        for one, other in zip(found["neighbors"], expected["neighbors"], strict=True):
            assert one["similarity"] == pytest.approx(other["similarity"], abs=1e-5)


def test_decoders_that_are_killed_under_load_cost_single_images_only(published: Path) -> None:
    data = encoded(synthetic_image(5, size_px=(600, 600)))
    statuses: list[int] = []
    with running_here(published, decode_workers=2) as server:

        def ask() -> None:
            statuses.extend(server.classify(data).status_code for _ in range(20))

        callers = [threading.Thread(target=ask) for _ in range(4)]
        for caller in callers:
            caller.start()
        for _ in range(4):
            time.sleep(0.1)
            for pid in server.processes()[1:]:
                os.kill(pid, signal.SIGKILL)
        for caller in callers:
            caller.join()
        assert len(statuses) == 80
        assert set(statuses) <= {200, 422}
        assert server.classify(data).status_code == 200


def raw_request(data: bytes) -> bytes:
    head = f"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def test_callers_who_hang_up_free_their_places(published: Path) -> None:
    """The last caller would wait for forty batches, if the work of those who left were still done."""
    with running_here(published, batch_s=0.5, max_batch=1) as server:
        gone = [server.connect() for _ in range(40)]
        for connection in gone:
            connection.sendall(raw_request(DATA))
        time.sleep(0.5)
        for connection in gone:
            connection.close()
        started = time.monotonic()
        assert server.classify(DATA).status_code == 200
        assert time.monotonic() - started < 10


def answer_of(server: Server, request: bytes) -> bytes:
    answer = b""
    with server.connect() as connection:
        connection.sendall(request)
        while b"}" not in answer and (part := connection.recv(65536)):
            answer += part
    return answer


def test_a_body_that_does_not_arrive_is_not_waited_for(server: Server) -> None:
    answer = answer_of(server, raw_request(DATA)[:-10])
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"urn:hardlook:problem:body-timeout" in answer
    assert server.classify(DATA).status_code == 200


def test_chunked_bodies_are_counted(server: Server) -> None:
    head = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = answer_of(server, head + 2 * (b"%x\r\n" % 60_000 + bytes(60_000) + b"\r\n"))
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"urn:hardlook:problem:body-too-large" in answer
    assert server.classify(DATA).status_code == 200
