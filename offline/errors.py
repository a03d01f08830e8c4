"""Every exception that offline raises on purpose; none needs torch, so that the command line can name them quickly.

OfflineError
├── DataMissing   an archive is not where it is looked for
├── DataError     data has another layout than it should, or nothing in it can be read
├── PlanError     a plan has unknown or missing keys, or does not fit its data
└── RunError      a run directory belongs to another plan, or is damaged, or a run finds nothing that it can read
"""

from pathlib import Path

DATA_VARIABLE = "HARDLOOK_DATA"


class OfflineError(Exception):
    """Root of everything that offline raises on purpose."""


class DataMissing(OfflineError):
    """An archive is not where it is looked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(
            f"data file not found: {path} (set {DATA_VARIABLE} to the folder that holds train/ and bench/)"
        )


class DataError(OfflineError):
    """Data has another layout than it should, or nothing in it can be read."""

    def __init__(self, data: str, reason: str) -> None:
        self.data, self.reason = data, reason
        super().__init__(f"{data}: {reason}")


class PlanError(OfflineError):
    """A plan has unknown or missing keys, or does not fit its data."""


class RunError(OfflineError):
    """A run directory belongs to another plan, or is damaged, or a run finds nothing that it can read."""
