"""THINGS odd-one-out with one image perturbed (methods 6.3): is the odd one of three images still the one people see?

The attacker perturbs the first image of the pair that people find similar, and knows the two others. He raises the
cross-entropy of people's choice over the three similarities, as they are, without a temperature: the counterpart of
2AFC's objective. The paper has no figures under this attack.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from offline.audit.embeddings import encode_stream, require_finite
from offline.audit.plan import AuditPlan, ImagesPlan
from offline.audit.record import Judgement
from offline.audit.task import Item
from offline.benchmarks.odd_one_out import choose
from offline.criteria import Criterion
from offline.data.files import read_image_file
from offline.data.things import OddOneOutTriplets, Variant, read_things
from offline.errors import PlanError
from offline.objectives import Objective
from perception.encoder import Encoder

ATTACK = "odd-one-out"
KINDS: dict[str, Variant] = {"things": "triplets", "things-dreamsim": "dreamsim"}
POSITIONS = ("1", "2", "3")


@dataclass(frozen=True)
class Triples:
    """Triplets of which one image is perturbed; every field has one row a triplet.

    Attributes:
        partner: (b, d) unit embeddings of the image that people find similar to the perturbed one.
        outsider: (b, d) of the one that they call odd.
        perturbed, other, odd: (b,) int64, places in the triplet, from 0, of the perturbed image, its partner and the
            odd one.
    """

    partner: Tensor
    outsider: Tensor
    perturbed: Tensor
    other: Tensor
    odd: Tensor

    def rows(self, index: Tensor) -> Self:
        """The triplets `index`, (k,) int64."""
        index = index.to(self.odd.device)
        return type(self)(
            self.partner[index], self.outsider[index], self.perturbed[index], self.other[index], self.odd[index]
        )

    @classmethod
    def of(cls, embeddings: Tensor, triplets: Tensor, odd: Tensor) -> Self:
        """From a table of unit embeddings (m, d), its rows in each triplet (b, 3), and which is odd (b,)."""
        perturbed = torch.where(odd == 0, 1, 0)
        other = torch.where(odd == 2, 1, 2)  # the two that are left, in their order
        partner, outsider = (triplets.gather(1, place[:, None]).squeeze(1) for place in (other, odd))
        return cls(embeddings[partner], embeddings[outsider], perturbed, other, odd)

    def similarities(self, embeddings: Tensor) -> Tensor:
        """(b, 3) from the perturbed images' unit embeddings (b, d); column i is of the pair without image i."""
        fixed = (self.partner * self.outsider).sum(dim=1)
        human = (embeddings * self.partner).sum(dim=1)  # the pair without the odd one
        wrong = (embeddings * self.outsider).sum(dim=1)
        values = torch.stack([human, wrong, fixed], dim=1)
        place = torch.stack([self.odd, self.other, self.perturbed], dim=1)
        return torch.zeros_like(values).scatter(1, place, values)


@dataclass(frozen=True)
class OddOneOutCrossEntropy:
    """`-log softmax(s)[y]`, s_i the similarity of the pair without image i, and y the one that people call odd.

    Attributes:
        triples: of the batch.
    """

    needs_random_start: ClassVar[bool] = False
    triples: Triples

    def __call__(self, embeddings: Tensor) -> Tensor:
        """See `offline.objectives.Objective`."""
        return F.cross_entropy(self.triples.similarities(embeddings), self.triples.odd, reduction="none")

    def rows(self, index: Tensor) -> Self:
        """See `offline.objectives.Objective`."""
        return type(self)(self.triples.rows(index))


@dataclass(frozen=True)
class OddOneOutWrong:
    """The odd one is another than people's, by the rule of `offline.benchmarks.odd_one_out.choose`.

    Attributes:
        triples: of the batch.
    """

    triples: Triples

    def __call__(self, embeddings: Tensor) -> Tensor:
        """See `offline.criteria.Criterion`."""
        return choose(self.triples.similarities(embeddings)) != self.triples.odd

    def rows(self, index: Tensor) -> Self:
        """See `offline.criteria.Criterion`."""
        return type(self)(self.triples.rows(index))


