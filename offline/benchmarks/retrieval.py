"""How well rankings of a gallery answer queries: the metric of ROxford5k and RParis6k, and class-labelled sets.

Owns the metrics and the ground truth's file. Knows no images and no attacks: rankings come in as row numbers.

The revisited sets publish their ground truth as pickles, `gnd_roxford5k.pkl` and `gnd_rparis6k.pkl` (methods 6.4).
`GroundTruth.load` reads them as plain data, without running them (`offline.data.pickled`), or a JSON object of the same
fields:

    {"imlist": ["all_souls_000013", ...], "qimlist": ["...", ...],
     "gnd": [{"bbx": [x1, y1, x2, y2], "easy": [row, ...], "hard": [row, ...], "junk": [row, ...]}, ...]}

where `gnd` has one entry a query, in the order of `qimlist`, and rows are those of `imlist`, from 0.
"""

import json
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from offline.data.pickled import read_pickled
from offline.errors import DataError, DataMissing

Difficulty = Literal["easy", "medium", "hard"]


@dataclass(frozen=True)
class RevisitedQuery:
    """One query of a revisited set.

    Attributes:
        image: its name.
        box: the part of it that is asked for, (x1, y1, x2, y2) in px; the official protocol crops to it.
        easy, hard, junk: rows of the database, each in at most one of the three; all others are negatives.
    """

    image: str
    box: tuple[float, float, float, float]
    easy: frozenset[int]
    hard: frozenset[int]
    junk: frozenset[int]

    def relevant(self, difficulty: Difficulty) -> tuple[frozenset[int], frozenset[int]]:
        """Positives, and what is taken out of the ranking because it is neither right nor wrong to find it.

        Raises:
            DataError: there is no such difficulty.
        """
        if difficulty == "easy":
            return self.easy, self.junk | self.hard
        if difficulty == "medium":
            return self.easy | self.hard, self.junk
        if difficulty == "hard":
            return self.hard, self.junk | self.easy
        raise DataError("retrieval", f"difficulty must be one of {get_args(Difficulty)}, got {difficulty!r}")


@dataclass(frozen=True)
class GroundTruth:
    """A revisited set: the names of its database, and its queries."""

    images: tuple[str, ...]
    queries: tuple[RevisitedQuery, ...]

    @classmethod
    def load(cls, path: Path) -> "GroundTruth":
        """Read the layout that the module describes: plain data of a pickle where the name ends in .pkl, else JSON.

        Raises:
            DataError: absent, damaged, of another layout, or with rows that the database does not have.
        """
        try:
            table = read_pickled(path) if path.suffix == ".pkl" else json.loads(path.read_bytes())
            if not isinstance(table, dict):
                raise TypeError(f"it holds a {type(table).__name__}, expected a dict of imlist, qimlist and gnd")
            images, names = tuple(map(_text, table["imlist"])), tuple(map(_text, table["qimlist"]))
            if len(set(images)) != len(images):
                raise ValueError("names in imlist are not unique")
            entries = zip(names, table["gnd"], strict=True)
            return cls(images, tuple(_query(name, entry, len(images)) for name, entry in entries))
        except DataError as error:  # of the pickle
            raise DataError(error.data, f"is no ground truth: {error.reason}") from error
        except DataMissing as error:
            raise DataError(str(path), "is no ground truth: there is no such file") from error
        except (OSError, ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError) as error:
            raise DataError(str(path), f"is no ground truth: {error!r}") from error

    def average_precisions(self, rankings: Sequence[Sequence[int]], difficulty: Difficulty) -> "QueryScores":
        """Judge one ranking of the whole database a query, in the order of `queries`.

        Raises:
            DataError: there is not one ranking a query, or one is no permutation of the database's rows.
        """
        if len(rankings) != len(self.queries):
            raise DataError("retrieval", f"{len(rankings)} rankings for {len(self.queries)} queries")
        scores = []
        for query, ranking in zip(self.queries, rankings, strict=True):
            if len(ranking) != len(self.images) or set(ranking) != set(range(len(self.images))):
                raise DataError("retrieval", f"the ranking for {query.image} must hold each of {len(self.images)} rows")
            scores.append(average_precision(ranking, *query.relevant(difficulty)))
        return QueryScores(tuple(scores))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a name is {value!r}")
    return value


def _query(name: str, entry: dict[str, Any], size: int) -> RevisitedQuery:
    box = tuple(map(float, entry["bbx"]))
    if len(box) != 4 or not all(map(math.isfinite, box)) or box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError(f"bbx of {name} must be x1 < x2, y1 < y2, got {box}")
    rows = {key: _rows(entry[key], f"{key} of {name}") for key in ("easy", "hard", "junk")}
    together = [row for part in rows.values() for row in part]
    if not all(type(row) is int and 0 <= row < size for row in together):
        raise ValueError(f"rows of {name} must be integers below {size}")
    if len(set(together)) != len(together):
        raise ValueError(f"a row of {name} is listed twice")
    return RevisitedQuery(name, (box[0], box[1], box[2], box[3]), *(frozenset(part) for part in rows.values()))


def _rows(values: Any, what: str) -> list[Any]:
    """As a list; an empty array has no type that means anything."""
    if not isinstance(values, np.ndarray):
        return list(values)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise ValueError(f"{what} must be a list of rows, got an array {values.shape} of {values.dtype}")
    return list(values.tolist())


