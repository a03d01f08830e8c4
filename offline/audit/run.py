"""Runs an audit: every system under every setting, batch by batch, into the records of a run directory.

Owns the chain of attacks and the re-check of what they bring: ball, box, 8-bit rounding and the decision, in the
serving precision. Which images there are and what counts as right are the tasks' matter.

A batch is a function of the plan and its number, so that a killed run goes on to the same bytes on the same machine.
"""

import platform
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offline.attacks.base import AttackResult
from offline.attacks.search import nothing_found
from offline.audit.attacker import COST_IMAGES, SQUARE, Attacker, defended, described_defense, measured_cost
from offline.audit.examples import ExamplePictures
from offline.audit.masking import masking_checks
from offline.audit.plan import AuditPlan, SystemPlan, ThreatPlan
from offline.audit.record import (
    CHECKS_NAME,
    DECIMALS,
    RECORDS_NAME,
    AuditRecord,
    Check,
    Judgement,
    Setting,
    as_line,
    read_checks,
)
from offline.audit.state import State, encode_pixels
from offline.audit.task import Item, Task
from offline.audit.traces import Traces
from offline.certify import Certifier
from offline.errors import RunError
from offline.jsonlines import JsonLines
from offline.runs import RunDirectory, read_events
from offline.seeds import mixed_seed
from perception.counterattack import Counterattack
from perception.encoder import Encoder
from perception.encoders.tower import TowerEncoder
from perception.preprocess import to_pixels

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


Opener = Callable[[AuditPlan, SystemPlan, TowerEncoder], tuple[Encoder, Task]]
"""From a system's encoder to what is attacked in its place, and the task; raises as `run_audit`."""


