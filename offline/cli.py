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

    from offline.data.archives import data_root
    from offline.finetune.pretrain import plan_from_table
    from offline.finetune.pretrain import pretrain as run_pretraining
    from offline.progress import ProgressDisplay

    if threads:
        torch.set_num_threads(threads)
    plan = plan_from_table(_read_toml(config))
    with ProgressDisplay() as display:
        for step, losses in run_pretraining(plan, data_root(data), run, stop_after):
            display.update("pretrain", step, plan.steps, f"loss {losses['loss']:.3f}")
    print(f"run directory: {run}" + ("" if stop_after else f"; encoder: local-dir:{run / 'export'}"))


@app.command
def finetune(
    config: Path,
    *,
    run: Path,
    data: DataFolder = None,
    cpu: bool = False,
    workers: int = 0,
    threads: int | None = None,
    stop_after: int | None = None,
) -> None:
    """Fine-tune an encoder adversarially (FARE, TeCoA), or go on with a run that was stopped.

    The processes of `torchrun --nproc_per_node N --no-python -- hardlook-lab finetune ...` share each batch, and do
    together what one process does alone.

    Args:
        config: A plan such as offline/configs/finetune_fare4.toml, which says what it costs and should reach.
        run: Run directory; the same plan and directory resume.
        cpu: Do not use a GPU.
        workers: Processes that read images; 0 reads in a thread.
        threads: CPU threads of each process; default all.
        stop_after: Stop with a checkpoint after this many updates.
    """
    import os

    import torch

    from offline.data.archives import data_root
    from offline.finetune.loop import finetune as run_finetuning
    from offline.finetune.plan import plan_from_table
    from offline.progress import ProgressDisplay
    from offline.runs import read_events

    if threads:
        torch.set_num_threads(threads)
    plan = plan_from_table(_read_toml(config))
    quiet = os.environ.get("RANK", "0") != "0"
    with ProgressDisplay(quiet=quiet) as display:
        updates = run_finetuning(plan, data_root(data), run, cpu=cpu, workers=workers, stop_after=stop_after)
        for done, figures in updates:
            display.update("finetune", done, plan.steps, f"{plan.method} loss {figures['loss']:.3f}")
    if not quiet:
        finished = stop_after is None or stop_after >= plan.steps
        unreadable = {(event["source"], event["id"]) for event in read_events(run, "unreadable")}
        if unreadable:
            print(f"unreadable images, replaced and listed in metrics.jsonl: {len(unreadable)}")
        print(f"run directory: {run}" + (f"; encoder: local-dir:{run / 'export'}" if finished else ""))


@app.command
def export(*, encoder: EncoderName, out: Path, half: bool = False) -> None:
    """Write an encoder as one folder in its family's published format, with its text tower if it has one.

    Args:
        out: Folder for the configuration and the weights.
        half: Write fp16 instead of fp32.
    """
    import torch

    from perception import load_encoder

    load_encoder(encoder).export(out, dtype=torch.float16 if half else torch.float32)
    print(f"local-dir:{out} (fingerprint {load_encoder(f'local-dir:{out}').fingerprint})")


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


