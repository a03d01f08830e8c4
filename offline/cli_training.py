"""`hardlook-lab`: the commands that train. They import their libraries inside, so that `--help` is quick."""

from pathlib import Path

from cyclopts import App

from offline.cli_options import DataFolder, read_toml, use_threads


def add_commands(app: App) -> None:
    """Register the commands."""
    app.command(pretrain)
    app.command(finetune)
    app.command(tune)
    app.command(distill)


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
    from offline.data.archives import data_root
    from offline.finetune.pretrain import plan_from_table
    from offline.finetune.pretrain import pretrain as run_pretraining
    from offline.progress import ProgressDisplay

    use_threads(threads)
    plan = plan_from_table(read_toml(config))
    with ProgressDisplay() as display:
        for step, losses in run_pretraining(plan, data_root(data), run, stop_after):
            display.update("pretrain", step, plan.steps, f"loss {losses['loss']:.3f}")
    print(f"run directory: {run}" + ("" if stop_after else f"; encoder: local-dir:{run / 'export'}"))


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

    from offline.data.archives import data_root
    from offline.finetune.loop import finetune as run_finetuning
    from offline.finetune.plan import plan_from_table
    from offline.progress import ProgressDisplay
    from offline.runs import read_events

    use_threads(threads)
    plan = plan_from_table(read_toml(config))
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


def tune(
    config: Path,
    *,
    run: Path,
    data: DataFolder = None,
    cpu: bool = False,
    workers: int = 0,
    threads: int | None = None,
    stop_after: int | None = None,
) -> None:
    """Tune an encoder on what people say of NIGHTS (MLP head, LoRA, LipSim), or go on with a run that was stopped.

    Args:
        config: A plan such as offline/configs/tune_mlp_fare4_vit_b_16.toml, which says what it costs and should reach.
        run: Run directory; the same plan and directory resume.
        cpu: Do not use a GPU.
        workers: Processes that read images; 0 reads in a thread.
        threads: CPU threads; default all.
        stop_after: Stop with a checkpoint after this many updates.
    """
    from offline.data.archives import data_root
    from offline.finetune.tune import tune as run_tuning
    from offline.finetune.tune_plan import plan_from_table
    from offline.progress import ProgressDisplay
    from offline.runs import read_events

    use_threads(threads)
    plan = plan_from_table(read_toml(config))
    with ProgressDisplay() as display:
        for now in run_tuning(plan, data_root(data), run, cpu=cpu, workers=workers, stop_after=stop_after):
            display.update(now.part, now.done, now.total, now.text)
    for event in read_events(run, "tuned")[-1:]:
        print(f"epoch {event['epoch']} (0-based) has the least validation loss, accuracy {event['accuracy']:.4f}")
        print(f"encoder: {event['encoder']}; whole: local-dir:{run / 'export'}")
    print(f"run directory: {run}")


def distill(
    config: Path,
    *,
    run: Path,
    data: DataFolder = None,
    cpu: bool = False,
    workers: int = 0,
    threads: int | None = None,
    stop_after: int | None = None,
) -> None:
    """Train a 1-Lipschitz LipSim network on any encoder's embeddings, or go on with a run that was stopped.

    Args:
        config: A plan such as offline/configs/distill_bundled_lipsim.toml, which says what it costs and should reach.
        run: Run directory; the same plan and directory resume.
        cpu: Do not use a GPU.
        workers: Processes that read images; 0 reads in a thread.
        threads: CPU threads; default all.
        stop_after: Stop with a checkpoint after this many updates.
    """
    from offline.data.archives import data_root
    from offline.finetune.distill import distill as run_distillation
    from offline.finetune.distill_plan import plan_from_table
    from offline.progress import ProgressDisplay
    from offline.runs import read_events

    use_threads(threads)
    plan = plan_from_table(read_toml(config))
    with ProgressDisplay() as display:
        updates = run_distillation(plan, data_root(data), run, cpu=cpu, workers=workers, stop_after=stop_after)
        for done, figures in updates:
            display.update("distill", done, plan.steps, f"{plan.objective} loss {figures['loss']:.4f}")
    finished = stop_after is None or stop_after >= plan.steps
    unreadable = {(event["source"], event["id"]) for event in read_events(run, "unreadable")}
    if unreadable:
        print(f"unreadable images, replaced and listed in metrics.jsonl: {len(unreadable)}")
    print(f"run directory: {run}" + (f"; encoder: local-dir:{run / 'export'}" if finished else ""))
