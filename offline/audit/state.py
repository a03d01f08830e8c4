"""A batch on its way through the attacks of an audit: what is known of each image so far.

Owns who is worse than before, through the eyes of what serves. Knows no attacks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offline.attacks.base import AttackResult
from offline.audit.record import DECIMALS, Judgement, Round
from offline.audit.task import Task
from offline.audit.traces import Traces
from perception.counterattack import Counterattack
from perception.encoder import Encoder
from perception.preprocess import to_pixels


@dataclass
class State:
    """Lists and tensors have one entry an item.

    Attributes:
        task: whose items they are; rows: which.
        pixels, clean: (b, 3, h, w) as they are, and their embeddings (b, d), without a defence.
        images: (b, 3, h, w) the worst versions so far, which `worst` judges; `judged` are the clean ones.
        winners, rounds: see `AuditRecord`.
    """

    task: Task
    rows: Tensor
    pixels: Tensor
    clean: Tensor
    judged: list[Judgement]
    images: Tensor
    worst: list[Judgement]
    winners: list[str]
    rounds: list[list[Round]]

    @classmethod
    def begin(cls, task: Task, encoder: Encoder, rows: Tensor, images: Sequence[NDArray[np.uint8]]) -> "State":
        """Before any attack; `encoder` is what serves."""
        pixels = to_pixels(images)
        if isinstance(encoder, Counterattack):
            embeddings, clean = encoder.encode_both(pixels)
        else:
            embeddings = clean = encode_pixels(encoder, pixels)
        pixels = pixels.to(clean.device)
        judged = task.judge(rows, embeddings)
        empty: list[list[Round]] = [[] for _ in images]
        return cls(task, rows, pixels, clean, judged, pixels.clone(), list(judged), ["none"] * len(images), empty)

    def not_at_goal(self) -> Tensor:
        """(k,) int64, whose attacker is not content."""
        found = [not self.task.at_goal(row, j) for row, j in zip(self.rows.tolist(), self.worst, strict=True)]
        return torch.nonzero(torch.tensor(found)).flatten()

    def take(self, name: str, at: Tensor, found: AttackResult, traces: Traces, encoder: Encoder) -> None:
        """Judge what an attack brought for the items `at`, and keep what is worse than before."""
        judged = self.task.judge(self.rows[at], encode_pixels(encoder, found.adversarial))
        for place, i in enumerate(at.tolist()):
            row, now = int(self.rows[i]), judged[place]
            before, after = self.task.severity(row, self.worst[i]), self.task.severity(row, now)
            if after > before or (after == before and self.winners[i] == "none"):
                self.worst[i], self.winners[i] = now, name
                self.images[i] = found.adversarial[place]
            updates, objective = int(found.updates[place]), round(float(found.objective[place]), DECIMALS)
            self.rounds[i].append(
                Round(
                    attack=name,
                    updates=updates,
                    objective=objective,
                    reached=self.task.at_goal(row, now),
                    answer=self.worst[i].answer,
                    correct=self.worst[i].correct,
                    trace=traces.of(place),
                )
            )


def encode_pixels(encoder: Encoder, pixels: Tensor) -> Tensor:
    """(b, 3, h, w) in [0, 1] -> (b, d) unit embeddings, without a gradient."""
    with torch.no_grad():
        return encoder.encode(pixels)
