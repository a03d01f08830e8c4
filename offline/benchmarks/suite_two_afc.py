"""The suites of perceptual choices: NIGHTS, BAPPS, and NIGHTS by attack steps (methods 5.3, 6.1, 6.2; appendix A).

The reference is attacked by APGD on the cross-entropy of the two similarities: 100 updates from one random start, under
linf 4/255 and l2 3 (at 224 px). Robust is right when clean and when attacked. Encoders whose authors compare images by
a distance (R-LPIPS) are judged and attacked by it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from offline.audit.plan import AuditPlan, ImagesPlan, ThreatPlan
from offline.audit.record import AuditRecord
from offline.audit.task import Task
from offline.audit.two_afc import TripletSet, compared, task_of_triplets
from offline.benchmarks.intervals import Accuracy
from offline.benchmarks.published import Figure
from offline.benchmarks.suites import (
    CHUNK,
    Chunk,
    CleanAnswer,
    CleanPass,
    Show,
    SuiteRequest,
    Threat,
    attack,
    by_encoder,
    share,
)
from offline.benchmarks.two_afc import BAPPS_SPLITS, bapps_mean, human_ceiling, pooled, soft_score
from offline.data.two_afc import Triplet, read_triplets
from offline.errors import PlanError
from perception.catalogue import card_of
from perception.encoder import Encoder
from perception.encoders.tower import TowerEncoder

STEPS = 100
BAPPS_ATTACKED = 1000
"""Triplets of each split that are attacked, the first by name; the clean figure is of all (methods 6.2)."""
THREATS = (Threat("linf_4_255", "linf", 4 / 255), Threat("l2_3", "l2", 3.0))
SOFT = "bapps_soft_score"
STEP_COUNTS = (50, 100, 200, 500, 1000)
NIGHTS_GROUPS = {"test_imagenet": "nights_imagenet", "test_no_imagenet": "nights_no_imagenet"}
TABLE_VI = {
    "clean": 90.6,
    **{f"linf_4_255_{steps}": 74.3 for steps in STEP_COUNTS},
    **dict(zip((f"l2_3_{steps}" for steps in STEP_COUNTS), (66.7, 66.1, 65.9, 65.7, 65.6), strict=True)),
}
"""Published for one encoder, zero-shot FARE ConvNeXt-B_w, in percent; see `TABLE_VI_ENCODER`."""
TABLE_VI_ENCODER = "fare4-convnext_base_w"

Shares = Mapping[str, Accuracy]
"""Right answers by set, such as 'test_imagenet' or 'cnn'."""


def nights(request: SuiteRequest, show: Show) -> list[Figure]:
    """NIGHTS' test triplets: both splits together, which is the mean weighted by their sizes, and each for itself.

    A request's limit takes the first so many of a seeded shuffle of all test triplets.

    Raises:
        DataError: the folder has another layout, or files are missing; before an encoder is loaded.
        OfflineError, PerceptionError: see `attack` and `CleanPass.run`.
    """
    steps = request.steps or STEPS
    by_name = _measure(request, show, "nights", (steps,))
    return nights_figures(by_name, [("clean", "clean"), *((t.name, _key(t, steps)) for t in THREATS)])


def nights_figures(
    measured: Mapping[str, Mapping[str, Shares]], names: Sequence[tuple[str, str]], group: str = "nights"
) -> list[Figure]:
    """Figures of both splits together, then of each.

    Args:
        measured: by encoder, then by key of `names`, then by set.
        names: of the figures, each with its key.
        group: of the figures of both splits together.
    """
    figures = []
    for encoder, by_key in measured.items():
        for name, key in names:
            if key in by_key:
                figures.append(Figure.of_share(encoder, group, name, pooled(list(by_key[key].values()))))
    for split, of_split in NIGHTS_GROUPS.items():
        for encoder, by_key in measured.items():
            found = [(name, by_key[key][split]) for name, key in names if split in by_key.get(key, {})]
            figures += [Figure.of_share(encoder, of_split, name, accuracy) for name, accuracy in found]
    return figures


def steps(request: SuiteRequest, show: Show) -> list[Figure]:
    """Table VI: NIGHTS, both splits together, by updates of the attack.

    Each number of updates is an attack of its own. A request's `steps` takes its place, for a shorter run.

    Raises:
        DataError, OfflineError, PerceptionError: see `nights`.
    """
    counts = (request.steps,) if request.steps else STEP_COUNTS
    by_name = _measure(request, show, "nights", counts)
    keys = [_key(threat, count) for threat in THREATS for count in counts]
    figures = nights_figures(by_name, [(key, key) for key in ("clean", *keys)], "nights_steps")
    return [_beside_table_vi(figure) for figure in figures if figure.group == "nights_steps"]


def bapps(request: SuiteRequest, show: Show, *, soft: bool = False) -> list[Figure]:
    """BAPPS' validation triplets: the mean of the six splits, whatever their sizes, and each for itself.

    Accuracy on what most raters say; clean on all triplets, attacked on the first 1,000 of each split by name. A
    request's limit takes the first so many of each split, of the attacked ones at most 1,000.

    Args:
        soft: also LPIPS's own score on the clean triplets, and what a rater drawn at random would get.

    Raises:
        DataError, OfflineError, PerceptionError: see `nights`.
    """
    triplets = read_triplets("bapps", request.folder, request.limit, request.seed)
    answers = _clean("bapps", triplets, request, show)
    measured = {encoder: {"clean": _shares(of_encoder)} for encoder, of_encoder in answers.items()}
    count = request.steps or STEPS
    if not request.clean_only:
        limit = min(request.limit or BAPPS_ATTACKED, BAPPS_ATTACKED)
        for encoder, records in by_encoder(_attacked("bapps", request, limit, (count,), show), request).items():
            for threat in THREATS:
                measured[encoder][_key(threat, count)] = _robust(threat.of(records, count))
    names = [("clean", "clean"), *((threat.name, _key(threat, count)) for threat in THREATS)]
    figures = bapps_figures(measured, names)
    return figures + (_soft_figures(answers, triplets) if soft else [])


def _beside_table_vi(figure: Figure) -> Figure:
    card = card_of(figure.encoder)
    of_table = card is not None and card.name == TABLE_VI_ENCODER
    return replace(figure, published=TABLE_VI.get(figure.name)) if of_table else figure


def bapps_figures(measured: Mapping[str, Mapping[str, Shares]], names: Sequence[tuple[str, str]]) -> list[Figure]:
    """Figures of the six splits' mean, then of each split; arguments as for `nights_figures`."""
    figures = []
    for encoder, by_key in measured.items():
        for name, key in names:
            if key in by_key:
                mean = bapps_mean({split: accuracy.value for split, accuracy in by_key[key].items()})
                total = sum(accuracy.total for accuracy in by_key[key].values())
                figures.append(Figure.of_mean(encoder, "bapps", name, mean, total))
    for split in BAPPS_SPLITS:
        for encoder, by_key in measured.items():
            found = [(name, by_key[key][split]) for name, key in names if key in by_key]
            figures += [Figure.of_share(encoder, f"bapps_{split}", name, accuracy) for name, accuracy in found]
    return figures


