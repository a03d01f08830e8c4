"""What decides a run of inversions, besides the targets."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from offline.errors import PlanError
from offline.inversion.optimiser import Optimiser
from perception.encoder import Precision

OptimiserName = Literal["apgd", "multi-view"]
RADIUS_AT_224 = 100.0
"""l2, of the paper; at another input size it is scaled so that each value may change as much (root mean square)."""
APGD_STEPS = 500
MULTI_VIEW_STEPS = 1000


@dataclass(frozen=True)
class InversionPlan:
    """See the module.

    Attributes:
        encoders: names that `load_encoder` takes; each one's own embeddings are inverted.
        precision: of the encoders.
        optimiser: 'apgd' (Eq. 9, 10) or 'multi-view'.
        steps: updates; None for the published number, 500 of APGD and 1000 of the multi-view optimiser.
        radius: of APGD's l2 ball around the start, at the encoder's own input size, as it is; None for 100 at 224 px,
            scaled by `size_px / 224` for other sizes.
        seeds: one reconstruction of each target for each of them.
        batch: reconstructions that are sought together.
    """

    encoders: tuple[str, ...]
    precision: Precision = "fp32"
    optimiser: OptimiserName = "apgd"
    steps: int | None = None
    radius: float | None = None
    seeds: tuple[int, ...] = (0,)
    batch: int = 8

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            PlanError: no encoder or seed, one of them twice, a negative seed, a count below 1, an impossible radius, or
                a radius for an optimiser that has none.
        """
        for name in ("encoders", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise PlanError(f"{name} must be one or several different ones, got {list(values)}")
        if min(self.seeds) < 0:
            raise PlanError(f"a seed must not be negative, got {min(self.seeds)}")
        for name, value in (("steps", self.steps), ("batch", self.batch)):
            if value is not None and value < 1:
                raise PlanError(f"{name} must be at least 1, got {value}")
        if self.radius is not None and not (math.isfinite(self.radius) and self.radius > 0):
            raise PlanError(f"radius must be positive and finite, got {self.radius}")
        if self.optimiser not in get_args(OptimiserName):
            raise PlanError(f"optimiser must be one of {', '.join(get_args(OptimiserName))}, got {self.optimiser!r}")
        if self.optimiser == "multi-view" and self.radius is not None:
            raise PlanError("the multi-view optimiser has no radius: give one to apgd alone")

    def make_optimiser(self) -> Optimiser:
        """The optimiser with this plan's steps and radius."""
        if self.optimiser == "apgd":
            from offline.inversion.apgd import ApgdInversion

            return ApgdInversion(steps=self.steps or APGD_STEPS, radius=self.radius)
        from offline.inversion.multi_view import MultiViewInversion

        return MultiViewInversion(steps=self.steps or MULTI_VIEW_STEPS)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for plan.json; the optimiser's own settings with them."""
        return {
            "encoders": list(self.encoders),
            "precision": self.precision,
            "optimiser": {"name": self.optimiser, **self.make_optimiser().settings()},
            "seeds": list(self.seeds),
            "batch": self.batch,
        }
