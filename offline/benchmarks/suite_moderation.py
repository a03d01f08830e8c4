"""The moderation suites: NSFW images (tables III, VIII and IV) and dangerous objects (table X); methods 6.5 to 6.7.

The grey-box attacker of Eq. 5 knows the encoder and 16 images of the other label, not the pools: APGD, linf 8/255. An
attack stops when the decision is the attacker's, which it asks after every update; the published one asked at the end.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from offline.audit.figures import summarise
from offline.audit.plan import AuditPlan, CombinationPlan, ImagesPlan, SystemPlan, ThreatPlan
from offline.audit.record import AuditRecord
from offline.audit.rows import Row
from offline.benchmarks.choices import choose, open_folders
from offline.benchmarks.intervals import Accuracy
from offline.benchmarks.moderation_tasks import ModerationImages, chunks, opener
from offline.benchmarks.published import Figure
from offline.benchmarks.suites import (
    CleanAnswer,
    CleanPass,
    Show,
    SuiteRequest,
    Threat,
    attack,
    by_encoder,
    share,
)
from offline.errors import DataError, DataMissing, PlanError
from perception.catalogue import card_of
from perception.image import IMAGE_EXTENSIONS
from perception.verdict import PoolLabel, VerdictLabel

POOL_SIZE, TARGETS = 500, 16
NSFW_QUERIES, NSFW_STEPS = 500, 200
OBJECT_QUERIES, OBJECTS_ATTACKED, OBJECT_STEPS = 10_000, 1000, 500
THREAT = Threat("linf_8_255", "linf", 8 / 255)
SAFE, UNSAFE = VerdictLabel.SAFE, VerdictLabel.UNSAFE
ANSWERS = {VerdictLabel.SAFE: "safe", VerdictLabel.REVIEW: "buffer", VerdictLabel.UNSAFE: "unsafe"}

NSFW_ROOT = "nsfw_dataset_v1"
NSFW_CLASSES = {PoolLabel.SAFE: "neutral", PoolLabel.BUFFER: "sexy", PoolLabel.UNSAFE: "porn"}
NSFW_LAYOUT = (
    f"the layout of {NSFW_ROOT}.zip of the data set deepghs/nsfw_detect: {NSFW_ROOT}/drawings, hentai, neutral, porn "
    "and sexy with image files; it is gated: accept its conditions on the model hub, then download and unpack the zip"
)
UNSAFE_WNIDS = ("n02749479", "n04090263", "n04086273")
SAFE_WNIDS = (
    "n03180011",
    "n02974003",
    "n01688243",
    "n01820546",
    "n04252225",
    "n02444819",
    "n03345487",
    "n01882714",
    "n01871265",
    "n02116738",
)
OBJECTS_LAYOUT = (
    f"train/<wnid>/*.JPEG as in ImageNet's training set (the classes {', '.join((*UNSAFE_WNIDS, *SAFE_WNIDS))}), and "
    "flickr/unsafe and flickr/safe, 500 photographs each, which are published nowhere: search Flickr for the tags of "
    "methods 6.6"
)
DETECTOR, DETECTOR_ENCODER = "LAION detector", "clip-vit-l-14"
TABLE_IV = {
    DETECTOR: (98.2, 99.6, 13.1, 28.2),
    "clip-convnext_base_w": (95.4, 99.4, 0.0, 4.2),
    "fare4-convnext_base_w": (92.2, 98.4, 56.4, 82.8),
    f"{DETECTOR} or fare4-convnext_base_w": (89.6, 99.8, 9.3, 91.0),
}
"""Safe and unsafe queries judged rightly, clean and then attacked, in percent."""
_TABLE_IV_NAMES = ("safe_clean", "unsafe_clean", "safe_linf_8_255", "unsafe_linf_8_255")


@dataclass(frozen=True)
class Detector:
    """The detector that a suite compares with.

    Attributes:
        head: file of its head.
        encoder: whose embeddings it takes.
        threshold: of its probability.
    """

    head: Path
    encoder: str = DETECTOR_ENCODER
    threshold: float = 0.5


def nsfw(request: SuiteRequest, show: Show, *, pool_size: int = POOL_SIZE) -> list[Figure]:
    """Tables III and VIII: safe, buffer and unsafe answers to safe and to unsafe queries, clean and attacked.

    Pools of 500 a class, 500 other safe and 500 other unsafe queries (a request's limit takes their place), and 16
    other targets of either label, by a seed; the data set is published without a choice of its own.

    Raises:
        DataError, DataMissing: the folder has another layout, or too few images; before an encoder is loaded.
        OfflineError, PerceptionError: see `attack` and `CleanPass.run`.
    """
    images = _nsfw_images(request, pool_size, buffer=True)
    if request.clean_only:
        parts = chunks(images, images.queries, request.run)
        what = {"suite": "nsfw", "pools": _ids(images)}
        answers = _clean(CleanPass(parts, what).run(request, request.part("clean"), show), request)
        return nsfw_figures({name: {"clean": found} for name, found in answers.items()})
    plan = _plan(request, request.systems, NSFW_STEPS, {SAFE: "neutral", UNSAFE: "porn"})
    run = _attacked(request)
    records = by_encoder(attack(plan, request, run, show, opener(images, run)), request)
    return nsfw_figures({name: _answers_of(found) for name, found in records.items()})


def nsfw_figures(answers: Mapping[str, Mapping[str, Sequence[tuple[str, str]]]]) -> list[Figure]:
    """Figures of answers: first the shares put into their own pool, then all answers to each kind of query.

    Args:
        answers: by encoder, then by version 'clean' or 'linf_8_255', pairs of what is right and what was answered.
    """
    own, spread = [], []
    for label in (SAFE, UNSAFE):
        for encoder, by_version in answers.items():
            for version, pairs in by_version.items():
                given = [answer for right, answer in pairs if right == label]
                shares = {name: share(answer == verdict for answer in given) for verdict, name in ANSWERS.items()}
                own.append(Figure.of_share(encoder, "nsfw", f"{label}_{version}", shares[ANSWERS[label]]))
                for name, of_answer in shares.items():
                    group = f"nsfw_{label}_queries"
                    spread.append(Figure.of_share(encoder, group, f"{version}_{name}", of_answer))
    return [*own, *spread]


def detector(request: SuiteRequest, show: Show, against: Detector, *, pool_size: int = POOL_SIZE) -> list[Figure]:
    """Table IV: pools without a buffer, a detector, and the OR of the two, each attacked for itself.

    Raises:
        PlanError: it is asked for without attacks.
        DataError, DataMissing, OfflineError, PerceptionError: see `nsfw`; and the detector's head is not there.
    """
    if request.clean_only:
        raise PlanError("the detector suite is about attacks; `nsfw --clean-only` has the clean answers of the pools")
    if not against.head.is_file():
        raise DataMissing(against.head)
    images = _nsfw_images(request, pool_size, buffer=False)
    head = str(against.head.resolve())
    alone = SystemPlan(name=DETECTOR, encoder=against.encoder, head=head, threshold=against.threshold)
    systems = tuple(replace(system, pools=("safe", "unsafe")) for system in _with_pools(request.systems))
    plan = _plan(request, (alone, *systems), NSFW_STEPS, {SAFE: "neutral", UNSAFE: "porn"})
    either = tuple(CombinationPlan(f"{DETECTOR} or {s.name}"[:80], (DETECTOR, s.name)) for s in systems)
    plan = replace(plan, combinations=either)
    run = _attacked(request)
    records = attack(plan, request, run, show, opener(images, run))
    names = {DETECTOR: DETECTOR} | {system.name: system.encoder for system in systems}
    names |= {e.name: f"{DETECTOR} or {names[e.systems[1]]}" for e in either}
    return [figure for row in summarise(plan, records, []).rows for figure in _binary(names[row.system], row)]


def _binary(name: str, row: Row) -> Iterable[Figure]:
    """Clean and attacked of one label; a row of table IV is of two."""
    published = dict(zip(_TABLE_IV_NAMES, TABLE_IV.get(_table_iv_name(name), ()), strict=False))
    for version, accuracy in (("clean", row.clean), ("linf_8_255", row.robust)):
        if accuracy is not None and not row.set:
            figure = Figure.of_share(name, "nsfw_binary", f"{row.label}_{version}", accuracy)
            yield replace(figure, published=published.get(figure.name))


def _table_iv_name(name: str) -> str:
    prefix, found, encoder = name.rpartition(f"{DETECTOR} or ")
    card = card_of(encoder)
    return f"{prefix}{found}{card.name if card is not None else encoder}"


def dangerous_objects(request: SuiteRequest, show: Show, *, pool_size: int = POOL_SIZE) -> list[Figure]:
    """Table X: firearms among ImageNet's images over pools of Flickr photographs, without a buffer.

    Clean: 10,000 safe images and all unsafe ones; attacked: 1,000 unsafe ones towards 16 safe ones. A request's limit
    takes the place of all three numbers.

    Raises:
        DataError, DataMissing, OfflineError, PerceptionError: see `nsfw`.
    """
    folder = request.folder
    wanted = {
        **{f"train/{wnid}": 1 for wnid in (*UNSAFE_WNIDS, *SAFE_WNIDS)},
        **{f"flickr/{label}": pool_size for label in (PoolLabel.SAFE, PoolLabel.UNSAFE)},
    }
    _require_folders(folder, wanted, "dangerous objects", OBJECTS_LAYOUT)
    pools = {}
    for label in (PoolLabel.SAFE, PoolLabel.UNSAFE):
        flickr = open_folders([folder / "flickr" / label])
        pools[label], _ = choose(flickr, [pool_size], request.seed, name=f"flickr/{label}")
    safe = open_folders([folder / "train" / wnid for wnid in SAFE_WNIDS])
    targets, others = choose(safe, [TARGETS], request.seed, name="safe images of train/")
    unsafe = open_folders([folder / "train" / wnid for wnid in UNSAFE_WNIDS])
    attacked_count = min(request.limit or OBJECTS_ATTACKED, len(unsafe))
    attacked, rest = choose(unsafe, [attacked_count], request.seed, name="unsafe images of train/")
    images = ModerationImages(pools, {UNSAFE: attacked}, {SAFE: targets})
    everything = replace(attacked, indices=attacked.indices + rest.indices)
    firearms = everything.part(0, request.limit or len(everything))
    clean = {SAFE: others.part(0, request.limit or OBJECT_QUERIES), UNSAFE: firearms}
    what = {"suite": "dangerous-objects", "pools": _ids(images)}
    answers = CleanPass(chunks(images, clean, request.run), what).run(request, request.part("clean"), show)
    figures = [
        Figure.of_share(encoder, "dangerous_objects", f"{label}_clean", share(a == r for r, a in pairs if r == label))
        for encoder, pairs in _clean(answers, request).items()
        for label in (SAFE, UNSAFE)
    ]
    if request.clean_only:
        return figures
    plan = _plan(request, request.systems, OBJECT_STEPS, {UNSAFE: "train"})
    run = _attacked(request)
    for encoder, records in by_encoder(attack(plan, request, run, show, opener(images, run)), request).items():
        robust: Accuracy = share(record.robust for record in records)
        figures.append(Figure.of_share(encoder, "dangerous_objects", f"unsafe_{THREAT.name}", robust))
    return figures


# --- images and plans ------------------------------------------------------------------------------------------------


def _nsfw_images(request: SuiteRequest, pool_size: int, *, buffer: bool) -> ModerationImages:
    root = request.folder / NSFW_ROOT if (request.folder / NSFW_ROOT).is_dir() else request.folder
    queries = request.limit or NSFW_QUERIES
    sizes = {PoolLabel.SAFE: [pool_size, queries, TARGETS], PoolLabel.UNSAFE: [pool_size, queries, TARGETS]}
    if buffer:
        sizes = {PoolLabel.SAFE: sizes[PoolLabel.SAFE], PoolLabel.BUFFER: [pool_size], **sizes}
    _require_folders(root, {NSFW_CLASSES[label]: sum(of) for label, of in sizes.items()}, "NSFW", NSFW_LAYOUT)
    parts = {
        label: choose(open_folders([root / NSFW_CLASSES[label]]), of, request.seed, name=NSFW_CLASSES[label])
        for label, of in sizes.items()
    }
    both = {SAFE: parts[PoolLabel.SAFE], UNSAFE: parts[PoolLabel.UNSAFE]}
    return ModerationImages(
        pools={label: of[0] for label, of in parts.items()},
        queries={label: of[1] for label, of in both.items()},
        targets={label: of[2] for label, of in both.items()},
    )


def _require_folders(root: Path, wanted: Mapping[str, int], name: str, layout: str) -> None:
    """Find out all at once what is missing or too small, by the names of files alone."""
    problems = []
    for relative, count in wanted.items():
        folder = root / relative
        if not folder.is_dir():
            problems.append(f"{folder} is not there")
            continue
        found = sum(path.suffix[1:].lower() in IMAGE_EXTENSIONS for path in folder.rglob("*"))
        if found < count:
            problems.append(f"{folder} holds {found} image files, needs {count}")
    if problems:
        shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise DataError(name, f"{shown}; expected {layout}")


def _plan(
    request: SuiteRequest, systems: Sequence[SystemPlan], steps: int, queries: dict[VerdictLabel, str]
) -> AuditPlan:
    """A plan of target-set attacks; which images there are is the opener's matter, and the run's record of it."""
    other = {SAFE: UNSAFE, UNSAFE: SAFE}
    paths = {other[label]: path for label, path in queries.items()} | queries
    return AuditPlan(
        task="moderation",
        systems=_with_pools(systems),
        threats=(ThreatPlan(THREAT.norm, THREAT.eps, request.steps or steps),),
        queries=tuple(_images(label, path, request.limit) for label, path in queries.items()),
        targets=tuple(_images(other[label], paths[other[label]], TARGETS) for label in queries),
        attacks=("target-set",),
        square_queries=request.square_queries,
        seed=request.seed,
        batch=request.batch,
    )


def _images(label: VerdictLabel, path: str, limit: int) -> ImagesPlan:
    return ImagesPlan(kind="folder", path=path, label="safe" if label is SAFE else "unsafe", limit=limit)


def _with_pools(systems: Sequence[SystemPlan]) -> tuple[SystemPlan, ...]:
    """Systems with a gallery, which a plan wants to be named; the opener builds it in the run directory."""
    return tuple(system if system.head else replace(system, gallery="pools/") for system in systems)


def _attacked(request: SuiteRequest) -> Path:
    run = request.part("attacked")
    if run is None:
        raise PlanError("attacks need a run directory")
    return run


def _ids(images: ModerationImages) -> dict[str, list[str]]:
    return {str(label): list(choice.ids) for label, choice in images.pools.items()}


def _clean(answers: Iterable[CleanAnswer], request: SuiteRequest) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {encoder: [] for encoder in request.encoders}
    for answer in answers:
        found[answer.encoder].append((answer.label, answer.answer))
    return found


def _answers_of(records: Sequence[AuditRecord]) -> dict[str, list[tuple[str, str]]]:
    return {
        "clean": [(record.label, record.clean.answer) for record in records],
        THREAT.name: [(record.label, record.attacked.answer) for record in records],
    }
