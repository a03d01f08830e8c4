"""Curation: what in a collection should be looked at, each with a suggestion. Nothing is changed here.

Near-duplicates within a pool, contradictions between pools, and candidates for a pool that texts describe. What is
found depends on the collection alone: the same one gives the same lists.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from indexer.contents import POOL_LABELS, POOLS, Contents, Exemplar, Kind
from indexer.errors import InvalidLabel, InvalidName
from indexer.pairs import Groups, Progress, Rows, join_near, similarities
from perception.verdict import Neighbor, PoolLabel

NEAR_IDENTICAL = 0.98  # cosine from which two images are taken for one and the same
VOTERS = 5  # nearest exemplars that must agree before a move to another pool is suggested
_NEGATIVES_WIDEN = 8  # how many times k are looked at before those that a negative prompt describes better are left out
_QUERIES = 1024  # searched at a time
_CHUNK_ROWS = 8192  # bounds the float64 copies of a large group
_TIE = 1e-9  # similarities to a mean that are this close are equal


class Searchable(Protocol):
    """A `Snapshot` or a `View`."""

    @property
    def collection(self) -> str:
        """The collection's name."""

    @property
    def kind(self) -> Kind:
        """'pools' for the moderation collection, else 'gallery'."""

    def contents(self) -> Contents:
        """A copy of all that searches can find."""

    def exemplar(self, id: str) -> Exemplar:
        """Look up one exemplar."""

    def embedding(self, id: str) -> NDArray[np.float32]:
        """The embedding (d,) of an exemplar."""

    def search(self, queries: NDArray[np.float32], k: int, *, label: str | None = None) -> list[list[Neighbor]]:
        """The k nearest exemplars; see `Snapshot.search`."""


@dataclass(frozen=True)
class Member:
    """One exemplar of a group of near-duplicates.

    Attributes:
        exemplar: what it is.
        similarity: cosine to the one to keep, 1 for itself.
        same_file: whether its image file is that of the one to keep, byte for byte.
        suggestion: `delete` for what the one to keep stands for; `look` for what belongs to the group only through
            others and is less similar than asked for to the one to keep.
    """

    exemplar: Exemplar
    similarity: float
    same_file: bool
    suggestion: Literal["keep", "delete", "look"]


@dataclass(frozen=True)
class Group:
    """Near-duplicates: each is near another of them.

    Attributes:
        members: the one to keep first, then most similar to it first, ties by id. To keep is the one nearest the
            group's mean embedding, of equally near ones the first by id.
    """

    members: tuple[Member, ...]

    @property
    def keep(self) -> Member:
        """The one to keep."""
        return self.members[0]


@dataclass(frozen=True)
class Contradiction:
    """An exemplar whose nearest neighbour lies in another pool; equally near ones of both pools count.

    Attributes:
        exemplar: what it is; its label is its pool.
        own: the nearest other exemplar of its own pool; None where there is none.
        other: the nearest exemplar of the other pools.
        suggestion: `look` or `move`.
        to: pool to move it to; None with `look`.
        reason: a sentence for a person.
    """

    exemplar: Exemplar
    own: Neighbor | None
    other: Neighbor
    suggestion: Literal["look", "move"]
    to: str | None
    reason: str

    @property
    def margin(self) -> float:
        """How much nearer the other pool is, in [0, 2]."""
        return self.other.similarity - (-1.0 if self.own is None else self.own.similarity)


@dataclass(frozen=True)
class Candidate:
    """An exemplar that a prompt describes.

    Attributes:
        exemplar: what it is.
        prompt: of several that find it, the one that it is most similar to.
        similarity: cosine of the exemplar and the prompt.
        contrast: `similarity` minus the highest similarity to a negative prompt; None without negative prompts.
        known: the exemplar of the moderation pools that shows the same image; None where none does.
    """

    exemplar: Exemplar
    prompt: str
    similarity: float
    contrast: float | None
    known: Neighbor | None


