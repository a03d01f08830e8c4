"""Runs an audit: every system under every setting, batch by batch, into the records of a run directory.

Owns the chain of attacks and the re-check of what they bring: ball, box, 8-bit rounding and the decision, in the
serving precision. Which images there are and what counts as right are the tasks' matter.

A batch is a function of the plan and its number, so that a killed run goes on to the same bytes on the same machine.
"""

import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offline.attacks.apgd import Apgd
from offline.attacks.base import Attacked, AttackResult
from offline.attacks.precision import Bf16Gradients
from offline.attacks.search import Problem, SearchAttack, nothing_found
from offline.attacks.square import Square
from offline.attacks.targeted import Targeted
from offline.audit.examples import ExamplePictures
from offline.audit.masking import Subject, masking_checks
from offline.audit.plan import AuditPlan, SystemPlan, ThreatPlan
from offline.audit.record import (
    CHECKS_NAME,
    DECIMALS,
    RECORDS_NAME,
    AuditRecord,
    Check,
    Judgement,
    Round,
    Setting,
    as_line,
    read_checks,
)
from offline.audit.task import Item, Task
from offline.errors import RunError
from offline.folding import fold
from offline.jsonlines import JsonLines
from offline.runs import RunDirectory, read_events
from offline.seeds import mixed_seed
from perception.encoder import Encoder
from perception.encoders.tower import TowerEncoder
from perception.preprocess import to_pixels

SQUARE = "square"
CHECK_STEPS, CHECK_QUERIES = 100, 500  # at most, of the masking checks
_MARKS = frozenset(factor * 10**power for power in range(5) for factor in (1, 2, 5)) | {0}
_PACKAGES = ("hardlook", "torch", "timm", "open_clip_torch", "numpy", "pillow")


@dataclass(frozen=True)
class Progress:
    """How far one system is under one setting: `done` of `total` images, of which `clean` and `robust` are right."""

    system: str
    setting: Setting
    done: int
    total: int
    clean: int
    robust: int


def run_audit(plan: AuditPlan, *, data: Path, folder: Path, run: Path, device: str = "cpu") -> Iterator[Progress]:
    """Audit all systems of a plan, or go on with a run that was stopped; the records in `run` are the result.

    Args:
        plan: what is asked.
        data: folder of the images.
        folder: of the plan's file, which paths of pools and policies start from.
        run: run directory.
        device: torch device.

    Raises:
        PerceptionError: an encoder or artefact cannot be loaded, or does not fit.
        OfflineError: the images or the plan do not fit, an attack left its threat model, or the directory holds a run
            of another plan or of other artefacts.
    """
    from perception import load_encoder

    asked = {"audit": plan.as_dict()}
    if (run / "plan.json").exists():  # a run of another plan is refused before anything is loaded
        RunDirectory(run, asked)
    directory: RunDirectory | None = None
    for system in plan.systems:
        encoder = load_encoder(system.encoder, precision=system.precision, device=device)
        task = open_task(plan, system, encoder, data, folder)
        if directory is None:  # not before: a plan that cannot be run leaves no directory that no other may use
            directory = RunDirectory(run, asked)
            versions = {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()}
            directory.log(event="session", versions=versions, device=device, threads=torch.get_num_threads())
        _note_system(directory, system, encoder, task)
        yield from SystemAudit(plan, system, encoder, task, run, data).run()


def open_task(plan: AuditPlan, system: SystemPlan, encoder: Encoder, data: Path, folder: Path) -> Task:
    """Load what the plan's task needs for one system; raises as `run_audit`."""
    if plan.task == "moderation":
        from offline.audit.moderation import open_moderation

        return open_moderation(plan, system, encoder, data, folder)
    if plan.task == "retrieval":
        from offline.audit.retrieval import open_retrieval

        return open_retrieval(plan, encoder, data)
    if plan.task == "two-afc":
        from offline.audit.two_afc import open_two_afc

        return open_two_afc(plan, encoder, data)
    from offline.audit.zero_shot import open_zero_shot

    return open_zero_shot(plan, encoder, data)