def run_audit(
    plan: AuditPlan, *, data: Path, folder: Path, run: Path, device: str = "cpu", opener: Opener | None = None
) -> Iterator[Progress]:
    """Audit all systems of a plan, or go on with a run that was stopped; the records in `run` are the result.

    Args:
        plan: what is asked.
        data: folder of the images.
        folder: of the plan's file, which paths of pools and policies start from.
        run: run directory.
        device: torch device.
        opener: for images that a plan cannot name, such as a benchmark's; default what the plan says.

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
        loaded = load_encoder(system.encoder, precision=system.precision, device=device)
        encoder, task = opener(plan, system, loaded) if opener else _open(plan, system, loaded, data, folder)
        if directory is None:  # not before: a plan that cannot be run leaves no directory that no other may use
            directory = RunDirectory(run, asked)
            versions = {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()}
            directory.log(event="session", versions=versions, device=device, threads=torch.get_num_threads())
        encoder = defended(system, encoder)
        _note_system(directory, system, encoder, task)
        yield from SystemAudit(plan, system, encoder, task, run, data).run()
    if directory is not None and not read_events(run, "finished"):
        directory.log(event="finished")


def _open(plan: AuditPlan, system: SystemPlan, encoder: TowerEncoder, data: Path, folder: Path) -> tuple[Encoder, Task]:
    """What a plan says; see `Opener`."""
    if plan.task == "two-afc":
        from offline.audit.two_afc import compared

        view = compared(encoder)
        return view, open_task(plan, system, view, data, folder)
    return encoder, open_task(plan, system, encoder, data, folder)


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
    if plan.task == "odd-one-out":
        from offline.audit.odd_one_out import open_odd_one_out

        return open_odd_one_out(plan, encoder, data)
    from offline.audit.zero_shot import open_zero_shot

    return open_zero_shot(plan, encoder, data)


class SystemAudit:
    """The audit of one system."""

    def __init__(
        self, plan: AuditPlan, system: SystemPlan, encoder: Encoder, task: Task, run: Path, data: Path
    ) -> None:
        self.plan, self.system, self.encoder, self.task, self.run_path = plan, system, encoder, task, run
        self.attacker = Attacker.of(plan, system, encoder)
        self.certifier = Certifier.of(encoder, task)
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
        state = State.begin(self.task, self.encoder, rows, [item.pixels for item in self._items(rows)])
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
        self, name: str, state: State, at: Tensor, setting: Setting, steps: int, generator: torch.Generator
    ) -> tuple[AttackResult, Traces]:
        rows, pixels = state.rows[at], state.pixels[at]
        objective = self.task.objective(name, rows, state.clean[at])
        traces = Traces(len(at), steps)
        watch = None if name == SQUARE else traces.watch
        problem = self.attacker.problem(name, objective, self.task.criterion(rows), setting.threat, watch)
        found = nothing_found(pixels)
        self.attacker.attack(name, steps).go_on(problem, pixels, found, generator)
        return found, traces

    def _records(self, state: State, setting: Setting, *, with_examples: bool) -> list[AuditRecord]:
        eight_bit = (state.images * 255).round().to(torch.uint8).cpu().numpy()
        rounded = self.task.judge(state.rows, encode_pixels(self.encoder, to_pixels(list(eight_bit))))
        clean = _gated(self.encoder, state.pixels, state.judged)
        attacked = _gated(self.encoder, state.images, state.worst)
        distance = setting.threat.distance(state.images, state.pixels).tolist()
        certifier = self.certifier
        certified = certifier.radii(state.rows, state.pixels, state.judged) if certifier else [None] * len(clean)
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
                clean=_short(clean[i]),
                attacked=_short(attacked[i]),
                rounded=_short(rounded[i], with_neighbors=False),
                rounds=tuple(state.rounds[i]),
                winner=state.winners[i],
                distance=round(distance[i], DECIMALS),
                certified=certified[i],
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
        state = State.begin(self.task, self.encoder, rows, [item.pixels for item in self._items(rows)])
        at = state.not_at_goal()[: self.plan.check_images]
        rows, clean = rows[at], state.clean[at]
        if not len(at):
            nothing = "no image could be checked: the attacker's goal is reached without an attack"
            checks = [Check(self.system.name, "gradients", False, nothing, {"images": 0})]
        else:
            along, black_box = (self.task.objective(name, rows, clean) for name in (self.plan.chain[0], SQUARE))
            subject = self.attacker.subject(
                along, black_box, self.task.criterion(rows), state.pixels[at], setting.threat
            )
            steps, queries = self.attacker.check_limits(setting.steps)
            checks = list(masking_checks(subject, steps=steps, queries=queries, seed=self.plan.seed))
        JsonLines(self.run_path / CHECKS_NAME).append([as_line(check) for check in checks])

    def _items(self, rows: Tensor) -> list[Item]:
        return [self.task.items[row] for row in rows.tolist()]


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


def _gated(encoder: Encoder, pixels: Tensor, judged: Sequence[Judgement]) -> list[Judgement]:
    """The judgements with tau among their scores, where a defence has one."""
    if not isinstance(encoder, Counterattack):
        return list(judged)
    taus = encoder.defend(pixels).tau.tolist()
    return [replace(j, scores={**j.scores, "tau": tau}) for j, tau in zip(judged, taus, strict=True)]


def _short(judgement: Judgement, *, with_neighbors: bool = True) -> Judgement:
    """A judgement as it is recorded."""
    near = [replace(n, similarity=round(n.similarity, DECIMALS)) for n in judgement.neighbors] if with_neighbors else []
    scores = {name: round(float(value), DECIMALS) for name, value in judgement.scores.items()}
    return Judgement(judgement.answer, judgement.correct, scores, tuple(near))


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
        **described_defense(system, encoder),
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
    measured = any(event["system"] == system.name for event in read_events(directory.path, "cost"))
    if system.defense is not None and not measured:
        images = [item.pixels for item in task.items[:: max(1, len(task.items) // COST_IMAGES)]]
        directory.log(event="cost", system=system.name, **measured_cost(encoder, images))


def _progress(system: str, setting: Setting, seen: Sequence[AuditRecord], total: int) -> Progress:
    clean = sum(record.clean.correct is True for record in seen)
    return Progress(system, setting, len(seen), total, clean, sum(record.robust is True for record in seen))
