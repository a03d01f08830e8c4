"""Probing: which cosine tells versions of one image from other images, and what the detector makes of both.

    python benchmarks/probing.py --json probing.json

From one run, for each encoder: cosines of altered images to their originals and of different images to their nearest
neighbour; the share of an honest caller's answers that would be coarse, with all images of an archive sent within one
window; how many queries an attacker gets before answers are coarse, with and without junk in between; and what one
observation costs. Images come from the folder that HARDLOOK_DATA names.
"""

import argparse
import io
import json
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from torch import Tensor

from offline.attacks.square import Square
from offline.data.archives import data_root, open_archive
from offline.objectives import EmbeddingShift
from offline.threat import ThreatModel
from perception import decode, encode_images, load_encoder
from perception.encoder import Encoder
from perception.preprocess import to_pixels
from service.probing import ProbingDetector

Embeddings = NDArray[np.float32]
EPS = 8 / 255
SIMILARITIES, LIMITS = (0.9, 0.95, 0.98), (10, 30, 100)
DEFAULT = (30, 0.95, 600.0)
ARCHIVES = {
    "imagenet": "bench/imagenet1k_sample_256px.zip",
    "kodak": "bench/kodak16_q95.zip",
    "caltech": "train/caltech101_128px.zip",
    "flickr": "train/flickr8k_128px_train_val.zip",
}


