"""When to ask again, as pure functions."""

import math
from datetime import UTC
from email.utils import parsedate_to_datetime

# Not 500, which is a bug and stays one; not 504, after which the work has been done once for nothing already. 502 is a
# proxy's word for a service that is being restarted.
RETRIED_STATUSES = frozenset({429, 502, 503})
# Of them, those that say that nothing was done.
REFUSED_STATUSES = frozenset({429, 503})
_FIRST_BACKOFF_S = 0.25
_MOST_BACKOFF_S = 10.0
_MOST_DIGITS = 9


def backoff_s(attempt: int, share: float) -> float:
    """Exponential backoff with full jitter.

    Args:
        attempt: the one that failed, from 1.
        share: random, uniform in [0, 1).

    Returns:
        Seconds in [0, min(10, 0.25 * 2^(attempt - 1))).
    """
    return share * min(_MOST_BACKOFF_S, _FIRST_BACKOFF_S * 2.0 ** min(attempt - 1, 16))


def pause_s(attempt: int, share: float, retry_after_s: float | None) -> float:
    """How long to wait after an attempt: what the service asks for and the backoff, lest all come back at once."""
    return backoff_s(attempt, share) + (retry_after_s or 0.0)


def retry_after_s(header: str | None, now_s: float) -> float | None:
    """The header Retry-After in seconds from now, at least 0; None where it is absent or says nothing.

    Args:
        header: seconds, or an HTTP date (RFC 9110, 10.2.3).
        now_s: seconds since the epoch.
    """
    value = (header or "").strip()
    if value.isascii() and value.isdecimal():
        return float(value) if len(value) <= _MOST_DIGITS else math.inf
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    if date.tzinfo is None:  # "-0000", which an HTTP date never has
        date = date.replace(tzinfo=UTC)
    return max(0.0, date.timestamp() - now_s)
