"""`hardlook-lab benchmark`: measure encoders. The commands import their libraries inside, so that `--help` is quick."""

from pathlib import Path
from typing import Any

from cyclopts import App

from offline.cli_options import DataFolder, EncoderName, EncoderNames, JsonFile, Precision, use_threads, write_json

benchmark = App(name="benchmark", help="Measure an encoder; prints the figures and writes JSON on request.")


@benchmark.command
def embedding(
    *, encoder: EncoderName, precision: Precision = "fp32", data: DataFolder = None, json_file: JsonFile = None
) -> None:
    """Clean quality: Caltech-101 and grocery 1-NN, Tiny-ImageNet zero-shot, Flickr8k text-to-image, speed."""
    from offline.benchmarks.embedding import EmbeddingBenchmark
    from offline.data.archives import data_root
    from perception import load_encoder

    loaded = load_encoder(encoder, precision=precision)
    figures: dict[str, Any] = {"encoder": encoder, "fingerprint": loaded.fingerprint, "precision": precision}
    for metric, value in EmbeddingBenchmark(data_root(data)).run(loaded, loaded.text):
        figures[metric] = round(value, 4)
        print(f"{metric:30} {value:.4f}", flush=True)
    write_json(json_file, figures)


@benchmark.command
def moderation(*, encoder: EncoderName, gallery: Path, data: DataFolder = None, json_file: JsonFile = None) -> None:
    """The dangerous-object task on images that are disjoint from the demo pools: safe / review / unsafe shares.

    Args:
        gallery: The demo pools, as `demo-pools` wrote them.
    """
    from offline.data.archives import data_root
    from offline.demo_pools import measure
    from perception import Gallery, load_encoder

    loaded = load_encoder(encoder)
    figures = {"encoder": encoder, **measure(loaded, Gallery.load(gallery), data_root(data))}
    for name, value in figures.items():
        print(f"{name:34} {value}")
    write_json(json_file, figures)


@benchmark.command
def robustness(
    *,
    encoder: EncoderNames,
    run: Path,
    limit: int | None = None,
    steps: int = 100,
    linf: str = "4/255",
    l2: str = "3",
    seed: int = 0,
    batch: int = 64,
    threads: int | None = None,
    data: DataFolder = None,
    json_file: JsonFile = None,
) -> None:
    """Caltech-101 nearest neighbours, clean and under APGD (linf and l2), or go on with a run that was stopped.

    Args:
        run: Run directory; the same plan resumes, and further encoders may join.
        limit: The first so many of a seeded shuffle of the 1,025 queries; default all.
        steps: Steps of APGD.
        linf: Radius, such as 4/255.
        l2: Radius at 224 px; scaled with the side of the encoder's input.
        seed: Of the shuffle and the random starts.
        batch: Images attacked together.
        threads: CPU threads; default all.
    """
    from offline.benchmarks.robustness import RECORDS_NAME, RobustnessPlan, run_robustness
    from offline.benchmarks.robustness_records import RecordFile, summarise, table
    from offline.data.archives import data_root
    from offline.progress import ProgressDisplay
    from offline.threat import parse_eps

    use_threads(threads)
    plan = RobustnessPlan(parse_eps(linf), parse_eps(l2), steps, limit, seed, batch)
    with ProgressDisplay() as display:
        for now in run_robustness(encoder, data=data_root(data), run=run, plan=plan):
            text = f"{now.encoder} {now.threat.norm}: {now.clean} right, {now.robust} robust"
            display.update(f"{now.encoder} {now.threat}", now.done, now.total, text)
    rows = summarise(RecordFile(run / RECORDS_NAME).read())
    print(table(rows), end="")
    write_json(json_file, {"rows": [row.as_dict() for row in rows]})
