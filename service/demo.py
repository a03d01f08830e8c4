"""`hardlook-demo`: the whole path on real images, over real HTTP, without a model hub.

Publishes the bundled demo pools, starts the service with the small bundled encoder (an explicit choice, named in what
it prints), sends it photographs and the benign test hits in many guises, and prints what came back. Knows the service
by its HTTP interface alone.
"""

import argparse
import base64
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module, resources
from pathlib import Path
from typing import Any

import httpx
from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Table

from indexer.contents import POOLS
from indexer.staging import read_details, stage_gallery
from indexer.store import SnapshotStore
from perception import Gallery
from perception.encoder import open_image
from perception.testing import benign_hits, encoded

ENCODER = "bundled/fare4"
START_TIMEOUT_S = 120.0
VERDICT_OF_POOL = {"unsafe": "unsafe", "buffer": "review"}
# Public photographs inside Python packages: (package, folder, files).
PHOTOS = (
    ("skimage", "data", ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg")),
    ("sklearn", "datasets/images", ("china.jpg", "flower.jpg")),
)
TEXTS = ("a photo of a butterfly", "a sports car", "a grand piano")


@dataclass(frozen=True)
class Sample:
    """One file to send: what it is, in which guise, its bytes, and the verdict that must come back, if any must."""

    name: str
    guise: str
    file: bytes
    expected: str | None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo; exit code 1 when a test hit or a bad file was not answered as it must be."""
    parser = argparse.ArgumentParser(prog="hardlook-demo", description="Classify and search real images over HTTP.")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="only publish the demo pools there, then stop")
    options = parser.parse_args(arguments)
    if options.prepare is not None:
        print(f"published the demo pools {publish_pools(options.prepare)} in {options.prepare}")
        return
    with tempfile.TemporaryDirectory(prefix="hardlook-demo-") as folder, serving(Path(folder)) as client:
        failures = classify_all(client) + refuse_bad(client)
        search(client)
        failures += correct(client)
    print(f"\ndemo: {'everything was answered as it must be' if not failures else f'{failures} WRONG answers'}")
    sys.exit(1 if failures else 0)


def publish_pools(root: Path) -> str:
    """Publish the demo pools of the bundled encoder below `root` and return their version."""
    folder = Path(str(resources.files("indexer"))) / "demo" / ENCODER.removeprefix("bundled/")
    contents = stage_gallery(
        Gallery.load(folder / "pools.safetensors"),
        collection=POOLS,
        encoder_name=ENCODER,
        details=read_details(folder / "exemplars.jsonl"),
    )
    return SnapshotStore(root, POOLS).publish(contents)


@contextmanager
def serving(root: Path) -> Iterator[httpx.Client]:
    """A service with the demo pools on a free loopback port, as a process of its own."""
    print(f"published the demo pools, version {publish_pools(root)}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"ENCODER": ENCODER, "POOLS": str(root), "PORT": str(port), "LOG_LEVEL": "WARNING", "DEVICE": "cpu"}
    settings["ANONYMOUS_SCOPES"] = "admin"  # for as long as this program runs, to whoever is on this machine
    inherited = {k: v for k, v in os.environ.items() if not k.upper().startswith("HARDLOOK_")}
    environment = inherited | {f"HARDLOOK_{k}": v for k, v in settings.items()}
    process = subprocess.Popen([sys.executable, "-c", "from service.cli import main; main()"], env=environment)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            began = time.monotonic()
            wait_until_ready(client, process)
            print(f"the service was ready after {time.monotonic() - began:.1f} s; encoder {ENCODER}, chosen explicitly")
            yield client
    finally:
        process.terminate()
        process.wait(30)


def wait_until_ready(client: httpx.Client, process: "subprocess.Popen[bytes]") -> None:
    """Ask /readyz until it says yes; ends the program when the service does not come up."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            sys.exit(f"demo: the service ended with exit code {process.returncode}")
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    sys.exit(f"demo: the service was not ready after {START_TIMEOUT_S:.0f} s")


def photographs() -> Iterator[tuple[str, bytes]]:
    """The public photographs, as files."""
    for package, folder, names in PHOTOS:
        root = Path(str(import_module(package).__file__)).parent / folder
        for name in names:
            yield f"{package}/{name}", (root / name).read_bytes()


def guises(image: Image.Image) -> Iterator[tuple[str, bytes]]:
    """Re-encoded and resized variants of an image, as people make them."""
    width, height = image.size
    yield "JPEG quality 40", encoded(image, "JPEG", quality=40)
    yield "WebP quality 60", encoded(image, "WEBP", quality=60)
    yield "half size PNG", encoded(image.resize((width // 2, height // 2), Image.Resampling.BICUBIC))
    yield "double size JPEG", encoded(image.resize((width * 2, height * 2), Image.Resampling.BICUBIC), "JPEG")
    yield "grey 8-bit PNG", encoded(image.convert("L"))


def samples() -> Iterator[Sample]:
    """Everything that is sent to /classify."""
    hits = benign_hits()
    for hit in hits:
        name, verdict = hit.id.removeprefix("benign_hits/"), VERDICT_OF_POOL[str(hit.pool)]
        yield Sample(name, "as shipped", hit.file, verdict)
        for guise, file in guises(open_image(hit.file)):
            # Without its colours a drawn hit is another picture: shown, not promised.
            yield Sample(name, guise, file, None if guise.startswith("grey") else verdict)
    photos = list(photographs())
    for name, file in photos:
        yield Sample(name, "as published", file, None)
    cat = open_image(dict(photos)["skimage/chelsea.png"])
    for guise, file in guises(cat):
        yield Sample("skimage/chelsea.png", guise, file, None)
    unsafe = open_image(next(h.file for h in hits if h.pool == "unsafe")).resize(cat.size)
    # Neighbouring frames differ: encoders merge equal ones, and the third must stay the third.
    animation = [cat, ImageOps.mirror(cat), unsafe, cat]
    file = encoded(animation[0], "WEBP", save_all=True, append_images=animation[1:], duration=100)
    yield Sample("cat, third frame a test hit", "animated WebP", file, "unsafe")


def classify_all(client: httpx.Client) -> int:
    """Classify every sample, print a table, and return how many answers were not what they must be."""
    table = Table(
        "image", "sent as", "verdict", "margin", "nearest exemplar (pool, similarity)", "ms", title="POST /classify"
    )
    failures, photos_safe, photos = 0, 0, 0
    answer: dict[str, Any] = {}
    for sample in samples():
        began = time.perf_counter()
        response = client.post("/classify", content=sample.file, headers={"content-type": "application/octet-stream"})
        took_ms = 1000 * (time.perf_counter() - began)
        response.raise_for_status()
        answer = response.json()
        result = answer["results"][0]
        nearest, verdict = result["neighbors"][0], result["verdict"]
        wrong = sample.expected is not None and verdict != sample.expected
        failures += wrong
        if sample.expected is None and "/" in sample.name:
            photos, photos_safe = photos + 1, photos_safe + (verdict == "safe")
        frame = result["frame"]
        where = f" in frame {frame['index']}" if frame["index"] else ""
        table.add_row(
            sample.name,
            sample.guise,
            f"{verdict}{where}" + (f"  WRONG, must be {sample.expected}" if wrong else ""),
            f"{result['margin']:.3f}",
            f"{nearest['id']} ({nearest['pool']}, {nearest['similarity']:.3f})",
            f"{took_ms:.0f}",
        )
    Console(width=150).print(table)
    model, snapshot, policy = answer["model"], answer["snapshot"], answer["policy"]
    print(
        f"model {model['name']} ({model['fingerprint'][:16]}), pools {snapshot['version']}, policy {policy['version']}"
    )
    print(f"{photos_safe} of {photos} photographs and their variants were found safe")
    if photos_safe < photos:
        print("  (every one of them is safe: encoder and pools are small; one more exemplar in the safe pool mends it)")
    return failures


def refuse_bad(client: httpx.Client) -> int:
    """Send files that must be refused, print the problems, and return how many were not refused with a typed 4xx."""
    whole = next(photographs())[1]
    bad = {
        "half of a PNG": whole[: len(whole) // 2],
        "a text file": b"this is not an image",
        "a header of 30,000 x 30,000 pixels": struct.pack("<2sIIIIiiHH24x", b"BM", 0, 0, 54, 40, 30_000, 30_000, 1, 24),
    }
    table = Table("file", "status", "problem", "detail", title="files that cannot be judged are never safe")
    failures = 0
    for name, file in bad.items():
        response = client.post("/classify", content=file, headers={"content-type": "application/octet-stream"})
        problem = response.json()
        failures += not (400 <= response.status_code < 500 and "type" in problem)
        table.add_row(name, str(response.status_code), problem["title"], problem["detail"][:90])
    Console(width=150).print(table)
    return failures


def search(client: httpx.Client) -> None:
    """Ask /similar by text and by image, and print what came back."""
    table = Table("query", "nearest in the safe pool (class, similarity)", title="POST /similar")
    queries: list[tuple[str, dict[str, Any]]] = [(f"text: {text}", {"text": text}) for text in TEXTS]
    for name, file in photographs():
        if name.endswith(("chelsea.png", "flower.jpg")):
            queries.append((f"image: {name}", {"images": [{"data": base64.b64encode(file).decode()}]}))
    for shown, body in queries:
        response = client.post("/similar", json={**body, "pool": "safe", "k": 4})
        response.raise_for_status()
        found = response.json()["results"][0]["neighbors"]
        named = [f"{n['metadata'].get('class') or n['id'].split('/')[0]} {n['similarity']:.2f}" for n in found]
        table.add_row(shown, ", ".join(named))
    Console(width=150).print(table)


def correct(client: httpx.Client) -> int:
    """Call a photograph unsafe, see that the next answer does, and take it back; how many steps went wrong."""

    def judged(file: bytes) -> dict[str, Any]:
        response = client.post("/classify", content=file, headers={"content-type": "application/octet-stream"})
        response.raise_for_status()
        answer: dict[str, Any] = response.json()
        return answer

    answers = ((name, file, judged(file)) for name, file in photographs())
    name, file, before = next(found for found in answers if found[2]["results"][0]["verdict"] == "safe")
    began = time.perf_counter()
    item = {"id": "demo/correction", "label": "unsafe", "data": base64.b64encode(file).decode()}
    added = client.post("/collections/pools/exemplars", json={"items": [item], "reason": "shown in the demo"})
    added.raise_for_status()
    during = judged(file)
    took_ms = 1000 * (time.perf_counter() - began)
    back = {"version": before["snapshot"]["version"], "reason": "it was only shown"}
    client.post("/collections/pools/rollback", json=back).raise_for_status()
    after = judged(file)
    log = client.get("/audit").json()["entries"]
    sound = client.post("/audit/verify").json()["sound"]
    table = Table("what", "verdict", "pools", title=f"a correction, and back: {name}")
    for what, answer in (("before", before), ("added to the unsafe pool", during), ("rolled back", after)):
        table.add_row(what, answer["results"][0]["verdict"], answer["snapshot"]["version"])
    Console(width=150).print(table)
    print(f"the addition counted {took_ms:.0f} ms after it was asked for; the audit log has {len(log)} changes,")
    print(
        f"the last: {', '.join(entry['kind'] for entry in log[-3:])}; {'it is sound' if sound else 'it is NOT sound'}"
    )
    right = (
        during["results"][0]["verdict"] == "unsafe",
        before["results"] == after["results"],
        before["snapshot"]["version"] == after["snapshot"]["version"],
        sound,
    )
    return right.count(False)


if __name__ == "__main__":
    main()
