"""`hardlook-lab benchmark`: THINGS, ROxford5k, RParis6k and grids of neighbours.

The commands import their libraries inside, so that `--help` is quick.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import App

from offline.cli_options import EncoderNames, JsonFile, use_threads, write_json
from offline.cli_suites import SuiteOptions, measure

if TYPE_CHECKING:
    from offline.benchmarks.published import Figure
    from offline.benchmarks.suites import Show, SuiteRequest
    from offline.data.revisited import RevisitedSet

PAPERS_TRIPLETS = 5000


def add_commands(benchmark: App) -> None:
    """Register the commands."""
    for command in (things, roxford, rparis, neighbors):
        benchmark.command(command)


def things(
    *,
    options: SuiteOptions,
    variant: Literal["triplets", "dreamsim"] = "triplets",
    triplets: Path | None = None,
    image_list: Path | None = None,
    images: Path | None = None,
    attacked: int = 0,
) -> None:
    """THINGS odd-one-out (table XII): how often the image outside the most similar pair is the one that people chose.

    All triplets count unless there is a --limit, of which 5000 is the paper's recorded run. --steps, --square and
    --seed are those of the attack, if there is one.

    Args:
        variant: 'triplets' for the table of 4.7M choices, 'dreamsim' for the rows of things_valset.txt.
        triplets: The table or list of triplets, if it is not at its published place in the folder.
        image_list: The list of the concepts' images, likewise.
        images: The folder of images, likewise.
        attacked: Also attack the first so many triplets (linf 4/255, l2 3), which needs --run; the paper does not.
    """
    from offline.benchmarks.suite_things import ThingsFiles
    from offline.benchmarks.suite_things import things as run_things
    from offline.progress import ProgressDisplay

    use_threads(options.threads)
    options = dataclasses.replace(options, clean_only=options.clean_only or not attacked)
    files = ThingsFiles(variant, triplets, image_list, images)
    with ProgressDisplay() as display:
        figures = run_things(options.request("things"), display.update, files, attacked)
    _report(figures, options.json_file, "things")
    if variant == "triplets" and figures[0].count != PAPERS_TRIPLETS:
        print(f"On {figures[0].count} triplets; the published figures are of the first {PAPERS_TRIPLETS}.")


def roxford(*, options: SuiteOptions, crop: bool = True) -> None:
    """ROxford5k (table IX): official mAP, easy, medium and hard, clean and with queries under Eq. 6 (linf 4/255).

    A --limit takes the first so many queries.

    Args:
        crop: Crop the queries to their boxes, as the official protocol does; --no-crop shows them whole.
    """
    _revisited("roxford", options, crop)


def rparis(*, options: SuiteOptions, crop: bool = True) -> None:
    """RParis6k (table IX): as roxford.

    Args:
        crop: Crop the queries to their boxes, as the official protocol does; --no-crop shows them whole.
    """
    _revisited("rparis", options, crop)


def _revisited(which: "RevisitedSet", options: SuiteOptions, crop: bool) -> None:
    from offline.benchmarks.suite_revisited import revisited
    from offline.data.archives import data_root
    from offline.data.revisited import default_folder

    def run(request: "SuiteRequest", show: "Show") -> Sequence["Figure"]:
        return revisited(request, show, which, crop=crop)

    folder = options.folder if options.folder is not None else default_folder(which, data_root(options.data))
    measure(dataclasses.replace(options, folder=folder), which, run)


def neighbors(
    *,
    encoder: EncoderNames,
    gallery: Path,
    out: Path,
    queries: Path | None = None,
    count: int | None = None,
    k: int = 5,
    linf: str = "4/255",
    steps: int = 50,
    seed: int = 0,
    batch: int = 8,
    device: str = "cpu",
    threads: int | None = None,
    json_file: JsonFile = None,
) -> None:
    """A grid of nearest neighbours under each encoder, of clean queries and of the same under Eq. 6.

    Args:
        gallery: Folder of the images that are searched, such as train2017 of MS-COCO.
        out: Folder for grid.png and grid.html; it is the run directory, which resumes, and further encoders may join.
        queries: Folder of images to ask for; default images of the gallery, which are not their own neighbours.
        count: A seeded choice of so many queries; default all of --queries, else 4 of the gallery.
        k: Neighbours.
        linf: Radius, such as 4/255.
        steps: Of the attack.
        seed: Of the choice and of the random starts.
        batch: Queries attacked together.
        device: torch device, such as 'cpu' or 'cuda'.
        threads: CPU threads; default all.
    """
    from offline.benchmarks.neighbors import NeighborsPlan, open_neighbors, overlap_figures
    from offline.benchmarks.neighbors import neighbors as run_neighbors
    from offline.benchmarks.neighbors_page import write_grid
    from offline.progress import ProgressDisplay
    from offline.threat import parse_eps

    use_threads(threads)
    chosen = (4 if queries is None else 0) if count is None else count
    plan = NeighborsPlan(chosen, k, parse_eps(linf), steps, seed, batch)
    images = open_neighbors(gallery, queries, plan)
    with ProgressDisplay() as display:
        records = run_neighbors(encoder, images, plan, out, display.update, device=device)
    png, page = write_grid(records, images, plan, out)
    _report(overlap_figures(records), json_file, "neighbors")
    print(f"grid: {png}\npage: {page}")


def _report(figures: "Sequence[Figure]", json_file: Path | None, suite: str) -> None:
    """Print the figures, and write them where that is asked for."""
    from offline.benchmarks.published import figure_table, figures_as_json

    print(figure_table(figures), end="")
    content: dict[str, Any] = {"suite": suite, "figures": figures_as_json(figures)}
    write_json(json_file, content)
