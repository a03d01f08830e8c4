"""Retrieval under attack: how far the ranking of a gallery can be thrown off by one perturbed query (methods 5.3, 6.4).

The attacker moves a query's embedding as far from the clean one as possible (Eq. 6) and knows no gallery. Positives are
the images of the query's class, or those of the ground truth of a revisited set.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor

from offline.audit.classes import class_of, classes_of
from offline.audit.embeddings import encode_stream, require_finite
from offline.audit.plan import AuditPlan, ImagesPlan
from offline.audit.queries import read_images
from offline.audit.record import Judgement
from offline.audit.task import Item
from offline.benchmarks.retrieval import Difficulty, GroundTruth, average_precision, rank
from offline.criteria import Criterion
from offline.data.files import inside, read_image_file, require_files
from offline.errors import DataError, DataMissing, PlanError
from offline.objectives import EmbeddingShift, Objective
from perception.encoder import Encoder
from perception.verdict import Neighbor

GALLERY = "gallery"
EncodeFiles = Callable[[Sequence[Path]], tuple[Tensor, str]]
AP, REVISITED_AP = "ap", "ap_medium"
"""The score that an attack on a query is measured by: of class-labelled sets, and of revisited ones."""


@dataclass(frozen=True)
class Wanted:
    """What one score counts.

    Attributes:
        positives: rows of the gallery that are to be found.
        junk: rows that are taken out of the ranking.
    """

    positives: frozenset[int]
    junk: Collection[int] = frozenset()


@dataclass(frozen=True)
class Question:
    """What is asked with one query.

    Attributes:
        scores: by name.
        own: rows of the gallery that show the query itself, and are no answer.
    """

    scores: Mapping[str, Wanted]
    own: frozenset[int] = frozenset()


@dataclass(frozen=True, eq=False)
class SearchedGallery:
    """What is ranked.

    Attributes:
        ids: n names that no two images share.
        pools: n classes, or 'gallery'.
        embeddings: (n, d), of unit norm.
        sha256: over ids, pools and pixels.
    """

    ids: Sequence[str]
    pools: Sequence[str]
    embeddings: Tensor
    sha256: str

    @classmethod
    def of(
        cls, encoder: Encoder, ids: Sequence[str], pools: Sequence[str], images: Iterable[NDArray[np.uint8]]
    ) -> "SearchedGallery":
        """Encode a gallery's images, as the encoder takes them.

        Raises:
            DataError: two images have the same id.
        """
        return cls.made(ids, pools, *encode_stream(encoder, images))

    @classmethod
    def made(cls, ids: Sequence[str], pools: Sequence[str], embeddings: Tensor, pixels: str) -> "SearchedGallery":
        """From embeddings and the hash of the pixels that they are of; raises as `of`."""
        if len(set(ids)) < len(ids):
            raise DataError("retrieval", "two images of the gallery have the same id")
        return cls(ids, pools, embeddings, hashlib.sha256(json.dumps([ids, pools, pixels]).encode()).hexdigest())


class RetrievalTask:
    """See `offline.audit.task.Task`; there is no end to what the attacker can gain but an average precision of 0."""

    def __init__(
        self,
        items: Sequence[Item],
        questions: Sequence[Question],
        gallery: SearchedGallery,
        *,
        measured_by: str,
        neighbors: int,
    ) -> None:
        """Hold the queries and the gallery.

        Args:
            items: the queries.
            questions: one an item.
            gallery: what is ranked.
            measured_by: the score that makes a judgement worse as it falls.
            neighbors: that are returned.

        Raises:
            DataError: nothing in the gallery is an answer to any of the queries.
        """
        if not any(question.scores[measured_by].positives for question in questions):
            raise DataError("retrieval", f"none of {len(questions)} queries has anything to find in the gallery")
        self.items, self._questions, self._gallery = items, questions, gallery
        self._measured_by, self._neighbors = measured_by, neighbors
        self.identity = {"gallery_sha256": gallery.sha256}

    def judge(self, rows: Tensor, embeddings: Tensor) -> list[Judgement]:
        """See `Task.judge`; a score is absent where a query has no positives."""
        embeddings = embeddings.detach()
        require_finite(embeddings)
        gallery = self._gallery.embeddings.to(embeddings.device)
        judged = []
        for row, embedding, ranking in zip(rows.tolist(), embeddings, rank(embeddings, gallery), strict=True):
            question, order = self._questions[row], ranking.tolist()
            found = {name: average_precision(order, of.positives, of.junk) for name, of in question.scores.items()}
            scores = {name: value for name, value in found.items() if value is not None}
            first = [i for i in order[: self._neighbors + len(question.own)] if i not in question.own]
            first = first[: self._neighbors]
            similarities = (gallery[first] @ embedding).tolist()
            near = [
                Neighbor(self._gallery.ids[i], self._gallery.pools[i], similarity)
                for i, similarity in zip(first, similarities, strict=True)
            ]
            judged.append(Judgement("", None, scores, tuple(near)))
        return judged

    def severity(self, row: int, judgement: Judgement) -> float:
        """See `Task.severity`: what the average precision lacks; 0 for queries that have none."""
        return 1.0 - judgement.scores.get(self._measured_by, 1.0)

    def at_goal(self, row: int, judgement: Judgement) -> bool:
        """See `Task.at_goal`: there is nothing left to lose, or never was."""
        return judgement.scores.get(self._measured_by, 0.0) == 0.0

    def criterion(self, rows: Tensor) -> Criterion | None:
        """See `Task.criterion`: there is none."""
        return None

    def objective(self, attack: str, rows: Tensor, clean: Tensor) -> Objective:
        """See `Task.objective`.

        Raises:
            PlanError: there is no such attack.
        """
        if attack not in ("shift", "square"):
            raise PlanError(f"retrieval knows the attack shift, got {attack!r}")
        return EmbeddingShift(clean)


def open_retrieval(plan: AuditPlan, encoder: Encoder, data: Path) -> RetrievalTask:
    """Read queries and gallery, and encode the gallery.

    Args:
        plan: with a gallery and queries that have classes, or with a ground truth and its image folder.
        encoder: of the system.
        data: folder that relative paths start from.

    Raises:
        OfflineError: see `read_images`; or the ground truth is damaged, or its images are missing.
        PlanError: the plan has neither or both, or a query has no class.
        NonFiniteEmbedding: an image of the gallery has no embedding.
    """
    if plan.ground_truth:
        if plan.gallery or plan.queries or not plan.image_folder:
            raise PlanError("retrieval by ground_truth takes an image_folder, and no [[gallery]] and [[queries]]")
        return open_revisited(plan, encoder, data)
    if not plan.gallery or plan.image_folder:
        raise PlanError("retrieval needs a [[gallery]], or a ground_truth with its image_folder")
    return _open_classes(plan, encoder, data)


# --- classes ---------------------------------------------------------------------------------------------------------


def _open_classes(plan: AuditPlan, encoder: Encoder, data: Path) -> RetrievalTask:
    names, _, maps = classes_of((*plan.gallery, *plan.queries), data)
    several = len(plan.gallery) > 1
    if len({images.set_name for images in plan.gallery}) < len(plan.gallery):
        raise PlanError("sets of the gallery must have different names")
    ids: list[str] = []
    classes: list[int | None] = []
    shown: list[Image] = []
    known: dict[tuple[str, Path | None, str], set[int]] = {}
    for images, indices in zip(plan.gallery, maps, strict=False):
        for loaded in read_images(images, data, plan.seed):
            known.setdefault(_same_image(images, data, loaded.id), set()).add(len(ids))
            ids.append(f"{images.set_name}/{loaded.id}" if several else loaded.id)
            classes.append(int(indices[loaded.class_index]) if loaded.class_index >= 0 else None)
            shown.append(loaded.image)
    pools = [GALLERY if of is None else names[of] for of in classes]
    gallery = SearchedGallery.of(encoder, ids, pools, map(encoder.preprocess.apply, shown))
    rows_of = [frozenset(row for row, of in enumerate(classes) if of == label) for label in range(len(names))]
    items, questions = [], []
    for images, indices in zip(plan.queries, maps[len(plan.gallery) :], strict=True):
        for loaded in read_images(images, data, plan.seed):
            label = class_of(loaded, images, indices)
            own = frozenset(known.get(_same_image(images, data, loaded.id), ()))
            items.append(Item(images.set_name, loaded.id, names[label], encoder.preprocess.apply(loaded.image)))
            questions.append(Question({AP: Wanted(rows_of[label] - own, own)}, own))
    return RetrievalTask(items, questions, gallery, measured_by=AP, neighbors=plan.neighbors)


def _same_image(images: ImagesPlan, data: Path, identity: str) -> tuple[str, Path | None, str]:
    """What images of two sets have in common if and only if they are one: ids of folders start at the folder."""
    folder = (data / images.paths[0]).resolve() if images.kind == "folder" else None
    return images.kind, folder, identity


# --- revisited sets --------------------------------------------------------------------------------------------------


def open_revisited(
    plan: AuditPlan, encoder: Encoder, data: Path, *, limit: int = 0, encode: EncodeFiles | None = None
) -> RetrievalTask:
    """Read a revisited set's queries, and encode its database; see `open_retrieval`.

    Args:
        limit: the first so many queries; 0 for all.
        encode: from files to embeddings and a hash of their pixels, in place of encoding them anew each time.
    """
    path, folder = data / plan.ground_truth, data / plan.image_folder
    if not path.is_file():
        raise DataMissing(path)
    truth = GroundTruth.load(path)
    if len({query.image for query in truth.queries}) < len(truth.queries):
        raise DataError(str(path), "two queries have the same name")
    files = {
        name: inside(folder, f"{name}.jpg", str(path))
        for name in (*truth.images, *(query.image for query in truth.queries))
    }
    require_files(
        list(files.values()), path.name, f"all images of imlist and qimlist as {plan.image_folder}/<name>.jpg"
    )
    encode = encode or partial(_encode_files, encoder)
    gallery = SearchedGallery.made(
        truth.images, [GALLERY] * len(truth.images), *encode([files[name] for name in truth.images])
    )
    items, questions = [], []
    for query in truth.queries[: limit or None]:
        image = read_image_file(files[query.image])
        if plan.crop_queries:
            image = crop_to(image, query.box, query.image)
        items.append(Item(path.stem, query.image, "", encoder.preprocess.apply(image)))
        scores = {f"ap_{difficulty}": Wanted(*query.relevant(difficulty)) for difficulty in get_args(Difficulty)}
        questions.append(Question(scores))
    return RetrievalTask(items, questions, gallery, measured_by=REVISITED_AP, neighbors=plan.neighbors)


def _encode_files(encoder: Encoder, files: Sequence[Path]) -> tuple[Tensor, str]:
    return encode_stream(encoder, (encoder.preprocess.apply(read_image_file(file)) for file in files))


def crop_to(image: Image, box: tuple[float, float, float, float], name: str) -> Image:
    """The part of an image within a box (x1, y1, x2, y2) in its own px, rounded, and clipped to the image.

    Raises:
        DataError: no pixel is left.
    """
    left, top, right, bottom = (round(side) for side in box)
    clipped = (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height))
    if clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
        raise DataError(name, f"box {box} holds no pixel of an image of {image.width} x {image.height} px")
    return image.crop(clipped)
