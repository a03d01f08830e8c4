"""How much of an encoder's retrieval survives an attack: Caltech-101 nearest neighbours, clean and under APGD.

Queries are the `bench` split, the gallery is the clean `train` split, both under the encoder at hand. Whatever the
encoder gets right is attacked with Eq. 6 (as far from its own clean embedding as possible), at the encoder's input
size, until its nearest neighbour is of another class. The attacker knows the encoder; the gallery only ends the search.

An image counts as robust where it is right when clean and right again as the attack left it, which is judged by a new
forward pass of the encoder itself after norm and box have been checked. Every judged image is one line of
`records.jsonl` in the run directory; a resumed run skips the batches that are complete there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offline.attacks.apgd import Apgd
from offline.attacks.base import Attacked
from offline.benchmarks.embedding import encode_examples
from offline.benchmarks.robustness_records import Record, RecordFile
from offline.criteria import NearestNeighborWrong
from offline.data.archives import read_labelled_zip
from offline.errors import PlanError
from offline.folding import fold
from offline.objectives import EmbeddingShift
from offline.runs import RunDirectory
from offline.seeds import mixed_seed
from offline.threat import ThreatModel, scaled_l2_eps
from perception.encoder import Encoder
from perception.encoders.tower import TowerEncoder
from perception.preprocess import to_pixels

RECORDS_NAME = "records.jsonl"
ARCHIVE = "train/caltech101_128px.zip"


@dataclass(frozen=True)
class RobustnessPlan:
    """What decides the figures, besides the encoder.

    Attributes:
        linf_eps: radius in [0, 1] pixels.
        l2_eps_at_224: radius at 224 px; at another input size it is scaled by `scaled_l2_eps`.
        steps: of APGD.
        limit: the first so many of a seeded shuffle of the queries; None for all.
        seed: of the shuffle and of the random starts.
        batch: images attacked together; starts are drawn by batch.
    """

    linf_eps: float = 4 / 255
    l2_eps_at_224: float = 3.0
    steps: int = 100
    limit: int | None = None
    seed: int = 0
    batch: int = 64

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            PlanError: a count below 1, a negative seed, or an impossible radius.
        """
        for name, least in (("steps", 1), ("batch", 1), ("limit", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise PlanError(f"{name} must be at least {least}, got {value}")
        self.threats(size_px=1)

    def threats(self, size_px: int) -> tuple[ThreatModel, ...]:
        """The threat models for an encoder that takes images of this size."""
        return ThreatModel("linf", self.linf_eps), ThreatModel("l2", scaled_l2_eps(self.l2_eps_at_224, size_px))


@dataclass(frozen=True)
class Progress:
    """How far one encoder is under one threat: `done` of `total` queries, of which `clean` and `robust` are right."""

    encoder: str
    threat: ThreatModel
    done: int
    total: int
    clean: int
    robust: int


@dataclass(frozen=True)
class _Query:
    """A query image: (3, h, w) uint8 pixels as the encoder takes them, and its class."""

    id: str
    pixels: NDArray[np.uint8]
    label: str


@dataclass(frozen=True)
class _Gallery:
    """The clean gallery: (n, d) unit embeddings, (n,) int64 indices into the names of the classes."""

    embeddings: Tensor
    labels: Tensor
    classes: tuple[str, ...]


class RobustnessBenchmark:
    """Attacks encoders on the archive under `data`, and keeps what it finds in a run directory."""

    def __init__(self, data: Path, run: RunDirectory, plan: RobustnessPlan) -> None:
        self.data, self.plan = data, plan
        self.records = RecordFile(run.path / RECORDS_NAME)

    def run(self, encoder: Encoder) -> Iterator[Progress]:
        """Judge all queries under all threats; yields before the first batch and after each one.

        Raises:
            DataMissing: the archive is not there.
            RunError: the records are damaged, or the attack left its threat model.
            NonFiniteEmbedding: see `Encoder.encode`.
        """
        queries = self._queries(encoder)
        batches = [queries[i : i + self.plan.batch] for i in range(0, len(queries), self.plan.batch)]
        threats = self.plan.threats(encoder.preprocess.size_px)
        # The names say which lines a batch needs; where all are there, nothing needs to be encoded.
        known = {(r.threat, r.id): r for r in self.records.read() if r.fingerprint == encoder.fingerprint}
        judge: _Judge | None = None
        for threat in threats:
            seen: list[Record] = []
            yield _progress(encoder, threat, seen, len(queries))
            for number, batch in enumerate(batches):
                if any((threat, query.id) not in known for query in batch):
                    judge = judge or _Judge(encoder, self._gallery(encoder), self.plan)
                    records = judge.batch(batch, threat, number)
                    self.records.append(records)
                    known |= {(threat, record.id): record for record in records}
                seen.extend(known[threat, query.id] for query in batch)
                yield _progress(encoder, threat, seen, len(queries))

    def _queries(self, encoder: Encoder) -> list[_Query]:
        """The first `limit` of the shuffled queries."""
        bench = (e for e in read_labelled_zip(self.data / ARCHIVE) if e.fields["suggested_split"] == "bench")
        queries = [_Query(e.id, encoder.preprocess.apply(e.image), e.label) for e in bench]
        order = np.random.default_rng(self.plan.seed).permutation(len(queries))[: self.plan.limit]
        return [queries[i] for i in order]

    def _gallery(self, encoder: Encoder) -> _Gallery:
        train = (e for e in read_labelled_zip(self.data / ARCHIVE) if e.fields["suggested_split"] == "train")
        embeddings, examples, _ = encode_examples(encoder, train)
        classes = sorted({e.label for e in examples})
        labels = torch.tensor([classes.index(e.label) for e in examples])
        return _Gallery(embeddings.clone(), labels, tuple(classes))  # cloned: no longer an inference tensor


class _Judge:
    """Attacks batches of queries on one encoder and judges the outcome."""

    def __init__(self, encoder: Encoder, gallery: _Gallery, plan: RobustnessPlan) -> None:
        self.encoder, self.gallery, self.plan = encoder, gallery, plan
        self.attacked: Attacked = (fold(encoder) if isinstance(encoder, TowerEncoder) else None) or encoder

    def batch(self, queries: Sequence[_Query], threat: ThreatModel, number: int) -> list[Record]:
        """One record a query, in their order.

        Raises:
            RunError: the attack left its threat model.
        """
        pixels = to_pixels([query.pixels for query in queries])
        with torch.no_grad():
            clean = self.encoder.encode(pixels)
        pixels = pixels.to(clean.device)
        labels = torch.tensor([self._index(query.label) for query in queries], device=clean.device)
        wrong = NearestNeighborWrong(
            self.gallery.embeddings.to(clean.device), self.gallery.labels.to(clean.device), labels
        )
        correct = ~wrong(clean)
        perturbed = pixels.clone()
        rows = torch.nonzero(correct).flatten()
        if len(rows):
            generator = torch.Generator().manual_seed(mixed_seed(self.plan.seed, number, bits=32))
            apgd, shift = Apgd(steps=self.plan.steps), EmbeddingShift(clean[rows])
            found = apgd.attack(self.attacked, shift, wrong.rows(rows), pixels[rows], threat, generator=generator)
            perturbed[rows] = found.adversarial
        threat.require(perturbed, pixels, "APGD")
        with torch.no_grad():
            after = self.encoder.encode(perturbed)
        robust = correct & ~wrong(after)
        similarity, distance = (after * clean).sum(dim=1).clamp(-1, 1), threat.distance(perturbed, pixels)
        return [
            Record(
                encoder=self.encoder.name,
                fingerprint=self.encoder.fingerprint,
                norm=threat.norm,
                eps=threat.eps,
                id=query.id,
                label=query.label,
                clean_correct=bool(correct[i]),
                robust=bool(robust[i]),
                similarity=round(float(similarity[i]), 6),
                distance=float(distance[i]),
            )
            for i, query in enumerate(queries)
        ]

    def _index(self, label: str) -> int:
        """The class of a query in the gallery; -1, which no neighbour has, for a class that the gallery lacks."""
        return self.gallery.classes.index(label) if label in self.gallery.classes else -1


def run_robustness(
    encoders: Sequence[str],
    *,
    data: Path,
    run: Path,
    plan: RobustnessPlan,
    device: str = "cpu",
) -> Iterator[Progress]:
    """Load encoders one after the other and judge each; the records in `run` are the result.

    Args:
        encoders: names that `load_encoder` takes.
        data: holds the archive.
        run: run directory; the same plan resumes there, and may bring further encoders.
        plan: what is asked.
        device: torch device.

    Raises:
        PerceptionError: see `load_encoder`.
        OfflineError: see `RobustnessBenchmark.run`, and the directory holds a run of another plan.
    """
    from perception import load_encoder

    directory = RunDirectory(run, {"benchmark": "robustness", **asdict(plan)})
    bench = RobustnessBenchmark(data, directory, plan)
    for name in encoders:
        yield from bench.run(load_encoder(name, device=device))


def _progress(encoder: Encoder, threat: ThreatModel, seen: Sequence[Record], total: int) -> Progress:
    clean, robust = sum(r.clean_correct for r in seen), sum(r.robust for r in seen)
    return Progress(encoder.name, threat, len(seen), total, clean, robust)
