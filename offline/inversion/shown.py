"""A run of inversions in words."""

from collections.abc import Sequence

from offline.inversion.run import Results
from offline.inversion.store import GRID_NAME, RECONSTRUCTIONS, RESULTS_NAME, Record


def describe(results: Results) -> str:
    """Mean similarities by encoder, the least among them, what held the pictures, and where they are."""
    lines = []
    width = max(len(record.encoder) for record in results.records)
    for encoder in dict.fromkeys(record.encoder for record in results.records):
        records = [record for record in results.records if record.encoder == encoder]
        lowest = min(records, key=lambda record: record.similarity)
        lines.append(
            f"{encoder:{width}}  similarity {_mean([r.start_similarity for r in records]):.3f} at the start, "
            f"{_mean([r.similarity for r in records]):.3f} found, {_mean([r.similarity_8bit for r in records]):.3f} as "
            f"PNG (mean of {len(records)}; lowest {lowest.similarity:.3f}: {lowest.target}, seed {lowest.seed}); "
            + _held(records)
        )
    lines.append(f"pictures: {results.run / GRID_NAME}, {results.run / RECONSTRUCTIONS}")
    lines.append(f"figures: {results.run / RESULTS_NAME}")
    return "".join(f"{line}\n" for line in lines)


def _held(records: Sequence[Record]) -> str:
    radius, farthest = records[0].radius, max(record.distance for record in records)
    if radius is None:
        return f"no ball, farthest l2 {farthest:.1f} from the start"
    return f"l2 radius {radius:.4g} at its own size, farthest {farthest:.4g}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
