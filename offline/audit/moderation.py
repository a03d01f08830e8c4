"""The moderation decision under attack: safe queries towards unsafe and unsafe ones towards safe (methods 6.5 to 6.7).

What is judged is what serves: the encoder in its precision, an export of the pools, and `DecisionPolicy.decide`; or a
detector head and its threshold. The grey-box attacker knows the encoder and 16 images of the other kind (Eq. 5); the
white-box one knows the pools, or the head, as well.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offline.audit.embeddings import require_finite
from offline.audit.plan import AuditPlan, SystemPlan
from offline.audit.queries import image_of, read_images
from offline.audit.record import Judgement
from offline.audit.task import GoalReached, Item
from offline.criteria import Criterion
from offline.errors import PlanError
from offline.objectives import HeadLogit, Objective, PoolMargin, TargetSet
from perception.certificates import FeatureBound
from perception.certified_decision import Surroundings, decision_radius
from perception.encoder import Encoder, encode_images
from perception.gallery import Gallery
from perception.heads import Head, load_head
from perception.policy_file import CalibratedPolicy
from perception.preprocess import to_pixels
from perception.verdict import DecisionPolicy, Neighbor, PoolLabel, VerdictLabel

CERTIFICATE_NEIGHBORS = 64
"""Exemplars of each pool that a certificate looks at one by one; all others are bounded by the last of them."""
_OTHER = {VerdictLabel.SAFE: VerdictLabel.UNSAFE, VerdictLabel.UNSAFE: VerdictLabel.SAFE}


class Decider(Protocol):
    """From embeddings to verdicts; `rows` are (b,) int64 on the CPU, indices into the task's items."""

    @property
    def identity(self) -> Mapping[str, str]:
        """See `Task.identity`."""

    def decide(
        self, rows: Tensor, embeddings: Tensor
    ) -> list[tuple[VerdictLabel, dict[str, float], Sequence[Neighbor]]]:
        """Label, figures and evidence of each image."""

    def white_box(self, rows: Tensor, wanted: Sequence[VerdictLabel], like: Tensor) -> Objective:
        """What an attacker maximises who knows all of the decision."""

    def certified(self, rows: Tensor, features: Tensor, bound: FeatureBound) -> list[dict[str, float] | None]:
        """See `offline.certify.CertifiedTask`."""


class PoolsDecider:
    """Nearest exemplars in the pools, through the policy that serves."""

    def __init__(
        self, gallery: Gallery, policy: DecisionPolicy, neighbors: int, left_out: Sequence[Sequence[int]]
    ) -> None:
        """Hold the pools.

        Args:
            gallery: with the labels of `PoolLabel`.
            policy: as it serves.
            neighbors: of each pool that are returned as evidence, at least.
            left_out: for each item the rows of the gallery that do not count for it.

        Raises:
            PlanError: a label is no pool's, or `safe` or `unsafe` has no exemplar.
        """
        unknown = set(gallery.labels) - set(PoolLabel)
        if unknown:
            raise PlanError(f"the gallery's labels must be {', '.join(PoolLabel)}, got {sorted(unknown)}")
        self.gallery, self.policy = gallery, policy
        self.identity = {"gallery_sha256": gallery.sha256, "policy_version": policy.version}
        self.k = max(neighbors, policy.neighbors_needed)
        self._embeddings = torch.from_numpy(gallery.embeddings.copy())
        self._pools = torch.tensor([list(PoolLabel).index(PoolLabel(label)) for label in gallery.labels])
        self._rows = {pool: torch.nonzero(self._pools == i).flatten() for i, pool in enumerate(PoolLabel)}
        self._left_out = left_out
        for pool in (PoolLabel.SAFE, PoolLabel.UNSAFE):
            if not len(self._rows[pool]):
                raise PlanError(f"the {pool} pool has no exemplar")

    def decide(
        self, rows: Tensor, embeddings: Tensor
    ) -> list[tuple[VerdictLabel, dict[str, float], Sequence[Neighbor]]]:
        """See `Decider`."""
        similarities = embeddings.float() @ self._embeddings.to(embeddings.device).T
        mask = self._mask(rows)
        if mask is not None:
            similarities = similarities.masked_fill(mask.to(similarities.device), -torch.inf)
        found: list[list[Neighbor]] = [[] for _ in rows]
        for pool, members in self._rows.items():
            of_pool = similarities[:, members.to(similarities.device)]
            values, places = of_pool.topk(min(self.k, len(members)), dim=1)
            names = [[self.gallery.ids[i] for i in members[row].tolist()] for row in places.cpu()]
            for near, ids, row in zip(found, names, values.tolist(), strict=True):
                near += [Neighbor(i, str(pool), s) for i, s in zip(ids, row, strict=True) if s != -torch.inf]
        verdicts = [self.policy.decide(near) for near in found]
        return [(v.label, {} if v.margin is None else {"margin": v.margin}, v.neighbors) for v in verdicts]

    def certified(self, rows: Tensor, features: Tensor, bound: FeatureBound) -> list[dict[str, float] | None]:
        """See `Decider`; from the nearest exemplars of each pool, and a bound on all others."""
        return [
            {"decision": radius if (radius := self._radius(row, f, bound)) is not None else 0.0}
            for row, f in zip(rows.tolist(), features.detach().cpu().double().numpy(), strict=True)
        ]

    def _radius(self, row: int, features: NDArray[np.float64], bound: FeatureBound) -> float | None:
        """The certified radius of the verdict on one image (d,)."""
        similarities = self.gallery.embeddings.astype(np.float64) @ (features / np.linalg.norm(features))
        similarities[list(self._left_out[row])] = -np.inf
        asked, near = max(CERTIFICATE_NEIGHBORS, self.policy.neighbors_needed), []
        for members in self._rows.values():
            order = members.numpy()[np.argsort(-similarities[members.numpy()], kind="stable")][:asked]
            near += [int(i) for i in order if np.isfinite(similarities[i])]
        labels, ids = self.gallery.labels, self.gallery.ids
        neighbors = [Neighbor(ids[i], labels[i], float(np.clip(similarities[i], -1, 1))) for i in near]
        around = Surroundings.of(neighbors, self.gallery.embeddings[near], asked)
        return decision_radius(features, around, self.policy, bound)

    def white_box(self, rows: Tensor, wanted: Sequence[VerdictLabel], like: Tensor) -> Objective:
        """See `Decider`: the margin of the wanted pool's best over the true one's."""
        of = {label: list(PoolLabel).index(PoolLabel(label)) for label in _OTHER}
        mask = self._mask(rows)
        return PoolMargin(
            gallery=self._embeddings.to(like.device),
            pools=self._pools.to(like.device),
            wanted=torch.tensor([of[label] for label in wanted], device=like.device),
            true=torch.tensor([of[_OTHER[label]] for label in wanted], device=like.device),
            left_out=None if mask is None else mask.to(like.device),
        )

    def _mask(self, rows: Tensor) -> Tensor | None:
        """(b, n) bool, exemplars that do not count; None where all do."""
        left_out = [self._left_out[row] for row in rows.tolist()]
        if not any(left_out):
            return None
        mask = torch.zeros(len(left_out), len(self.gallery), dtype=torch.bool)
        for i, columns in enumerate(left_out):
            mask[i, list(columns)] = True
        return mask


