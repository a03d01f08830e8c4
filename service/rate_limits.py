"""Rate limits: how many images a caller may send in a time.

The library `limits` has the strategy, a sliding window counter: the images of the current window, and those of the
one before by the share of it that is still in sight. Two counters a caller and limit are enough for it, however high
the limit is. Counters live in this process: several processes each allow the whole limit.
"""

import re
import time
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING

from limits import RateLimitItem, parse_many
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from service.errors import RateLimited, SettingsError, TooManyImages

if TYPE_CHECKING:  # keys checks its limits with this module
    from service.keys import Caller

MAX_COUNTERS = 200_000
_FIRST_SWEEP = 1024
_TICK_S = 0.001  # the strategy asks for less than the limit, not for as much
_ZERO = re.compile(r"\b0+\s*[/a-z]", re.IGNORECASE)


@lru_cache(maxsize=256)
def parse_limits(text: str, name: str) -> tuple[RateLimitItem, ...]:
    """Parse limits such as '100/second;3000/minute'; none where the text is empty.

    Args:
        text: what to parse.
        name: where it is from, for the error.

    Raises:
        SettingsError: it is not of that form, or an amount or a time is 0.
    """
    if not text.strip():
        return ()
    try:
        items = parse_many(text)
    except ValueError:
        items = []
    if not items or _ZERO.search(text):
        raise SettingsError(
            f"{name}: {text[:100]!r} is no rate limit; write a number above 0, '/' and second, minute, hour, day, "
            "month or year, with ';' between several, such as '100/second;3000/minute'"
        )
    return tuple(items)


class RateLimits:
    """Counts the images of each caller.

    Memory: a counter takes about 400 bytes and is dropped once it is two windows old. Those of callers with a key are
    bounded by the keys. Anonymous callers, who may come from any number of addresses, have at most `max_counters`;
    where they need more, the oldest eighth is forgotten, and their callers begin anew.

    Args:
        default: limits of callers that have none of their own; the empty text for none.
        max_counters: of anonymous callers.

    Raises:
        SettingsError: the limits cannot be parsed.
    """

    def __init__(self, default: str, max_counters: int = MAX_COUNTERS) -> None:
        self._default = parse_limits(default, "HARDLOOK_RATE_LIMIT")
        self._known, self._anonymous = _Counters(None), _Counters(max_counters)

    @property
    def counters(self) -> int:
        """How many counters are held."""
        return len(self._known) + len(self._anonymous)

    def most_at_once(self, caller: "Caller") -> int | None:
        """The most images that a caller can ever send together; None for any number.

        Raises:
            SettingsError: the limit of the key cannot be parsed, which loading the keys has ruled out.
        """
        return min((item.amount for item in self._limits_of(caller)), default=None)

    async def hit(self, caller: "Caller", cost: int) -> None:
        """Count images against every limit of their caller, or against none where one has no room for all of them.

        Nothing here waits, so that no other request comes between the looking and the counting.

        Args:
            caller: who sends them; a limit of the key takes the place of the default.
            cost: how many, at least 1.

        Raises:
            RateLimited: no room for them now; says which limit, and when there will be room.
            TooManyImages: more at once than a limit ever allows, so that trying again is of no use.
            SettingsError: the limit of the key cannot be parsed, which loading the keys has ruled out.
        """
        limits, most = self._limits_of(caller), self.most_at_once(caller)
        if most is None:
            return
        if cost > most:
            raise TooManyImages(most)
        counters = self._anonymous if caller.anonymous else self._known
        limiter = SlidingWindowCounterRateLimiter(counters)
        full = [item for item in limits if not await limiter.test(item, caller.id, cost=cost)]
        if full:
            waits = {item: await counters.wait_s(item, item.key_for(caller.id), cost) for item in full}
            longest = max(waits, key=lambda item: waits[item])
            raise RateLimited(str(longest), max(1.0, waits[longest]))
        for item in limits:
            if not await limiter.hit(item, caller.id, cost=cost):  # only where the clock was set back since the look
                raise RateLimited(str(item), 1.0)

    def _limits_of(self, caller: "Caller") -> tuple[RateLimitItem, ...]:
        if caller.rate_limit is None:
            return self._default
        return parse_limits(caller.rate_limit, f"key {caller.id}")


class _Counters(MemoryStorage):
    """The library's storage, swept in another way: its own starts a task that looks at all counters with every hit.

    Args:
        max_counters: None for no bound.
    """

    def __init__(self, max_counters: int | None) -> None:
        super().__init__()
        self._max_counters = max_counters
        self._sweep_at = self._next_sweep()

    def __len__(self) -> int:
        return len(self.expirations)

    async def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        """See `MemoryStorage.incr`; nothing in here waits."""
        await self.get(key)  # drops what has expired
        if key not in self.expirations:
            self._make_room()
            self.expirations[key] = time.time() + expiry
        self.storage[key] += amount
        return self.storage[key]

    async def wait_s(self, item: RateLimitItem, key: str, cost: int) -> float:
        """Seconds until a limit that is full has room for `cost` images, which is at most its amount.

        With p images in the previous window, which is in sight for another v seconds, c in this one, and w seconds a
        window, the strategy counts p v / w + c, and there is room once that is below r = amount - cost + 1.
        """
        w = item.get_expiry()
        previous, in_sight_s, current, lives_s = await self.get_sliding_window(key, w)
        room = item.amount - cost + 1
        if current < room:
            wait_s = in_sight_s - (room - current) * w / max(previous, 1)
        else:  # not before this window is the previous one
            wait_s = lives_s - w + w * (1 - room / current)
        return wait_s + _TICK_S

    def _make_room(self) -> None:
        """Drop counters where there are twice as many as after the last time, so that each hit pays for a few."""
        if len(self) < self._sweep_at:
            return
        now = time.time()
        self._drop([key for key, expires in self.expirations.items() if expires <= now])
        if self._max_counters is not None and len(self) >= self._max_counters:
            self._drop(list(islice(self.expirations, max(1, self._max_counters // 8))))
        self._sweep_at = self._next_sweep()

    def _next_sweep(self) -> int:
        doubled = max(_FIRST_SWEEP, 2 * len(self))
        return doubled if self._max_counters is None else min(doubled, self._max_counters)

    def _drop(self, keys: list[str]) -> None:
        for key in keys:
            self.storage.pop(key, None)
            self.expirations.pop(key, None)