class SystemAudit:
    """The audit of one system."""

    def __init__(
        self, plan: AuditPlan, system: SystemPlan, encoder: Encoder, task: Task, run: Path, data: Path
    ) -> None:
        self.plan, self.system, self.encoder, self.task, self.run_path = plan, system, encoder, task, run
        attacked: Attacked = (fold(encoder) if isinstance(encoder, TowerEncoder) else None) or encoder
        self.attacked = Bf16Gradients(attacked) if plan.bf16_gradients else attacked
        self.records = JsonLines(run / RECORDS_NAME)
        self.pictures = ExamplePictures(run, data, plan, system.name)
        self.batches = list(_batches(task.items, plan.batch))
        self.positions = _positions(task.items)

    def run(self) -> Iterator[Progress]:
        """Attack what has no record yet; yields before the first batch of each setting and after each one."""
        known = {r.key: r for r in self.records.read(AuditRecord.from_dict) if r.system == self.system.name}
        settings = [(t, setting) for t in self.plan.threats for setting in t.settings(self.encoder.preprocess.size_px)]
        for order, (threat, setting) in enumerate(settings):
            seen: list[AuditRecord] = []
            yield _progress(self.system.name, setting, seen, len(self.task.items))
            for number, rows in enumerate(self.batches):
                keys = [(self.system.name, setting, item.set, item.id) for item in self._items(rows)]
                if not all(key in known for key in keys):
                    records = self.batch(rows, threat, setting, number, with_examples=order == 0)
                    # The first ones may have been written before a kill.
                    self.records.append(as_line(record) for record in records if record.key not in known)
                    known |= {record.key: record for record in records}
                seen += [known[key] for key in keys]
                yield _progress(self.system.name, setting, seen, len(self.task.items))
        self._check(settings[0][1])

    def batch(
        self, rows: Tensor, threat: ThreatPlan, setting: Setting, number: int, *, with_examples: bool = False
    ) -> list[AuditRecord]:
        """One record an item, in their order.

        Raises:
            RunError: an attack left its threat model.
        """
        state = _State.begin(self.task, self.encoder, rows, [item.pixels for item in self._items(rows)])
        queries = self.plan.square_queries if threat.square_queries is None else threat.square_queries
        for order, name in enumerate((*self.plan.chain, *([SQUARE] if queries else []))):
            at = state.not_at_goal()
            if not len(at):
                break
            seed = mixed_seed(self.plan.seed, number, order, bits=32)
            steps = queries if name == SQUARE else setting.steps
            found, traces = self._attack(name, state, at, setting, steps, torch.Generator().manual_seed(seed))
            setting.threat.require(found.adversarial, state.pixels[at], name)
            state.take(name, at, found, traces, self.encoder)
        return self._records(state, setting, with_examples=with_examples)

    def _attack(
        self, name: str, state: "_State", at: Tensor, setting: Setting, steps: int, generator: torch.Generator
    ) -> tuple[AttackResult, "_Traces"]:
        rows, pixels = state.rows[at], state.pixels[at]
        objective = self.task.objective(name, rows, state.clean[at])
        traces = _Traces(len(at), steps)
        watch = None if name == SQUARE else traces.watch
        problem = Problem(self.attacked, objective, self.task.criterion(rows), setting.threat, watch)
        attack: SearchAttack = Square(queries=steps) if name == SQUARE else Apgd(steps, self.plan.restarts)
        if name == "apgd-t":
            attack = Targeted(attack)
        found = nothing_found(pixels)
        attack.go_on(problem, pixels, found, generator)
        return found, traces

    def _records(self, state: "_State", setting: Setting, *, with_examples: bool) -> list[AuditRecord]:
        eight_bit = (state.images * 255).round().to(torch.uint8).cpu().numpy()
        rounded = self.task.judge(state.rows, _encode(self.encoder, list(eight_bit)))
        distance = setting.threat.distance(state.images, state.pixels).tolist()
        records = []
        for i, item in enumerate(self._items(state.rows)):
            record = AuditRecord(
                system=self.system.name,
                fingerprint=self.encoder.fingerprint,
                norm=setting.norm,
                eps=setting.eps,
                steps=setting.steps,
                set=item.set,
                id=item.id,
                label=item.label,
                clean=_short(state.judged[i]),
                attacked=_short(state.worst[i]),
                rounded=_short(rounded[i], with_neighbors=False),
                rounds=tuple(state.rounds[i]),
                winner=state.winners[i],
                distance=round(distance[i], DECIMALS),
            )
            if with_examples:
                position = self.positions[int(state.rows[i])]
                delta = state.images[i] - state.pixels[i]
                record = self.pictures.keep(record, position, item.pixels, eight_bit[i], delta)
            records.append(record)
        return records

    def _check(self, setting: Setting) -> None:
        """The masking checks on a sample of what is not at its attacker's goal when clean, unless they are there."""
        if any(check.system == self.system.name for check in read_checks(self.run_path)):
            return
        total = len(self.task.items)
        tried = min(2 * self.plan.check_images, total)
        rows = torch.tensor([i * total // tried for i in range(tried)])
        state = _State.begin(self.task, self.encoder, rows, [item.pixels for item in self._items(rows)])
        at = state.not_at_goal()[: self.plan.check_images]
        rows, clean = rows[at], state.clean[at]
        if not len(at):
            nothing = "no image could be checked: the attacker's goal is reached without an attack"
            checks = [Check(self.system.name, "gradients", False, nothing, {"images": 0})]
        else:
            subject = Subject(
                system=self.system.name,
                encoder=self.encoder,
                attacked=self.attacked,
                objective=self.task.objective(self.plan.chain[0], rows, clean),
                black_box=self.task.objective(SQUARE, rows, clean),
                criterion=self.task.criterion(rows),
                pixels=state.pixels[at],
                threat=setting.threat,
            )
            steps = min(setting.steps, CHECK_STEPS)
            checks = list(masking_checks(subject, steps=steps, queries=CHECK_QUERIES, seed=self.plan.seed))
        JsonLines(self.run_path / CHECKS_NAME).append([as_line(check) for check in checks])

    def _items(self, rows: Tensor) -> list[Item]:
        return [self.task.items[row] for row in rows.tolist()]


@dataclass
class _State:
    """A batch on its way through the chain; lists and tensors have one entry an item.

    Attributes:
        task: whose items they are; rows: which.
        pixels, clean: (b, 3, h, w) as they are, and their embeddings (b, d).
        images: (b, 3, h, w) the worst versions so far, which `worst` judges; `judged` are the clean ones.
        winners, rounds: see `AuditRecord`.
    """

    task: Task
    rows: Tensor
    pixels: Tensor
    clean: Tensor
    judged: list[Judgement]
    images: Tensor
    worst: list[Judgement]
    winners: list[str]
    rounds: list[list[Round]]

    @classmethod
    def begin(cls, task: Task, encoder: Encoder, rows: Tensor, images: Sequence[NDArray[np.uint8]]) -> "_State":
        """Before any attack."""
        clean = _encode(encoder, images)
        pixels = to_pixels(images).to(clean.device)
        judged = task.judge(rows, clean)
        empty: list[list[Round]] = [[] for _ in images]
        return cls(task, rows, pixels, clean, judged, pixels.clone(), list(judged), ["none"] * len(images), empty)

    def not_at_goal(self) -> Tensor:
        """(k,) int64, whose attacker is not content."""
        found = [not self.task.at_goal(row, j) for row, j in zip(self.rows.tolist(), self.worst, strict=True)]
        return torch.nonzero(torch.tensor(found)).flatten()

    def take(self, name: str, at: Tensor, found: AttackResult, traces: "_Traces", encoder: Encoder) -> None:
        """Judge what an attack brought for the items `at`, and keep what is worse than before."""
        judged = self.task.judge(self.rows[at], _encode_pixels(encoder, found.adversarial))
        for place, i in enumerate(at.tolist()):
            row, now = int(self.rows[i]), judged[place]
            before, after = self.task.severity(row, self.worst[i]), self.task.severity(row, now)
            if after > before or (after == before and self.winners[i] == "none"):
                self.worst[i], self.winners[i] = now, name
                self.images[i] = found.adversarial[place]
            updates, objective = int(found.updates[place]), round(float(found.objective[place]), DECIMALS)
            self.rounds[i].append(
                Round(
                    attack=name,
                    updates=updates,
                    objective=objective,
                    reached=self.task.at_goal(row, now),
                    answer=self.worst[i].answer,
                    correct=self.worst[i].correct,
                    trace=traces.of(place),
                )
            )


class _Traces:
    """The highest objective of each item at some updates of an attack's first run."""

    def __init__(self, items: int, steps: int) -> None:
        self._points: list[list[tuple[int, float]]] = [[] for _ in range(items)]
        self._marks, self._last, self._first_run = _MARKS | {steps}, -1, True

    def watch(self, rows: Tensor, updates: int, best: Tensor) -> None:
        """See `offline.attacks.search.Watch`."""
        self._first_run &= updates > self._last
        self._last = updates
        if self._first_run and updates in self._marks:
            for row, value in zip(rows.tolist(), best.tolist(), strict=True):
                self._points[row].append((updates, round(value, DECIMALS)))

    def of(self, item: int) -> tuple[tuple[int, float], ...]:
        """The points of one item."""
        return tuple(self._points[item])


def _batches(items: Sequence[Item], size: int) -> Iterator[Tensor]:
    """Rows of the items in batches that hold one set each, so that the size of a set moves no other set's batches."""
    of_set: dict[str, list[int]] = {}
    for row, item in enumerate(items):
        of_set.setdefault(item.set, []).append(row)
    for rows in of_set.values():
        yield from torch.tensor(rows).split(size)


def _positions(items: Sequence[Item]) -> list[int]:
    """Where each item stands within its set, from 0."""
    counts: Counter[str] = Counter()
    positions = []
    for item in items:
        positions.append(counts[item.set])
        counts[item.set] += 1
    return positions


def _short(judgement: Judgement, *, with_neighbors: bool = True) -> Judgement:
    """A judgement as it is recorded."""
    near = [replace(n, similarity=round(n.similarity, DECIMALS)) for n in judgement.neighbors] if with_neighbors else []
    scores = {name: round(float(value), DECIMALS) for name, value in judgement.scores.items()}
    return Judgement(judgement.answer, judgement.correct, scores, tuple(near))


def _encode(encoder: Encoder, images: Sequence[NDArray[np.uint8]]) -> Tensor:
    return _encode_pixels(encoder, to_pixels(images))


def _encode_pixels(encoder: Encoder, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return encoder.encode(pixels)


def _note_system(directory: RunDirectory, system: SystemPlan, encoder: Encoder, task: Task) -> None:
    """Write down what is audited; a run goes on with the same alone.

    Raises:
        RunError: the run was begun with another encoder, other pools or another policy of that name.
    """
    identity: dict[str, Any] = {
        "system": system.name,
        "encoder": system.encoder,
        "precision": system.precision,
        "fingerprint": encoder.fingerprint,
        "items": len(task.items),
        **task.identity,
    }
    earlier = [e for e in read_events(directory.path, "system") if e["system"] == system.name]
    if not earlier:
        directory.log(event="system", **identity)
    for name, value in identity.items():
        if earlier and earlier[0].get(name) != value:
            raise RunError(
                f"{directory.path} was begun with {name} {earlier[0].get(name)!r} of system {system.name!r}, now it is "
                f"{value!r}: choose another --run folder"
            )


def _progress(system: str, setting: Setting, seen: Sequence[AuditRecord], total: int) -> Progress:
    clean = sum(record.clean.correct is True for record in seen)
    return Progress(system, setting, len(seen), total, clean, sum(record.robust is True for record in seen))
