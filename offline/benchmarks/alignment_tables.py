"""Cue-conflict, near-duplicate and triplet figures as Markdown, one row an encoder; percent with 95 % intervals."""

from collections.abc import Iterable, Sequence
from typing import Any

from offline.benchmarks.cue_conflict_figures import FIGURES, Observed
from offline.benchmarks.near_duplicates import NearDuplicates
from offline.benchmarks.triplets import TripletDistances

_TITLES = {
    "shape_bias": "shape bias",
    "cue_share": "either cue",
    "shape_accuracy": "is the shape",
    "texture_accuracy": "is the texture",
    "human_agreement": "agrees with a person",
    "majority_agreement": "agrees with most people",
    "error_consistency": "error consistency, 100 kappa",
}


def observer_table(observers: Sequence[Observed]) -> str:
    """Cue-conflict figures, one row an observer."""
    rows = ([row.observer, *(row.figures[name].percent() for name in FIGURES)] for row in observers)
    return _markdown(["observer", *_TITLES.values()], rows)


def difference_table(encoders: Sequence[Observed]) -> str:
    """Each further encoder minus the first, in points with paired intervals; empty for one encoder."""
    if len(encoders) < 2:
        return ""
    first, *others = encoders
    rows = []
    for other in others:
        gained = other.minus(first)
        rows.append([f"{other.observer} - {first.observer}", *(gained[name].percent() for name in FIGURES)])
    return _markdown(["difference", *_TITLES.values()], rows)


def observers_as_json(observers: Sequence[Observed]) -> dict[str, Any]:
    """Plain values of people (first) and encoders: their rows, and each further encoder minus the first."""
    return {
        "rows": [row.as_dict() for row in observers],
        "differences_to_first": {
            row.observer: {name: value.as_dict() for name, value in row.minus(observers[1]).items()}
            for row in observers[2:]
        },
    }


def retrieval_table(results: Iterable[NearDuplicates]) -> str:
    """Near-duplicate retrieval, one row an encoder and zip."""
    rows = (
        [
            r.archive,
            r.encoder,
            str(r.images),
            str(r.queries),
            r.mean_average_precision.percent(),
            r.recall_at_1.percent(),
        ]
        for r in results
    )
    return _markdown(["archive", "encoder", "images", "queries", "mAP", "recall at 1"], rows)


def group_table(results: Sequence[NearDuplicates]) -> str:
    """The groups of one zip, one row a group and encoder; similarities are cosines, not percent."""
    heads = ["group", "encoder", "queries", "mAP", "first right", "worst pair", "best outside", "margin"]
    rows = (
        [
            group.group,
            result.encoder,
            str(group.queries),
            f"{100 * group.mean_average_precision:.1f}",
            str(group.first_right),
            f"{group.worst_pair:.3f}",
            f"{group.best_outside:.3f}",
            f"{group.margin:+.3f}",
        ]
        for groups in zip(*(result.groups for result in results), strict=True)
        for result, group in zip(results, groups, strict=True)
    )
    return _markdown(heads, rows)


def variant_table(results: Sequence[NearDuplicates]) -> str:
    """The versions of one zip, one row a version and one column an encoder: similarity and margin, '!' if not found."""
    rows = (
        [
            variants[0].group,
            variants[0].variant,
            *(f"{v.similarity:.3f} ({v.margin:+.3f}){'' if v.found else ' !'}" for v in variants),
        ]
        for variants in zip(*(result.variants for result in results), strict=True)
    )
    return _markdown(["group", "version", *(result.encoder for result in results)], rows)


def triplet_table(rows: Iterable[TripletDistances]) -> str:
    """Distances of both candidates from the reference, and which is closer."""
    cells = (
        [r.triplet, r.encoder, r.distance, f"{r.d0:.4f}", f"{r.d1:.4f}", "equal" if r.choice is None else str(r.choice)]
        for r in rows
    )
    return _markdown(["triplet", "encoder", "distance", "d0", "d1", "closer"], cells)


def _markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
