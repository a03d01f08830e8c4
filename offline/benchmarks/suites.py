"""What the benchmark suites have in common: what is asked, clean answers that resume, and attacks through the audit.

A suite turns a data set's published folder into tasks of `offline.audit`, whose judge gives every answer, clean and
attacked. A run directory holds a folder `clean` of answers without an attack, and an audit's run directory for each
attack, which `hardlook-lab report` reads as well. Knows no data set.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from offline.audit.plan import AuditPlan, SystemPlan
from offline.audit.record import AuditRecord
from offline.audit.run import Opener, run_audit
from offline.audit.task import Task
from offline.benchmarks.intervals import Accuracy
from offline.errors import PlanError, RunError
from offline.jsonlines import JsonLines
from offline.runs import RunDirectory
from offline.threat import Norm
from perception.encoder import Encoder
from perception.encoders.tower import TowerEncoder
from perception.preprocess import to_pixels

ANSWERS_NAME = "answers.jsonl"
CHUNK = 256
"""Images whose pixels are held at a time where there is no attack, by and large."""
_NOT_IN_NAMES = re.compile(r"[^\w .,/()+-]")
_LONGEST_NAME = 80

Key = tuple[str, str]
"""Set and id of an image within a suite."""


class Show(Protocol):
    """Where progress goes; see `offline.progress.ProgressDisplay.update`."""

    def __call__(self, task: str, done: int, total: int, text: str) -> None: ...  # noqa: D102


@dataclass(frozen=True)
class SuiteRequest:
    """What is asked of a suite.

    Attributes:
        encoders: names of `load_encoder`, each once.
        folder: of the data set.
        run: run directory, which resumes; None only without attacks.
        clean_only: no attacks.
        limit: of images or triplets; 0 for the protocol's number. Each suite says which ones.
        steps: of gradient attacks; 0 for the protocol's number.
        square_queries: of the Square attack on what survives; 0 for none, as in the published figures.
        batch: images encoded or attacked together.
        seed: of choices and random starts.
        device: torch device.

    Raises:
        PlanError: there is no encoder, or one twice, or attacks have no run directory, or a number is negative.
    """

    encoders: tuple[str, ...]
    folder: Path
    run: Path | None = None
    clean_only: bool = False
    limit: int = 0
    steps: int = 0
    square_queries: int = 0
    batch: int = 64
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.encoders or len(set(self.encoders)) < len(self.encoders):
            raise PlanError(f"a benchmark needs encoders, each once, got {list(self.encoders)}")
        if self.run is None and not self.clean_only:
            raise PlanError("attacks take long, and resume from a run directory: give --run DIR, or --clean-only")
        if min(self.limit, self.steps, self.square_queries, self.seed) < 0 or self.batch < 1:
            raise PlanError("limit, steps, square and seed must be 0 or more, and batch 1 or more")

    @property
    def systems(self) -> tuple[SystemPlan, ...]:
        """The encoders as systems of an audit, in their order."""
        names = [_NOT_IN_NAMES.sub("_", encoder)[-_LONGEST_NAME:] for encoder in self.encoders]
        if len(set(names)) < len(names):
            names = [f"{number} {name}"[:_LONGEST_NAME] for number, name in enumerate(names, 1)]
        return tuple(SystemPlan(name=n, encoder=e) for n, e in zip(names, self.encoders, strict=True))

    @property
    def departures(self) -> str:
        """What makes figures other than the published protocol's; empty where nothing does."""
        asked = {"limit": self.limit, "steps": self.steps, "square": self.square_queries, "seed": self.seed}
        return ", ".join(f"{name} {value}" for name, value in asked.items() if value)

    def part(self, *names: str) -> Path | None:
        """A folder within the run directory, if there is one."""
        return None if self.run is None else self.run.joinpath(*names)


# --- without an attack -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CleanAnswer:
    """What a system says of one image as it is; see `offline.audit.record.Judgement`."""

    encoder: str
    fingerprint: str
    set: str
    id: str
    label: str
    answer: str
    correct: bool
    scores: Mapping[str, float]

    @property
    def key(self) -> Key:
        """Set and id."""
        return self.set, self.id

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CleanAnswer":
        """The opposite of `asdict`; raises TypeError or KeyError for what is none."""
        answer = cls(**values)
        if type(answer.correct) is not bool or not isinstance(answer.scores, dict):
            raise TypeError(f"correct is {answer.correct!r}, scores are {answer.scores!r}")
        return answer


@dataclass(frozen=True)
class Chunk:
    """Images that are read together.

    Attributes:
        keys: of the images.
        open: reads them for an encoder; returns what encodes them, and the task that judges. Images that cannot be read
            may be left out.
    """

    keys: tuple[Key, ...]
    open: Callable[[TowerEncoder], tuple[Encoder, Task]]