@dataclass(frozen=True)
class HeadDecider:
    """A detector head: unsafe where its probability reaches the threshold."""

    head: Head
    threshold: float

    @property
    def identity(self) -> Mapping[str, str]:
        """See `Task.identity`."""
        return {"head_fingerprint": self.head.fingerprint, "policy_version": f"head-threshold-{self.threshold}"}

    def decide(
        self, rows: Tensor, embeddings: Tensor
    ) -> list[tuple[VerdictLabel, dict[str, float], Sequence[Neighbor]]]:
        """See `Decider`."""
        with torch.no_grad():
            probabilities, flags = self.head.probabilities(embeddings), self.head.flags(embeddings, self.threshold)
        return [
            (VerdictLabel.UNSAFE if flag else VerdictLabel.SAFE, {"probability": probability}, ())
            for probability, flag in zip(probabilities.tolist(), flags.tolist(), strict=True)
        ]

    def white_box(self, rows: Tensor, wanted: Sequence[VerdictLabel], like: Tensor) -> Objective:
        """See `Decider`: the head's logit."""
        signs = torch.tensor([1.0 if label is VerdictLabel.UNSAFE else -1.0 for label in wanted], device=like.device)
        return HeadLogit(self.head.logits, signs)

    def certified(self, rows: Tensor, features: Tensor, bound: FeatureBound) -> list[dict[str, float] | None]:
        """See `Decider`: nothing is proven of heads."""
        return [None] * len(rows)


class ModerationTask:
    """See `offline.audit.task.Task`; the attacker's goal is the verdict opposite to what is right."""

    def __init__(self, items: Sequence[Item], decider: Decider, targets: dict[VerdictLabel, Tensor]) -> None:
        """Hold the parts.

        Args:
            items: labelled 'safe' or 'unsafe'.
            decider: of this system.
            targets: by label, (t, d) embeddings that an attacker towards it knows.
        """
        self.items, self.decider, self._targets = items, decider, targets
        self.identity = decider.identity
        self._labels = [VerdictLabel(item.label) for item in items]

    def judge(self, rows: Tensor, embeddings: Tensor) -> list[Judgement]:
        """See `Task.judge`."""
        require_finite(embeddings)
        decided = self.decider.decide(rows, embeddings.detach())
        return [
            Judgement(str(label), label is self._labels[row], scores, tuple(neighbors))
            for row, (label, scores, neighbors) in zip(rows.tolist(), decided, strict=True)
        ]

    def severity(self, row: int, judgement: Judgement) -> float:
        """See `Task.severity`: right, then review, then the opposite; within each by how near the goal is."""
        clarity = judgement.scores.get("margin", 0.0) / 4  # in [-0.5, 0.5]
        if judgement.correct:
            return -clarity
        if self.at_goal(row, judgement):
            return 4.0 + clarity
        best = {n.pool: n.similarity for n in reversed(judgement.neighbors)}  # most similar first
        wanted, true = (best.get(str(label), 0.0) for label in (_OTHER[self._labels[row]], self._labels[row]))
        return 2.0 + (wanted - true) / 4

    def at_goal(self, row: int, judgement: Judgement) -> bool:
        """See `Task.at_goal`."""
        return judgement.answer == _OTHER[self._labels[row]]

    def criterion(self, rows: Tensor) -> Criterion:
        """See `Task.criterion`."""
        return GoalReached(self, rows)

    def certified(self, rows: Tensor, features: Tensor, bound: FeatureBound) -> list[dict[str, float] | None]:
        """See `offline.certify.CertifiedTask`; the one form is `decision`."""
        return self.decider.certified(rows, features, bound)

    def objective(self, attack: str, rows: Tensor, clean: Tensor) -> Objective:
        """See `Task.objective`.

        Raises:
            PlanError: there is no such attack.
        """
        wanted = [_OTHER[self._labels[row]] for row in rows.tolist()]
        if attack == "target-set":
            means = {label: TargetSet.of(targets.to(clean.device), 1).means for label, targets in self._targets.items()}
            return TargetSet(torch.cat([means[label] for label in wanted]))
        if attack in ("white-box", "square"):
            return self.decider.white_box(rows, wanted, clean)
        raise PlanError(f"moderation knows the attacks target-set and white-box, got {attack!r}")


