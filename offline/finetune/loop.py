"""`hardlook-lab finetune`: FARE and TeCoA fine-tuning of any encoder, on one process or many.

Owns the state of a run and its update. Every random choice is a function of (seed, step, slot of the global batch), so
a resumed run is the run that was killed, and the ranks of `torchrun` do together what one process does alone. The inner
attack always sees the unwrapped tower in eval mode; only the update goes through DistributedDataParallel.
"""

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from offline.data.batches import Batch, BatchPlan, BatchReader
from offline.data.classes import Naming
from offline.data.labelled import LabelledImages, joined, open_images
from offline.errors import PlanError, RunError
from offline.finetune.evaluate import HeldOut
from offline.finetune.inner import InnerAttack
from offline.finetune.objectives import Fare, FinetuneObjective, Tecoa, combined
from offline.finetune.plan import FinetunePlan, SourcePlan
from offline.finetune.schedule import warmup_cosine
from offline.folding import fold
from offline.runs import RunDirectory, adam_tensors, restore_adam
from offline.seeds import mixed_seed
from perception import load_encoder
from perception.encoders.tower import TowerEncoder
from perception.preprocess import PreprocessSpec
from perception.text import class_embeddings

if TYPE_CHECKING:
    from accelerate import Accelerator

Figures = dict[str, float]