def pictures(name: str, limit: int) -> list[Image.Image]:
    """Up to `limit` images of an archive, spread over it."""
    with open_archive(data_root() / ARCHIVES[name]) as archive:
        files = sorted(n for n in archive.namelist() if n.endswith((".jpg", ".jpeg", ".png", ".webp")))
        chosen = files[:: max(1, len(files) // limit)][:limit]
        return [decode(archive.read(n)).frames[0].image for n in chosen]


def embed(encoder: Encoder, images: Sequence[Image.Image]) -> Embeddings:
    """(n, d) unit embeddings."""
    return encode_images(encoder, images).numpy()


def alterations(rng: np.random.Generator) -> dict[str, Callable[[Image.Image], Image.Image]]:
    """What attackers and honest senders do to one image."""

    def added(pattern: Callable[[tuple[int, ...]], NDArray[Any]]) -> Callable[[Image.Image], Image.Image]:
        def alter(image: Image.Image) -> Image.Image:
            pixels = np.asarray(image, np.float32)
            return Image.fromarray(np.clip(np.rint(pixels + 255 * EPS * pattern(pixels.shape)), 0, 255).astype("u1"))

        return alter

    def square(shape: tuple[int, ...]) -> NDArray[Any]:
        pattern, side = np.zeros(shape), min(shape[:2]) // 4
        top, left = rng.integers(0, shape[0] - side), rng.integers(0, shape[1] - side)
        pattern[top : top + side, left : left + side] = rng.choice([-1, 1], 3)
        return pattern

    return {
        "uniform noise, 8/255": added(lambda shape: rng.uniform(-1, 1, shape)),
        "sign noise, 8/255": added(lambda shape: rng.choice([-1, 1], shape)),
        "one square, 8/255": added(square),
        "stripes, 8/255": added(lambda shape: rng.choice([-1, 1], (1, shape[1], 3))),
        "JPEG 90": lambda image: saved(image, 90),
        "JPEG 50": lambda image: saved(image, 50),
        "JPEG 20": lambda image: saved(image, 20),
        "half size": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS),
        "brighter by 20 %": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
        "5 % cut off each side": lambda image: cropped(image, 0.05),
        "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    }


def saved(image: Image.Image, quality: int) -> Image.Image:
    """As it comes back from a JPEG."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return decode(file.getvalue()).frames[0].image


def cropped(image: Image.Image, share: float) -> Image.Image:
    """Without `share` of each side."""
    x, y = round(share * image.width), round(share * image.height)
    return image.crop((x, y, image.width - x, image.height - y))


def percentiles(cosines: NDArray[Any], at: Sequence[float]) -> dict[str, float]:
    """Percentiles, and the share at the default threshold."""
    found = {f"p{p:g}": round(float(np.percentile(cosines, p)), 3) for p in at}
    return {**found, "at_0.95": round(float((cosines >= 0.95).mean()), 4)}


def observe(detector: ProbingDetector, stream: Iterable[Embeddings]) -> NDArray[np.bool_]:
    """Send (d,) embeddings of files that all differ; (n,) which answers are coarse."""
    return np.array([detector.observe("a", secrets.token_bytes(32), embedding) for embedding in stream])


def honest(streams: dict[str, Embeddings]) -> dict[str, Any]:
    """Percent of coarse answers for each archive, threshold and limit."""
    return {
        name: {
            f"{similarity:g}/{limit}": round(
                100 * float(observe(ProbingDetector(limit, similarity, 600.0, lambda: 1.0), stream).mean()), 3
            )
            for similarity in SIMILARITIES
            for limit in LIMITS
        }
        for name, stream in streams.items()
    }


def meme(encoder: Encoder, image: Image.Image, others: Embeddings, rng: np.random.Generator) -> dict[str, float]:
    """One image in 300 honest versions among different ones: percent of coarse answers about each."""
    versions = [saved(cropped(image, rng.uniform(0, 0.03)), int(rng.integers(40, 96))) for _ in range(300)]
    stream = np.concatenate([embed(encoder, versions), others])
    order = rng.permutation(len(stream))
    coarse = observe(ProbingDetector(*DEFAULT), stream[order])
    of_meme = order < len(versions)
    return {
        "versions": round(100 * float(coarse[of_meme].mean()), 2),
        "others": round(100 * float(coarse[~of_meme].mean()), 3),
    }


class Recorder:
    """An encoder for attacks that keeps what was asked; images stay in the batch to the end."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.asked: list[Embeddings] = []

    def encode(self, pixels: Tensor) -> Tensor:
        """See `offline.attacks.base.Attacked`."""
        embeddings = self._encoder.encode(pixels)
        self.asked.append(embeddings.detach().numpy())
        return embeddings


def square_attack(encoder: Encoder, pixels: Tensor, queries: int) -> Iterator[Embeddings]:
    """What Square asks about each image, in order, after the image itself: (queries + 1, d)."""
    with torch.inference_mode():
        clean = encoder.encode(pixels)
        recorder = Recorder(encoder)
        generator = torch.Generator().manual_seed(0)
        threat = ThreatModel("linf", EPS)
        Square(queries=queries).attack(recorder, EmbeddingShift(clean), None, pixels, threat, generator=generator)
    for row in range(len(pixels)):
        asked = [batch[row] for batch in recorder.asked if len(batch) == len(pixels)]
        yield np.stack([clean[row].numpy(), *asked])[: queries + 1]


def boundary_attack(encoder: Encoder, pixels: Tensor, rng: np.random.Generator) -> Iterator[Embeddings]:
    """What a boundary attack asks first: twelve halvings between two images, then noise about where they meet."""
    for one, other in zip(pixels, pixels.roll(1, 0), strict=True):
        low, high, asked = 0.0, 1.0, []
        middle = float(rng.uniform(0.2, 0.8))
        for _ in range(12):
            at = (low + high) / 2
            asked.append(at * one + (1 - at) * other)
            low, high = (at, high) if at < middle else (low, at)
        noise = torch.from_numpy(rng.standard_normal((188, *one.shape)).astype(np.float32))
        around = (asked[-1] + noise * 4 / 255).clamp(0, 1)
        with torch.inference_mode():
            yield encoder.encode(torch.cat([torch.stack(asked), around])).numpy()


def caught(streams: Sequence[Embeddings], junk: Embeddings, junk_each: int) -> dict[str, float]:
    """Full answers that attacks get, with so many junk images after each query, at the defaults."""
    full, first = [], []
    for stream in streams:
        detector, at, answers = ProbingDetector(*DEFAULT), 0, []
        for query in stream:
            answers.append(bool(observe(detector, [query])[0]))
            observe(detector, junk[(at + np.arange(junk_each)) % len(junk)] if junk_each else junk[:0])
            at += junk_each
        full.append(answers.count(False))
        first.append(answers.index(True) if True in answers else len(answers))
    return {
        "queries": len(streams[0]),
        "full_before_first_coarse_median": float(np.median(first)),
        "full_before_first_coarse_max": float(max(first)),
        "full_in_all_median": float(np.median(full)),
        "full_in_all_max": float(max(full)),
    }


def cost() -> dict[str, float]:
    """Microseconds an observation at d = 640 with all slots taken: images that are near none, and near one."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((2000, 640)).astype(np.float32)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    figures = {}
    for name, stream in (("different", images), ("alike", np.repeat(images[:1], len(images), axis=0))):
        detector, times = ProbingDetector(*DEFAULT), []
        observe(detector, images[:256])
        for image in stream:
            sha = secrets.token_bytes(32)
            began = time.perf_counter()
            detector.observe("a", sha, image)
            times.append(1e6 * (time.perf_counter() - began))
        figures[name] = round(float(np.median(times)), 1)
    return figures


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one encoder."""
    rng = np.random.default_rng(0)
    encoder = load_encoder(name)
    images = {archive: pictures(archive, options.images) for archive in ARCHIVES}
    streams = {archive: embed(encoder, found) for archive, found in images.items()}
    probed = [*images["imagenet"][:184], *images["kodak"]]
    originals = embed(encoder, probed)
    near = {
        label: percentiles((embed(encoder, [alter(i) for i in probed]) * originals).sum(axis=1), (1, 5, 50))
        for label, alter in alterations(rng).items()
    }
    different = {}
    for archive, stream in streams.items():
        cosines = stream @ stream.T
        np.fill_diagonal(cosines, -1)
        different[archive] = {"images": len(stream), **percentiles(cosines.max(axis=1), (50, 90, 99, 100))}
    pixels = to_pixels([encoder.preprocess.apply(i) for i in images["imagenet"][:: len(images["imagenet"]) // 16][:16]])
    junk = np.concatenate([streams["flickr"], streams["imagenet"]])
    squares = list(square_attack(encoder, pixels, options.queries))
    boundaries = list(boundary_attack(encoder, pixels, rng))
    to_clean = np.concatenate([s[1:] @ s[0] for s in squares])
    return {
        "near_duplicates": near,
        "nearest_other_image": different,
        "honest_coarse_percent": honest(streams),
        "meme_coarse_percent": meme(encoder, images["kodak"][0], streams["flickr"], rng),
        "square_queries_to_clean_image": percentiles(to_clean, (1, 5, 50, 95)),
        "attacks": {
            **{f"square, {junk_each} junk": caught(squares, junk, junk_each) for junk_each in (0, 10, 100)},
            "boundary, 0 junk": caught(boundaries, junk, 0),
        },
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="what tells probing from honest traffic")
    parser.add_argument("--encoder", nargs="+", default=["bundled/fare4", "bundled/clean"])
    parser.add_argument("--images", type=int, default=4000, help="the most of an archive")
    parser.add_argument("--queries", type=int, default=500, help="of Square for each of 16 images")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # thousands of detectors that say what they found
    figures = {"observation_us": cost(), **{name: measure(name, options) for name in options.encoder}}
    text = json.dumps(figures, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
