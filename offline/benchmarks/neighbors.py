"""Nearest neighbours of a few images under several encoders, clean and attacked (methods 5.3 and 6.8).

As in the paper's figures of MS-COCO: each query is perturbed away from itself (Eq. 6) under linf 4/255, by 50 updates
from a random start, and the gallery's most similar images are looked up before and after. Owns which queries, the
search, the attack and the records; `offline.benchmarks.neighbors_page` draws them.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from offline.attacks.apgd import Apgd
from offline.attacks.base import Attacked
from offline.benchmarks.encoded_files import EncodedFiles, FileEncoder
from offline.benchmarks.published import Figure
from offline.benchmarks.retrieval import rank
from offline.benchmarks.suites import Show
from offline.data.files import read_image_file
from offline.data.folder import FolderImages
from offline.errors import DataError, OfflineError, PlanError, RunError
from offline.folding import fold
from offline.jsonlines import JsonLines
from offline.objectives import EmbeddingShift
from offline.runs import RunDirectory, write_atomically
from offline.seeds import mixed_seed
from offline.threat import ThreatModel
from perception.encoder import Encoder
from perception.encoders.tower import TowerEncoder
from perception.preprocess import to_pixels

RECORDS_NAME, GALLERY_NAME, PICTURES_NAME = "records.jsonl", "gallery", "pictures"
LAYOUT = (
    "a folder of image files, whose sub-folders are searched as well, such as train2017 of MS-COCO (the paper takes "
    "15,000 of its images)"
)
_DECIMALS = 6


@dataclass(frozen=True)
class NeighborsPlan:
    """What is asked; the numbers of the paper are the defaults.

    Attributes:
        count: queries, of a seeded choice; 0 for all images of a folder of queries.
        k: neighbours.
        eps: radius of linf in [0, 1] pixel units.
        steps: updates of APGD.
        seed: of the choice and of the random starts.
        batch: queries attacked together; starts are drawn by batch.

    Raises:
        PlanError: a number is impossible.
    """

    count: int = 4
    k: int = 5
    eps: float = 4 / 255
    steps: int = 50
    seed: int = 0
    batch: int = 8

    def __post_init__(self) -> None:
        if self.count < 0 or min(self.k, self.steps, self.batch) < 1 or self.seed < 0:
            raise PlanError(f"k, steps and batch must be at least 1, count and seed at least 0, got {asdict(self)}")
        _ = self.threat

    @property
    def threat(self) -> ThreatModel:
        """The threat model."""
        return ThreatModel("linf", self.eps)


@dataclass(frozen=True)
class Near:
    """A neighbour: its id in the gallery, and its similarity in [-1, 1]."""

    id: str
    similarity: float


@dataclass(frozen=True)
class NeighborsRecord:
    """The neighbours of one query under one encoder.

    Attributes:
        encoder, fingerprint: name and identity.
        gallery_sha256: over the gallery's pixels, as the encoder takes them.
        query: its id.
        clean, attacked: the k most similar images of the gallery, best first; the query itself is none.
        distance: linf norm of the perturbation.
        pictures: name of its two pictures in the run directory, without '-clean.png' and '-attacked.png'.
    """

    encoder: str
    fingerprint: str
    gallery_sha256: str
    query: str
    clean: tuple[Near, ...]
    attacked: tuple[Near, ...]
    distance: float
    pictures: str

    @property
    def kept(self) -> frozenset[str]:
        """Ids that are neighbours of both the clean and the attacked query."""
        return frozenset(near.id for near in self.clean) & frozenset(near.id for near in self.attacked)

    @property
    def overlap(self) -> float:
        """The share of the clean query's neighbours that are kept under attack, in [0, 1]."""
        return len(self.kept) / len(self.clean)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "NeighborsRecord":
        """The opposite of `asdict`; raises TypeError or KeyError for what is none."""
        near = {name: tuple(Near(**found) for found in values[name]) for name in ("clean", "attacked")}
        record = cls(**{**values, **near})
        if not record.clean or len(record.clean) != len(record.attacked):
            raise TypeError(f"{len(record.clean)} and {len(record.attacked)} neighbours")
        return record


@dataclass(frozen=True)
class NeighborsImages:
    """The images of a gallery and the queries that were chosen.

    Attributes:
        gallery, queries: folders.
        ids: of the gallery, paths relative to its folder.
        asked: ids of the queries, in their order.
    """

    gallery: Path
    queries: Path
    ids: tuple[str, ...]
    asked: tuple[str, ...]

    def own(self, query: str) -> str:
        """The id under which the gallery holds the query itself; '' where it does not."""
        root, file = self.gallery.resolve(), (self.queries / query).resolve()
        return file.relative_to(root).as_posix() if file.is_relative_to(root) else ""

    @property
    def identity(self) -> dict[str, Any]:
        """For the run directory; folders may move."""
        digest = hashlib.sha256(json.dumps(self.ids).encode()).hexdigest()
        return {"gallery_ids_sha256": digest, "queries": list(self.asked)}