class Finetuning:
    """One run: original and trained tower, data, optimiser."""

    def __init__(self, plan: FinetunePlan, data: Path, accelerator: "Accelerator", workers: int = 0) -> None:
        """Load everything that the plan names.

        Raises:
            PlanError: the plan does not fit the encoder, the data or the number of processes.
            PerceptionError, DataMissing: see `load_encoder` and `open_images`.
        """
        self.plan, self.accelerator, self.workers = plan, accelerator, workers
        self.share = self._share_of_each_process()
        self.original: TowerEncoder = load_encoder(plan.encoder, device=str(accelerator.device))
        self.sources = joined([open_source(source, data) for source in plan.train])
        self.objective = self._objective()
        student = copy.deepcopy(self.original)
        student.visual.requires_grad_(True)
        self.student = self._in_step_across_ranks(student)
        folded = fold(self.student)
        self.attacked: nn.Module = folded if folded is not None else self.student
        self.refresh: Callable[[], None] = folded.refresh if folded is not None else lambda: None
        # The published recipe decays every visual parameter alike (methods 3.3).
        self.optimizer = torch.optim.AdamW(
            self.student.visual.parameters(), lr=plan.lr, betas=plan.betas, weight_decay=plan.weight_decay
        )
        self.model: nn.Module = accelerator.prepare(self.student)
        self.average = copy.deepcopy(self.student.visual.state_dict()) if plan.ema_decay else None
        held_out = joined([open_source(source, data) for source in plan.held_out]) if plan.held_out else None
        self.held_out = HeldOut(plan, self.original, held_out) if held_out and accelerator.is_main_process else None

    def _share_of_each_process(self) -> int:
        parts = self.accelerator.num_processes * self.plan.accumulation_steps
        if self.plan.batch_size % parts:
            raise PlanError(
                f"batch_size {self.plan.batch_size} is not a multiple of {self.accelerator.num_processes} processes "
                f"x {self.plan.accumulation_steps} accumulation steps"
            )
        return self.plan.batch_size // int(self.accelerator.num_processes)

    def _objective(self) -> FinetuneObjective:
        if self.plan.method == "fare":
            return Fare()
        for part in self.sources.parts:
            if not part.class_names:
                raise PlanError(f"TeCoA needs a class for every image; {part.name!r} has none")
        names = [names[0] for names in self.sources.class_names]
        # A clone, because tensors made in inference mode cannot take part in the attack's graph.
        return Tecoa(class_embeddings(self.original.text, names, [self.plan.template]).clone())

    def _in_step_across_ranks(self, student: TowerEncoder) -> TowerEncoder:
        """BatchNorm's statistics are of the global batch, or the run is refused."""
        has_batch_norm = any(isinstance(m, _BatchNorm) for m in student.modules())
        if self.accelerator.num_processes == 1 or not has_batch_norm or self.plan.freeze_batch_norm:
            return student
        if self.accelerator.device.type != "cuda":
            raise PlanError(
                "a tower with BatchNorm cannot be trained by several CPU processes in step (SyncBatchNorm needs CUDA): "
                "use one process, or freeze_batch_norm = true"
            )
        from timm.layers.norm_act import convert_sync_batchnorm

        student.visual = convert_sync_batchnorm(student.visual)  # type: ignore[no-untyped-call]
        return student

    def reader(self) -> BatchReader:
        """This process's share of every global batch."""
        sizes = [len(source) for source in self.sources.parts]
        preprocess = sized(self.original, self.plan.image_size_px)
        batches = BatchPlan(sizes, self.plan.per_batch, self.plan.seed)
        first = self.accelerator.process_index * self.share
        return BatchReader(self.sources, batches, preprocess, self.plan.flip, (first, first + self.share))

    def attack_at(self, step: int) -> InnerAttack:
        """The inner attack of update `step`: radius and step size grow to the plan's over `eps_warmup_steps`."""
        plan = self.plan
        share = min(1.0, (step + 1) / plan.eps_warmup_steps) if plan.eps_warmup_steps else 1.0
        threat = replace(plan.threat, eps=plan.eps * share)
        return InnerAttack(
            threat, plan.attack_steps, plan.attack_step_size * share, plan.attack_momentum, plan.attack_chunk
        )

    def step(self, step: int, batch: Batch) -> Figures:
        """Do update `step` (0-based) on this process's share of the batch and return its mean losses."""
        plan = self.plan
        rate = plan.lr * warmup_cosine(step, plan.steps, plan.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        micro = self.share // plan.accumulation_steps
        first_slot = self.accelerator.process_index * self.share
        total, attack = torch.zeros((), device=self.accelerator.device), self.attack_at(step)
        self.refresh()
        for part in range(plan.accumulation_steps):
            rows = slice(part * micro, (part + 1) * micro)
            last = part == plan.accumulation_steps - 1
            seeds = [mixed_seed(plan.seed, 1, step, first_slot + i) for i in range(rows.start, rows.stop)]
            torch.manual_seed(
                mixed_seed(plan.seed, 2, step, self.accelerator.process_index, part)
            )  # dropout, drop path
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = self._loss(batch.pixels[rows], batch.labels[rows], attack, seeds) / plan.accumulation_steps
                self.accelerator.backward(loss)
            total += loss.detach()
        self.optimizer.step()
        self._update_average()
        return {"loss": float(self.accelerator.reduce(total, "mean")), "lr": rate}

    def _loss(self, raw: Tensor, labels: Tensor, attack: InnerAttack, seeds: list[int]) -> Tensor:
        """Mean loss of one micro-batch: (b, 3, h, w) uint8 and (b,) labels, with the seed of each image's start."""
        device, plan = self.accelerator.device, self.plan
        pixels = raw.to(device).float().div_(255.0)
        # Convolutions on the CPU are faster this way; the values are the same.
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with self._autocast():
            with torch.no_grad():
                features = in_chunks(self.original, pixels, plan.attack_chunk)
            target = self.objective.target(features, labels.to(device))
            self.student.eval()
            start = attack.start_of(pixels, seeds)
            perturbed = attack(self.attacked, self.objective.per_image, pixels, target, start)
            self._train_mode()
            both = torch.cat([perturbed, pixels]) if plan.clean_weight else perturbed
            output = self.model(both)
            adversarial = self.objective.per_image(output[: len(pixels)], target)
            clean = self.objective.per_image(output[len(pixels) :], target) if plan.clean_weight else None
            return combined(clean, adversarial, plan.clean_weight)

    def _autocast(self) -> torch.autocast:
        enabled = self.plan.precision == "bf16"
        return torch.autocast(self.accelerator.device.type, dtype=torch.bfloat16, enabled=enabled)

    def _train_mode(self) -> None:
        self.student.train()
        if self.plan.freeze_batch_norm:
            for module in self.student.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.average is None:
            return
        for name, value in self.student.visual.state_dict().items():
            if value.is_floating_point():
                self.average[name].lerp_(value, 1 - self.plan.ema_decay)
            else:
                self.average[name].copy_(value)

    def result(self) -> TowerEncoder:
        """The trained encoder in eval mode, with averaged weights where the plan asks for them."""
        trained = copy.deepcopy(self.student).eval().requires_grad_(False)
        if self.average is not None:
            trained.visual.load_state_dict(self.average)
        return trained

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, by name."""
        flat = {f"visual.{name}": tensor for name, tensor in self.student.visual.state_dict().items()}
        flat |= {f"average.{name}": tensor for name, tensor in (self.average or {}).items()}
        return flat | adam_tensors(self.optimizer)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` took out.

        Raises:
            RunError: it is the state of another model.
        """

        def under(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        try:
            self.student.visual.load_state_dict(under("visual."))
        except RuntimeError as error:
            raise RunError(f"the checkpoint does not fit the encoder: {str(error).splitlines()[0]}") from error
        if self.average is not None:
            device = self.accelerator.device
            self.average = {name: tensor.to(device) for name, tensor in under("average.").items()}
        restore_adam(self.optimizer, tensors)


def sized(encoder: TowerEncoder, size_px: int) -> PreprocessSpec:
    """The encoder's evaluation transform, at another size where `size_px` is not 0."""
    spec = encoder.preprocess
    if not size_px or size_px == spec.size_px:
        return spec
    return replace(spec, size_px=size_px, resize_px=max(size_px, round(spec.resize_px * size_px / spec.size_px)))


def open_source(source: SourcePlan, data: Path) -> LabelledImages:
    """Open one source of a plan; its paths are relative to the data folder."""
    naming: Naming = None
    if source.class_names:
        naming = "imagenet" if source.class_names == "imagenet" else data / source.class_names
    return open_images(source.kind, [data / path for path in source.path], where=source.where, class_names=naming)


def in_chunks(network: Callable[[Tensor], Tensor], pixels: Tensor, chunk: int) -> Tensor:
    """Apply a network that treats images independently, `chunk` images at a time (0: all)."""
    return torch.cat([network(part) for part in pixels.split(chunk or len(pixels))])


def finetune(
    plan: FinetunePlan,
    data: Path,
    run_path: Path,
    *,
    cpu: bool = False,
    workers: int = 0,
    stop_after: int | None = None,
) -> Iterator[tuple[int, Figures]]:
    """Run or resume a fine-tuning; yields `(updates done, figures)` after each update, on every process.

    Args:
        data: folder that relative paths of the plan start from.
        run_path: run directory: plan, metrics.jsonl, checkpoint, and at the end `export/` and `curve.svg`.
        cpu: do not use a GPU.
        workers: processes that read images; 0 reads in a thread.
        stop_after: leave after this many updates, with a checkpoint.

    Raises:
        PlanError, RunError, DataMissing, PerceptionError: see there.
    """
    from accelerate import Accelerator

    from offline.finetune.publish import publish

    accelerator = Accelerator(cpu=cpu)
    training = Finetuning(plan, data, accelerator, workers)
    identity = {**plan.as_dict(), "encoder_fingerprint": training.original.fingerprint}
    with accelerator.main_process_first():
        run = RunDirectory(run_path, identity)
    start = resume(training, run)
    if accelerator.is_main_process:
        for problem in training.sources.problems:
            run.log(event="left out", reason=problem)
    last = min(plan.steps, stop_after or plan.steps)
    batches = training.reader().stream(start, last, workers)
    with contextlib.closing(batches):
        for step, batch in enumerate(batches, start):
            began = time.perf_counter()
            for source, image, reason in batch.unreadable:
                run.log(event="unreadable", step=step, source=source, id=image, reason=reason)
            figures = training.step(step, batch)
            done = step + 1
            figures |= {"step_s": round(time.perf_counter() - began, 3)}
            if accelerator.is_main_process:
                record(training, run, done, figures, last)
            yield done, figures
    if last == plan.steps and accelerator.is_main_process:
        publish(training.result(), training.original, plan, run)
    accelerator.wait_for_everyone()


def resume(training: Finetuning, run: RunDirectory) -> int:
    """Restore the last checkpoint, if there is one, and return the number of updates done."""
    checkpoint = run.load_checkpoint()
    if checkpoint is None:
        return 0
    tensors, state = checkpoint
    training.restore(tensors)
    if training.accelerator.is_main_process:
        run.log(event="resumed", step=state["step"])
    return int(state["step"])


def record(training: Finetuning, run: RunDirectory, done: int, figures: Figures, last: int) -> None:
    """Log, evaluate and save what is due after update `done`."""
    plan = training.plan
    if done % plan.log_every == 0 or done == last:
        run.log(event="step", step=done, **figures)
    due = plan.eval_every and done % plan.eval_every == 0
    if training.held_out is not None and (due or done == plan.steps):
        run.log(event="evaluation", step=done, **training.held_out.measure(training.result()))
    if done % plan.checkpoint_every == 0 or done == last:
        run.save_checkpoint(training.tensors(), {"step": done})
