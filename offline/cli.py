"""`hardlook-lab`: the offline jobs. Imports its libraries inside the commands, so that `--help` is quick."""

import json
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

app = App(name="hardlook-lab", help="Offline jobs: train, measure and build the encoders and demo pools of hardlook.")
benchmark = App(name="benchmark", help="Measure an encoder; prints the figures and writes JSON on request.")
app.command(benchmark)

DataFolder = Annotated[Path | None, Parameter(help="Folder with train/, bench/, weights/. Default: $HARDLOOK_DATA.")]
EncoderName = Annotated[str, Parameter(help="Catalogue name, 'hf-hub:...', 'local-dir:...' or 'visual:...'.")]
JsonFile = Annotated[Path | None, Parameter(name="--json", help="Also write the figures to this file.")]
Precision = Literal["fp32", "bf16"]


@app.command
def encoders() -> None:
    """List the encoders of the catalogue with their source."""
    from perception import list_encoders

    for name, card in list_encoders().items():
        source = "bundled with this package" if card.source.startswith("local-dir:") else card.source
        print(f"{name:32} {source}")


@app.command
def pretrain(
    config: Path, *, run: Path, data: DataFolder = None, threads: int | None = None, stop_after: int | None = None
) -> None:
    """Train the small bundled CLIP, or go on with a run that was stopped.

    Args:
        config: A plan such as offline/configs/pretrain_clean.toml, which says what it costs and should reach.
        run: Run directory; the same plan and directory resume.
        threads: CPU threads; default all.
        stop_after: Stop with a checkpoint after this step of the plan.
    """
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from offline.data.archives import data_root
    from offline.finetune.pretrain import plan_from_table
    from offline.finetune.pretrain import pretrain as run_pretraining

    if threads:
        torch.set_num_threads(threads)
    plan = plan_from_table(tomllib.loads(config.read_text("utf8")))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("loading", total=plan.steps)
        for step, losses in run_pretraining(plan, data_root(data), run, stop_after):
            progress.update(task, completed=step, description=f"loss {losses['loss']:.3f}")
    print(f"run directory: {run}" + ("" if stop_after else f"; encoder: local-dir:{run / 'export'}"))


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
    _write_json(json_file, figures)


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
    _write_json(json_file, figures)


@app.command
def demo_pools(*, encoder: EncoderName, out: Path, data: DataFolder = None) -> None:
    """Build the demo pools (embeddings and ids, no pixels) for an encoder.

    Args:
        out: Folder for `pools.safetensors` and `exemplars.jsonl`.
    """
    from offline.data.archives import data_root
    from offline.demo_pools import build
    from perception import load_encoder

    gallery = build(load_encoder(encoder), data_root(data), out)
    counts = {label: gallery.labels.count(label) for label in sorted(set(gallery.labels))}
    print(f"{len(gallery)} exemplars {counts} in {out}")


@app.command
def draw_benign_hits(*, out: Path) -> None:
    """Draw the benign test hits, which ship in perception/benign_hits/, anew.

    Args:
        out: Folder for the PNG files.
    """
    from offline.benign_hits import draw

    out.mkdir(parents=True, exist_ok=True)
    print("\n".join(str(path) for path in draw(out)))


def _write_json(path: Path | None, figures: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n")


def main() -> None:
    """Entry point: one clear line and exit code 2 for what the user can mend."""
    from offline.errors import OfflineError
    from perception.errors import PerceptionError

    try:
        app()
    except (PerceptionError, OfflineError, OSError, tomllib.TOMLDecodeError) as error:
        print(f"hardlook-lab: {error}", file=sys.stderr)
        sys.exit(2)
