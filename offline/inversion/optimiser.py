"""What looks for the pictures: takes targets and starts, and returns what it found."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from offline.attacks.base import Attacked
from offline.inversion.problem import Target
from offline.threat import ThreatModel

Watch = Callable[[int, Tensor, Tensor], None]
"""(updates done, pictures (b, 3, h, w), their similarities (b,)) of the best so far, from update 0, the starts, on.

The tensors stay the optimiser's own: whoever watches reads them at once, and changes and keeps nothing.
"""


class Keeper(Protocol):
    """Keeps the state of a batch's search over a kill; what it gives back must lead to the same result, bit by bit."""

    def restored(self) -> tuple[int, dict[str, Tensor]] | None:
        """(updates done, tensors on the CPU) that were last kept for this batch; None where it has to begin."""

    def offer(self, update: int, state: Callable[[], Mapping[str, Tensor]]) -> None:
        """Say after an update that the search can go on from here; `state` is called only where it is time to keep it.

        Args:
            update: updates done.
            state: all that the search needs, the trace and the states of random generators too
                (`torch.Generator.get_state` is a tensor), by name.
        """


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """What an optimiser found for a batch.

    Attributes:
        pixels: (b, 3, h, w) in [0, 1], on the device of the starts.
        similarity: (b,) cosines with the targets, as the optimiser saw them; a run judges `pixels` anew.
        trace: (steps + 1, b) the cosines that it looked at, from the starts on: of the points themselves, or the mean
            over their views.
    """

    pixels: Tensor
    similarity: Tensor
    trace: Tensor


class Optimiser(Protocol):
    """Looks for pictures of given embeddings; each row of a batch for itself."""

    @property
    def steps(self) -> int:
        """Updates of each picture."""

    def ball(self, size_px: int) -> ThreatModel | None:
        """What a picture of this size must stay in, around its start; None where only the box [0, 1] holds it."""

    def settings(self) -> dict[str, Any]:
        """All that decides what it finds, as plain values for plan.json."""

    def run(
        self,
        encoder: Attacked,
        targets: Sequence[Target],
        starts: Tensor,
        *,
        generators: Sequence[torch.Generator],
        watch: Watch | None = None,
        keeper: Keeper | None = None,
    ) -> Reconstruction:
        """Look for the pictures.

        Args:
            encoder: its parameters get no gradient.
            targets: b of them; the same one may occur with several seeds.
            starts: (b, 3, h, w) in [0, 1], on the encoder's device; see `offline.inversion.problem.start_pixels`.
            generators: one for each of the b, on the CPU; what a row draws must come from its own, so that its result
                does not depend on the others.
            watch: told after each update.
            keeper: asked at the beginning where to go on, and offered the state after each update.

        Raises:
            NonFiniteEmbedding: see `perception.encoder.Encoder.encode`.
            RunError: the objective is not finite.
        """
