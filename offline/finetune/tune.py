"""`hardlook-lab tune`: an encoder learns what people say of NIGHTS, as DreamSim did (methods 4) and LipSim (8.1).

Owns the state of a run, its update and the choice of the epoch. Every random choice is a function of (seed, step), so a
resumed run is the run that was killed. What learns is the matter of `tune_models`.
"""

import contextlib
import math
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from offline.benchmarks.two_afc import accuracy, choose_by_embedding
from offline.errors import RunError
from offline.finetune.distill import chosen_device, require_finite_loss
from offline.finetune.objectives import TwoAfcHinge
from offline.finetune.schedule import triangular
from offline.finetune.tune_models import Tuned, learning_parameters, put_back, tuned_by
from offline.finetune.tune_plan import TunePlan
from offline.finetune.tune_publish import publish_tuned
from offline.finetune.two_afc_batches import (
    Part,
    TripletBatch,
    TripletImages,
    TripletOrder,
    open_nights,
    triplets_sha256,
)
from offline.finetune.two_afc_features import FeatureCache
from offline.runs import RunDirectory, adam_tensors, restore_adam
from offline.seeds import mixed_seed
from perception import load_encoder
from perception.encoders.tower import TowerEncoder

SPLITS = ("train", "val")


class Progress(NamedTuple):
    """How far a tuning is: `done` of `total` triplets encoded, or updates done.

    Attributes:
        part: 'encode train', 'encode val' or 'tune'.
        text: one line on how it goes.
    """

    part: str
    done: int
    total: int
    text: str


class Best(NamedTuple):
    """The epoch of the least validation loss, 0-based, with its figures."""

    epoch: int
    loss: float
    accuracy: float


