"""Search: what one query costs in a large index, and whether it finds what the exact one finds.

    python benchmarks/search.py --n 1000000 --dim 640 --json search.json
    python benchmarks/search.py --n 1000000 --dim 640 --gaussian
    python benchmarks/search.py --n 1000000 --dim 640 --base clip.npz          an array `embeddings` of real ones

The rows imitate real embeddings: mixtures of real ones (by default those of the bundled demo pools) are centres of
clusters of uneven size and width, from near-duplicates to loose topics, and the noise has the covariance of the real
ones. Half the queries are fresh, half are rows that were changed a little. Prints for FlatIndex and for
ScalarQuantizedIndex the build, p50 and p99 of one query over all rows, and of one query in three ranges one after
another, as moderation asks its three pools; for the latter also recall@10 and how many answers are FlatIndex's to the
last bit. The median of the rounds counts; each is printed.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from indexer.backends.flat import FlatIndex
from indexer.backends.scalar_quantized import ScalarQuantizedIndex
from indexer.index import VectorIndex
from perception.gallery import Gallery

_DEMO = Path(__file__).parents[1] / "indexer" / "demo" / "clean" / "pools.safetensors"
_CHUNK_ROWS = 20_000
_K = 10

Embeddings = NDArray[np.float32]
Draw = Callable[[int], Embeddings]


def unit(rows: Embeddings) -> Embeddings:
    """Rows of unit L2 norm."""
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def gaussian(dim: int, rng: np.random.Generator) -> Draw:
    """Directions without any structure: no two rows are close."""
    return lambda count: unit(rng.standard_normal((count, dim), dtype=np.float32))


def clustered(base: Embeddings, n: int, dim: int, rng: np.random.Generator) -> Draw:
    """Rows like the real ones of `base` (m, d0), turned into `dim` dimensions."""
    _, lengths, directions = np.linalg.svd(base - base.mean(axis=0), full_matrices=False)
    noise = np.asarray(lengths[:, None] * directions / np.linalg.norm(lengths), np.float32)  # of unit expected norm
    size = max(dim, base.shape[1])
    turn = np.linalg.qr(rng.normal(size=(size, size)))[0][: base.shape[1], :dim].astype(np.float32)
    clusters = max(1, n // 50)
    shares = rng.dirichlet([0.5] * 3, clusters).astype(np.float32)
    centres = np.einsum("cs,csd->cd", shares, base[rng.integers(0, len(base), (clusters, 3))])
    centres = unit(centres + 0.3 * rng.standard_normal((clusters, len(noise)), dtype=np.float32) @ noise)
    widths = np.exp(rng.uniform(np.log(0.02), np.log(0.7), clusters)).astype(np.float32)[:, None]
    weights = np.arange(1, clusters + 1) ** -0.7
    weights /= weights.sum()

    def draw(count: int) -> Embeddings:
        of = rng.choice(clusters, count, p=weights)
        rows = centres[of] + widths[of] * (rng.standard_normal((count, len(noise)), dtype=np.float32) @ noise)
        floor = 0.1 / np.sqrt(dim) * widths[of] * rng.standard_normal((count, dim), dtype=np.float32)
        return unit(rows @ turn + floor)

    return draw


def make(options: argparse.Namespace) -> tuple[Embeddings, Embeddings]:
    """Rows and queries."""
    rng = np.random.default_rng(options.seed)
    if options.gaussian:
        draw = gaussian(options.dim, rng)
    else:
        base = Gallery.load(_DEMO).embeddings if options.base is None else np.load(options.base)["embeddings"]
        draw = clustered(unit(base.astype(np.float32)), options.n, options.dim, rng)
    rows = np.empty((options.n, options.dim), np.float32)
    for start in range(0, options.n, _CHUNK_ROWS):
        rows[start : start + _CHUNK_ROWS] = draw(min(_CHUNK_ROWS, options.n - start))
    fresh = draw(options.queries // 2)
    changed = rows[rng.integers(0, options.n, options.queries - len(fresh))]
    changed = changed + 0.2 / np.sqrt(options.dim) * rng.standard_normal(changed.shape, dtype=np.float32)
    return rows, np.concatenate([fresh, unit(changed)])


def timed(index: VectorIndex, queries: Embeddings, parts: list[range | None]) -> tuple[dict[str, float], list[Any]]:
    """Milliseconds of one query in all parts, and what was found."""
    times, found = [], []
    for query in queries:
        began = time.perf_counter()
        hits = [index.search(query[None], _K, part)[0] for part in parts]
        times.append(1000 * (time.perf_counter() - began))
        found.append(hits)
    p50, p99 = np.percentile(times, [50, 99])
    return {"p50_ms": round(float(p50), 2), "p99_ms": round(float(p99), 2)}, found


def middle(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """The median of rounds, and the rounds."""
    return {name: statistics.median(found[name] for found in rounds) for name in rounds[0]} | {"rounds": rounds}


def measure(
    build: Callable[[Embeddings], VectorIndex], rows: Embeddings, queries: Embeddings, rounds: int
) -> tuple[dict[str, Any], list[Any]]:
    """The figures of one kind of index, and its answers over all rows and in three ranges."""
    began = time.perf_counter()
    index = build(rows)
    build_s = time.perf_counter() - began
    first, second = len(rows) // 10, len(rows) * 8 // 10
    everything: list[range | None] = [None]
    pools: list[range | None] = [range(first), range(first, second), range(second, len(rows))]
    timed(index, queries[:5], everything)  # not counted
    alone, in_pools = [], []
    for _ in range(rounds):
        figures, found = timed(index, queries, everything)
        alone.append(figures)
        figures, found_in_pools = timed(index, queries, pools)
        in_pools.append(figures)
    figures_of_all = {"build_s": round(build_s, 2), "all_rows": middle(alone), "three_ranges": middle(in_pools)}
    return figures_of_all, [hits for of in (found, found_in_pools) for query in of for hits in query]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=640)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3, help="the median of which is printed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", type=Path, help="npz with an array `embeddings`; the demo pools where absent")
    parser.add_argument("--gaussian", action="store_true", help="rows without structure")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    rows, queries = make(options)
    quantised, found = measure(ScalarQuantizedIndex, rows, queries, options.rounds)
    exact, expected = measure(FlatIndex, rows, queries, 1)
    wanted = [{row for row, _ in hits} for hits in expected]
    hit = sum(len(want & {row for row, _ in hits}) for want, hits in zip(wanted, found, strict=True))
    figures = {
        "n": options.n,
        "dim": options.dim,
        "rows": "gaussian" if options.gaussian else str(options.base or "demo pools"),
        "cores": os.cpu_count(),
        "load_average_before": load_before,
        "scalar_quantized": quantised,
        "flat": exact,
        "recall_at_10": hit / sum(map(len, wanted)),
        "equal_answers": sum(a == b for a, b in zip(expected, found, strict=True)) / len(found),
        "flat_over_scalar_quantized_p50": round(exact["all_rows"]["p50_ms"] / quantised["all_rows"]["p50_ms"], 1),
    }
    print(json.dumps(figures, indent=2))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
