"""Shape or texture: what an encoder calls images that have the shape of one thing and the texture of another.

Owns the zip of cue-conflict images with ten people's answers each (Geirhos et al. 2019, "ImageNet-trained CNNs are
biased towards texture") and how an encoder decides among their 16 classes; the figures are those of
`offline.benchmarks.cue_conflict_figures`. Images whose two cues are of one class say nothing and are left out.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offline.benchmarks.bootstrap import Draws
from offline.benchmarks.cue_conflict_figures import Answers, Observed, observe_humans, observe_machine
from offline.benchmarks.embedding import encode_examples
from offline.data.archives import Example, open_archive, read_rows
from offline.data.files import read_image_member
from offline.data.labelled import open_images
from offline.errors import DataError, PlanError
from perception.encoder import Encoder, unit_embeddings
from perception.errors import CheckpointError, ImageError
from perception.text import TextEncoder, class_embeddings

ARCHIVE = Path("perceptual/cue_conflict_160px_humans.zip")
CLASSES = (
    "airplane", "bear", "bicycle", "bird", "boat", "bottle", "car", "cat",
    "chair", "clock", "dog", "elephant", "keyboard", "knife", "oven", "truck",
)  # fmt: skip
NO_ANSWER = "na"
"""What the table calls a trial that a person let pass."""
TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
"""The seven prompts that CLIP's authors publish as the short ensemble for ImageNet; a class is the mean of them."""
MOST_ANSWERS = 10_000
_COLUMNS = ("shape_class", "texture_class", "human_responses")


@dataclass(frozen=True)
class CueConflictImage:
    """One image.

    Attributes:
        row: of the table, from 2, for messages.
        file: member of the zip.
        shape, texture: its two cues, of `CLASSES`.
        answers: how many people gave which answer, of `CLASSES` and `NO_ANSWER`.
    """

    row: int
    file: str
    shape: str
    texture: str
    answers: Mapping[str, int]


def read_cue_conflict(path: Path) -> list[CueConflictImage]:
    """Read the table of a zip: columns file, shape_class, texture_class and human_responses ({answer: people}).

    Raises:
        DataMissing: it is not there.
        DataError: the table is missing or empty, or a row is malformed; names the row.
    """
    with open_archive(path) as archive:
        rows, members = read_rows(archive), set(archive.namelist())
    if not rows:
        raise DataError(str(path), "labels.csv has no rows")
    images, seen = [], set()
    for number, row in enumerate(rows, 2):
        image = _image(number, row, str(path))
        if image.file not in members:
            raise DataError(str(path), f"labels.csv, row {number}: names {image.file!r}, which the archive lacks")
        if image.file in seen:
            raise DataError(str(path), f"labels.csv, row {number}: names {image.file!r} a second time")
        seen.add(image.file)
        images.append(image)
    return images


def _image(number: int, row: Mapping[str, str], data: str) -> CueConflictImage:
    where = f"labels.csv, row {number}"
    missing = [column for column in _COLUMNS if column not in row]
    if missing:
        raise DataError(data, f"{where}: has no column {', '.join(missing)}; expected file, {', '.join(_COLUMNS)}")
    for column in _COLUMNS[:2]:
        if row[column] not in CLASSES:
            raise DataError(data, f"{where}: {column} is {row[column]!r}, expected one of {', '.join(CLASSES)}")
    answers = _answers(row["human_responses"], where, data)
    return CueConflictImage(number, row["file"], row["shape_class"], row["texture_class"], answers)


def _answers(text: str, where: str, data: str) -> dict[str, int]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("an answer is listed twice")
        return dict(pairs)

    try:
        answers: Any = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise DataError(data, f"{where}: human_responses {text[:80]!r} is no JSON: {error}") from error
    if not isinstance(answers, dict) or not answers:
        raise DataError(data, f"{where}: human_responses must be an object of {{answer: people}}, got {text[:80]!r}")
    for answer, people in answers.items():
        if answer not in CLASSES and answer != NO_ANSWER:
            raise DataError(data, f"{where}: answer {answer!r} is neither a class nor {NO_ANSWER!r}")
        if type(people) is not int or not 0 < people <= MOST_ANSWERS:
            raise DataError(
                data, f"{where}: {answer!r} must be the answer of 1 to {MOST_ANSWERS} people, got {people!r}"
            )
    return answers


