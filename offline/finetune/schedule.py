"""Learning rates: linear warm-up, then cosine to zero; and the triangle of LipSim's hinge stage."""

import math


def warmup_cosine(step: int, steps: int, warmup_steps: int) -> float:
    """Factor of the peak rate for update `step` (0-based), to be set *before* that update.

    `(step + 1) / warmup_steps` while warming up, then half a cosine that reaches 0 at `steps`. The reference sets the
    rate after the update, so that its first one runs at the full rate (methods 3.3, 9.1.4): not repeated here.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def triangular(step: int, steps: int) -> float:
    """Factor of the peak rate for update `step` (0-based), to be set *before* that update (methods 8.1, stage 2).

    Straight lines from 0 to 1 at 2/5 of the updates, to 1/20 at 4/5, and to 0 at `steps`.
    """
    share = step / steps
    if share < 0.4:
        return share / 0.4
    if share < 0.8:
        return 1 - 0.95 * (share - 0.4) / 0.4
    return 0.05 * (1 - share) / 0.2
