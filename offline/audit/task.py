"""What the runner needs to know of a task: which images there are, how an answer is judged, what the attacker wants."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offline.audit.record import Judgement
from offline.criteria import Criterion
from offline.objectives import Objective


@dataclass(frozen=True, eq=False)
class Item:
    """An image that is audited.

    Attributes:
        set: name of its query set.
        id: within the set.
        label: what is right.
        pixels: (3, h, w) uint8, as the encoder takes them.
    """

    set: str
    id: str
    label: str
    pixels: NDArray[np.uint8]


class Task(Protocol):
    """One task for one system.

    `rows` are always (b,) int64 on the CPU, indices into `items`; embeddings (b, d) belong to those items.
    """

    @property
    def items(self) -> Sequence[Item]:
        """The images, set by set."""

    @property
    def identity(self) -> Mapping[str, str]:
        """What answers besides the encoder, by name: hashes and versions; a run goes on with the same alone."""

    def judge(self, rows: Tensor, embeddings: Tensor) -> list[Judgement]:
        """What the system says, through the code that serves.

        Raises:
            NonFiniteEmbedding: an embedding can be compared with nothing.
        """

    def severity(self, row: int, judgement: Judgement) -> float:
        """How bad a judgement is for the defender: more is worse; only comparisons of one item's judgements count."""

    def at_goal(self, row: int, judgement: Judgement) -> bool:
        """Whether the attacker of an image can stop."""

    def criterion(self, rows: Tensor) -> Criterion | None:
        """The same for a batch, as attacks take it; None where there is no end to what can be gained."""

    def objective(self, attack: str, rows: Tensor, clean: Tensor) -> Objective:
        """What an attack of the plan, or 'square', maximises; `clean` (b, d) are the clean images' embeddings."""


@dataclass(frozen=True)
class GoalReached:
    """A criterion that asks the task itself, and so the code that serves.

    Attributes:
        task: whose goal it is.
        items: (b,) int64 on the CPU, rows of the task's items.
    """

    task: Task
    items: Tensor

    def __call__(self, embeddings: Tensor) -> Tensor:
        """See `Criterion`."""
        judged = self.task.judge(self.items, embeddings)
        return torch.tensor([self.task.at_goal(row, j) for row, j in zip(self.items.tolist(), judged, strict=True)])

    def rows(self, index: Tensor) -> Self:
        """See `Criterion`."""
        return replace(self, items=self.items[index.to(self.items.device)])