@dataclass(frozen=True)
class CleanPass:
    """Answers to images as they are.

    Attributes:
        chunks: all images; their task's items bear the keys.
        what: what else the answers depend on, such as hashes of files; a folder goes on with the same alone.
    """

    chunks: Sequence[Chunk]
    what: Mapping[str, Any] = field(default_factory=dict)

    def run(self, request: SuiteRequest, folder: Path | None, show: Show) -> list[CleanAnswer]:
        """Judge all images by all encoders of a request, or those that have no answer in `folder` yet.

        Further encoders may join in a later call.

        Raises:
            RunError: the folder holds answers of other images, or of other weights under an encoder's name.
            OfflineError, PerceptionError: an encoder cannot be loaded, or images cannot be read.
        """
        from perception import load_encoder

        known: dict[tuple[str, Key], CleanAnswer] = {}
        lines: JsonLines | None = None
        if folder is not None:
            keys = json.dumps([chunk.keys for chunk in self.chunks])
            asked = {**self.what, "images_sha256": hashlib.sha256(keys.encode()).hexdigest()}
            lines = JsonLines(RunDirectory(folder, asked).path / ANSWERS_NAME)
            known = {(a.encoder, a.key): a for a in lines.read(CleanAnswer.from_dict)}
        total = sum(len(chunk.keys) for chunk in self.chunks)
        for name in request.encoders:
            encoder = load_encoder(name, device=request.device)
            _require_same(name, encoder.fingerprint, known.values(), folder)
            done = 0
            for chunk in self.chunks:
                if not all((name, key) in known for key in chunk.keys):
                    found = list(_answers(name, *chunk.open(encoder), request.batch))
                    fresh = [answer for answer in found if (name, answer.key) not in known]
                    if lines is not None:
                        lines.append(map(asdict, fresh))
                    known |= {(name, answer.key): answer for answer in fresh}
                done += len(chunk.keys)
                show(f"{name} clean", done, total, f"{name}, clean")
        wanted = [key for chunk in self.chunks for key in chunk.keys]
        return [known[name, key] for name in request.encoders for key in wanted if (name, key) in known]


def _require_same(name: str, fingerprint: str, known: Iterable[CleanAnswer], folder: Path | None) -> None:
    others = {answer.fingerprint for answer in known if answer.encoder == name} - {fingerprint}
    if others:
        raise RunError(f"{folder} holds answers of other weights of {name}: choose another --run folder")


def _answers(name: str, encoder: Encoder, task: Task, batch: int) -> Iterator[CleanAnswer]:
    for rows in torch.arange(len(task.items)).split(batch):
        items = [task.items[row] for row in rows.tolist()]
        judged = task.judge(rows, _encode(encoder, to_pixels([item.pixels for item in items])))
        for item, judgement in zip(items, judged, strict=True):
            answer, correct, scores = judgement.answer, bool(judgement.correct), dict(judgement.scores)
            yield CleanAnswer(name, encoder.fingerprint, item.set, item.id, item.label, answer, correct, scores)


def _encode(encoder: Encoder, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return encoder.encode(pixels)


# --- under attack ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Threat:
    """What a figure under attack is about: the name of the published figure, and the plan's setting.

    Attributes:
        name: such as 'linf_4_255'.
        norm: of the perturbation.
        eps: radius in [0, 1] pixel units; for l2 at 224 px.
    """

    name: str
    norm: Norm
    eps: float

    def of(self, records: Iterable[AuditRecord], steps: int) -> list[AuditRecord]:
        """The records under this threat, after so many steps; recorded l2 radii are scaled, and one plan has one."""
        return [
            record
            for record in records
            if (record.norm, record.steps) == (self.norm, steps)
            and (self.norm == "l2" or math.isclose(record.eps, self.eps, rel_tol=1e-9))
        ]


def attack(
    plan: AuditPlan, request: SuiteRequest, run: Path, show: Show, opener: Opener | None = None
) -> list[AuditRecord]:
    """Run an audit to its end, or go on with it, and write its report; see `run_audit`.

    Returns:
        Its records.
    """
    from offline.audit.report import Run, write_report

    for now in run_audit(plan, data=request.folder, folder=run, run=run, device=request.device, opener=opener):
        text = f"{now.system}, {now.setting}: {now.clean} right, {now.robust} robust"
        show(f"{run.name} {now.system} {now.setting}", now.done, now.total, text)
    write_report(run)
    return list(Run.read(run).records)


def by_encoder(records: Iterable[AuditRecord], request: SuiteRequest) -> dict[str, list[AuditRecord]]:
    """Records by the names that the encoders were asked for under, in their order."""
    names = {system.name: system.encoder for system in request.systems}
    found: dict[str, list[AuditRecord]] = {encoder: [] for encoder in request.encoders}
    for record in records:
        if record.system in names:
            found[names[record.system]].append(record)
    return found


def share(right: Iterable[bool | None]) -> Accuracy:
    """The share that is True.

    Raises:
        DataError: there is nothing to count.
    """
    outcomes = [outcome is True for outcome in right]
    return Accuracy(sum(outcomes), len(outcomes))