def near_duplicates(
    view: Searchable,
    min_similarity: float,
    label: str | None = None,
    progress: Progress | None = None,
    threads: int | None = None,
) -> list[Group]:
    """Groups of exemplars that are near-duplicates of each other, largest first, ties by label and id.

    Exemplars are joined whose embeddings' cosine is at least `min_similarity`, and, whatever their embeddings, whose
    image files are the same. In the moderation collection no group spans two pools: that would be a contradiction.

    Takes time in proportion to the square of the exemplars, and memory for a second copy of the embeddings.

    Args:
        view: what to look through.
        min_similarity: in (0, 1].
        label: look only at exemplars of this label; one that nothing carries finds nothing.
        progress: told now and then how many of how many pairs are compared.
        threads: that look for pairs; None for one for each core.

    Raises:
        ValueError: `min_similarity` is out of range.
        InvalidLabel: the moderation collection is asked for another label than the three pools.
    """
    if view.kind == "pools" and label is not None and label not in POOL_LABELS:
        raise InvalidLabel(label, POOL_LABELS, view.collection)
    contents = view.contents()
    ranges = _label_ranges(contents)
    if label is not None:
        parts = [ranges.get(label, range(0))]
    else:
        parts = list(ranges.values()) if view.kind == "pools" else [range(len(contents.exemplars))]
    total, done, found = sum(len(rows) * (len(rows) + 1) // 2 for rows in parts), 0, []
    for rows in parts:
        embeddings, exemplars = contents.embeddings[rows.start : rows.stop], contents.exemplars[rows.start : rows.stop]
        groups = Groups(len(rows))
        groups.join(*_same_file(exemplars))
        join_near(groups, embeddings, min_similarity, progress and _from(progress, done, total), threads)
        found += [_group(exemplars, embeddings, group, min_similarity) for group in groups.larger_than_one()]
        done += len(rows) * (len(rows) + 1) // 2
    return sorted(found, key=lambda g: (-len(g.members), g.keep.exemplar.label, g.keep.exemplar.id))


def contradictions(view: Searchable, progress: Progress | None = None) -> list[Contradiction]:
    """Exemplars of the moderation collection whose nearest neighbour lies in another pool, worst first.

    The suggestion: from a similarity of 0.98 on, the two show the same image and one of them is mislabelled, so both
    are to be looked at. Else, where the five nearest all lie in one other pool, a move to that pool. Else a move to
    the buffer pool; what is there already is to be looked at.

    Worst is what is near-identical, then what is between safe and unsafe; among those alike, the higher margin first.

    Args:
        view: of the moderation collection; every exemplar is searched for in every pool.
        progress: told now and then how many of how many exemplars are done.

    Raises:
        InvalidName: it is a gallery.
    """
    if view.kind != "pools":
        raise InvalidName(view.collection, f"contradictions are between the pools of {POOLS!r}; a gallery has none")
    contents = view.contents()
    found: list[Contradiction] = []
    for label, rows in _label_ranges(contents).items():
        for start in range(rows.start, rows.stop, _QUERIES):
            stop = min(start + _QUERIES, rows.stop)
            queries = contents.embeddings[start:stop]
            near = {pool: view.search(queries, VOTERS + (pool == label), label=pool) for pool in POOL_LABELS}
            for position, exemplar in enumerate(contents.exemplars[start:stop]):
                neighbors = [n for pool in POOL_LABELS for n in near[pool][position] if n.id != exemplar.id]
                contradiction = _contradiction(exemplar, neighbors)
                if contradiction is not None:
                    found.append(contradiction)
            if progress is not None:
                progress(stop, len(contents.exemplars))
    return sorted(found, key=_badness)


def probe(
    view: Searchable,
    prompts: Sequence[str],
    embeddings: NDArray[np.float32],
    *,
    k: int,
    min_similarity: float = -1.0,
    negatives: NDArray[np.float32] | None = None,
    pools: Searchable | None = None,
) -> list[Candidate]:
    """Exemplars that prompts describe: candidates for a pool.

    Without negative prompts, these are the k nearest to each prompt, most similar first. With them, of the 8 k nearest
    to each prompt those are left out that a negative prompt describes at least as well, and the k of the highest
    contrast are taken, that first. The contrast is a difference of cosines: a softmax would need the temperature that
    the encoder was trained with. An exemplar is listed once, ties by label and id.

    Args:
        view: where to look, mostly a gallery.
        prompts: p texts.
        embeddings: (p, d) of the prompts.
        k: candidates of each prompt, at least 1.
        min_similarity: leave out what is less similar than this to the prompt.
        negatives: (m, d) of the negative prompts; None or m = 0 for none.
        pools: the moderation collection, to mark what is in a pool already; None to mark nothing.

    Raises:
        ValueError: shapes that do not fit; see `VectorIndex.search`.
    """
    if len(prompts) != len(embeddings):
        raise ValueError(f"{len(prompts)} prompts and {len(embeddings)} embeddings do not fit")
    against = negatives if negatives is not None and len(negatives) else None
    best: dict[str, Candidate] = {}
    vectors: dict[str, NDArray[np.float32]] = {}
    for prompt, hits in zip(
        prompts, view.search(embeddings, k if against is None else _NEGATIVES_WIDEN * k), strict=True
    ):
        taken = []
        for hit in hits:
            if hit.similarity < min_similarity:
                break
            if hit.id not in vectors:
                vectors[hit.id] = view.embedding(hit.id)
            contrast = None if against is None else hit.similarity - _highest(against, vectors[hit.id])
            if contrast is None or contrast > 0.0:
                taken.append(Candidate(view.exemplar(hit.id), prompt, hit.similarity, contrast, None))
        for candidate in sorted(taken, key=_rank)[:k]:
            present = best.get(candidate.exemplar.id)
            if present is None or candidate.similarity > present.similarity:
                best[candidate.exemplar.id] = candidate
    return _marked(sorted(best.values(), key=_rank), vectors, view, pools)


def _label_ranges(contents: Contents) -> dict[str, range]:
    """Rows by label; they are contiguous."""
    ranges, start = {}, 0
    for label, n in contents.counts.items():
        ranges[label] = range(start, start + n)
        start += n
    return ranges


def _from(progress: Progress, done: int, total: int) -> Progress:
    """Progress of a part as that of the whole."""
    return lambda part, _: progress(done + part, total)


def _same_file(exemplars: Sequence[Exemplar]) -> tuple[Rows, Rows]:
    """Pairs of rows whose image files are equal, enough to connect all of them."""
    first: dict[str, int] = {}
    pairs = [(row, first.setdefault(e.sha256, row)) for row, e in enumerate(exemplars) if e.sha256]
    left, right = np.array([pair for pair in pairs if pair[0] != pair[1]], np.int64).reshape(-1, 2).T
    return left, right


def _group(exemplars: Sequence[Exemplar], embeddings: NDArray[np.float32], rows: Rows, min_similarity: float) -> Group:
    """The group of some rows, which ascend as ids do within a label."""
    keep = int(rows[_nearest_the_mean([exemplars[row] for row in rows], embeddings, rows)])
    found = similarities(embeddings, rows, np.full(len(rows), keep))
    members = []
    for row, similarity in zip(rows.tolist(), found.tolist(), strict=True):
        exemplar, kept = exemplars[row], exemplars[keep]
        same_file = bool(kept.sha256) and exemplar.sha256 == kept.sha256
        if row == keep:
            members.append(Member(exemplar, 1.0, same_file, "keep"))
        else:
            equal = same_file or np.array_equal(embeddings[row], embeddings[keep])
            stands_for = equal or similarity >= min_similarity
            members.append(Member(exemplar, similarity, same_file, "delete" if stands_for else "look"))
    members.sort(key=lambda m: (m.suggestion != "keep", -m.similarity, m.exemplar.id))
    return Group(tuple(members))


def _nearest_the_mean(exemplars: Sequence[Exemplar], embeddings: NDArray[np.float32], rows: Rows) -> int:
    """Position in `rows` of the one nearest their mean, ties by id."""
    chunks = [rows[start : start + _CHUNK_ROWS] for start in range(0, len(rows), _CHUNK_ROWS)]
    mean = sum(_unit(embeddings[chunk]).sum(axis=0) for chunk in chunks) / len(rows)
    near = np.concatenate([(_unit(embeddings[chunk]) * mean).sum(axis=1) for chunk in chunks])
    tied = np.flatnonzero(near >= near.max() - _TIE).tolist()
    return int(min(tied, key=lambda at: exemplars[at].id))


def _unit(embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = embeddings.astype(np.float64)
    unit: NDArray[np.float64] = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return unit


def _contradiction(exemplar: Exemplar, neighbors: Sequence[Neighbor]) -> Contradiction | None:
    """What an exemplar's nearest others say, from the nearest few of each pool."""
    ranked = sorted(neighbors, key=lambda n: (-n.similarity, n.pool, n.id))
    own = next((n for n in ranked if n.pool == exemplar.label), None)
    other = next((n for n in ranked if n.pool != exemplar.label), None)
    if other is None or (own is not None and own.similarity > other.similarity):
        return None
    voters = ranked[:VOTERS]
    if other.similarity >= NEAR_IDENTICAL:
        return Contradiction(exemplar, own, other, "look", None, "one of the two is mislabelled: look at both")
    if len(voters) == VOTERS and all(n.pool == other.pool for n in voters):
        return Contradiction(
            exemplar, own, other, "move", other.pool, f"its {VOTERS} nearest are all in the {other.pool} pool"
        )
    if exemplar.label == PoolLabel.BUFFER:
        return Contradiction(exemplar, own, other, "look", None, "its nearest do not agree: look at it")
    reason = "its nearest do not agree: it is no clear example of its pool"
    return Contradiction(exemplar, own, other, "move", str(PoolLabel.BUFFER), reason)


def _badness(found: Contradiction) -> tuple[bool, bool, float, str]:
    between_the_ends = PoolLabel.BUFFER not in (found.exemplar.label, found.other.pool)
    return found.other.similarity < NEAR_IDENTICAL, not between_the_ends, -found.margin, found.exemplar.id


def _highest(negatives: NDArray[np.float32], embedding: NDArray[np.float32]) -> float:
    """The highest cosine of (m, d) and (d,), as searches calculate it."""
    return float(np.clip((negatives * embedding.astype(np.float64)).sum(axis=1).max(), -1.0, 1.0))


def _rank(candidate: Candidate) -> tuple[float, str, str]:
    value = candidate.similarity if candidate.contrast is None else candidate.contrast
    return -value, candidate.exemplar.label, candidate.exemplar.id


def _marked(
    candidates: Sequence[Candidate],
    embeddings: Mapping[str, NDArray[np.float32]],
    view: Searchable,
    pools: Searchable | None,
) -> list[Candidate]:
    """The same, with the exemplars of the moderation pools that show the same images."""
    if pools is None or not candidates:
        return list(candidates)
    if view.kind == "pools":
        return [replace(c, known=Neighbor(c.exemplar.id, c.exemplar.label, 1.0)) for c in candidates]
    found = pools.search(np.stack([embeddings[c.exemplar.id] for c in candidates]), 1)
    return [
        replace(c, known=hits[0] if hits and hits[0].similarity >= NEAR_IDENTICAL else None)
        for c, hits in zip(candidates, found, strict=True)
    ]
