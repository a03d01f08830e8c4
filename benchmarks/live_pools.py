"""Live pools: how soon a change of large pools is found, and what searches cost meanwhile.

    python benchmarks/live_pools.py --n 1000000 --dim 640 --json live.json

Publishes pools of n exemplars (rows as those of benchmarks/search.py), opens them as the service does, with a
catalogue, and lets the service's own editor add exemplars. Prints the time from asking for an addition until it is
durable and found by a search of all pools; p50 and p99 of a search for one image in the three pools, alone, with the
additions on top, and while additions are made as fast as they can be; the exact index beside it; and the ratio.
"""

import argparse
import asyncio
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.search import Embeddings, make, unit
from indexer.backends.choice import build_index
from indexer.backends.flat import FlatIndex
from indexer.catalog.database import Database
from indexer.catalog.edits import Add
from indexer.catalog.ledger import Catalog
from indexer.catalog.state import Stamp
from indexer.contents import POOLS, Contents, Exemplar
from indexer.snapshot import MakeIndex
from indexer.store import SnapshotStore
from service.editing import Editor
from service.published import Published

_LABELS = ("buffer", "safe", "unsafe")
_K = 10


def publish(root: Path, rows: Embeddings, stamp: Stamp) -> None:
    """Publish rows as the moderation pools: a tenth buffer, the others half safe, half unsafe."""
    n = len(rows)
    ends = (n // 10, n // 10 + (n - n // 10) // 2, n)
    exemplars = [
        Exemplar(f"e{row:09d}", _LABELS[sum(row >= end for end in ends[:2])], source=f"e{row:09d}.jpg")
        for row in range(n)
    ]
    contents = Contents(POOLS, stamp.name, stamp.fingerprint, tuple(exemplars), rows)
    SnapshotStore(root, POOLS).publish(contents)


def percentiles(times_s: list[float]) -> dict[str, float]:
    """Milliseconds."""
    p50, p99 = np.percentile(np.array(times_s) * 1000, [50, 99])
    return {"p50_ms": round(float(p50), 2), "p99_ms": round(float(p99), 2)}


def searches(published: Published, queries: Embeddings) -> list[float]:
    """Seconds of a search for one image in the three pools, for each query."""
    times_s = []
    for query in queries:
        started_s = time.perf_counter()
        published.pools().evidence(query[np.newaxis], _K)
        times_s.append(time.perf_counter() - started_s)
    return times_s


def open_pools(root: Path, stamp: Stamp, index: MakeIndex, database: Database) -> tuple[Published, Catalog, float]:
    """As the service does; and the seconds that it takes."""
    started_s = time.perf_counter()
    published = Published(root, stamp, index)
    catalog = Catalog(database, root, published.base)
    published.open(catalog)
    return published, catalog, time.perf_counter() - started_s


async def additions(
    editor: Editor, published: Published, stamp: Stamp, rows: Embeddings, first: int
) -> tuple[list[float], list[float]]:
    """Seconds until each addition is durable, and until a search has found it."""
    durable_s, found_s = [], []
    for number, row in enumerate(rows, first):
        id = f"new-{number}"
        started_s = time.perf_counter()
        await editor.apply([Add(POOLS, Exemplar(id, "unsafe"), row, stamp)], actor="benchmark")
        durable_s.append(time.perf_counter() - started_s)
        [evidence] = await asyncio.to_thread(published.pools().evidence, row[np.newaxis], _K)
        found_s.append(time.perf_counter() - started_s)
        assert id in {neighbor.id for neighbor in evidence.neighbors}, f"{id} is not found"
    return durable_s, found_s


async def edited(
    published: Published, catalog: Catalog, stamp: Stamp, options: argparse.Namespace, queries: Embeddings
) -> dict[str, Any]:
    """What additions cost, and what they cost searches."""
    rng = np.random.default_rng(options.seed + 1)
    new = unit(rng.standard_normal((options.additions, options.dim), dtype=np.float32))
    half = options.additions // 2
    async with Editor(catalog, published, 0.25) as editor:
        durable_s, found_s = await additions(editor, published, stamp, new[:half], 0)
        meanwhile_s: list[float] = []
        thread = threading.Thread(target=lambda: meanwhile_s.extend(searches(published, queries)))
        thread.start()
        more_durable_s, more_found_s = await additions(editor, published, stamp, new[half:], half)
        await asyncio.to_thread(thread.join)
    after_s = await asyncio.to_thread(searches, published, queries)
    return {
        "addition_durable": percentiles(durable_s),
        "addition_found": {**percentiles(found_s), "max_ms": round(1000 * max(found_s), 1)},
        "addition_found_beside_searches": {**percentiles(more_found_s), "max_ms": round(1000 * max(more_found_s), 1)},
        "search_with_additions": percentiles(after_s),
        "search_beside_additions": percentiles(meanwhile_s),
        "additions_per_s_beside_searches": round(len(more_durable_s) / sum(more_found_s), 1),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=640)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--additions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", type=Path, help="npz with an array `embeddings`; the demo pools where absent")
    parser.add_argument("--gaussian", action="store_true", help="rows without structure")
    parser.add_argument("--folder", type=Path, help="for the pools, a temporary one by default; needs 5 KB an exemplar")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    stamp = Stamp("benchmark", "benchmark-fingerprint", options.dim)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        root = Path(folder)
        rows, queries = make(options)
        publish(root, rows, stamp)
        del rows
        database = Database.open(f"sqlite:///{root}/catalog.sqlite3")
        published, catalog, opened_s = open_pools(root, stamp, build_index, database)
        searches(published, queries[:20])
        result: dict[str, Any] = {
            "n": options.n,
            "dim": options.dim,
            "seed": options.seed,
            "opened_s": round(opened_s, 1),
            "search": percentiles(searches(published, queries)),
        }
        result |= asyncio.run(edited(published, catalog, stamp, options, queries))
        del published, catalog
        exact, _, _ = open_pools(root, stamp, FlatIndex, database)
        exact_s = searches(exact, queries[: max(20, len(queries) // 4)])
        result["exact_search_with_additions"] = percentiles(exact_s)
        result["exact_to_fast"] = round(
            result["exact_search_with_additions"]["p50_ms"] / result["search_with_additions"]["p50_ms"], 1
        )
        database.close()
    for name, value in result.items():
        print(f"{name}: {value}")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
