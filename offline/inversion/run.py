"""A run of inversions: batch after batch of (target, seed) pairs under each encoder, judged anew, kept over kills.

What was found counts only as the encoder itself sees it, in a forward pass of its own for each picture, after box and
ball have been checked. On a CPU a reconstruction has the same bits whatever else is in its batch or run; elsewhere the
pictures of a batch go through the encoder together, and a long search enlarges the rounding in which that differs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from offline.attacks.base import Attacked
from offline.errors import PlanError, RunError
from offline.folding import fold
from offline.inversion.optimiser import Optimiser, Reconstruction
from offline.inversion.plan import InversionPlan
from offline.inversion.preview import Place, Preview
from offline.inversion.problem import Target, search_generator, start_pixels
from offline.inversion.sources import Sources
from offline.inversion.store import Record, Store, to_8bit
from offline.runs import RunDirectory
from perception.encoder import Encoder
from perception.encoders.tower import TowerEncoder

CHECKPOINT_NAME = "checkpoint.safetensors"
KEEP_EVERY_S = 20.0
_DIGITS = 6
Show = Callable[[str, int, int, str], None]
"""(task, done, total, text): see `offline.progress.ProgressDisplay.update`."""


@dataclass(frozen=True)
class Results:
    """What a run found: one record a reconstruction, in the order of encoders, seeds and targets."""

    run: Path
    plan: dict[str, Any]
    records: tuple[Record, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**self.plan, "reconstructions": [vars(record) for record in self.records]}


def run_inversion(
    plan: InversionPlan,
    sources: Sources,
    run: Path,
    *,
    device: str = "cpu",
    show: Show | None = None,
    keep_every_s: float = KEEP_EVERY_S,
) -> Results:
    """Look for all pictures, or go on with a run that was stopped.

    All encoders are loaded, and all targets embedded, before the first search.

    Args:
        plan: what is asked.
        sources: what is inverted.
        run: run directory; see `offline.inversion.store`.
        device: torch device.
        show: told how far it is.
        keep_every_s: seconds between two checkpoints within a batch.

    Raises:
        PerceptionError: see `load_encoder`; an encoder cannot embed a target, or a picture.
        RunError: the directory holds a run of another plan, or is damaged, or an optimiser left its ball or the box.
    """
    from perception import load_encoder

    encoders = [load_encoder(name, precision=plan.precision, device=device) for name in plan.encoders]
    return invert_with(encoders, plan, sources, run, device=device, show=show, keep_every_s=keep_every_s)


def invert_with(
    encoders: Sequence[Encoder],
    plan: InversionPlan,
    sources: Sources,
    run: Path,
    *,
    device: str = "cpu",
    show: Show | None = None,
    keep_every_s: float = KEEP_EVERY_S,
) -> Results:
    """The same with encoders that are loaded, on `device`, under the names of the plan; see `run_inversion`.

    Raises:
        PlanError: other names than the plan's.
    """
    if [encoder.name for encoder in encoders] != list(plan.encoders):
        raise PlanError(f"the plan is for {list(plan.encoders)}, not {[encoder.name for encoder in encoders]}")
    targets = {encoder.name: sources.targets(encoder) for encoder in encoders}
    asked = {
        "invert": sources.kind,
        **plan.as_dict(),
        **sources.as_dict(),
        "fingerprints": {encoder.name: encoder.fingerprint for encoder in encoders},
    }
    directory = RunDirectory(run, asked)
    store = Store(run, plan.encoders, sources.ids)
    preview = Preview(store, plan.encoders, plan.seeds)
    job = _Job(plan, plan.make_optimiser(), directory, store, preview, show or _silent, keep_every_s)
    for encoder in encoders:
        job.run(encoder, targets[encoder.name], device)
    records = tuple(job.records())
    preview.draw_grid()
    preview.draw(set())
    store.write_results(asked, records)
    directory.log(event="finished", reconstructions=len(records))
    (run / CHECKPOINT_NAME).unlink(missing_ok=True)
    return Results(run, asked, records)


class _Job:
    """The batches of a run."""

    def __init__(
        self,
        plan: InversionPlan,
        optimiser: Optimiser,
        directory: RunDirectory,
        store: Store,
        preview: Preview,
        show: Show,
        keep_every_s: float,
    ) -> None:
        self._plan, self._optimiser, self._directory, self._store = plan, optimiser, directory, store
        self._preview, self._show, self._keep_every_s = preview, show, keep_every_s
        self._places: list[Place] = []
        complete = (r for r in store.records() if store.has(r.encoder, r.target, r.seed))
        self._known = {(record.encoder, record.target, record.seed): record for record in complete}

    def records(self) -> Iterator[Record]:
        """Those of the encoders that `run` was called for."""
        return (self._known[place] for place in self._places)

    def run(self, encoder: Encoder, targets: Sequence[Target], device: str) -> None:
        """Look for all pictures of an encoder that are not there yet."""
        self._preview.show_targets(targets)
        by_id = {target.id: target for target in targets}
        places = [(encoder.name, target.id, seed) for seed in self._plan.seeds for target in targets]
        self._places += places
        self._preview.finish([self._known[place] for place in places if place in self._known])
        for target in targets:
            if target.picture is not None:
                self._store.add_original(encoder.name, target.id, target.picture)
        attacked: Attacked | None = None
        for first in range(0, len(places), self._plan.batch):
            batch = places[first : first + self._plan.batch]
            if not all(place in self._known for place in batch):
                attacked = attacked or (fold(encoder) if isinstance(encoder, TowerEncoder) else None) or encoder
                self._batch(encoder, attacked, batch, [by_id[id] for _, id, _ in batch], first, len(places), device)
            self._tell(encoder.name, first + len(batch), len(places))

    def _batch(
        self,
        encoder: Encoder,
        attacked: Attacked,
        batch: Sequence[Place],
        targets: Sequence[Target],
        before: int,
        total: int,
        device: str,
    ) -> None:
        size_px = encoder.preprocess.size_px
        starts = torch.cat([start_pixels(1, size_px, seed, [id]) for _, id, seed in batch]).to(device)

        def watch(update: int, pixels: Tensor, similarity: Tensor) -> None:
            self._preview.watch(batch, update, pixels, similarity)
            self._tell(encoder.name, before, total, update, len(batch))

        found = self._optimiser.run(
            attacked,
            targets,
            starts,
            generators=[search_generator(id, seed) for _, id, seed in batch],
            watch=watch,
            keeper=_BatchKeeper(self._directory, batch, self._keep_every_s),
        )
        records = self._judged(encoder, batch, targets, starts, found)
        self._store.add(records, found.pixels, found.trace.T)
        self._known |= dict(zip(batch, records, strict=True))
        self._preview.finish(records)
        mean = sum(record.similarity for record in records) / len(records)
        self._directory.log(event="batch", encoder=encoder.name, first=before, reconstructions=len(batch), mean=mean)

    def _judged(
        self,
        encoder: Encoder,
        batch: Sequence[Place],
        targets: Sequence[Target],
        starts: Tensor,
        found: Reconstruction,
    ) -> list[Record]:
        ball = self._optimiser.ball(starts.shape[-1])
        outside = (~((found.pixels >= 0) & (found.pixels <= 1))).flatten(1).any(dim=1)  # NaN is outside too
        if bool(outside.any()):
            raise RunError(f"the {self._plan.optimiser} optimiser left [0, 1] for {batch[int(outside.int().argmax())]}")
        if ball is not None:
            ball.require(found.pixels, starts, f"the {self._plan.optimiser} optimiser")
        distances = (found.pixels.double() - starts.double()).flatten(1).norm(dim=1).tolist()
        wanted = torch.stack([target.embedding for target in targets])
        seen = [
            _similarities(encoder, pixels, wanted)
            for pixels in (starts, found.pixels, to_8bit(found.pixels).float() / 255)
        ]
        return [
            Record(
                encoder=encoder.name,
                fingerprint=encoder.fingerprint,
                target=id,
                seed=seed,
                start_similarity=seen[0][i],
                similarity=seen[1][i],
                similarity_8bit=seen[2][i],
                distance=round(distances[i], _DIGITS),
                radius=None if ball is None else ball.eps,
            )
            for i, (_, id, seed) in enumerate(batch)
        ]

    def _tell(self, encoder: str, before: int, total: int, update: int = 0, batch: int = 0) -> None:
        """Updates done: all of `before` reconstructions, and `update` of each of the `batch` on their way."""
        steps = self._optimiser.steps
        self._show(encoder, before * steps + batch * update, total * steps, f"{encoder}: updates of {total} pictures")


class _BatchKeeper:
    """See `Keeper`: the run's checkpoint, as far as it is of this batch."""

    def __init__(self, directory: RunDirectory, batch: Sequence[Place], every_s: float) -> None:
        self._directory, self._batch, self._every_s = directory, [list(place) for place in batch], every_s
        self._last_s = monotonic()

    def restored(self) -> tuple[int, dict[str, Tensor]] | None:
        """See `Keeper`."""
        kept = self._directory.load_checkpoint()
        if kept is None or kept[1].get("batch") != self._batch:
            return None
        return int(kept[1]["update"]), kept[0]

    def offer(self, update: int, state: Callable[[], Mapping[str, Tensor]]) -> None:
        """See `Keeper`."""
        if monotonic() - self._last_s < self._every_s:
            return
        self._directory.save_checkpoint(dict(state()), {"batch": self._batch, "update": update})
        self._last_s = monotonic()


@torch.no_grad()
def _similarities(encoder: Encoder, pixels: Tensor, targets: Tensor) -> list[float]:
    """Cosines of pictures with their targets, each in a pass of its own; clipped to [-1, 1] against rounding."""
    rows = (encoder.encode(row)[0] for row in pixels.split(1))
    cosines = [float(row.double() @ target.double()) for row, target in zip(rows, targets, strict=True)]
    return [round(min(max(cosine, -1.0), 1.0), _DIGITS) for cosine in cosines]


def _silent(task: str, done: int, total: int, text: str) -> None:
    """Tell nobody."""