def open_neighbors(gallery: Path, queries: Path | None, plan: NeighborsPlan) -> NeighborsImages:
    """List the gallery, and choose the queries.

    Args:
        gallery: folder.
        queries: folder; None takes them from the gallery.
        plan: its count and seed decide on the choice; what cannot be read is passed over.

    Raises:
        DataError: a folder is missing or holds no image, or too few can be read.
        PlanError: the gallery has not more than k images, or all of its images are asked for.
    """
    of_gallery = _listed(gallery, "gallery")
    if len(of_gallery) <= plan.k:
        raise PlanError(f"{plan.k} neighbours need a gallery of more images, {gallery} holds {len(of_gallery)}")
    candidates = of_gallery if queries is None else _listed(queries, "queries")
    folder = queries or gallery
    if queries is None and not plan.count:
        raise PlanError("give a folder of queries, or how many of the gallery's images to ask for")
    order = np.random.default_rng(plan.seed).permutation(len(candidates)) if plan.count else np.arange(len(candidates))
    readable = (candidates[row] for row in order.tolist() if _is_readable(folder / candidates[row]))
    wanted = plan.count or len(candidates)
    asked = tuple(query for query, _ in zip(readable, range(wanted), strict=False))
    if len(asked) < (plan.count or 1):
        raise DataError(str(folder), f"holds {len(asked)} images that can be read, {wanted} were asked for")
    return NeighborsImages(gallery, folder, tuple(of_gallery), asked)


def _listed(folder: Path, what: str) -> list[str]:
    if not folder.is_dir():
        raise DataError(what, f"{folder} is not there; expected {LAYOUT}")
    try:
        listed = FolderImages(folder, None, what)
    except DataError as error:
        raise DataError(what, f"{folder} {error.reason}; expected {LAYOUT}") from error
    return [listed.id_of(i) for i in range(len(listed))]


def _is_readable(file: Path) -> bool:
    try:
        read_image_file(file)
    except OfflineError:
        return False
    return True


def neighbors(
    encoders: Sequence[str],
    images: NeighborsImages,
    plan: NeighborsPlan,
    run: Path,
    show: Show,
    *,
    device: str = "cpu",
) -> list[NeighborsRecord]:
    """Search and attack all queries under all encoders, or those that have no record yet.

    Args:
        encoders: names of `load_encoder`; more may join in a later call.
        images: gallery and queries.
        plan: what is asked.
        run: run directory, which holds the gallery's embeddings, pictures of the queries and the records.
        show: takes progress.
        device: torch device.

    Returns:
        The records of these encoders, in their order, then in that of the queries.

    Raises:
        RunError: the directory holds a run of another plan, other images or other weights.
        OfflineError, PerceptionError: an encoder or the gallery cannot be read, or an attack left its threat model.
    """
    from perception import load_encoder

    if not encoders or len(set(encoders)) < len(encoders):
        raise PlanError(f"neighbors needs encoders, each once, got {list(encoders)}")
    directory = RunDirectory(run, {"neighbors": asdict(plan), **images.identity})
    lines = JsonLines(directory.path / RECORDS_NAME)
    known = {(record.encoder, record.query): record for record in lines.read(NeighborsRecord.from_dict)}
    for name in encoders:
        encoder = load_encoder(name, device=device)
        tell = _teller(show, f"{name}, gallery")
        files = [images.gallery / id for id in images.ids]
        gallery = FileEncoder(encoder, run / GALLERY_NAME, skip_unreadable=True).encode(files, tell)
        for problem in gallery.problems:
            directory.log(event="unreadable", problem=problem)
        search = _Search(name, encoder, images, gallery, plan, run)
        for record in known.values():
            search.require_same(record)
        tell = _teller(show, f"{name}, queries")
        for number, start in enumerate(range(0, len(images.asked), plan.batch)):
            asked = images.asked[start : start + plan.batch]
            if not all((name, query) in known for query in asked):
                fresh = [record for record in search.batch(number, asked) if (name, record.query) not in known]
                lines.append(map(asdict, fresh))
                known |= {(name, record.query): record for record in fresh}
            tell(start + len(asked), len(images.asked))
    return [known[name, query] for name in encoders for query in images.asked]


def _teller(show: Show, text: str) -> Callable[[int, int], None]:
    return lambda done, total: show(text, done, total, text)


