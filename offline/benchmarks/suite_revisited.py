"""The suites of ROxford5k and RParis6k: the official mean average precision, easy, medium and hard (methods 6.4).

Clean, and with each query perturbed away from itself by Eq. 6 under linf 4/255, 100 updates from a random start (5.3,
table IX). A query's attacked figure is the lower, by medium, of what the perturbed and the clean image get: an attack
that helps the ranking has not succeeded.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from offline.audit.plan import AuditPlan, SystemPlan, ThreatPlan
from offline.audit.record import Judgement
from offline.audit.retrieval import RetrievalTask, open_revisited
from offline.audit.task import Task
from offline.benchmarks.encoded_files import FileEncoder
from offline.benchmarks.published import Figure
from offline.benchmarks.retrieval import Difficulty, QueryScores
from offline.benchmarks.suites import Show, SuiteRequest, Threat, attack, by_encoder
from offline.data.revisited import IMAGES, RevisitedSet, open_revisited_folder
from perception.encoder import Encoder
from perception.encoders.tower import TowerEncoder
from perception.preprocess import to_pixels

STEPS = 100
THREAT = Threat("linf_4_255", "linf", 4 / 255)
CHECK_IMAGES = 8


def revisited(request: SuiteRequest, show: Show, which: RevisitedSet, *, crop: bool = True) -> list[Figure]:
    """Mean average precisions of a revisited set, over the queries that have something to find.

    Args:
        request: its limit takes the first so many queries; 0 for all. Embeddings of the database are kept in its run
            directory.
        show: takes progress.
        which: set.
        crop: queries to their boxes, as the official protocol does; the paper does not say.

    Raises:
        DataError: the folder has another layout, or files are missing; before an encoder is loaded.
        OfflineError, PerceptionError: see `attack`.
    """
    found = open_revisited_folder(which, request.folder)
    steps = request.steps or STEPS
    plan = AuditPlan(
        task="retrieval",
        systems=request.systems,
        threats=(ThreatPlan(THREAT.norm, THREAT.eps, steps),),
        ground_truth=found.ground_truth_name,
        image_folder=IMAGES,
        crop_queries=crop,
        square_queries=request.square_queries,
        check_images=CHECK_IMAGES,
        seed=request.seed,
        batch=request.batch,
    )

    def task_of(plan: AuditPlan, name: str, encoder: Encoder) -> RetrievalTask:
        def encode(files: Sequence[Path]) -> tuple[Tensor, str]:
            def tell(done: int, total: int) -> None:
                show(f"{which} {name} database", done, total, f"{name}, database")

            encoded = FileEncoder(encoder, request.part("database")).encode(files, tell)
            return encoded.embeddings, encoded.sha256

        return open_revisited(plan, encoder, request.folder, limit=request.limit, encode=encode)

    def opener(plan: AuditPlan, system: SystemPlan, encoder: TowerEncoder) -> tuple[Encoder, Task]:
        return encoder, task_of(plan, system.name, encoder)

    run = request.part("attacked")
    if request.clean_only or run is None:
        from perception import load_encoder

        figures = []
        for system in request.systems:
            encoder = load_encoder(system.encoder, device=request.device)
            judged = clean_judgements(task_of(plan, system.name, encoder), encoder, request.batch)
            figures += _figures(system.encoder, which, {"clean": judged})
        return figures
    by_name = by_encoder(attack(plan, request, run, show, opener), request)
    return [
        figure
        for name, records in by_name.items()
        for figure in _figures(
            name, which, {"clean": [r.clean for r in records], THREAT.name: [r.attacked for r in records]}
        )
    ]


def clean_judgements(task: RetrievalTask, encoder: Encoder, batch: int) -> list[Judgement]:
    """What a system says of all queries as they are."""
    judged = []
    for rows in torch.arange(len(task.items)).split(batch):
        with torch.no_grad():
            embeddings = encoder.encode(to_pixels([task.items[row].pixels for row in rows.tolist()]))
        judged += task.judge(rows, embeddings)
    return judged


def _figures(encoder: str, group: str, versions: Mapping[str, Sequence[Judgement]]) -> list[Figure]:
    """Of each version and difficulty for which a query has positives."""
    figures = []
    for version, judged in versions.items():
        for difficulty in get_args(Difficulty):
            scores = QueryScores(tuple(judgement.scores.get(f"ap_{difficulty}") for judgement in judged))
            if scores.judged:
                name = f"{difficulty}_{version}"
                figures.append(Figure.of_mean(encoder, group, name, scores.mean, scores.judged))
    return figures
