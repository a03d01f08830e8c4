"""The C library's allocator, told to keep what is freed.

A pass through an encoder allocates and frees hundreds of large tensors. glibc hands those above 32 MiB, and the top
of its heap, back to the system each time, and the system clears every page before it gives it out again.
"""

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8  # mallopt's parameters; none of them is in Python
_MAX_INT = 2**31 - 1
_PAD_BYTES = 256 * 2**20


def keep_freed_memory(*, one_arena: bool = False) -> bool:
    """Keep freed memory for reuse from now on, in this process; its size stays near the peak of its use.

    Args:
        one_arena: let all threads, those that are started later, allocate from one arena: `malloc_trim` gives back the
            end of that one alone.

    Returns:
        Whether the C library can: glibc can, others need not.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = [(_MMAP_MAX, 0), (_TRIM_THRESHOLD, _MAX_INT), (_TOP_PAD, _PAD_BYTES)]
    if one_arena:
        settings.append((_ARENA_MAX, 1))
    accepted = [int(mallopt(parameter, value)) for parameter, value in settings]
    return all(accepted)
