"""`hardlook-lab`: the offline jobs. Imports its libraries inside the commands, so that `--help` is quick."""

import sys
from pathlib import Path
from typing import Literal

from cyclopts import App

from offline.cli_alignment import add_commands as add_alignment_commands
from offline.cli_benchmarks import benchmark
from offline.cli_inversion import invert
from offline.cli_options import DataFolder, EncoderName, JsonFile, read_toml, use_threads, write_json
from offline.cli_retrieval import add_commands as add_retrieval_commands
from offline.cli_suites import add_commands as add_suite_commands
from offline.cli_training import add_commands as add_training_commands

app = App(name="hardlook-lab", help="Offline jobs: train, measure and build the encoders and demo pools of hardlook.")
app.command(benchmark)
app.command(invert)
add_training_commands(app)
add_alignment_commands(benchmark)
add_suite_commands(benchmark)
add_retrieval_commands(benchmark)


@app.command
def encoders() -> None:
    """List the encoders of the catalogue with their source."""
    from perception import list_encoders

    for name, card in list_encoders().items():
        source = "bundled with this package" if card.source.startswith("local-dir:") else card.source
        print(f"{name:32} {source}")


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
    from offline.audit.gate import Recorded, compare
    from offline.audit.plan import plan_from_table
    from offline.audit.report import Run, write_report
    from offline.audit.run import run_audit
    from offline.audit.tables import table
    from offline.data.archives import data_root
    from offline.progress import ProgressDisplay

    use_threads(threads)
    plan = plan_from_table(read_toml(config))
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
    write_json(json_file, figures.as_dict())
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
