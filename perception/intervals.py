"""Confidence intervals of shares that were counted."""

import math

_NORMAL_QUANTILE = 1.959963984540054  # of 97.5 %


def wilson_interval(count: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of the share `count / total`, in [0, 1]; unlike the usual one it has a width at 0 and 1.

    Raises:
        ValueError: nothing was counted, or more than all.
    """
    if total < 1 or not 0 <= count <= total:
        raise ValueError(f"{count} of {total} is no share")
    z, n, p = _NORMAL_QUANTILE, total, count / total
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
    return max(0.0, min(low, p)), min(1.0, max(high, p))  # at 0 and 1 rounding would cut the share itself off
