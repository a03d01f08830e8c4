"""What an encoder's clean embeddings are worth: four figures and its speed.

| metric | task | data |
| --- | --- | --- |
| caltech101_1nn | nearest neighbour, `bench` queries in the `train` gallery | Caltech-101 |
| grocery_loo_1nn | nearest neighbour among all other natural photos | Grocery Store |
| tiny_imagenet_zero_shot | class names as text, one template | Tiny-ImageNet val |
| flickr8k_text_to_image_r10 | 5 captions an image, right image among the first 10 | Flickr8k, first 1,000 of val |
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offline.data.archives import Example, read_labelled_zip, read_mosaic_zip
from perception.encoder import Encoder
from perception.preprocess import to_pixels
from perception.text import TextEncoder, class_embeddings

BATCH = 64
ZERO_SHOT_TEMPLATE = "a photo of a {}"
FLICKR_IMAGES = 1000


@torch.inference_mode()
def encode_examples(encoder: Encoder, examples: Iterable[Example]) -> tuple[Tensor, list[Example], float]:
    """Encode a stream of examples.

    Returns:
        (n, d) unit embeddings, the examples in the same order, and the seconds spent inside the encoder.
    """
    rows: list[Tensor] = []
    kept: list[Example] = []
    batch: list[NDArray[np.uint8]] = []
    spent = 0.0

    def flush() -> None:
        nonlocal spent
        pixels = to_pixels(batch)
        began = time.perf_counter()
        rows.append(encoder.encode(pixels).cpu())
        spent += time.perf_counter() - began
        batch.clear()

    for example in examples:
        batch.append(encoder.preprocess.apply(example.image))
        kept.append(example)
        if len(batch) == BATCH:
            flush()
    if batch:
        flush()
    return torch.cat(rows), kept, spent


def nearest_neighbor_accuracy(
    queries: Tensor,
    query_labels: Sequence[str],
    gallery: Tensor,
    gallery_labels: Sequence[str],
    *,
    exclude_self: bool = False,
) -> float:
    """Share of queries whose most similar gallery item carries their label.

    Args:
        queries: (b, d) unit embeddings.
        gallery: (n, d) unit embeddings; with `exclude_self` it is `queries`, and row i never answers query i.
    """
    similarities = queries @ gallery.T
    if exclude_self:
        similarities.fill_diagonal_(-2.0)
    nearest = similarities.argmax(dim=1).tolist()
    right: int = sum(gallery_labels[j] == label for j, label in zip(nearest, query_labels, strict=True))
    return right / len(query_labels)


def recall_at(k: int, queries: Tensor, gallery: Tensor, target: Tensor) -> float:
    """Share of queries whose target is among the k most similar gallery rows.

    Args:
        queries: (b, d); gallery: (n, d); target: (b,) int64 rows of the gallery.
    """
    similarities = queries @ gallery.T
    of_target = similarities.gather(1, target[:, None])
    ranks = (similarities > of_target).sum(1)
    return float(ranks.lt(k).float().mean())


class EmbeddingBenchmark:
    """Runs the four tasks on archives under `data`."""

    def __init__(self, data: Path) -> None:
        self.data = data

    def run(self, encoder: Encoder, text: TextEncoder) -> Iterator[tuple[str, float]]:
        """Yield `(metric, value)` as each task ends; the last is `encode_ms`, per image in batches of 64.

        Raises:
            DataMissing: an archive is not there.
        """
        spent, images = 0.0, 0
        for name, task in (("caltech101_1nn", self._caltech), ("grocery_loo_1nn", self._grocery)):
            value, seconds, count = task(encoder)
            spent, images = spent + seconds, images + count
            yield name, value
        for name, text_task in (("tiny_imagenet_zero_shot", self._tiny), ("flickr8k_text_to_image_r10", self._flickr)):
            value, seconds, count = text_task(encoder, text)
            spent, images = spent + seconds, images + count
            yield name, value
        yield "encode_ms", 1000 * spent / images

    def _caltech(self, encoder: Encoder) -> tuple[float, float, int]:
        rows, examples, spent = encode_examples(encoder, read_labelled_zip(self.data / "train/caltech101_128px.zip"))
        is_bench = torch.tensor([e.fields["suggested_split"] == "bench" for e in examples])
        labels = [e.label for e in examples]
        bench = [label for label, b in zip(labels, is_bench.tolist(), strict=True) if b]
        train = [label for label, b in zip(labels, is_bench.tolist(), strict=True) if not b]
        return nearest_neighbor_accuracy(rows[is_bench], bench, rows[~is_bench], train), spent, len(rows)

    def _grocery(self, encoder: Encoder) -> tuple[float, float, int]:
        natural = (e for e in read_labelled_zip(self.data / "bench/grocery_128px.zip") if e.fields["kind"] == "natural")
        rows, examples, spent = encode_examples(encoder, natural)
        labels = [e.label for e in examples]
        return nearest_neighbor_accuracy(rows, labels, rows, labels, exclude_self=True), spent, len(rows)

    def _tiny(self, encoder: Encoder, text: TextEncoder) -> tuple[float, float, int]:
        rows, examples, spent = encode_examples(encoder, read_mosaic_zip(self.data / "bench/tiny196_64px_val.zip"))
        # Two classes may share a first lemma ("crane"): the synset is the class, its name only the prompt.
        names = {e.fields["wnid"]: e.label for e in examples}
        classes = list(names)
        weights = class_embeddings(text, list(names.values()), [ZERO_SHOT_TEMPLATE]).cpu()
        predicted = (rows @ weights.T).argmax(1).tolist()
        right = sum(classes[p] == e.fields["wnid"] for p, e in zip(predicted, examples, strict=True))
        return right / len(rows), spent, len(rows)

    def _flickr(self, encoder: Encoder, text: TextEncoder) -> tuple[float, float, int]:
        val = [
            e for e in read_labelled_zip(self.data / "train/flickr8k_128px_train_val.zip") if e.fields["split"] == "val"
        ][:FLICKR_IMAGES]
        rows, examples, spent = encode_examples(encoder, val)
        captions = [e.fields[f"caption{i}"] for e in examples for i in range(5)]
        target = torch.arange(len(examples)).repeat_interleave(5)
        with torch.inference_mode():
            queries = torch.cat([text.encode_text(captions[i : i + 256]) for i in range(0, len(captions), 256)]).cpu()
        return recall_at(10, queries, rows, target), spent, len(rows)
