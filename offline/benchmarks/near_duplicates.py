"""Near-duplicates: does an image find the other versions of itself, and which manipulations hide one?

Owns the zips of images in groups (`groups.csv`: file, group, variant), in which the group `distractor`, and any group
of one image, has nothing to find. Each image of a group is a query among all other images of its zip; similarity is the
cosine. The first image of a group in the table is its original.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offline.benchmarks.bootstrap import Draws, Estimate, ratio
from offline.benchmarks.embedding import encode_examples
from offline.benchmarks.retrieval import ClassRankings, rank
from offline.data.archives import Example, open_archive, read_rows
from offline.data.files import read_image_member
from offline.errors import DataError
from perception.encoder import Encoder

ARCHIVES = (Path("neardup/neardup_pdq_imagededup.zip"), Path("neardup/landmarks_instance.zip"))
TABLE = "groups.csv"
DISTRACTOR = "distractor"
_COLUMNS = ("group", "variant")


@dataclass(frozen=True)
class GroupedImage:
    """One image: its row of the table (from 2), member of the zip, group, and which version of the group's image."""

    row: int
    file: str
    group: str
    variant: str


def read_groups(path: Path) -> list[GroupedImage]:
    """Read the table of a zip.

    Raises:
        DataMissing: it is not there.
        DataError: the table is missing or has no group of two images, or a row is malformed; names the row.
    """
    with open_archive(path) as archive:
        rows, members = read_rows(archive, TABLE), set(archive.namelist())
    images, seen = [], set()
    for number, row in enumerate(rows, 2):
        missing = [column for column in _COLUMNS if not row.get(column, "").strip()]
        if missing:
            raise DataError(str(path), f"{TABLE}, row {number}: has no {' and no '.join(missing)}")
        image = GroupedImage(number, row["file"], row["group"], row["variant"])
        if image.file not in members:
            raise DataError(str(path), f"{TABLE}, row {number}: names {image.file!r}, which the archive lacks")
        if image.file in seen:
            raise DataError(str(path), f"{TABLE}, row {number}: names {image.file!r} a second time")
        seen.add(image.file)
        images.append(image)
    if not _searched(images):
        raise DataError(str(path), f"{TABLE} has no group of two or more images")
    return images


def _searched(images: Sequence[GroupedImage]) -> list[str]:
    """The groups with something to find, in the order of the table."""
    sizes = Counter(image.group for image in images)
    return [group for group, size in sizes.items() if size > 1 and group != DISTRACTOR]


@dataclass(frozen=True)
class Variant:
    """One version against its original.

    Attributes:
        similarity: cosine of the two.
        margin: that minus the similarity of the original and the most similar image outside of the group.
    """

    group: str
    variant: str
    similarity: float
    margin: float

    @property
    def found(self) -> bool:
        """A search with the original finds this version before any image outside of the group."""
        return self.margin > 0


@dataclass(frozen=True)
class GroupScore:
    """One group.

    Attributes:
        queries: its images.
        mean_average_precision: over them, by trapezoids as in the revisited sets.
        first_right: how many of them find one of the group first.
        worst_pair: the least similar two of the group.
        best_outside: the most similar of its images and any other's.
        margin: the first minus the second: above 0 one threshold tells the group from all else.
    """

    group: str
    queries: int
    mean_average_precision: float
    first_right: int
    worst_pair: float
    best_outside: float
    margin: float


@dataclass(frozen=True)
class NearDuplicates:
    """What an encoder finds in one zip.

    Attributes:
        archive: the zip's name.
        images, queries: how many.
        mean_average_precision: over the queries; the interval is of the bootstrap over queries.
        recall_at_1: share of queries that find one of their group first, with Wilson's interval.
        groups, variants: in the order of the table.
    """

    encoder: str
    archive: str
    images: int
    queries: int
    mean_average_precision: Estimate
    recall_at_1: Estimate
    groups: tuple[GroupScore, ...]
    variants: tuple[Variant, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "encoder": self.encoder,
            "archive": self.archive,
            "images": self.images,
            "queries": self.queries,
            "mean_average_precision": self.mean_average_precision.as_dict(),
            "recall_at_1": self.recall_at_1.as_dict(),
            "groups": [_rounded(asdict(group)) for group in self.groups],
            "variants": [{**_rounded(asdict(variant)), "found": variant.found} for variant in self.variants],
        }


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


