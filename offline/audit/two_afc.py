"""Two-alternative forced choice on NIGHTS and BAPPS, with the reference perturbed (methods 5.3, 6.1 and 6.2).

Encoders whose authors compare images by a distance, not by the cosine, are `offline.audit.two_afc_distance`'s matter.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor

from offline.audit.embeddings import BATCH, batches, encode_stream, require_finite
from offline.audit.plan import AuditPlan, ImagesPlan
from offline.audit.record import Judgement
from offline.audit.task import Item, Task
from offline.audit.two_afc_distance import SIDES, CandidatePairs, DistanceTwoAfcTask, DistanceView
from offline.benchmarks.two_afc import choose_by_embedding
from offline.criteria import Criterion, TwoAfcWrong
from offline.data.files import read_image_file
from offline.data.two_afc import Triplet, read_triplets
from offline.errors import DataError, PlanError
from offline.objectives import Objective, TwoAfcCrossEntropy
from perception.certificates import FeatureBound, published_two_afc_radii, two_afc_radii
from perception.encoder import Encoder
from perception.encoders.tower import TowerEncoder
from perception.preprocess import PreprocessSpec
from perception.similarity import cosine_similarity

_Preprocess = Callable[[Image], NDArray[np.uint8]]


class TwoAfcTask:
    """See `offline.audit.task.Task`; the attacker of a reference wants the other candidate chosen."""

    def __init__(
        self,
        items: Sequence[Item],
        left: Tensor,
        right: Tensor,
        identity: Mapping[str, str],
        undecided: Sequence[bool] | None = None,
    ) -> None:
        """Hold the triplets.

        Args:
            items: the references, labelled 'left' or 'right'.
            left, right: (n, d) unit embeddings of the candidates.
            identity: see `Task.identity`.
            undecided: for each item, whether exactly half of the raters prefer either candidate; by default nowhere.
        """
        self.items, self.identity = items, identity
        self._undecided = undecided if undecided is not None else [False] * len(items)
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

    def certified(self, rows: Tensor, features: Tensor, bound: FeatureBound) -> list[dict[str, float] | None]:
        """See `offline.certify.CertifiedTask`; the forms are those of methods 8.1, and undecided triplets are left out.

        NIGHTS has none, and neither has BAPPS' validation set of five raters each.
        """
        left, right, _ = self._of(rows, features.device)
        reference, x, y = (each.detach().cpu().numpy() for each in (features, left, right))
        tighter, published = (form(reference, x, y, bound) for form in (two_afc_radii, published_two_afc_radii))
        return [
            None if self._undecided[row] else {"tighter": float(tighter[i]), "published": float(published[i])}
            for i, row in enumerate(rows.tolist())
        ]

    def _of(self, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Left and right embeddings and the labels of some items."""
        rows = rows.to(self._left.device)
        return self._left[rows].to(device), self._right[rows].to(device), self._labels[rows].to(device)


def open_two_afc(plan: AuditPlan, encoder: Encoder, data: Path) -> Task:
    """Read the triplets and encode their candidates; holds the references' pixels, 150 kB each at 224 px.

    The sets of the items are the splits of NIGHTS and BAPPS, under the name of the plan's set where it has one.

    Args:
        plan: each of its queries is of the kind 'nights' or 'bapps', and has one path.
        encoder: of the system, as `compared` gives it.
        data: folder that relative paths start from.

    Raises:
        DataMissing, DataError: the data is not there, or has another layout.
        PlanError: the plan has no queries, or asks for what this task does not have.
        NonFiniteEmbedding: a candidate has no embedding.
    """
    if not plan.queries:
        raise PlanError("two-afc needs [[queries]] of the kind 'nights' or 'bapps'")
    sets = []
    for images in plan.queries:
        triplets = read_triplets(images.kind, _folder(images, data), images.limit, plan.seed)
        sets.append(TripletSet(images.kind, triplets, images.name))
    return task_of_triplets(sets, encoder)


@dataclass(frozen=True)
class TripletSet:
    """Triplets of one data set.

    Attributes:
        kind: 'nights' or 'bapps', which decides on the preprocessing.
        triplets: of any splits.
        name: put before the splits' names; may be empty.
    """

    kind: str
    triplets: Sequence[Triplet]
    name: str = ""


def task_of_triplets(sets: Sequence[TripletSet], encoder: Encoder) -> Task:
    """The task of triplets that have been chosen; see `open_two_afc`.

    Raises:
        DataError: an image cannot be read, or two triplets of a set have the same id.
        PlanError: the encoder compares by distance, and is not as `compared` gives it.
        NonFiniteEmbedding: a candidate has no embedding.
    """
    if getattr(encoder, "metric", "cosine") == "l2" and not isinstance(encoder, DistanceView):
        raise PlanError(f"{encoder.name} compares by distance: 2AFC takes it as `compared` gives it")
    items: list[Item] = []
    candidates: CandidatePairs | _Embedded
    candidates = CandidatePairs(encoder) if isinstance(encoder, DistanceView) else _Embedded(encoder)
    digest = hashlib.sha256()
    for of_set in sets:
        preprocess = _preprocess(of_set.kind, encoder.preprocess)
        for batch in batches(of_set.triplets, BATCH):
            left, right = (
                [preprocess(read_image_file(path)) for path in paths]
                for paths in ([t.left for t in batch], [t.right for t in batch])
            )
            hashes = candidates.add(left, right)
            items += [_item(triplet, of_set.name, preprocess) for triplet in batch]
            digest.update(json.dumps([*hashes, *((t.set, t.id, t.prefers_right) for t in batch)]).encode())
    if len({(item.set, item.id) for item in items}) < len(items):
        raise DataError("two-afc", "two triplets of a set have the same id")
    identity = {"triplets_sha256": digest.hexdigest()}
    if isinstance(candidates, CandidatePairs):
        return DistanceTwoAfcTask(items, candidates, identity)
    undecided = [triplet.judge == 0.5 for of_set in sets for triplet in of_set.triplets]
    return TwoAfcTask(items, *candidates.sides, identity, undecided)


def compared(encoder: Encoder) -> Encoder:
    """An encoder as 2AFC compares with it: itself, or for those that compare by distance a view of it."""
    if getattr(encoder, "metric", "cosine") == "l2":
        return DistanceView(cast(TowerEncoder, encoder))
    return encoder


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


class _Embedded:
    """The candidates' embeddings."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._left: list[Tensor] = []
        self._right: list[Tensor] = []

    def add(self, left: Sequence[NDArray[np.uint8]], right: Sequence[NDArray[np.uint8]]) -> tuple[str, str]:
        """Take in a batch of pairs; returns the hashes of their pixels."""
        of_left, left_hash = encode_stream(self._encoder, left)
        of_right, right_hash = encode_stream(self._encoder, right)
        # BAPPS has triplets of two equal candidates: they must tie, whatever a batch does to the last bit.
        same = torch.tensor([np.array_equal(a, b) for a, b in zip(left, right, strict=True)], device=of_left.device)
        self._left.append(of_left)
        self._right.append(torch.where(same[:, None], of_left, of_right))
        return left_hash, right_hash

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        """(n, d) of all left and all right candidates."""
        return torch.cat(self._left), torch.cat(self._right)
