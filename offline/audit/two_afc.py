"""Two-alternative forced choice on NIGHTS and BAPPS, with the reference perturbed (methods 5.3, 6.1 and 6.2)."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor

from offline.audit.embeddings import BATCH, batches, encode_stream, require_finite
from offline.audit.plan import AuditPlan, ImagesPlan
from offline.audit.record import Judgement
from offline.audit.task import Item
from offline.benchmarks.two_afc import choose_by_embedding
from offline.criteria import Criterion, TwoAfcWrong
from offline.data.files import read_image_file
from offline.data.two_afc import Triplet, read_triplets
from offline.errors import DataError, PlanError
from offline.objectives import Objective, TwoAfcCrossEntropy
from perception.encoder import Encoder
from perception.preprocess import PreprocessSpec
from perception.similarity import cosine_similarity

SIDES = ("left", "right")

_Preprocess = Callable[[Image], NDArray[np.uint8]]


class TwoAfcTask:
    """See `offline.audit.task.Task`; the attacker of a reference wants the other candidate chosen."""

    def __init__(self, items: Sequence[Item], left: Tensor, right: Tensor, identity: Mapping[str, str]) -> None:
        """Hold the triplets.

        Args:
            items: the references, labelled 'left' or 'right'.
            left, right: (n, d) unit embeddings of the candidates.
            identity: see `Task.identity`.
        """
        self.items, self.identity = items, identity
        self._left, self._right = left, right
        self._labels = torch.tensor([SIDES.index(item.label) for item in items], device=left.device)

    def judge(self, rows: Tensor, embeddings: Tensor) -> list[Judgement]:
        """See `Task.judge`; the margin is the left candidate's similarity minus the right one's."""
        embeddings = embeddings.detach()
        require_finite(embeddings)
        left, right, labels = self._of(rows, embeddings.device)
        chosen = choose_by_embedding(embeddings, left, right).long()
        margins = cosine_similarity(embeddings, left) - cosine_similarity(embeddings, right)
        correct = chosen == labels
        return [
            Judgement(SIDES[side], good, {"margin": margin})
            for side, good, margin in zip(chosen.tolist(), correct.tolist(), margins.tolist(), strict=True)
        ]

    def severity(self, row: int, judgement: Judgement) -> float:
        """See `Task.severity`: 1 for the wrong choice."""
        return float(self.at_goal(row, judgement))

    def at_goal(self, row: int, judgement: Judgement) -> bool:
        """See `Task.at_goal`."""
        return judgement.answer != self.items[row].label

    def criterion(self, rows: Tensor) -> Criterion:
        """See `Task.criterion`."""
        return TwoAfcWrong(*self._of(rows, self._left.device))

    def objective(self, attack: str, rows: Tensor, clean: Tensor) -> Objective:
        """See `Task.objective`.

        Raises:
            PlanError: there is no such attack.
        """
        if attack not in ("two-afc", "square"):
            raise PlanError(f"two-afc knows the attack two-afc, got {attack!r}")
        return TwoAfcCrossEntropy(*self._of(rows, clean.device))

    def _of(self, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Left and right embeddings and the labels of some items."""
        rows = rows.to(self._left.device)
        return self._left[rows].to(device), self._right[rows].to(device), self._labels[rows].to(device)


def open_two_afc(plan: AuditPlan, encoder: Encoder, data: Path) -> TwoAfcTask:
    """Read the triplets and encode their candidates; holds the references' pixels, 150 kB each at 224 px.

    The sets of the items are the splits of NIGHTS and BAPPS, under the name of the plan's set where it has one.

    Args:
        plan: each of its queries is of the kind 'nights' or 'bapps', and has one path.
        encoder: of the system.
        data: folder that relative paths start from.

    Raises:
        DataMissing, DataError: the data is not there, or has another layout.
        PlanError: the plan has no queries, or asks for what this task does not have.
        NonFiniteEmbedding: a candidate has no embedding.
    """
    if not plan.queries:
        raise PlanError("two-afc needs [[queries]] of the kind 'nights' or 'bapps'")
    items: list[Item] = []
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    digest = hashlib.sha256()
    for images in plan.queries:
        triplets = read_triplets(images.kind, _folder(images, data), images.limit, plan.seed)
        preprocess = _preprocess(images.kind, encoder.preprocess)
        for batch in batches(triplets, BATCH):
            left, right, hashes = _candidates(encoder, batch, preprocess)
            sides[0].append(left)
            sides[1].append(right)
            items += [_item(triplet, images.name, preprocess) for triplet in batch]
            digest.update(json.dumps([*hashes, *((t.set, t.id, t.prefers_right) for t in batch)]).encode())
    if len({(item.set, item.id) for item in items}) < len(items):
        raise DataError("two-afc", "two triplets of a set have the same id")
    return TwoAfcTask(items, torch.cat(sides[0]), torch.cat(sides[1]), {"triplets_sha256": digest.hexdigest()})


def _folder(images: ImagesPlan, data: Path) -> Path:
    if len(images.paths) != 1 or images.where or images.class_names or images.label:
        raise PlanError(f"a set of kind {images.kind!r} takes one path, and no where, class_names or label")
    return data / images.paths[0]


def _preprocess(kind: str, spec: PreprocessSpec) -> _Preprocess:
    """How a data set's images become pixels: the encoder's way, but for BAPPS as the paper does for every encoder.

    BAPPS (methods 1.3): the square images of 64 px straight to the encoder's size, bilinear, without a crop.
    """
    if kind != "bapps":
        return spec.apply
    enlarge = replace(spec, resize_px=spec.size_px, resize_mode="shortest", interpolation="bilinear")

    def apply(image: Image) -> NDArray[np.uint8]:
        if image.width != image.height:
            raise DataError("BAPPS", f"images must be square, got one of {image.width} x {image.height} px")
        return enlarge.apply(image)

    return apply


def _item(triplet: Triplet, name: str, preprocess: _Preprocess) -> Item:
    set_name = f"{name}/{triplet.set}" if name else triplet.set
    pixels = preprocess(read_image_file(triplet.reference))
    return Item(set_name, triplet.id, SIDES[triplet.prefers_right], pixels)


def _candidates(
    encoder: Encoder, triplets: Sequence[Triplet], preprocess: _Preprocess
) -> tuple[Tensor, Tensor, tuple[str, str]]:
    """Embeddings of the left and the right candidates, and the hashes of their pixels."""
    left = [preprocess(read_image_file(triplet.left)) for triplet in triplets]
    right = [preprocess(read_image_file(triplet.right)) for triplet in triplets]
    of_left, left_hash = encode_stream(encoder, left)
    of_right, right_hash = encode_stream(encoder, right)
    # BAPPS has triplets of two equal candidates: they must tie, whatever a batch does to the last bit.
    same = torch.tensor([np.array_equal(a, b) for a, b in zip(left, right, strict=True)], device=of_left.device)
    return of_left, torch.where(same[:, None], of_left, of_right), (left_hash, right_hash)
