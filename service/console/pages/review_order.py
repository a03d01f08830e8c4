"""Going back in the review queue, which the API lists forwards only: ids sort by time, and any time makes one."""

from collections.abc import Awaitable, Callable

from service.wire_reviews import ReviewsAnswer

LOOK = 50
_TIME_DIGITS = 16
_FIRST_STEP_US = 60_000_000


async def item_before(id: str, listed: Callable[[str, int], Awaitable[ReviewsAnswer]]) -> str | None:
    """The id of the last item before another one; None where there is none.

    It looks back twice as far again and again until it has found one, and then halves what lies between until a look
    shows all of it: about as many calls as the distance in time has bits, and two where the queue is busy.

    Args:
        id: 32 hex digits, of which the first 16 are microseconds since 1970.
        listed: asks for the items after an id (empty for the first ones), and for how many.
    """
    at_us = int(id[:_TIME_DIGITS], 16)
    step_us, low_us = _FIRST_STEP_US, at_us
    earlier: list[str] = []
    while not earlier:
        if low_us <= 0:
            return None
        low_us = max(0, at_us - step_us)
        earlier, whole = await _earlier(id, low_us, listed)
        step_us *= 8
    high_us = at_us
    while not whole:
        middle_us = (low_us + high_us) // 2
        if middle_us == low_us:  # more of one microsecond than a look shows: from one to the next
            return await _last_from(earlier[-1], id, listed)
        found, whole_now = await _earlier(id, middle_us, listed)
        if found:
            low_us, earlier, whole = middle_us, found, whole_now
        else:
            high_us = middle_us
    return earlier[-1]


async def _earlier(
    id: str, after_us: int, listed: Callable[[str, int], Awaitable[ReviewsAnswer]]
) -> tuple[list[str], bool]:
    """Ids between a moment and an item, at most as many as a look shows, and whether these are all."""
    start = f"{after_us:0{_TIME_DIGITS}x}{'0' * _TIME_DIGITS}"
    page = await listed(start, LOOK)
    earlier = [review.id for review in page.reviews if review.id < id]
    return earlier, len(earlier) < len(page.reviews) or page.next is None


async def _last_from(start: str, id: str, listed: Callable[[str, int], Awaitable[ReviewsAnswer]]) -> str:
    """The last item before another one, going forwards from an earlier one."""
    last = start
    while True:
        page = await listed(last, LOOK)
        earlier = [review.id for review in page.reviews if review.id < id]
        if not earlier:
            return last
        last = earlier[-1]