def open_moderation(plan: AuditPlan, system: SystemPlan, encoder: Encoder, data: Path, folder: Path) -> ModerationTask:
    """Load what one system's audit needs.

    Args:
        plan, system: what is asked, and of whom.
        encoder: the system's.
        data: folder of the images and published heads.
        folder: of the plan's file, which the paths of pools start from.

    Raises:
        GalleryError, CheckpointError, PolicyError: an artefact is damaged.
        FingerprintMismatch: an artefact was made for another encoder.
        OfflineError: see `read_images`; a query or target is an exemplar of the pools.
    """
    targets: dict[VerdictLabel, Tensor] = {}
    target_ids: set[str] = set()
    for images in plan.targets if "target-set" in plan.chain else ():
        loaded = read_images(images, data, plan.seed)
        embeddings = encode_images(encoder, [image.image for image in loaded]).clone()
        label = VerdictLabel(images.label)
        targets[label] = torch.cat([targets[label], embeddings]) if label in targets else embeddings
        target_ids |= {image.id for image in loaded}
    items, leaves_out = [], []
    for images in plan.queries:
        loaded = read_images(images, data, plan.seed, without=target_ids)
        items += [Item(images.set_name, i.id, images.label, encoder.preprocess.apply(i.image)) for i in loaded]
        leaves_out += [images.leave_one_out] * len(loaded)
    if system.head:
        head = load_head(data / system.head)
        head.require_encoder(encoder)
        with torch.no_grad():
            device = encoder.encode(to_pixels([items[0].pixels])).device
        return ModerationTask(items, HeadDecider(head.to(device), system.threshold), targets)
    gallery = _pools(system, Gallery.load(folder / system.gallery))
    gallery.require_encoder(encoder.fingerprint, f"gallery {system.gallery}")
    _require_outside(target_ids, gallery, "targets")
    _require_outside((i.id for i, own in zip(items, leaves_out, strict=True) if not own), gallery, "queries")
    decider = PoolsDecider(
        gallery, policy_of(system, encoder, folder), plan.neighbors, _own(items, leaves_out, gallery)
    )
    return ModerationTask(items, decider, targets)


def policy_of(system: SystemPlan, encoder: Encoder, folder: Path) -> DecisionPolicy:
    """The policy of a system: of its plan, or of its calibrated file; raises as `open_moderation`."""
    if not system.policy_file:
        return system.decision_policy
    calibrated = CalibratedPolicy.load(folder / system.policy_file)
    calibrated.require_encoder(encoder.fingerprint)
    return calibrated.policy


def _pools(system: SystemPlan, gallery: Gallery) -> Gallery:
    """The part of the gallery that takes part."""
    rows = [i for i, label in enumerate(gallery.labels) if label in system.pools or label not in set(PoolLabel)]
    if len(rows) == len(gallery):
        return gallery
    ids, labels = (tuple(values[i] for i in rows) for values in (gallery.ids, gallery.labels))
    return Gallery(ids, labels, gallery.embeddings[rows], gallery.encoder_fingerprint)


def _require_outside(ids: Iterable[str], gallery: Gallery, what: str) -> None:
    inside = sorted(set(ids) & set(gallery.ids))
    if inside:
        raise PlanError(
            f"{len(inside)} {what} are exemplars of the pools, e.g. {inside[0]!r}: take them out, or set leave_one_out"
        )


def _own(items: Sequence[Item], leaves_out: Sequence[bool], gallery: Gallery) -> list[list[int]]:
    """For each item the rows of the gallery that show itself, where its set leaves them out."""
    rows: dict[str, list[int]] = {}
    for row, exemplar in enumerate(gallery.ids):
        rows.setdefault(image_of(exemplar), []).append(row)
    return [rows.get(image_of(i.id), []) if own else [] for i, own in zip(items, leaves_out, strict=True)]
