"""The learning rate of every training here: linear warm-up, then cosine to zero."""

import math


def warmup_cosine(step: int, steps: int, warmup_steps: int) -> float:
    """Factor of the peak rate for update `step` (0-based), to be set *before* that update.

    `(step + 1) / warmup_steps` while warming up, then half a cosine that reaches 0 at `steps`. The reference sets the
    rate after the update, so that its first one runs at the full rate (methods 3.3, 9.1.4): not repeated here.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))
