"""The suite of THINGS odd-one-out (methods 6.3, table XII): clean on all triplets, attacked on some if asked for.

The paper attacks no such triplets; its clean figures are of the first 5,000.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from offline.audit.odd_one_out import KINDS, task_of_things
from offline.audit.plan import AuditPlan, ImagesPlan, SystemPlan, ThreatPlan
from offline.audit.task import Task
from offline.benchmarks.encoded_files import FileEncoder
from offline.benchmarks.intervals import Accuracy
from offline.benchmarks.odd_one_out import accuracy, choices, similarity_table
from offline.benchmarks.published import Figure
from offline.benchmarks.suites import Show, SuiteRequest, Threat, attack, by_encoder, share
from offline.data.things import OddOneOutTriplets, Variant, read_things
from offline.errors import PlanError
from perception.encoder import Encoder
from perception.encoders.tower import TowerEncoder

STEPS = 100
THREATS = (Threat("linf_4_255", "linf", 4 / 255), Threat("l2_3", "l2", 3.0))
CHECK_IMAGES = 8


@dataclass(frozen=True)
class ThingsFiles:
    """Which triplets, and where they are; see `offline.data.things.read_things`."""

    variant: Variant = "triplets"
    table: Path | None = None
    image_list: Path | None = None
    images: Path | None = None

    @property
    def group(self) -> str:
        """Of the figures: DreamSim's list has none in the paper."""
        return "things" if self.variant == "triplets" else "things_dreamsim"

    def read(self, folder: Path, limit: int) -> OddOneOutTriplets:
        """The triplets; raises as `read_things`."""
        return read_things(
            folder, self.variant, limit, table=self.table, image_list=self.image_list, images=self.images
        )


def things(request: SuiteRequest, show: Show, files: ThingsFiles | None = None, attacked: int = 0) -> list[Figure]:
    """The share of triplets whose odd one is people's.

    Args:
        request: its limit takes the first so many triplets; 0 for all. Embeddings are kept in its run directory.
        show: takes progress.
        files: which triplets.
        attacked: the first so many triplets are also attacked, unless the request is `clean_only`.

    Raises:
        PlanError: `attacked` is negative.
        DataError: the folder has another layout, a row is malformed or images are missing; before an encoder is loaded.
        OfflineError, PerceptionError: see `attack`.
    """
    if attacked < 0:
        raise PlanError(f"attacked must be 0 or more, got {attacked}")
    files = files or ThingsFiles()
    triplets = files.read(request.folder, request.limit)
    figures = [
        Figure.of_share(name, files.group, "clean", found)
        for name, found in _clean(request, triplets, files, show).items()
    ]
    if request.clean_only or not attacked or request.run is None:
        return figures
    return figures + _attacked(request, first(triplets, attacked), files, show)


def first(triplets: OddOneOutTriplets, count: int) -> OddOneOutTriplets:
    """The first so many triplets, or all where there are fewer."""
    return replace(triplets, triplets=triplets.triplets[:count], odd=triplets.odd[:count])


def _clean(
    request: SuiteRequest, triplets: OddOneOutTriplets, files: ThingsFiles, show: Show
) -> Mapping[str, Accuracy]:
    """By encoder; each image is encoded once."""
    from perception import load_encoder

    used = triplets.used
    compact = used.searchsorted(triplets.triplets)  # from rows of all images to those that are used
    paths = [triplets.images[row] for row in used.tolist()]
    found = {}
    for name in request.encoders:
        encoder = load_encoder(name, device=request.device)
        metric = getattr(encoder, "metric", "cosine")

        def tell(done: int, total: int, name: str = name) -> None:
            show(f"{files.group} {name}", done, total, f"{name}, images")

        encode = FileEncoder(encoder, request.part("embeddings"), features=metric == "l2").encode
        embeddings = encode(paths, tell).embeddings.to(request.device)
        found[name] = accuracy(choices(similarity_table(embeddings, metric), compact), triplets.odd)
    return found


def _attacked(request: SuiteRequest, triplets: OddOneOutTriplets, files: ThingsFiles, show: Show) -> list[Figure]:
    """Right when clean and when attacked; the images of the plan are those of the request."""
    steps = request.steps or STEPS
    kind = next(kind for kind, variant in KINDS.items() if variant == files.variant)
    plan = AuditPlan(
        task="odd-one-out",
        systems=request.systems,
        threats=tuple(ThreatPlan(threat.norm, threat.eps, steps) for threat in THREATS),
        queries=(ImagesPlan(kind, ".", limit=len(triplets)),),
        square_queries=request.square_queries,
        check_images=CHECK_IMAGES,
        seed=request.seed,
        batch=request.batch,
    )

    def opener(plan: AuditPlan, system: SystemPlan, encoder: TowerEncoder) -> tuple[Encoder, Task]:
        return encoder, task_of_things(triplets, encoder, plan.queries[0].set_name)

    run = request.part("attacked")
    assert run is not None  # SuiteRequest sees to it
    records = attack(plan, request, run, show, opener)
    return [
        Figure.of_share(name, files.group, threat.name, share(record.robust for record in threat.of(of_encoder, steps)))
        for name, of_encoder in by_encoder(records, request).items()
        for threat in THREATS
    ]
