"""`hardlook-lab distill`: LipSim's stage 1, in which a 1-Lipschitz network regresses any encoder's embeddings.

Owns the state of a run and its update (methods 8.1). Every random choice is a function of (seed, step, slot of the
batch), so a resumed run is the run that was killed. What makes the network 1-Lipschitz is the network's matter: the
bound holds at every step of any training.
"""

import contextlib
import copy
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from offline.data.batches import Batch, BatchPlan, BatchReader
from offline.data.labelled import joined
from offline.errors import PlanError, RunError
from offline.finetune.distill_plan import DistillPlan
from offline.finetune.distill_views import ColourJitter, View, resized
from offline.finetune.evaluate import read_held_out
from offline.finetune.loop import Figures, open_source
from offline.finetune.publish import CURVE, draw_curve, publish_encoder
from offline.finetune.schedule import warmup_cosine
from offline.runs import RunDirectory, adam_tensors, restore_adam
from offline.seeds import mixed_seed
from perception import load_encoder
from perception.encoder import unit_embeddings
from perception.encoders.lipsim import LipsimNetwork, LipsimParts
from perception.encoders.tower import TowerEncoder

_CHUNK = 64
# Of the largest feature: the weights' rounding, through all layers; fp32 is compared with itself, but for a GPU's TF32.
_TOLERANCE = {"fp32": 1e-5, "fp16": 1e-2}