class _Search:
    """One encoder's gallery, searched before and after an attack."""

    def __init__(
        self,
        name: str,
        encoder: Encoder,
        images: NeighborsImages,
        gallery: EncodedFiles,
        plan: NeighborsPlan,
        run: Path,
    ) -> None:
        self._name, self._encoder, self._images, self._plan, self._run = name, encoder, images, plan, run
        self._gallery = gallery
        self._ids = [images.ids[row] for row in gallery.rows.tolist()]
        folded = fold(encoder) if isinstance(encoder, TowerEncoder) else None
        self._attacked: Attacked = folded or encoder

    def require_same(self, record: NeighborsRecord) -> None:
        """Refuse to go on with records of other weights, or of a gallery whose images were others.

        Raises:
            RunError: they are.
        """
        same = (self._encoder.fingerprint, self._gallery.sha256)
        if record.encoder == self._name and (record.fingerprint, record.gallery_sha256) != same:
            raise RunError(f"{self._run} holds neighbours of other weights or images of {self._name}: choose another")

    def batch(self, number: int, asked: Sequence[str]) -> Iterator[NeighborsRecord]:
        """The records of some queries; starts are drawn from the batch's number."""
        plan = self._plan
        shown = [self._encoder.preprocess.apply(read_image_file(self._images.queries / query)) for query in asked]
        pixels = to_pixels(shown)
        with torch.no_grad():
            clean = self._encoder.encode(pixels)
        pixels = pixels.to(clean.device)
        found = Apgd(plan.steps, 1).attack(
            self._attacked,
            EmbeddingShift(clean),
            None,
            pixels,
            plan.threat,
            generator=torch.Generator().manual_seed(mixed_seed(plan.seed, number)),
        )
        plan.threat.require(found.adversarial, pixels, "shift")
        with torch.no_grad():
            attacked = self._encoder.encode(found.adversarial)
        distances = plan.threat.distance(found.adversarial, pixels).tolist()
        eight_bit = (found.adversarial * 255).round().to(torch.uint8).cpu().numpy()
        rankings = zip(self._nearest(asked, clean), self._nearest(asked, attacked), strict=True)
        for i, (before, after) in enumerate(rankings):
            pictures = self._keep(asked[i], shown[i], eight_bit[i])
            distance = round(distances[i], _DECIMALS)
            fingerprint, sha256 = self._encoder.fingerprint, self._gallery.sha256
            yield NeighborsRecord(self._name, fingerprint, sha256, asked[i], before, after, distance, pictures)

    def _nearest(self, asked: Sequence[str], embeddings: Tensor) -> list[tuple[Near, ...]]:
        """The k most similar of the gallery for each query, which is not its own neighbour."""
        queries = embeddings.cpu()
        nearest = []
        for query, embedding, order in zip(asked, queries, rank(queries, self._gallery.embeddings), strict=True):
            own = self._images.own(query)
            rows = [row for row in order[: self._plan.k + 1].tolist() if self._ids[row] != own][: self._plan.k]
            if len(rows) < self._plan.k:
                raise DataError("gallery", f"only {len(rows)} of its images can be read, {self._plan.k} are asked for")
            similarities = (self._gallery.embeddings[rows] @ embedding).tolist()
            near = zip((self._ids[row] for row in rows), similarities, strict=True)
            nearest.append(tuple(Near(id, round(value, _DECIMALS)) for id, value in near))
        return nearest

    def _keep(self, query: str, clean: NDArray[np.uint8], attacked: NDArray[np.uint8]) -> str:
        """Keep the pictures of a query as the encoder sees it; returns their name."""
        name = hashlib.sha256(json.dumps([self._name, query]).encode()).hexdigest()[:16]
        folder = self._run / PICTURES_NAME
        folder.mkdir(parents=True, exist_ok=True)
        for version, pixels in (("clean", clean), ("attacked", attacked)):
            buffer = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(buffer, format="PNG")
            write_atomically(folder / f"{name}-{version}.png", buffer.getvalue())
        return name


def overlap_figures(records: Sequence[NeighborsRecord]) -> list[Figure]:
    """By encoder, the mean share of neighbours that are kept under attack; the paper prints no such figure."""
    figures = []
    for encoder in dict.fromkeys(record.encoder for record in records):
        of_encoder = [record for record in records if record.encoder == encoder]
        mean = sum(record.overlap for record in of_encoder) / len(of_encoder)
        name = f"overlap_at_{len(of_encoder[0].clean)}"
        figures.append(Figure.of_mean(encoder, "neighbors", name, mean, len(of_encoder)))
    return figures
