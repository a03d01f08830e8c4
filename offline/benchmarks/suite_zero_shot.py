"""The zero-shot suites: 13 sets and their average, and ImageNet (methods 5.4, 6.9; table XI).

Clean on the whole test sets; attacked on 1,000 images of each (ImageNet: the same 5,000 for both) by APGD on the
cross-entropy, then targeted APGD on DLR for what survives, under linf 2/255 and 4/255. CIFAR and STL-10 are attacked at
their own size. With two classes (PCam) there is no targeted attack.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from offline.audit.plan import AttackName, AuditPlan, ImagesPlan, SystemPlan, ThreatPlan
from offline.audit.run import Opener
from offline.audit.task import Item, Task
from offline.audit.zero_shot import LEAST_CLASSES_TARGETED, ZeroShotTask
from offline.benchmarks.intervals import Accuracy
from offline.benchmarks.native_resolution import NativeResolution
from offline.benchmarks.published import Figure
from offline.benchmarks.suites import CHUNK, Chunk, CleanPass, Show, SuiteRequest, Threat, attack, by_encoder, share
from offline.benchmarks.zero_shot_sets import THIRTEEN, OpenedSet, Prompts, label_of, open_imagenet, open_sets
from offline.errors import DataError, PlanError
from perception.encoder import Encoder, fingerprint
from perception.encoders.tower import TowerEncoder
from perception.errors import ImageError
from perception.text import TextEncoder, class_embeddings

ATTACKED, STEPS, IMAGENET_IMAGES = 1000, 100, 5000
THREATS = (Threat("linf_2_255", "linf", 2 / 255), Threat("linf_4_255", "linf", 4 / 255))
AVERAGE = "zero_shot_13"
_NAMES = ("clean", *(threat.name for threat in THREATS))

Measured = Mapping[str, Mapping[str, Accuracy]]
"""Right answers by encoder, then by name of the figure."""


def zero_shot(
    request: SuiteRequest, show: Show, *, sets: Sequence[str] = (), prompts: Sequence[Path] = ()
) -> list[Figure]:
    """The average of the sets that are there, and each of them.

    A request's limit takes the first so many of each set's seeded shuffle, clean and attacked.

    Args:
        sets: names such as 'cifar10', of which all must be there; none for those of the 13 that are.
        prompts: CLIP_benchmark's JSON files, for sets without text files of their own.

    Raises:
        DataError: a set is malformed or missing; before an encoder is loaded.
        PlanError: there is no such set.
        CheckpointError: an encoder has no text tower.
        OfflineError, PerceptionError: see `attack` and `CleanPass.run`.
    """
    known = {spec.short: spec for spec in THIRTEEN}
    unknown = set(sets) - set(known)
    if unknown:
        raise PlanError(f"the zero-shot sets are {', '.join(known)}; got {', '.join(sorted(unknown))}")
    specs = [spec for name, spec in known.items() if name in sets] or list(THIRTEEN)
    opened = open_sets(request.folder, specs, Prompts.load(prompts), all_of_them=bool(sets))
    measured = {of.spec.short: _Suite(of, request, show, ATTACKED).measure() for of in opened}
    return zero_shot_figures(measured)


def zero_shot_figures(measured: Mapping[str, Measured]) -> list[Figure]:
    """The unweighted average of sets, which is published for all 13 alone, then each set.

    Args:
        measured: by the sets' short names; by the same encoders everywhere.
    """
    whole = set(measured) == {spec.short for spec in THIRTEEN}
    group = AVERAGE if whole else f"zero_shot_average_of_{len(measured)}"
    figures = []
    for encoder in next(iter(measured.values())):
        for name in _NAMES:
            found = [of_set[encoder][name] for of_set in measured.values() if name in of_set[encoder]]
            if found:
                mean = math.fsum(accuracy.value for accuracy in found) / len(found)
                total = sum(accuracy.total for accuracy in found)
                figures.append(Figure.of_mean(encoder, group, name, mean, total))
    for short, of_set in measured.items():
        for encoder, by_name in of_set.items():
            group = f"zero_shot_{short}"
            figures += [Figure.of_share(encoder, group, name, by_name[name]) for name in _NAMES if name in by_name]
    return figures


def imagenet(request: SuiteRequest, show: Show) -> list[Figure]:
    """ImageNet: 5,000 images, or a request's limit, clean and attacked; raises as `zero_shot`."""
    suite = _Suite(open_imagenet(request.folder), request, show, IMAGENET_IMAGES, clean_on_all=False)
    return [
        Figure.of_share(encoder, "imagenet", name, by_name[name])
        for encoder, by_name in suite.measure().items()
        for name in _NAMES
        if name in by_name
    ]