# --- answers ---------------------------------------------------------------------------------------------------------


def _measure(request: SuiteRequest, show: Show, kind: str, counts: Sequence[int]) -> dict[str, dict[str, Shares]]:
    """Right answers of each encoder, clean and by threat and steps, where both are of the same triplets."""
    triplets = read_triplets(kind, request.folder, request.limit, request.seed)
    if request.clean_only:
        answers = _clean(kind, triplets, request, show)
        return {encoder: {"clean": _shares(of_encoder)} for encoder, of_encoder in answers.items()}
    records = by_encoder(_attacked(kind, request, request.limit, counts, show), request)
    measured: dict[str, dict[str, Shares]] = {}
    for encoder, of_encoder in records.items():
        first = THREATS[0].of(of_encoder, counts[0])
        measured[encoder] = {"clean": _by_set([(record.set, record.clean.correct) for record in first])}
        for threat in THREATS:
            measured[encoder] |= {_key(threat, n): _robust(threat.of(of_encoder, n)) for n in counts}
    return measured


def _attacked(kind: str, request: SuiteRequest, limit: int, counts: Sequence[int], show: Show) -> list[AuditRecord]:
    run = request.part("attacked")
    if run is None:
        raise PlanError("attacks need a run directory")
    plan = AuditPlan(
        task="two-afc",
        systems=request.systems,
        threats=tuple(ThreatPlan(threat.norm, threat.eps, tuple(counts)) for threat in THREATS),
        queries=(ImagesPlan(kind=kind, path=".", limit=limit),),
        square_queries=request.square_queries,
        seed=request.seed,
        batch=request.batch,
    )
    return attack(plan, request, run, show)