class OddOneOutTask:
    """See `offline.audit.task.Task`; the attacker wants another image of the three to be the odd one."""

    def __init__(
        self, items: Sequence[Item], embeddings: Tensor, triplets: Tensor, odd: Tensor, identity: Mapping[str, str]
    ) -> None:
        """Hold the triplets.

        Args:
            items: the perturbed images, labelled '1', '2' or '3' after the place of the odd one.
            embeddings: (m, d) of all images, of unit norm.
            triplets: (n, 3) int64, rows of the embeddings, one triplet an item.
            odd: (n,) int64 in {0, 1, 2}.
            identity: see `Task.identity`.
        """
        self.items, self.identity = items, identity
        self._embeddings = embeddings
        self._triplets, self._odd = triplets.to(embeddings.device), odd.to(embeddings.device)

    def judge(self, rows: Tensor, embeddings: Tensor) -> list[Judgement]:
        """See `Task.judge`; the margin is the similarity of people's pair minus the larger of the two others."""
        embeddings = embeddings.detach()
        require_finite(embeddings)
        triples = self._of(rows, embeddings.device)
        similarities = triples.similarities(embeddings)
        human = similarities.gather(1, triples.odd[:, None]).squeeze(1)
        margins = human - similarities.scatter(1, triples.odd[:, None], -torch.inf).amax(dim=1)
        chosen = choose(similarities)
        correct = chosen == triples.odd
        return [
            Judgement(POSITIONS[place], good, {"margin": margin})
            for place, good, margin in zip(chosen.tolist(), correct.tolist(), margins.tolist(), strict=True)
        ]

    def severity(self, row: int, judgement: Judgement) -> float:
        """See `Task.severity`: 1 for the wrong choice."""
        return float(self.at_goal(row, judgement))

    def at_goal(self, row: int, judgement: Judgement) -> bool:
        """See `Task.at_goal`."""
        return judgement.answer != self.items[row].label

    def criterion(self, rows: Tensor) -> Criterion:
        """See `Task.criterion`."""
        return OddOneOutWrong(self._of(rows, self._embeddings.device))

    def objective(self, attack: str, rows: Tensor, clean: Tensor) -> Objective:
        """See `Task.objective`.

        Raises:
            PlanError: there is no such attack.
        """
        if attack not in (ATTACK, "square"):
            raise PlanError(f"odd-one-out knows the attack {ATTACK}, got {attack!r}")
        return OddOneOutCrossEntropy(self._of(rows, clean.device))

    def _of(self, rows: Tensor, device: torch.device) -> Triples:
        rows, embeddings = rows.to(device), self._embeddings.to(device)
        return Triples.of(embeddings, self._triplets.to(device)[rows], self._odd.to(device)[rows])


def open_odd_one_out(plan: AuditPlan, encoder: Encoder, data: Path) -> OddOneOutTask:
    """Read the triplets and encode their images, each once; holds the pixels of each image, 150 kB at 224 px.

    Args:
        plan: has one set of queries, of the kind 'things' or 'things-dreamsim', with one path; its limit is of the
            first triplets.
        encoder: of the system; it compares by the cosine.
        data: folder that relative paths start from.

    Raises:
        DataMissing, DataError: the data is not there, or has another layout.
        PlanError: the plan or the encoder does not fit.
        NonFiniteEmbedding: an image has no embedding.
    """
    images = plan.queries[0] if plan.queries else ImagesPlan("")
    plain = len(images.paths) == 1 and not (images.where or images.class_names or images.label)
    if len(plan.queries) != 1 or images.kind not in KINDS or not plain:
        kinds = " or ".join(map(repr, KINDS))
        raise PlanError(f"odd-one-out needs one [[queries]] of the kind {kinds} with one path, and no where or label")
    triplets = read_things(data / images.paths[0], KINDS[images.kind], images.limit)
    return task_of_things(triplets, encoder, images.set_name)


def task_of_things(triplets: OddOneOutTriplets, encoder: Encoder, name: str = "things") -> OddOneOutTask:
    """The task of triplets that have been read; ids are their numbers from 1, in the order of the table.

    Raises:
        DataError: an image cannot be read.
        PlanError: the encoder compares by distance.
        NonFiniteEmbedding: an image has no embedding.
    """
    if getattr(encoder, "metric", "cosine") != "cosine":
        raise PlanError(f"{encoder.name} compares by distance; odd-one-out is attacked through cosines alone")
    used = triplets.used
    pixels = [encoder.preprocess.apply(read_image_file(triplets.images[row])) for row in used.tolist()]
    embeddings, digest = encode_stream(encoder, pixels)
    places = np.searchsorted(used, triplets.triplets)  # from rows of all images to those that are used
    odd = triplets.odd
    first = places[np.arange(len(odd)), np.where(odd == 0, 1, 0)]
    items = [
        Item(name, str(number), POSITIONS[place], pixels[row])
        for number, (row, place) in enumerate(zip(first.tolist(), odd.tolist(), strict=True), 1)
    ]
    told = hashlib.sha256(json.dumps([digest, places.tolist(), odd.tolist()]).encode())
    identity = {"triplets_sha256": told.hexdigest()}
    return OddOneOutTask(items, embeddings, torch.from_numpy(places), torch.from_numpy(odd), identity)