@benchmark.command
def robustness(
    *,
    encoder: Annotated[list[str], Parameter(help="Repeat for several; catalogue name, 'local-dir:...' and so on.")],
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
    import torch

    from offline.benchmarks.robustness import RECORDS_NAME, RobustnessPlan, run_robustness
    from offline.benchmarks.robustness_records import RecordFile, summarise, table
    from offline.data.archives import data_root
    from offline.progress import ProgressDisplay
    from offline.threat import parse_eps

    if threads:
        torch.set_num_threads(threads)
    plan = RobustnessPlan(parse_eps(linf), parse_eps(l2), steps, limit, seed, batch)
    with ProgressDisplay() as display:
        for now in run_robustness(encoder, data=data_root(data), run=run, plan=plan):
            text = f"{now.encoder} {now.threat.norm}: {now.clean} right, {now.robust} robust"
            display.update(f"{now.encoder} {now.threat}", now.done, now.total, text)
    rows = summarise(RecordFile(run / RECORDS_NAME).read())
    print(table(rows), end="")
    _write_json(json_file, {"rows": [row.as_dict() for row in rows]})


@app.command
def audit(
    config: Path,
    *,
    run: Path,
    gate: Path | None = None,
    device: str = "cpu",
    threads: int | None = None,
    data: DataFolder = None,
    json_file: JsonFile = None,
) -> None:
    """Attack the decision that is deployed, or go on with an audit that was stopped; prints the figures.

    Args:
        config: A plan such as offline/configs/audit_demo_pools.toml.
        run: Run directory; the same plan resumes.
        gate: Figures of an earlier audit (report.json); exit code 1 where a system is worse beyond their intervals.
        device: torch device, such as 'cpu' or 'cuda'.
        threads: CPU threads; default all.
    """
    import torch

    from offline.audit.gate import Recorded, compare
    from offline.audit.plan import plan_from_table
    from offline.audit.report import Run, write_report
    from offline.audit.run import run_audit
    from offline.audit.tables import table
    from offline.data.archives import data_root
    from offline.progress import ProgressDisplay

    if threads:
        torch.set_num_threads(threads)
    plan = plan_from_table(_read_toml(config))
    recorded = Recorded.load(gate) if gate is not None else None  # read now: not after hours, if it cannot be
    updates = run_audit(plan, data=data_root(data), folder=config.parent, run=run, device=device)
    with ProgressDisplay() as display:
        for now in updates:
            text = f"{now.system}, {now.setting}: {now.clean} right, {now.robust} robust"
            display.update(f"{now.system} {now.setting}", now.done, now.total, text)
    figures = Run.read(run).figures
    print(table(figures), end="")
    print("\n".join(check.sentence for check in figures.checks if not check.passed))
    print(f"report: {write_report(run)}")
    _write_json(json_file, figures.as_dict())
    if recorded is not None:
        findings = compare(plan, figures, recorded)
        print("\n".join(map(str, findings)))
        sys.exit(any(finding.worse for finding in findings))


@app.command
def report(run: Path) -> None:
    """Write an audit's report anew from its records: one HTML page, JSON and CSV.

    Args:
        run: Run directory of an audit, finished or not.
    """
    from offline.audit.report import Run, write_report
    from offline.audit.tables import table

    print(table(Run.read(run).figures), end="")
    print(f"report: {write_report(run)}")


@app.command
def calibrate(
    run: Path,
    *,
    system: str,
    out: Path,
    max_false_negative: float,
    max_false_positive: float,
    norm: Literal["linf", "l2"] | None = None,
    eps: str | None = None,
    steps: int | None = None,
    confident: bool = False,
) -> None:
    """Choose the thresholds of the decision for target error rates, on clean and attacked queries of an audit.

    Args:
        run: Run directory of a moderation audit.
        system: Which of its systems.
        out: Policy file to write, for HARDLOOK_POLICY_FILE.
        max_false_negative: Share of unsafe images that may be answered 'safe'.
        max_false_positive: Share of safe images that may be answered 'unsafe'.
        norm: With eps and steps: the setting of the audit whose attacked images count; default the only one.
        eps: Radius such as 4/255, as recorded.
        steps: Updates of the attack.
        confident: The upper ends of the 95 % intervals have to meet the targets.
    """
    from offline.audit.calibrate import calibrate as choose
    from offline.audit.calibrate import describe
    from offline.audit.record import Setting
    from offline.errors import PlanError
    from offline.threat import parse_eps

    setting = None
    if norm is not None and eps is not None and steps is not None:
        setting = Setting(norm, parse_eps(eps), steps)
    elif (norm, eps, steps) != (None, None, None):
        raise PlanError("give norm, eps and steps together, or none of them")
    calibrated = choose(
        run,
        system,
        setting,
        max_false_negative=max_false_negative,
        max_false_positive=max_false_positive,
        confident=confident,
    )
    calibrated.save(out)
    print(describe(calibrated))
    print(f"policy file: {out}")


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


def _read_toml(path: Path) -> dict[str, Any]:
    from offline.errors import PlanError

    try:
        return tomllib.loads(path.read_text("utf8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} is no TOML: {error}") from error


def _write_json(path: Path | None, figures: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n")


def main() -> None:
    """Entry point: one clear line and exit code 2 for what the user can mend."""
    from offline.errors import OfflineError
    from perception.errors import PerceptionError
    from perception.memory import keep_freed_memory

    keep_freed_memory()
    try:
        app()
    except (PerceptionError, OfflineError, OSError) as error:
        print(f"hardlook-lab: {error}", file=sys.stderr)
        sys.exit(2)