def _clean(kind: str, triplets: Sequence[Triplet], request: SuiteRequest, show: Show) -> dict[str, list[CleanAnswer]]:
    """Answers to all triplets, by encoder."""

    def chunk(part: Sequence[Triplet]) -> Chunk:
        def read(encoder: TowerEncoder) -> tuple[Encoder, Task]:
            view = compared(encoder)
            return view, task_of_triplets([TripletSet(kind, part)], view)

        return Chunk(tuple((triplet.set, triplet.id) for triplet in part), read)

    chunks = [chunk(triplets[start : start + CHUNK]) for start in range(0, len(triplets), CHUNK)]
    labels = "".join("01"[triplet.prefers_right] for triplet in triplets)
    found = CleanPass(chunks, {"suite": kind, "labels": labels}).run(request, request.part("clean"), show)
    return {encoder: [answer for answer in found if answer.encoder == encoder] for encoder in request.encoders}


def _soft_figures(answers: Mapping[str, Sequence[CleanAnswer]], triplets: Sequence[Triplet]) -> list[Figure]:
    judges = {(t.set, t.id): t.judge for t in triplets if t.judge is not None}
    figures: list[Figure] = []
    counts: dict[str, int] = {}
    for encoder, of_encoder in answers.items():
        scores: dict[str, float] = {}
        for split in BAPPS_SPLITS:
            chosen = [answer for answer in of_encoder if answer.set == split]
            # The margin is the right candidate's distance minus the left one's.
            right = torch.tensor([answer.scores["margin"] for answer in chosen], dtype=torch.float64)
            judge = torch.tensor([judges[answer.key] for answer in chosen], dtype=torch.float64)
            scores[split], counts[split] = soft_score(torch.zeros_like(right), right, judge), len(chosen)
        figures += _soft_row(encoder, scores, counts)
    ceilings = {s: human_ceiling(torch.tensor([t.judge for t in triplets if t.set == s])) for s in BAPPS_SPLITS}
    return figures + _soft_row("a rater at random", ceilings, counts)


def _soft_row(name: str, scores: Mapping[str, float], counts: Mapping[str, int]) -> list[Figure]:
    mean = Figure.of_mean(name, SOFT, "mean", bapps_mean(scores), sum(counts.values()))
    return [mean, *(Figure.of_mean(name, SOFT, split, scores[split], counts[split]) for split in BAPPS_SPLITS)]


def _shares(answers: Sequence[CleanAnswer]) -> Shares:
    return _by_set([(answer.set, answer.correct) for answer in answers])


def _robust(records: Sequence[AuditRecord]) -> Shares:
    return _by_set([(record.set, record.robust) for record in records])


def _by_set(right: Sequence[tuple[str, bool | None]]) -> Shares:
    sets = dict.fromkeys(name for name, _ in right)
    return {name: share(good for of, good in right if of == name) for name in sets}


def _key(threat: Threat, steps: int) -> str:
    return f"{threat.name}_{steps}"
