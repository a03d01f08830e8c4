"""Seeds for parts of a job that must not share their random numbers."""

import numpy as np


def mixed_seed(*numbers: int, bits: int = 63) -> int:
    """One seed below `2^bits` from several numbers >= 0, all of which and whose order matter.

    Args:
        bits: 63, or 32 where published figures depend on the narrower seeds.
    """
    sequence = np.random.SeedSequence(numbers)
    if bits == 32:
        return int(sequence.generate_state(1, np.uint32)[0])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(64 - bits))
