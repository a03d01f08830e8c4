"""Serving: what HTTP costs on top of decoding, preprocessing and encoding, and what happens under too much of it.

    python benchmarks/serve.py --encoder bundled/fare4 --json serve.json
    python benchmarks/serve.py --encoder visual:convnext_base_w:FILE --seconds 60 --json serve.json
    python benchmarks/serve.py --encoder bundled/fare4 --overload-s 60

Bare: the same files decoded, preprocessed and encoded in this process, in batches, at torch's own number of threads
and at one; the faster of the two counts. Served: hardlook-serve in processes of its own on the same cores, which the
callers share too. Prints, from one run: images a second served / bare at saturation, and the milliseconds that one
idle request takes more than bare. With --overload-s also: twice the best rate offered for so long, and what is answered
of it.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from perception import decode, load_encoder
from perception.encoders.tower import TowerEncoder
from perception.memory import keep_freed_memory
from perception.preprocess import to_pixels
from perception.testing import encoded, synthetic_image
from service.testing import publish, toy_pools

_LOAD = Path(__file__).with_name("http_load.py")
_ROOT = Path(__file__).parents[1]


def write_images(folder: Path, archive: Path | None, count: int) -> list[bytes]:
    """Files to send: the first JPEGs of an archive, or synthetic ones of 640 x 480."""
    if archive is None:
        files = [encoded(synthetic_image(i, (640, 480)), "JPEG") for i in range(count)]
    else:
        with zipfile.ZipFile(archive) as opened:
            names = [name for name in opened.namelist() if name.endswith(".jpg")][:count]
            files = [opened.read(name) for name in names]
    folder.mkdir()
    for number, data in enumerate(files):
        (folder / f"{number:05}").write_bytes(data)
    return files


def bare(encoder: TowerEncoder, files: list[bytes], batch: int) -> dict[str, float]:
    """Images a second in batches, and milliseconds for one alone; each at the better number of threads."""

    def prepared(data: bytes) -> Any:
        return encoder.preprocess.apply(decode(data).frames[0].image)

    rates, singles = [], []
    own = torch.get_num_threads()
    with torch.inference_mode():
        for threads in sorted({1, own}):
            torch.set_num_threads(threads)
            encoder.encode(to_pixels([prepared(data) for data in files[:batch]]))
            began = time.perf_counter()
            for start in range(0, len(files), batch):
                encoder.encode(to_pixels([prepared(data) for data in files[start : start + batch]]))
            rates.append(len(files) / (time.perf_counter() - began))
            times = []
            for data in files[:20]:
                began = time.perf_counter()
                encoder.encode(to_pixels([prepared(data)]))
                times.append(1000 * (time.perf_counter() - began))
            singles.append(statistics.median(times))
    torch.set_num_threads(own)
    return {"per_s": max(rates), "one_ms": min(singles)}


@contextmanager
def serving(encoder: str, pools: Path, log: Path, **settings: object) -> Iterator[int]:
    """hardlook-serve on a free port, which is yielded once it is ready."""
    given = {"encoder": encoder, "pools": pools, "port": 0, **settings}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HARDLOOK_")}
    environment |= {f"HARDLOOK_{name.upper()}": str(value) for name, value in given.items()}
    environment["PYTHONPATH"] = str(_ROOT)
    with log.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, "-c", "from service.cli import main; main([])"], env=environment, stderr=sink
        )
    try:
        while not (found := re.search(r"running on http://127\.0\.0\.1:(\d+)", log.read_text())):
            if process.poll() is not None:
                raise SystemExit(f"the service ended: {log.read_text()}")
            time.sleep(0.1)
        port = int(found[1])
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None:
                    raise SystemExit(f"the service ended: {log.read_text()}") from None
                time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()


def load(port: int, folder: Path, *arguments: object) -> dict[str, Any]:
    """What http_load.py measured, in a process of its own."""
    command = [sys.executable, str(_LOAD), str(port), str(folder), *map(str, arguments)]
    found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures of one run."""
    encoder = load_encoder(options.encoder)
    files = write_images(folder / "images", options.images, options.count)
    publish(folder / "pools", encoder, toy_pools())
    changes = dict(pair.split("=", 1) for pair in options.set)
    rounds = []
    with serving(options.encoder, folder / "pools", folder / "log", max_batch=options.batch, **changes) as port:
        load(port, folder / "images", "--connections", 2, "--seconds", options.seconds / 4)  # not counted
        for _ in range(options.rounds):  # side by side, since the speed of a machine changes
            alone = bare(encoder, files, options.batch)
            idle = load(port, folder / "images", "--connections", 1, "--seconds", options.seconds)
            rates = {}
            for connections in options.connections:
                found = load(port, folder / "images", "--connections", connections, "--seconds", options.seconds)
                rates[connections] = found["good_per_s"]
            rounds.append(
                {
                    "bare_per_s": round(alone["per_s"], 2),
                    "served_per_s": rates,
                    "served_over_bare": round(max(rates.values()) / alone["per_s"], 3),
                    "bare_one_ms": round(alone["one_ms"], 2),
                    "idle_p50_ms": idle["statuses"]["200"]["p50_ms"],
                    "idle_more_ms": round(idle["statuses"]["200"]["p50_ms"] - alone["one_ms"], 2),
                }
            )
        figures: dict[str, Any] = {
            "encoder": options.encoder,
            "batch": options.batch,
            "settings": changes,
            "rounds": rounds,
            "served_over_bare": statistics.median(found["served_over_bare"] for found in rounds),
            "idle_more_ms": statistics.median(found["idle_more_ms"] for found in rounds),
        }
        if options.overload_s:
            # The best number of connections, by the median of its rounds: the highest of many short runs is luck.
            best = max(
                statistics.median(found["served_per_s"][connections] for found in rounds)
                for connections in options.connections
            )
            found = load(port, folder / "images", "--rate", 2 * best, "--seconds", options.overload_s)
            figures["overload"] = {"offered_per_s": round(2 * best, 1), **found}
            figures["overload_over_best"] = round(found["good_per_s"] / best, 3)
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", default="bundled/fare4")
    parser.add_argument("--images", type=Path, help="zip of JPEGs; synthetic ones where absent")
    parser.add_argument("--count", type=int, default=128, help="images that are sent in turn")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--connections", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--seconds", type=float, default=10.0, help="for each number of connections")
    parser.add_argument("--rounds", type=int, default=3, help="the median of which is printed")
    parser.add_argument("--overload-s", type=float, default=0.0)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings, such as replicas=2")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    keep_freed_memory()  # as the service does
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(options, Path(folder))
    print(json.dumps(figures, indent=2))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