@dataclass(frozen=True)
class QueryScores:
    """One figure a query, in [0, 1]; None for queries that nothing in the gallery could answer, which do not count."""

    by_query: tuple[float | None, ...]

    @property
    def judged(self) -> int:
        """How many queries count."""
        return sum(score is not None for score in self.by_query)

    @property
    def mean(self) -> float:
        """The mean over the queries that count.

        Raises:
            DataError: none does.
        """
        if not self.judged:
            raise DataError("retrieval", f"none of {len(self.by_query)} queries has anything to find")
        return math.fsum(score for score in self.by_query if score is not None) / self.judged


def average_precision(ranking: Sequence[int], positives: Collection[int], junk: Collection[int] = ()) -> float | None:
    """The area under precision against recall by trapezoids, as the revisited sets define it.

    The j-th positive (from 0), at rank r (from 0) of the ranking without junk, adds the mean of the precision just
    before it, `j / r` or 1 where r = 0, and at it, `(j + 1) / (r + 1)`. A positive that the ranking lacks adds 0.

    Args:
        ranking: rows of the gallery, best first.
        positives, junk: rows of the gallery.

    Returns:
        In [0, 1]; None without positives.

    Raises:
        DataError: a row is ranked twice, or is both positive and junk.
    """
    if len(set(ranking)) != len(ranking):
        raise DataError("retrieval", "a row is ranked twice")
    wanted, ignored = frozenset(positives), frozenset(junk)
    if wanted & ignored:
        raise DataError("retrieval", f"row {min(wanted & ignored)} is both positive and junk")
    if not wanted:
        return None
    kept = (row for row in ranking if row not in ignored)
    return _area([rank for rank, row in enumerate(kept) if row in wanted], len(wanted))


def _area(ranks: Iterable[int], positives: int) -> float:
    """The sum over the positives' ranks (from 0, rising) of `average_precision`."""
    steps = ((j / r if r else 1.0) + (j + 1) / (r + 1) for j, r in enumerate(ranks))
    return math.fsum(steps) / 2 / positives


def rank(queries: Tensor, gallery: Tensor, *, exclude_self: bool = False) -> Tensor:
    """Rank a gallery by cosine, best first; of equally similar rows the first comes first.

    Args:
        queries: (b, d) unit embeddings.
        gallery: (n, d) unit embeddings; with `exclude_self` it is `queries`, and row i is left out for query i.

    Returns:
        (b, n) int64 rows of the gallery; (b, n - 1) with `exclude_self`.

    Raises:
        DataError: the shapes do not fit, or a similarity is not finite, which no order has a place for.
    """
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise DataError("retrieval", f"queries {tuple(queries.shape)} and gallery {tuple(gallery.shape)} do not fit")
    if exclude_self and len(queries) != len(gallery):
        raise DataError("retrieval", f"{len(queries)} queries cannot be left out of a gallery of {len(gallery)}")
    similarities = queries @ gallery.T
    if not bool(torch.isfinite(similarities).all()):
        raise DataError("retrieval", "a similarity is not finite")
    order = similarities.argsort(dim=1, descending=True, stable=True)
    if not exclude_self:
        return order
    own = torch.arange(len(order), device=order.device)[:, None]
    return order[order != own].view(len(order), -1)


@dataclass(frozen=True)
class ClassRankings:
    """Rankings of a gallery with classes: a query's positives are the rows of its class.

    Attributes:
        rankings: (b, m) int64 rows of the gallery, best first, no row twice; a query that is itself in the gallery is
            not in its own ranking (`rank(..., exclude_self=True)`).
        query_labels: b classes.
        gallery_labels: n classes.
    """

    rankings: Tensor
    query_labels: Sequence[str]
    gallery_labels: Sequence[str]

    def __post_init__(self) -> None:
        """Check that the parts fit.

        Raises:
            DataError: they do not.
        """
        if self.rankings.ndim != 2 or len(self.rankings) != len(self.query_labels):
            raise DataError(
                "retrieval", f"rankings {tuple(self.rankings.shape)} for {len(self.query_labels)} query labels"
            )
        if self.rankings.numel():
            low, high = int(self.rankings.min()), int(self.rankings.max())
            if low < 0 or high >= len(self.gallery_labels):
                raise DataError("retrieval", f"rows {low} to {high} are ranked, of {len(self.gallery_labels)}")
            ordered = self.rankings.sort(dim=1).values
            if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
                raise DataError("retrieval", "a row is ranked twice")

    def average_precisions(self) -> QueryScores:
        """`average_precision` of each ranking, whose positives are all that it holds of the class, without junk."""
        return QueryScores(
            tuple(_area(ranks, len(ranks)) if (ranks := _true(hits)) else None for hits in self._relevant())
        )

    def precisions_at(self, k: int) -> QueryScores:
        """P@k: the share of its class among a query's first k; a class of fewer than k cannot reach 1.

        Raises:
            DataError: k is not in [1, m].
        """
        length = self.rankings.shape[1]
        if not 1 <= k <= length:
            raise DataError("retrieval", f"k must be in [1, {length}], the length of the rankings, got {k}")
        return QueryScores(tuple(sum(hits[:k]) / k if any(hits) else None for hits in self._relevant()))

    def _relevant(self) -> Iterator[list[bool]]:
        """For each query, whether the rows of its ranking are of its class, best first."""
        for ranking, label in zip(self.rankings, self.query_labels, strict=True):
            yield [self.gallery_labels[row] == label for row in ranking.tolist()]


def _true(hits: Sequence[bool]) -> list[int]:
    return [rank for rank, hit in enumerate(hits) if hit]
