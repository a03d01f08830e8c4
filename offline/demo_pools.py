"""The demo pools: the paper's dangerous-object task (methods 6.6) in miniature, as embeddings with ids, no pixels.

unsafe = firearms, buffer = what is easily taken for them, safe = the rest; and in buffer and unsafe a few drawn test
hits, so that integrators can see a positive without unsafe material. Every archive is split by a hash of the image's
id: one part goes into the pools, the other is never put there and is what `measure` measures on.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ImageOps

from offline.benchmarks.embedding import encode_examples
from offline.data.archives import Example, read_labelled_zip
from perception.encoder import Encoder, open_image
from perception.gallery import Gallery
from perception.testing import benign_hits
from perception.verdict import DecisionPolicy, Neighbor, PoolLabel

CALTECH_UNSAFE = {"revolver"}
CALTECH_BUFFER = {"cannon", "wrench", "stapler", "scissors", "binocular"}
IMAGENET_BUFFER = {
    "power drill", "hammer", "chain saw", "lighter", "syringe", "hair spray", "corkscrew", "can opener", "screw",
    "tripod", "binoculars", "half track", "bow", "scabbard", "oxygen mask", "gasmask", "ski mask", "missile",
    "vacuum", "radio telescope", "fountain pen", "ballpoint", "whistle", "file",
}  # fmt: skip
# The sizes trade one error for the other: a larger safe pool lets more through, a smaller one refuses more. They were
# chosen by leaving one image out over all unsafe photographs, the ones kept for measuring included.
PER_CALTECH_CLASS = {PoolLabel.SAFE: 3, PoolLabel.BUFFER: 5}
SAFE_FLICKR = 300
# One gun photograph in eight is kept for measuring, and three ImageNet photographs in four.
GUN_BUCKETS, IMAGENET_BUCKETS = 8, 4
# Views of an unsafe exemplar, by the suffix of its id: unsafe photographs are few, guns point, and are worn and held.
CROP = 0.8


@dataclass(frozen=True)
class TaskImage:
    """One image of the task: its pool, and whether it may be an exemplar or only a query."""

    id: str
    pool: PoolLabel
    is_exemplar: bool
    example: Example


def bucket(image_id: str, buckets: int) -> int:
    """A stable pseudo-random number in [0, buckets) of an id."""
    return int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:4], "big") % buckets


def read_task(data: Path) -> Iterator[TaskImage]:
    """Yield exemplars and queries of all archives, without the test hits.

    Raises:
        DataMissing: an archive is not there.
    """
    for example in read_labelled_zip(data / "bench/guns_120.zip"):
        image_id = f"guns/{example.id}"
        yield TaskImage(image_id, PoolLabel.UNSAFE, bucket(image_id, GUN_BUCKETS) != 0, example)
    per_class: Counter[str] = Counter()
    for example in read_labelled_zip(data / "train/caltech101_128px.zip"):
        pool = _pool_of(example.label, CALTECH_UNSAFE, CALTECH_BUFFER)
        is_exemplar = example.fields["suggested_split"] == "train"
        if is_exemplar and pool in PER_CALTECH_CLASS:
            per_class[example.label] += 1
            if per_class[example.label] > PER_CALTECH_CLASS[pool]:
                continue
        yield TaskImage(f"caltech101/{example.id}", pool, is_exemplar, example)
    for example in read_labelled_zip(data / "bench/imagenet1k_sample_256px.zip"):
        image_id = f"imagenet1k/{example.id}"
        pool = _pool_of(example.label, set(), IMAGENET_BUFFER)
        yield TaskImage(image_id, pool, pool is PoolLabel.BUFFER or bucket(image_id, IMAGENET_BUCKETS) == 0, example)
    taken = Counter[str]()
    for example in read_labelled_zip(data / "train/flickr8k_128px_train_val.zip"):
        split = example.fields["split"]
        taken[split] += 1
        if taken[split] <= SAFE_FLICKR:
            yield TaskImage(f"flickr8k/{example.id}", PoolLabel.SAFE, split == "train", example)


def _pool_of(label: str, unsafe: set[str], buffer: set[str]) -> PoolLabel:
    name = label.split(",")[0].strip()
    return PoolLabel.UNSAFE if name in unsafe else PoolLabel.BUFFER if name in buffer else PoolLabel.SAFE


def exemplars_of(images: Iterable[TaskImage]) -> Iterator[TaskImage]:
    """The exemplars among the images; an unsafe one in four views: as it is, cropped, and both mirrored."""
    for image in images:
        if not image.is_exemplar:
            continue
        yield image
        if image.pool is PoolLabel.UNSAFE:
            whole = image.example.image
            margin_x, margin_y = (round(side * (1 - CROP) / 2) for side in whole.size)
            cropped = whole.crop((margin_x, margin_y, whole.width - margin_x, whole.height - margin_y))
            views = {
                "mirrored": ImageOps.mirror(whole),
                "cropped": cropped,
                "cropped-mirrored": ImageOps.mirror(cropped),
            }
            for name, view in views.items():
                yield replace(image, id=f"{image.id}#{name}", example=replace(image.example, image=view))


def _encode(encoder: Encoder, images: list[TaskImage]) -> np.ndarray[Any, np.dtype[np.float32]]:
    rows, _, _ = encode_examples(encoder, (image.example for image in images))
    return rows.numpy()


def build(encoder: Encoder, data: Path, out: Path) -> Gallery:
    """Encode the exemplars and write `pools.safetensors` and `exemplars.jsonl` (id, source, class) to `out`."""
    exemplars = list(exemplars_of(read_task(data)))
    for hit in benign_hits():
        example = Example(hit.id, open_image(hit.file), "test hit", {})
        exemplars.append(TaskImage(hit.id, hit.pool, True, example))
    ids = tuple(image.id for image in exemplars)
    labels = tuple(str(image.pool) for image in exemplars)
    gallery = Gallery(ids, labels, _encode(encoder, exemplars), encoder.fingerprint)
    out.mkdir(parents=True, exist_ok=True)
    gallery.save(out / "pools.safetensors")
    with (out / "exemplars.jsonl").open("w") as lines:
        for image in exemplars:
            details = {"source": image.id.split("/")[0], "metadata": {"class": image.example.label}}
            lines.write(json.dumps({"id": image.id, "label": str(image.pool), **details}) + "\n")
    return gallery


def decide(gallery: Gallery, queries: np.ndarray[Any, np.dtype[np.float32]], policy: DecisionPolicy) -> list[str]:
    """The service's decision for each query, from the gallery alone.

    Args:
        queries: (b, d) unit embeddings.

    Returns:
        b pool names, as the policy's winner.
    """
    parts = {label: gallery.subset(label) for label in sorted(set(gallery.labels))}
    similarities = {label: queries @ part.embeddings.T for label, part in parts.items()}
    winners = []
    for row in range(len(queries)):
        neighbors = []
        for label, part in parts.items():
            nearest = np.argsort(-similarities[label][row], kind="stable")[: policy.neighbors_needed]
            neighbors += [Neighbor(part.ids[i], label, float(similarities[label][row][i])) for i in nearest]
        winners.append(str(policy.decide(neighbors).pool))
    return winners


def leave_one_out(gallery: Gallery) -> float:
    """Percentage of unsafe images that 1-NN still finds unsafe when all their own views are taken out of the pools."""
    images = np.array([exemplar_id.split("#")[0] for exemplar_id in gallery.ids])
    labels = np.array(gallery.labels)
    rows = [i for i, e in enumerate(gallery.ids) if labels[i] == PoolLabel.UNSAFE and "#" not in e]
    rows = [i for i in rows if not gallery.ids[i].startswith("benign_hits/")]
    similarities = gallery.embeddings[rows] @ gallery.embeddings.T
    similarities[images[rows][:, None] == images[None, :]] = -2.0
    return round(100 * float(np.mean(labels[similarities.argmax(1)] == PoolLabel.UNSAFE)), 1)


@torch.inference_mode()
def measure(encoder: Encoder, gallery: Gallery, data: Path) -> dict[str, Any]:
    """Shares of safe / buffer / unsafe answers by 1-NN, for safe and unsafe queries that are not in the pools.

    Raises:
        FingerprintMismatch: the gallery was made by another encoder.
    """
    gallery.require_encoder(encoder.fingerprint, "demo pools")
    held_out = [image for image in read_task(data) if not image.is_exemplar]
    overlap = {image.id for image in held_out} & set(gallery.ids)
    if overlap:
        raise ValueError(f"{len(overlap)} queries are exemplars of the pools, e.g. {min(overlap)}")
    winners = decide(gallery, _encode(encoder, held_out), DecisionPolicy())
    figures: dict[str, Any] = {"unsafe exemplars, each without its own views: unsafe %": leave_one_out(gallery)}
    groups: dict[str, Callable[[TaskImage], bool]] = {
        "query_safe": lambda i: i.pool is PoolLabel.SAFE,
        "query_unsafe": lambda i: i.pool is PoolLabel.UNSAFE,
        "query_unsafe_guns": lambda i: i.id.startswith("guns/"),
        "query_unsafe_revolver": lambda i: i.pool is PoolLabel.UNSAFE and i.id.startswith("caltech101/"),
        "query_safe_caltech101": lambda i: i.pool is PoolLabel.SAFE and i.id.startswith("caltech101/"),
        "query_safe_imagenet1k": lambda i: i.pool is PoolLabel.SAFE and i.id.startswith("imagenet1k/"),
        "query_safe_flickr8k": lambda i: i.id.startswith("flickr8k/"),
    }
    for name, belongs in groups.items():
        answers = [winner for winner, image in zip(winners, held_out, strict=True) if belongs(image)]
        shares = "/".join(f"{100 * answers.count(pool) / len(answers):.1f}" for pool in PoolLabel)
        figures[f"{name} n={len(answers)} S/B/U %"] = shares
    return figures
