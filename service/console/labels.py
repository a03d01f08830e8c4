"""Counts by label, in words."""

from collections.abc import Mapping

_MOST = 12


def labels_in_words(counts: Mapping[str, int]) -> str:
    """How many there are of each label, as far as there are not too many labels to read, and in all.

    Args:
        counts: by label.
    """
    parts = [f"{label} {count}" for label, count in list(counts.items())[:_MOST]]
    more = [f"and {len(counts) - _MOST} more labels"] if len(counts) > _MOST else []
    return ", ".join([*parts, *more, f"{sum(counts.values())} in all"])