def text_classifier(encoder: Encoder, templates: Sequence[str] = TEMPLATES) -> Tensor:
    """The classes as text, by the encoder's own tower: (16, d) unit embeddings, each the mean over the templates.

    Raises:
        PlanError: the encoder has no text tower, or a template has not exactly one '{}'.
    """
    if not templates:
        raise PlanError("at least one template is needed")
    for template in templates:
        if template.count("{}") != 1 or template.count("{") + template.count("}") != 2:
            raise PlanError(f"a template must have exactly one '{{}}' for the class, got {template!r}")
    try:
        text = getattr(encoder, "text", None)
    except CheckpointError:
        text = None
    if not isinstance(text, TextEncoder):
        raise PlanError(
            f"{encoder.name} has no text tower to name the 16 classes with; give labelled images with --prototypes"
        )
    return class_embeddings(text, CLASSES, templates).cpu()


def prototype_classifier(encoder: Encoder, folder: Path) -> Tensor:
    """The classes as images: (16, d), each the normalised mean of the unit embeddings of its labelled images.

    Args:
        folder: has one sub-folder of images for each of `CLASSES`, and no others.

    Raises:
        DataMissing: it is not there.
        DataError: it lacks a class or has others, or an image cannot be read.
        NonFiniteEmbedding: an image has no embedding.
    """
    images = open_images("folder", folder)
    names = [of[0] for of in images.class_names]
    if tuple(names) != CLASSES:
        odd = sorted(set(names).symmetric_difference(CLASSES))
        raise DataError(str(folder), f"must have one sub-folder for each of the 16 classes; missing or other: {odd}")

    def examples() -> Iterator[Example]:
        for index in range(len(images)):
            try:
                example = images.read(index)
            except (ImageError, OSError) as error:
                raise DataError(str(folder), f"{images.id_of(index)} cannot be read: {error}") from error
            if example.label >= 0:
                yield Example(example.id, example.image, names[example.label], {})

    rows, kept, _ = encode_examples(encoder, examples())
    labels = np.array([CLASSES.index(example.label) for example in kept])
    return unit_embeddings(torch.stack([rows[labels == index].mean(0) for index in range(len(CLASSES))]))


def classifier_of(encoder: Encoder, templates: Sequence[str], prototypes: Path | None) -> Tensor:
    """By prototypes where a folder of them is given, else by text; see either."""
    return text_classifier(encoder, templates) if prototypes is None else prototype_classifier(encoder, prototypes)


class CueConflictBenchmark:
    """Runs on a zip of cue-conflict images; every row that it gives is over the same images and resamples."""

    def __init__(self, path: Path, *, resamples: int = 2000, seed: int = 0) -> None:
        """Read the table.

        Args:
            resamples: of the bootstrap over images, for the intervals.
            seed: of the bootstrap.

        Raises:
            DataMissing, DataError: see `read_cue_conflict`, or no image has two different cues.
        """
        self.path = path
        listed = read_cue_conflict(path)
        self.images = [image for image in listed if image.shape != image.texture]
        self.left_out = len(listed) - len(self.images)
        if not self.images:
            raise DataError(str(path), f"none of {len(listed)} images has two cues of different classes")
        self._answers = _answer_table(self.images)
        self._draws = Draws(len(self.images), resamples, seed)

    def humans(self) -> Observed:
        """The people's own figures: the ceiling of an encoder's."""
        return observe_humans(self._answers, self._draws, CLASSES)

    def run(self, encoder: Encoder, classifier: Tensor) -> Observed:
        """An encoder's figures.

        Args:
            classifier: (16, d) unit embeddings of `CLASSES`, see `text_classifier` and `prototype_classifier`.

        Raises:
            DataError: an image cannot be read.
        """
        return observe_machine(encoder.name, self.decide(encoder, classifier), self._answers, self._draws, CLASSES)

    def decide(self, encoder: Encoder, classifier: Tensor) -> list[str]:
        """The class that is closest to each of `images`, by cosine; of equally close ones the first of `CLASSES`.

        Raises:
            DataError: an image cannot be read.
        """
        rows, _, _ = encode_examples(encoder, self._examples())
        return [CLASSES[index] for index in (rows @ classifier.T).argmax(dim=1).tolist()]

    def _examples(self) -> Iterator[Example]:
        with open_archive(self.path) as archive:
            for image in self.images:
                pixels = read_image_member(archive, image.file, f"labels.csv, row {image.row}")
                yield Example(image.file, pixels, "", {})


def _answer_table(images: Sequence[CueConflictImage]) -> Answers:
    return Answers(
        shape=np.array([CLASSES.index(image.shape) for image in images]),
        texture=np.array([CLASSES.index(image.texture) for image in images]),
        counts=np.array([[image.answers.get(name, 0) for name in CLASSES] for image in images]),
        unanswered=np.array([image.answers.get(NO_ANSWER, 0) for image in images]),
    )