class Distillation:
    """One run: teacher, student, data, optimiser."""

    def __init__(self, plan: DistillPlan, data: Path, device: str = "cpu") -> None:
        """Load everything that the plan names, and draw the student's weights.

        Raises:
            PlanError: the student's dim is not the teacher's, or the plan does not fit the data.
            PerceptionError, DataMissing, DataError: see `load_encoder` and `open_images`.
        """
        self.plan = plan
        self.teacher: TowerEncoder = load_encoder(plan.teacher, precision=plan.teacher_precision, device=device)
        if plan.student.dim != self.teacher.dim:
            raise PlanError(f"student.dim must be the {self.teacher.dim} of {plan.teacher}, got {plan.student.dim}")
        self.sources = joined([open_source(source, data) for source in plan.train])
        torch.manual_seed(mixed_seed(plan.seed, 0))
        parts = LipsimParts(plan.student, plan.preprocess, LipsimNetwork(plan.student).state_dict(), "a new network")
        self.student: TowerEncoder = parts.build("student", "fp32", device)
        self.student.visual.requires_grad_(True)
        parameters = self.student.visual.parameters()
        self.optimizer = torch.optim.Adam(parameters, lr=plan.lr, betas=plan.betas, weight_decay=plan.weight_decay)
        self.jitter = ColourJitter(plan.jitter, plan.jitter_probability, plan.grey_probability)
        self.held_out: tuple[Tensor, Tensor] | None = None
        if plan.held_out:
            images = joined([open_source(source, data) for source in plan.held_out])
            pixels, _ = read_held_out(images, self.view, plan.eval_images, plan.seed)
            pixels = pixels.to(device)
            self.held_out = pixels, torch.cat([self.target(part) for part in pixels.split(_CHUNK)])

    @property
    def view(self) -> View:
        """What both networks see."""
        largest = max(self.plan.student.image_size, self.teacher.preprocess.size_px)
        return View(self.plan.view_px or largest, self.plan.geometry)

    def reader(self) -> BatchReader:
        """The batches."""
        batches = BatchPlan([len(source) for source in self.sources.parts], self.plan.per_batch, self.plan.seed)
        return BatchReader(self.sources, batches, self.view, self.plan.flip)

    @torch.no_grad()
    def target(self, pixels: Tensor) -> Tensor:
        """What the student should answer: views (b, 3, v, v) in [0, 1] -> (b, d) of norm `target_scale`.

        Raises:
            NonFiniteEmbedding: the teacher has no embedding of an image.
        """
        embeddings = self.teacher.encode(resized(pixels, self.teacher.preprocess.size_px))
        if self.plan.centre:
            embeddings = unit_embeddings(embeddings - embeddings.mean(dim=1, keepdim=True))
        return self.plan.target_scale * embeddings

    def answer(self, pixels: Tensor) -> Tensor:
        """The student's features of its own pixels, (b, d), without the constant coordinate."""
        return self.student.features(pixels)[:, : self.plan.student.dim]

    def loss(self, answer: Tensor, target: Tensor) -> Tensor:
        """The objective on two (b, d): `sqrt(mean over b and d of (answer - target)^2)`, or `mean of 1 - cos`."""
        if self.plan.objective == "cosine":
            return (1 - F.cosine_similarity(answer, target, dim=1)).mean()
        return F.mse_loss(answer, target).sqrt()

    def step(self, step: int, batch: Batch) -> Figures:
        """Do update `step` (0-based).

        Raises:
            RunError: the loss is not finite.
        """
        plan = self.plan
        rate = plan.lr * warmup_cosine(step, plan.steps, plan.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        size, total = plan.batch_size // plan.accumulation_steps, 0.0
        for first in range(0, plan.batch_size, size):
            view = batch.pixels[first : first + size].to(self.student.device).float().div_(255.0)
            target, own = self.target(view), resized(view, plan.student.image_size)
            loss = self.loss(self.answer(own), target)
            if plan.views == 2:
                seeds = [mixed_seed(plan.seed, 1, step, slot) for slot in range(first, first + size)]
                loss = (loss + self.loss(self.answer(self.jitter(own, seeds)), target)) / 2
            (loss / plan.accumulation_steps).backward()
            total += loss.item() / plan.accumulation_steps
        require_finite_loss(total, step)
        self.optimizer.step()
        return {"loss": total, "lr": rate}

    @torch.no_grad()
    def measure(self) -> Figures:
        """Loss on the held-out images, cosine to the target, and the mean norm of the features."""
        if self.held_out is None:
            return {}
        pixels, target = self.held_out
        own = resized(pixels, self.plan.student.image_size)
        answer = torch.cat([self.answer(part) for part in own.split(_CHUNK)])
        figures = {
            "clean_loss": self.loss(answer, target),
            "clean_cosine": F.cosine_similarity(answer, target, dim=1).mean(),
            "norm": answer.norm(dim=1).mean(),
        }
        return {name: round(value.item(), 4) for name, value in figures.items()}

    def result(self) -> TowerEncoder:
        """The trained encoder in eval mode."""
        return copy.deepcopy(self.student).eval().requires_grad_(False)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, by name."""
        flat = {f"visual.{name}": tensor for name, tensor in self.student.visual.state_dict().items()}
        return flat | adam_tensors(self.optimizer)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` took out.

        Raises:
            RunError: it is the state of another network.
        """
        visual = {k.removeprefix("visual."): v for k, v in tensors.items() if k.startswith("visual.")}
        try:
            self.student.visual.load_state_dict(visual)
        except RuntimeError as error:
            raise RunError(f"the checkpoint does not fit the student: {str(error).splitlines()[0]}") from error
        restore_adam(self.optimizer, tensors)


def distill(
    plan: DistillPlan,
    data: Path,
    run_path: Path,
    *,
    cpu: bool = False,
    workers: int = 0,
    stop_after: int | None = None,
) -> Iterator[tuple[int, Figures]]:
    """Run or resume a distillation; yields `(updates done, figures)` after each update.

    Args:
        data: folder that relative paths of the plan start from.
        run_path: run directory: plan, metrics.jsonl, checkpoint, and at the end `export/` and `curve.svg`.
        cpu: do not use a GPU.
        workers: processes that read images; 0 reads in a thread.
        stop_after: leave after this many updates, with a checkpoint.

    Raises:
        PlanError, RunError, DataMissing, DataError, PerceptionError: see there.
    """
    training = Distillation(plan, data, chosen_device(cpu))
    run = RunDirectory(run_path, {**plan.as_dict(), "teacher_fingerprint": training.teacher.fingerprint})
    start, checkpoint = 0, run.load_checkpoint()
    if checkpoint is not None:
        training.restore(checkpoint[0])
        start = int(checkpoint[1]["step"])
        run.log(event="resumed", step=start)
    for problem in training.sources.problems:
        run.log(event="left out", reason=problem)
    last = min(plan.steps, stop_after or plan.steps)
    with contextlib.closing(training.reader().stream(start, last, workers)) as batches:
        for step, batch in enumerate(batches, start):
            began = time.perf_counter()
            for source, image, reason in batch.unreadable:
                run.log(event="unreadable", step=step, source=source, id=image, reason=reason)
            figures = training.step(step, batch)
            figures |= {"step_s": round(time.perf_counter() - began, 3)}
            _record(training, run, step + 1, figures, last)
            yield step + 1, figures
    if last == plan.steps:
        _publish(training, run)


def _record(training: Distillation, run: RunDirectory, done: int, figures: Figures, last: int) -> None:
    """Log, evaluate and save what is due after update `done`."""
    plan = training.plan
    if done % plan.log_every == 0 or done == last:
        run.log(event="step", step=done, **figures)
    due = plan.eval_every and done % plan.eval_every == 0
    if training.held_out is not None and (due or done == plan.steps):
        run.log(event="evaluation", step=done, **training.measure())
    if done % plan.checkpoint_every == 0 or done == last:
        run.save_checkpoint(training.tensors(), {"step": done})


def _publish(training: Distillation, run: RunDirectory) -> None:
    """Write `export/` and the curve, and check that the export is what was trained.

    Raises:
        CheckpointError, RunError: it is not.
    """
    plan, trained = training.plan, training.result()
    origin = {"teacher_fingerprint": training.teacher.fingerprint}
    loaded = publish_encoder(trained, run, "distill", plan.as_dict(), origin, plan.export_dtype)
    exact = plan.export_dtype == "fp32" and training.student.device.type == "cpu"
    require_same_features(trained, loaded, _TOLERANCE["fp32" if exact else "fp16"])
    draw_curve(run.path, run.path / CURVE, f"training loss ({plan.objective})")


def chosen_device(cpu: bool) -> str:
    """'cuda' where there is one and it may be used."""
    return "cuda" if torch.cuda.is_available() and not cpu else "cpu"


def require_finite_loss(loss: float, step: int) -> None:
    """Stop before the optimiser takes over what cannot be undone.

    Raises:
        RunError: names the update, counted from 1 as the log does.
    """
    if not torch.isfinite(torch.tensor(loss)):
        raise RunError(f"update {step + 1}: the loss is {loss}; the last checkpoint is from before it")


@torch.no_grad()
def require_same_features(trained: TowerEncoder, loaded: TowerEncoder, tolerance: float) -> None:
    """Compare what was trained with what was read back, on two random images.

    Args:
        tolerance: largest difference, as a share of the largest feature.

    Raises:
        RunError: they differ by more.
    """
    size = trained.preprocess.size_px
    pixels = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected, found = trained.features(pixels).cpu(), loaded.features(pixels).cpu()
    difference = float((expected - found).abs().max() / expected.abs().max())
    if not difference <= tolerance:
        raise RunError(f"the export differs from what was trained by {difference:.2g}, at most {tolerance} is rounding")
