"""Times of the catalogue: UTC, ISO 8601 with microseconds, so that their texts sort as the times do."""

from datetime import UTC, datetime


def now() -> datetime:
    """The present time, aware, in UTC."""
    return datetime.now(UTC)


def text_of(time: datetime) -> str:
    """A time as the catalogue writes it, such as 2026-11-21T17:30:00.123456+00:00.

    Raises:
        ValueError: it has no time zone.
    """
    if time.tzinfo is None:
        raise ValueError(f"{time} has no time zone")
    return time.astimezone(UTC).isoformat(timespec="microseconds")


def now_text() -> str:
    """The present time as text."""
    return text_of(now())


def parse_time(text: str) -> datetime:
    """The inverse of `text_of`; reads any ISO 8601 time with a zone.

    Raises:
        ValueError: it is none.
    """
    time = datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone")
    return time.astimezone(UTC)
