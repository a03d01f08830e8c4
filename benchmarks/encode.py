"""Encoding: what the encoder's checks and preprocessing cost on top of the bare network.

    python benchmarks/encode.py --encoder bundled/clean --json encode.json

Prints, from one run, ours / bare as a ratio of milliseconds an image: `encode` (normalisation, network, unit norm,
finiteness check) and `files` (decoding and resizing included) against the network alone on ready tensors.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from perception import encode_images, load_encoder
from perception.testing import encoded, synthetic_image


def milliseconds(work: Callable[[], object], images: int, repeats: int) -> float:
    """Median milliseconds an image over `repeats` runs, after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - began) / images)
    return statistics.median(times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", default="bundled/clean")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    encoder = load_encoder(options.encoder, precision=options.precision)
    size = encoder.preprocess.size_px
    pixels = torch.rand(options.batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    ready = pixels.to(dtype).contiguous(memory_format=torch.channels_last)
    files = [encoded(synthetic_image(i, (640, 480)), "JPEG") for i in range(options.batch)]
    with torch.inference_mode():
        bare = milliseconds(lambda: encoder.visual(ready), options.batch, options.repeats)
        ours = milliseconds(lambda: encoder.encode(pixels), options.batch, options.repeats)
        whole = milliseconds(lambda: encode_images(encoder, files, options.batch), options.batch, options.repeats)
    figures = {
        "encoder": options.encoder,
        "precision": options.precision,
        "batch": options.batch,
        "threads": torch.get_num_threads(),
        "bare_ms": round(bare, 3),
        "encode_ms": round(ours, 3),
        "encode_over_bare": round(ours / bare, 3),
        "files_ms": round(whole, 3),
        "files_over_bare": round(whole / bare, 3),
    }
    print("\n".join(f"{name:18} {value}" for name, value in figures.items()))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