class Tuning:
    """One run: encoder, what learns on it, triplets, optimiser, and the best weights so far."""

    def __init__(self, plan: TunePlan, data: Path, device: str = "cpu") -> None:
        """Load everything that the plan names.

        Raises:
            DataError: NIGHTS is not there, or has another layout, or a split is empty.
            PlanError, PerceptionError: the plan does not fit the encoder; see `load_encoder`.
        """
        self.plan = plan
        limits = {"train": plan.train_limit, "val": plan.val_limit}
        triplets = {split: open_nights(data / plan.nights, split, limits[split], plan.seed) for split in SPLITS}
        self.encoder: TowerEncoder = load_encoder(plan.encoder, device=device)
        torch.manual_seed(mixed_seed(plan.seed, 0))
        self.tuned: Tuned = tuned_by(plan, self.encoder)
        self.images = {split: TripletImages(triplets[split], self.tuned.preprocess) for split in SPLITS}
        self.cached: dict[str, Tensor] = {}
        self.order = TripletOrder(len(triplets["train"]), plan.batch_size, plan.seed)
        self.objective = TwoAfcHinge(plan.margin, plan.reduction)
        self.parameters = learning_parameters(self.tuned.network)
        self.optimizer = torch.optim.Adam(
            self.parameters.values(), lr=plan.lr, betas=plan.betas, weight_decay=plan.weight_decay
        )
        self.best: Best | None = None
        self.best_weights: dict[str, Tensor] = {}

    @property
    def steps(self) -> int:
        """Updates in all."""
        return self.plan.epochs * self.order.steps_per_epoch

    @property
    def identity(self) -> dict[str, Any]:
        """What a run directory belongs to."""
        hashes = {f"{split}_sha256": triplets_sha256(self.images[split].triplets) for split in SPLITS}
        return {**self.plan.as_dict(), "encoder_fingerprint": self.encoder.fingerprint, **hashes}

    def encode(self, folder: Path, workers: int = 0) -> Iterator[Progress]:
        """Compute or load the features of all images, where those are what is trained on."""
        if not self.tuned.on_features:
            return
        for split in SPLITS:
            cache = FeatureCache(folder, split, self.encoder, self.images[split], self.plan.chunk)
            for done in cache.fill(workers):
                yield Progress(f"encode {split}", done, len(self.images[split]), f"encode {split}")
            self.cached[split] = cache.load()

    def batches(self, start: int, stop: int, workers: int = 0) -> Generator[TripletBatch, None, None]:
        """The training triplets of the updates from `start` to before `stop`."""
        if not self.tuned.on_features:
            return Part(self.images["train"], self.order).stream(range(start, stop), workers)
        return (self._cached_rows("train", self.order.rows(step)) for step in range(start, stop))

    def _cached_rows(self, split: str, rows: list[int]) -> TripletBatch:
        triplets = self.images[split].triplets
        prefers_right = torch.tensor([triplets[row].prefers_right for row in rows])
        return TripletBatch(self.cached[split][rows], prefers_right)

    def features(self, batch: TripletBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Features (b, d) of references, left and right images."""
        images = batch.images.to(self.encoder.device)
        if not self.tuned.on_features:
            images = images.float().div_(255.0)
        features = self.tuned.features(images.flatten(0, 1))
        reference, left, right = features.reshape(len(images), 3, -1).unbind(1)
        return reference, left, right

    def step(self, step: int, batch: TripletBatch) -> dict[str, float]:
        """Do update `step` (0-based).

        Raises:
            RunError: the loss is not finite.
        """
        rate = self.plan.lr * (triangular(step, self.steps) if self.plan.method == "lipsim-hinge" else 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.tuned.train(True)
        torch.manual_seed(mixed_seed(self.plan.seed, 1, step))  # dropout
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.objective(*self.features(batch), batch.prefers_right.to(self.encoder.device))
        require_finite_loss(loss.item(), step)
        loss.backward()
        self.optimizer.step()
        self.tuned.train(False)
        return {"loss": loss.item(), "lr": rate}

    @torch.no_grad()
    def validate(self, workers: int = 0) -> tuple[float, float]:
        """Mean hinge and clean 2AFC accuracy of the validation split.

        Raises:
            DataError: a feature is not finite.
        """
        images, size = self.images["val"], self.plan.chunk
        hinge = TwoAfcHinge(self.plan.margin, "sum")
        total, chosen, preferred = 0.0, [], []
        steps = range(-(-len(images) // size))
        if self.tuned.on_features:
            rows = ([*range(s * size, min(len(images), (s + 1) * size))] for s in steps)
            batches = (self._cached_rows("val", part) for part in rows)
        else:
            batches = Part(images, None, size).stream(steps, workers)
        with contextlib.closing(batches):
            for batch in batches:
                features = self.features(batch)
                chosen.append(choose_by_embedding(*features).cpu())
                preferred.append(batch.prefers_right)
                total += hinge(*features, batch.prefers_right.to(self.encoder.device)).item()
        return total / len(images), accuracy(torch.cat(chosen), torch.cat(preferred)).value

    def consider(self, epoch: int, loss: float, share_right: float) -> None:
        """Keep the present weights if no earlier epoch had so small a validation loss.

        Raises:
            RunError: the loss is not finite.
        """
        if not math.isfinite(loss):
            raise RunError(f"epoch {epoch}: the validation loss is {loss}")
        if self.best is None or loss < self.best.loss:
            self.best = Best(epoch, loss, share_right)
            self.best_weights = {name: value.detach().clone() for name, value in self.parameters.items()}

    def restore_best(self) -> Best:
        """Put the weights of the best epoch into the network.

        Raises:
            RunError: no epoch has ended.
        """
        if self.best is None:
            raise RunError("no epoch has ended: there are no best weights")
        put_back(self.parameters, self.best_weights)
        return self.best

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, by name."""
        flat: dict[str, Tensor] = {f"weights.{name}": value for name, value in self.parameters.items()}
        flat |= {f"best.{name}": value for name, value in self.best_weights.items()}
        return flat | adam_tensors(self.optimizer)

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> int:
        """Put back what `tensors` took out; returns the number of updates done.

        Raises:
            RunError: it is the state of another network.
        """

        def under(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        try:
            put_back(self.parameters, under("weights."))
        except ValueError as error:
            raise RunError(f"the checkpoint does not fit: {error}") from error
        self.best_weights = {name: value.to(self.encoder.device) for name, value in under("best.").items()}
        self.best = Best(**state["best"]) if state["best"] is not None else None
        restore_adam(self.optimizer, tensors)
        return int(state["step"])


def tune(
    plan: TunePlan,
    data: Path,
    run_path: Path,
    *,
    cpu: bool = False,
    workers: int = 0,
    stop_after: int | None = None,
) -> Iterator[Progress]:
    """Run or resume a tuning.

    Args:
        data: folder that the plan's `nights` is relative to.
        run_path: run directory: plan, metrics.jsonl, checkpoint, cached features, and at the end `adapter/` (but for
            'lipsim-hinge'), `export/` and `curve.svg`.
        cpu: do not use a GPU.
        workers: processes that read images; 0 reads in a thread.
        stop_after: leave after this many updates, with a checkpoint.

    Raises:
        PlanError, RunError, DataError, PerceptionError: see there.
    """
    training = Tuning(plan, data, chosen_device(cpu))
    run, start = RunDirectory(run_path, training.identity), 0
    yield from training.encode(run.path, workers)
    checkpoint = run.load_checkpoint()
    if checkpoint is not None:
        start = training.restore(*checkpoint)
        run.log(event="resumed", step=start)
    last = min(training.steps, stop_after or training.steps)
    with contextlib.closing(training.batches(start, last, workers)) as batches:
        for step, batch in enumerate(batches, start):
            began = time.perf_counter()
            figures = training.step(step, batch)
            figures |= {"step_s": round(time.perf_counter() - began, 3)}
            _record(training, run, step + 1, figures, last, workers)
            said = f"{plan.method} loss {figures['loss']:.4f}"
            best = f", best validation accuracy {training.best.accuracy:.4f}" if training.best else ""
            yield Progress("tune", step + 1, training.steps, said + best)
    if last == training.steps:
        publish_tuned(training.tuned, plan, training.encoder, training.restore_best()._asdict(), run)


def _record(training: Tuning, run: RunDirectory, done: int, figures: dict[str, float], last: int, workers: int) -> None:
    """Log, validate and save what is due after update `done`."""
    if done % training.plan.log_every == 0 or done == last:
        run.log(event="step", step=done, **figures)
    epoch, within = divmod(done, training.order.steps_per_epoch)
    if not within:
        loss, share_right = training.validate(workers)
        run.log(event="evaluation", step=done, epoch=epoch - 1, clean_loss=loss, clean_accuracy=share_right)
        training.consider(epoch - 1, loss, share_right)
    if not within or done % training.plan.checkpoint_every == 0 or done == last:
        state = {"step": done, "best": training.best._asdict() if training.best else None}
        run.save_checkpoint(training.tensors(), state)