class NearDuplicateBenchmark:
    """Runs on one zip of grouped images."""

    def __init__(self, path: Path, *, resamples: int = 2000, seed: int = 0) -> None:
        """Read the table.

        Args:
            resamples, seed: of the bootstrap over queries.

        Raises:
            DataMissing, DataError: see `read_groups`.
        """
        self.path, self.images = path, read_groups(path)
        self._resamples, self._seed = resamples, seed

    def run(self, encoder: Encoder) -> NearDuplicates:
        """An encoder's figures.

        Raises:
            DataError: an image cannot be read.
        """
        rows, _, _ = encode_examples(encoder, self._examples())
        return self.judge(encoder.name, rows)

    def judge(self, name: str, embeddings: Tensor) -> NearDuplicates:
        """The figures of (n, d) unit embeddings of `images`.

        Raises:
            DataError: there is not one embedding an image, or a similarity is not finite.
        """
        if len(embeddings) != len(self.images):
            raise DataError(str(self.path), f"{len(embeddings)} embeddings of {len(self.images)} images")
        groups, labels = _searched(self.images), [image.group for image in self.images]
        queries = [index for index, label in enumerate(labels) if label in groups]
        rankings = rank(embeddings, embeddings, exclude_self=True)[queries]
        found = ClassRankings(rankings, [labels[index] for index in queries], labels)
        precisions = np.array([0.0 if score is None else score for score in found.average_precisions().by_query])
        first = np.array([labels[row] == labels[query] for query, row in zip(queries, rankings[:, 0], strict=True)])
        similarities = (embeddings @ embeddings.T).double()
        draws = Draws(len(queries), self._resamples, self._seed)
        of_query = np.array([labels[index] for index in queries])
        return NearDuplicates(
            name,
            self.path.name,
            len(labels),
            len(queries),
            Estimate.of(ratio(precisions, np.ones(len(queries)))(draws.weights)),
            Estimate.of_count(int(first.sum()), len(queries)),
            tuple(
                self._group(group, similarities, precisions[of_query == group], int(first[of_query == group].sum()))
                for group in groups
            ),
            tuple(variant for group in groups for variant in self._variants(group, similarities)),
        )

    def _group(self, group: str, similarities: Tensor, precisions: Any, first_right: int) -> GroupScore:
        inside, outside = self._split(group)
        pairs = similarities[inside][:, inside]
        upper = torch.triu_indices(len(inside), len(inside), offset=1)
        worst = float(pairs[upper[0], upper[1]].min())
        best = float(similarities[inside][:, outside].max()) if outside else -1.0
        return GroupScore(group, len(inside), float(precisions.mean()), first_right, worst, best, worst - best)

    def _variants(self, group: str, similarities: Tensor) -> Iterator[Variant]:
        (original, *others), outside = self._split(group)
        best = float(similarities[original, outside].max()) if outside else -1.0
        for index in others:
            similarity = float(similarities[original, index])
            yield Variant(group, self.images[index].variant, similarity, similarity - best)

    def _split(self, group: str) -> tuple[list[int], list[int]]:
        """Rows of the group, and of all else."""
        inside = [index for index, image in enumerate(self.images) if image.group == group]
        return inside, [index for index, image in enumerate(self.images) if image.group != group]

    def _examples(self) -> Iterator[Example]:
        with open_archive(self.path) as archive:
            for image in self.images:
                pixels = read_image_member(archive, image.file, f"{TABLE}, row {image.row}")
                yield Example(image.file, pixels, image.group, {})
