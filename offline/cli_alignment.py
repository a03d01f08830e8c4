"""`hardlook-lab benchmark cue-conflict|near-duplicates|triplets`: encoders beside people, on data that is at hand."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from offline.cli_options import DataFolder, EncoderNames, JsonFile, use_threads, write_json

_Archives = Annotated[
    list[Path] | None, Parameter(help="Zip with groups.csv; repeat. Default: the two of DATA/neardup.")
]
_Templates = Annotated[
    list[str] | None, Parameter(help="Prompt with one '{}' for the class; repeat. Default: CLIP's seven.")
]


def add_commands(benchmark: App) -> None:
    """Add the commands to `hardlook-lab benchmark`."""
    for command in (cue_conflict, near_duplicates, triplets):
        benchmark.command(command)


def cue_conflict(
    *,
    encoder: EncoderNames,
    archive: Path | None = None,
    template: _Templates = None,
    prototypes: Path | None = None,
    picture: Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    threads: int | None = None,
    data: DataFolder = None,
    json_file: JsonFile = None,
) -> None:
    """Shape or texture: 1,200 cue-conflict images beside the answers of ten people each, with 95 % intervals.

    Args:
        archive: Zip with labels.csv; default the one in DATA/perceptual.
        prototypes: Folder with a sub-folder of images for each class, instead of texts: for encoders without text.
        picture: Draw the shape bias by class, people beside encoders, as .png or .svg.
        seed: Of the bootstrap.
        device: torch device, such as 'cpu' or 'cuda'.
        threads: CPU threads; default all.
    """
    from offline.benchmarks.alignment_tables import difference_table, observer_table, observers_as_json
    from offline.benchmarks.cue_conflict import ARCHIVE, TEMPLATES, CueConflictBenchmark, classifier_of
    from offline.benchmarks.cue_conflict_picture import draw_shape_bias, require_picture
    from offline.data.archives import data_root
    from offline.errors import PlanError
    from perception import load_encoder

    use_threads(threads)
    if picture is not None:
        require_picture(picture)
    if prototypes is not None and template is not None:
        raise PlanError("give --template or --prototypes, not both")
    templates = tuple(template or TEMPLATES)
    benchmark = CueConflictBenchmark(archive or data_root(data) / ARCHIVE, seed=seed)
    rows, fingerprints = [benchmark.humans()], {}
    for name in encoder:
        loaded = load_encoder(name, device=device)
        rows.append(benchmark.run(loaded, classifier_of(loaded, templates, prototypes)))
        fingerprints[name] = loaded.fingerprint
    by = f"prototypes of {prototypes}" if prototypes is not None else "prompts: " + " | ".join(templates)
    print(f"{len(benchmark.images)} images, {benchmark.left_out} of equal cues left out; seed {seed}; {by}")
    print(observer_table(rows), end="")
    print(difference_table(rows[1:]), end="")
    if picture is not None:
        draw_shape_bias(rows, picture)
        print(f"picture: {picture}")
    head = {"suite": "cue-conflict", "images": len(benchmark.images), "left_out": benchmark.left_out, "seed": seed}
    write_json(json_file, {**head, "classes_by": by, "fingerprints": fingerprints, **observers_as_json(rows)})


def near_duplicates(
    *,
    encoder: EncoderNames,
    archive: _Archives = None,
    seed: int = 0,
    device: str = "cpu",
    threads: int | None = None,
    data: DataFolder = None,
    json_file: JsonFile = None,
) -> None:
    """Versions of one photo and photos of one place: does an image find the others, and which manipulation hides it?

    Args:
        seed: Of the bootstrap.
        device: torch device, such as 'cpu' or 'cuda'.
        threads: CPU threads; default all.
    """
    from offline.benchmarks.alignment_tables import group_table, retrieval_table, variant_table
    from offline.benchmarks.near_duplicates import ARCHIVES, NearDuplicateBenchmark
    from offline.data.archives import data_root
    from perception import load_encoder

    use_threads(threads)
    paths = archive or [data_root(data) / path for path in ARCHIVES]
    benchmarks = [NearDuplicateBenchmark(path, seed=seed) for path in paths]
    by_encoder, fingerprints = [], {}
    for name in encoder:
        loaded = load_encoder(name, device=device)
        by_encoder.append([benchmark.run(loaded) for benchmark in benchmarks])
        fingerprints[name] = loaded.fingerprint
    results = list(zip(*by_encoder, strict=True))
    print(retrieval_table([result for of_archive in results for result in of_archive]), end="")
    for of_archive in results:
        print(f"\n{of_archive[0].archive}, by group\n{group_table(of_archive)}", end="")
        print(f"\n{of_archive[0].archive}, similarity to the group's first image\n{variant_table(of_archive)}", end="")
    figures = {
        "suite": "near-duplicates",
        "seed": seed,
        "fingerprints": fingerprints,
        "rows": [result.as_dict() for of_archive in results for result in of_archive],
    }
    write_json(json_file, figures)


def triplets(
    *,
    encoder: EncoderNames,
    archive: Path | None = None,
    device: str = "cpu",
    threads: int | None = None,
    data: DataFolder = None,
    json_file: JsonFile = None,
) -> None:
    """The demonstration triplets of LPIPS and DreamSim: distances and choices, without a verdict.

    Args:
        archive: Zip of the two; default the one in DATA/perceptual.
        device: torch device, such as 'cpu' or 'cuda'.
        threads: CPU threads; default all.
    """
    from offline.benchmarks.alignment_tables import triplet_table
    from offline.benchmarks.triplets import ARCHIVE, TripletBenchmark
    from offline.data.archives import data_root
    from perception import load_encoder

    use_threads(threads)
    benchmark = TripletBenchmark(archive or data_root(data) / ARCHIVE)
    rows, fingerprints = [], {}
    for name in encoder:
        loaded = load_encoder(name, device=device)
        rows += list(benchmark.run(loaded))
        fingerprints[name] = loaded.fingerprint
    print(triplet_table(rows), end="")
    print("No vote of people is published for these two triplets: there is no right answer.")
    table = [row.as_dict() for row in rows]
    write_json(json_file, {"suite": "triplets", "fingerprints": fingerprints, "rows": table})
