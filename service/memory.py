"""Memory: what large requests have freed goes back to the system.

The service keeps what is freed for reuse (`perception.memory`), since every large tensor of the encoder would be system
calls and fresh pages otherwise; after a burst of large bodies that is hundreds of MiB that nobody uses.
"""

import asyncio
import ctypes
import gc
from collections.abc import Callable

_QUIET_S = 1.0


def trimmer() -> Callable[[], object] | None:
    """Glibc's `malloc_trim`, where the C library has it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return None if trim is None else lambda: trim(0)


async def trim_when_idle(idle_since_work: Callable[[], bool]) -> None:
    """Collect garbage and trim whenever work has been done and none is in progress; until cancelled.

    Errors and tasks hold each other, and with them the bodies that they were about, until garbage is collected.

    Args:
        idle_since_work: whether there is nothing to do now and something was done since it last said so.
    """
    trim = trimmer()
    while trim is not None:
        await asyncio.sleep(_QUIET_S)
        if idle_since_work():
            await asyncio.to_thread(gc.collect)
            await asyncio.to_thread(trim)