@dataclass(frozen=True)
class _Suite:
    """One set.

    Attributes:
        opened: the set.
        request, show: see `zero_shot`.
        protocol: images that are attacked.
        clean_on_all: the clean figure is of all images, not of the attacked ones.
    """

    opened: OpenedSet
    request: SuiteRequest
    show: Show
    protocol: int
    clean_on_all: bool = True

    def measure(self) -> dict[str, dict[str, Accuracy]]:
        """Right answers by encoder and name."""
        short, request = self.opened.spec.short, self.request
        every = self._order()
        attacked = every[: request.limit or self.protocol]
        chosen = every if self.clean_on_all and not request.limit else attacked
        answers = self._clean(sorted(chosen)).run(request, request.part(short, "clean"), self._named(short))
        measured = {
            encoder: {"clean": share(answer.correct for answer in answers if answer.encoder == encoder)}
            for encoder in request.encoders
        }
        run = request.part(short, "attacked")
        if request.clean_only or run is None:
            return measured
        plan, steps = self._plan(len(attacked)), request.steps or STEPS
        records = attack(plan, request, run, self._named(short), self._opener(sorted(attacked)))
        for encoder, of_encoder in by_encoder(records, request).items():
            for threat in THREATS:
                measured[encoder][threat.name] = share(record.robust for record in threat.of(of_encoder, steps))
        return measured

    def _order(self) -> list[int]:
        order: list[int] = np.random.default_rng(self.request.seed).permutation(len(self.opened.images)).tolist()
        return order

    def _named(self, name: str) -> Show:
        def show(task: str, done: int, total: int, text: str) -> None:
            self.show(f"{name} {task}", done, total, f"{name}: {text}")

        return show

    def _clean(self, indices: Sequence[int]) -> CleanPass:
        cached: dict[str, Tensor] = {}

        def read(part: Sequence[int], encoder: TowerEncoder) -> tuple[Encoder, Task]:
            view = _view(self.opened, encoder)
            if encoder.fingerprint not in cached:
                cached.clear()
                cached[encoder.fingerprint] = _classifier(self.opened, encoder)
            return view, _task(self.opened, view, part, cached[encoder.fingerprint], _text_of(encoder))

        parts = [indices[start : start + CHUNK] for start in range(0, len(indices), CHUNK)]
        set_name, images = self.opened.spec.short, self.opened.images
        chunks = [Chunk(tuple((set_name, images.id_of(i)) for i in part), partial(read, part)) for part in parts]
        prompts = repr((self.opened.class_names, self.opened.templates))
        what = {"suite": set_name, "prompts_sha256": hashlib.sha256(prompts.encode()).hexdigest()}
        return CleanPass(chunks, what)

    def _opener(self, indices: Sequence[int]) -> Opener:
        def open_task(_plan: AuditPlan, _system: SystemPlan, encoder: TowerEncoder) -> tuple[Encoder, Task]:
            view = _view(self.opened, encoder)
            return view, _task(self.opened, view, indices, _classifier(self.opened, encoder), _text_of(encoder))

        return open_task

    def _plan(self, count: int) -> AuditPlan:
        few = len(self.opened.class_names) < LEAST_CLASSES_TARGETED
        attacks: tuple[AttackName, ...] = ("apgd-ce",) if few else ("apgd-ce", "apgd-t")
        short, request = self.opened.spec.short, self.request
        return AuditPlan(
            task="zero-shot",
            systems=request.systems,
            threats=(ThreatPlan("linf", tuple(threat.eps for threat in THREATS), request.steps or STEPS),),
            queries=(ImagesPlan(kind="folder", path=short, name=short, limit=count),),
            templates=self.opened.templates,
            attacks=attacks,
            square_queries=request.square_queries,
            seed=request.seed,
            batch=request.batch,
        )


def _view(opened: OpenedSet, encoder: TowerEncoder) -> Encoder:
    """What takes the set's images: the encoder, or for small images one that enlarges them itself."""
    size_px = opened.spec.native_px
    return NativeResolution(encoder, size_px) if 0 < size_px <= encoder.preprocess.size_px else encoder


def _text_of(encoder: TowerEncoder) -> TextEncoder:
    text = getattr(encoder, "text", None)
    if not isinstance(text, TextEncoder):
        raise PlanError(f"zero-shot needs an encoder with a text tower, {encoder.name} has none")
    return text


def _classifier(opened: OpenedSet, encoder: TowerEncoder) -> Tensor:
    return class_embeddings(_text_of(encoder), opened.class_names, opened.templates).clone()


def _task(opened: OpenedSet, view: Encoder, indices: Sequence[int], classes: Tensor, text: TextEncoder) -> ZeroShotTask:
    """The task of some images; those that cannot be decoded are passed over."""
    items, labels = [], []
    for index in indices:
        try:
            example = opened.images.read(index)
        except (ImageError, OSError):
            continue
        labels.append(label_of(opened, example.label, example.id))
        name = opened.class_names[labels[-1]]
        items.append(Item(opened.spec.short, example.id, name, view.preprocess.apply(example.image)))
    if not items:
        raise DataError(opened.spec.name, f"none of {len(indices)} images can be decoded")
    prompts = {"classes": list(opened.class_names), "templates": list(opened.templates)}
    identity = {"classifier": fingerprint(prompts, view.preprocess, "fp32", text.tower.state_dict())}
    return ZeroShotTask(items, torch.tensor(labels), opened.class_names, classes, identity)
